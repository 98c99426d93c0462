"""Shows what the context of a trained agent is worth: prints a table, draws a picture.

    python experiments/report.py runs/NAME

The agent's own context is compared with two controls: no context at all, and the context of another
task. With a simulator the measure is the return by episode in the held-out tasks, and the table has
scores. Without a simulator it is the held-out loss, -log P of the targets, by steps of context. The
run's folder gets result.npz (`amount`, and an array for each context) and incontext.png.
"""

import dataclasses
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import dataset_path, has_score, require, run_command, write_atomically

LABELS = {"own": "own context", "hidden": "no context", "other": "context of another task"}
COLORS = {"own": "C0", "hidden": "C7", "other": "C3"}


def open_run(run, data="", device="cpu"):
    """The agent of a run, its dataset, and its training and held-out tasks (bool masks).

    `data` is the folder of the dataset, if it has moved. Raises BadInput if there is no dataset or
    another one than the agent was trained on.
    """
    agent = t2mir.load_agent(run, device)
    c = agent.config
    if not data and not dataset_path(c.data, c.env).exists():
        data = "data"  # the whole project may have moved; that it is the same dataset is checked
    if data:
        c = dataclasses.replace(c, data=data)
    arrays, train_tasks, held_out = t2mir.open_dataset(c)
    same = arrays["fingerprint"] == t2mir.read_checkpoint(run)["fingerprint"]
    require(same, f"{c.env} in {c.data} is not the dataset that {run} was trained on")
    return agent, arrays, train_tasks, held_out


def hidden_context(c, history, episode, t):
    """For `t2mir.evaluate`: the agent sees no step at all."""
    return t2mir.own_context(c, history, episode, t).part(0, 0)


def other_context(c, history, episode, t):
    """For `t2mir.evaluate`: the finished episodes that an agent sees are those of the task before."""
    mixed = {}
    for name, x in history.items():
        mixed[name] = x.roll(1, 0)
        mixed[name][:, episode] = x[:, episode]  # the running episode is the agent's own
    return t2mir.own_context(c, mixed, episode, t)


def returns_by_episode(model, data, tasks, contexts):
    """The returns of an agent that acts in `tasks`: episodes (n,), and (n, tasks) by context."""
    choose = {"own": t2mir.own_context, "hidden": hidden_context, "other": other_context}
    episodes = model.config.eval_episodes
    result = {}
    for name in contexts:
        history = t2mir.evaluate(model, data["tasks"][tasks], episodes, 1, choose[name])
        result[name] = history["rewards"].sum(-1).T.numpy()
    return np.arange(1, episodes + 1), result


def with_other_prompt(batch, finished):
    """The Batch with the first `finished` steps of each context from a sequence of another task."""
    parts = []
    for part in batch.context[:3]:  # states, actions, rewards; not the times
        part = part.clone()
        part[:, :finished] = part[:, :finished].roll(1, 0)
        parts.append(part)
    return batch._replace(context=t2mir.Steps(*parts, batch.context.times))


def losses_by_context(model, data, tasks, contexts, batches=60):
    """The held-out loss in `tasks` by amount of context: amounts (n,), and losses (n, 1) by context.

    In AD these are the finished episodes, in DPT up to eight groups of steps.
    """
    c = model.config
    device = model.state_statistics.device
    x = t2mir.to_tensors(data, tasks)
    size = min(c.batch, 2 * len(x["tasks"]))
    steps_per_episode = len(range(0, model.horizon, c.stride))
    seen = []
    losses = {name: [] for name in contexts}
    with t2mir.evaluation_mode(model), torch.random.fork_rng(devices=[]):
        for i in range(batches):
            torch.manual_seed(i)
            batch = t2mir.DRAW_BATCH[c.mode](c, x, i, size).to(device)
            finished = batch.context.rewards.shape[1]
            if c.mode == "ad":  # the last episode is the running one
                finished -= steps_per_episode
            shown = {
                "own": batch,
                "hidden": batch._replace(seen=torch.zeros_like(batch.seen)),
                "other": with_other_prompt(batch, finished),
            }
            amount = batch.seen
            if c.mode == "ad":
                of_running = (batch.query_times + c.stride - 1) // c.stride  # steps
                amount = (batch.seen - of_running) // steps_per_episode
            seen.append(amount.flatten())
            for name in contexts:
                outputs, _ = model.predict(shown[name])
                loss = model.policy.neg_log_prob(outputs, batch.targets)
                losses[name].append(loss.reshape(batch.seen.numel(), -1).mean(1))
    seen = torch.cat(seen).cpu().numpy()
    group = seen
    if c.mode == "dpt":
        edges = np.quantile(seen, np.linspace(0, 1, 9)[1:-1])
        group = np.searchsorted(edges, seen)
    groups = [group == g for g in np.unique(group)]
    result = {}
    for name in contexts:
        loss = torch.cat(losses[name]).cpu().numpy()
        result[name] = np.array([[loss[members].mean()] for members in groups])
    return np.array([seen[members].mean() for members in groups]), result


def draw(path, title, labels, amount, result, lines):
    """Draws each context's curve over the single tasks' curves; `lines`: name -> (height, style)."""
    fig = Figure(figsize=(5, 3.4), layout="tight")
    ax = fig.subplots()
    for name, y in result.items():  # (amounts, tasks)
        ax.plot(amount, y, color=COLORS[name], lw=0.5, alpha=0.2)
        ax.plot(amount, y.mean(1), "o-", color=COLORS[name], label=LABELS[name], ms=4)
    for name, (height, style) in lines.items():
        ax.axhline(height, color="k", ls=style, lw=1, label=name)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    title = title.encode(errors="replace").decode()  # a name may have a broken letter, or a $
    ax.set_title(title, parse_math=False)
    ax.legend(fontsize=7)
    write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))


def report(run, data="", device="auto"):
    """Writes result.npz and incontext.png into the folder `run`, and prints the table."""
    run = Path(run)
    require(not run.is_file(), f"{run} must be the folder of a run")
    saved = t2mir.read_checkpoint(run)
    step = saved["step"]
    steps = saved["config"]["steps"]
    if step < steps:
        print(f"{run} is not finished: this is the agent after {step} of {steps} steps")
    model, arrays, _, tasks = open_run(run, data, device)
    contexts = ["own", "hidden"]
    if tasks.sum() > 1:
        contexts.append("other")

    more = {}
    lines = {}
    if arrays["simulator"]:
        amount, result = returns_by_episode(model, arrays, tasks, contexts)
        labels = ("episode in context", "return in held-out tasks")
        title = labels[1]
        more = {name: arrays[name][tasks] for name in ("tasks", "random_return", "expert_return")}
        lines["expert"] = (more["expert_return"].mean(), "--")
        lines["random"] = (more["random_return"].mean(), ":")
    else:
        amount, result = losses_by_context(model, arrays, tasks, contexts)
        what = "steps of context"
        if model.config.mode == "ad":
            what = "finished episodes"
        labels = (what, "held-out loss, -log P of the actions (lower is better)")
        title = labels[1]
    write_atomically(
        run / "result.npz", lambda file: np.savez(file, amount=amount, step=step, **result, **more)
    )

    scored = np.zeros(0, bool)
    if arrays["simulator"]:
        scored = has_score(arrays["random_return"], arrays["expert_return"])[tasks]
    if scored.any():
        title = "mean score: 0 is a random agent, 1 the expert"
    print(title)
    print(f"{labels[0] + ':':25}" + "".join(f" {n:7.0f}" for n in amount))
    for name, y in result.items():
        row = y.mean(1)
        if scored.any():
            row = t2mir.scores(y.T, arrays, tasks)[scored].mean(0)
        print(f"{LABELS[name] + ':':25}" + "".join(f" {value:7.3f}" for value in row))
    if scored.any() and not scored.all():
        left_out = ", ".join(map(str, np.flatnonzero(tasks)[~scored]))
        print(f"no scores in tasks whose expert hardly gains over random actions: {left_out}")
    draw(run / "incontext.png", run.resolve().name, labels, amount, result, lines)
    print(f"picture: {run / 'incontext.png'}")
    if arrays["simulator"]:
        print(f"moving pictures: python experiments/watch.py {run}")


def main(run: tyro.conf.Positional[Path], data: str = "", device: str = "auto"):
    """Makes the report of a run. `data` is the folder of the dataset, if it has moved."""
    report(run, data, device)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

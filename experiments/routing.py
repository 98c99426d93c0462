"""Draws what the routers of a run's last T2MIR layer do on held-out tasks, as in the paper's Fig. 1.

    python experiments/routing.py RUN [--out FOLDER]

Contexts are single stored episodes, evenly spaced over each task's history. The picture, FOLDER/NAME-routing.png, has
t-SNE maps of the logits of the token-wise router (by modality) and of the task-wise router (by task, after a whole
episode), the share of each modality's choices that goes to each expert, and how soon the task-wise router settles: the
share of the experts chosen after a whole episode that are already chosen after each step. The last two are printed, and
with a simulator whether the task-wise router chooses in an agent's own episodes as it does in stored ones.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput, write_atomically  # noqa: E402
from experiments.fresh_tasks import open_run  # noqa: E402

EPISODES, POINTS = 10, 1500  # stored episodes of each task, and tokens in the map of the token-wise router


@torch.no_grad()
def route(model, states, actions, rewards):
    """The last T2MIR layer's Routing of both routers, which read n episodes: (n, T, obs_dim), (n, T, act_dim), (n, T).

    In DPT, S queries follow the 3 S tokens of the prompt: the states of the prompt, which see all of it.
    """
    stride = model.config.stride
    states, actions, rewards = (part[:, ::stride] for part in (states, actions, rewards))
    tokens = model.tokens(states, actions, rewards, torch.arange(0, model.horizon, stride))
    if model.config.mode == "dpt":
        prefix = torch.full(rewards.shape, tokens.shape[1])
        *_, routed = model.act(torch.cat([tokens, model.state_tokens(states, model.horizon)], dim=1), prefix)
    else:
        *_, routed = model.act(tokens)
    return routed[-1]["token"], routed[-1]["task"]


def chosen(routing):
    """1 / k for each chosen expert of each token, else 0: the shape of routing.logits."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.chosen, 1 / routing.chosen.shape[-1])


def compare_contexts(model, tasks, stored, last):
    """Prints how many of the task-wise router's experts two contexts of a task have in common, on average.

    `stored` (n, N, E) are the choices after n stored episodes of each task; the token `last` ends an episode.
    """
    memory = []
    t2mir.evaluate(model, tasks, EPISODES, seed=1, memory=memory)
    own = torch.stack([chosen(route(model, *episode)[1])[:, last] for episode in memory])

    def common(a, b):
        return torch.minimum(a[:, None], b[None]).sum(-1).mean(2)  # of all pairs of contexts

    pairs = ~torch.eye(len(stored), dtype=torch.bool)
    print("share of the task-wise MoE's experts that two contexts have in common")
    print(f"two stored episodes of a task          {common(stored, stored)[pairs].mean():5.0%}")
    print(f"an agent's own and a stored one        {common(own, stored).mean():5.0%}")
    print(f"stored ones of two tasks               {common(stored, stored.roll(1, 1)).mean():5.0%}")


def tsne(points, perplexity):
    """t-SNE map (n, 2) of points (n, E). The perplexity must be below n."""
    return TSNE(random_state=0, perplexity=min(perplexity, (len(points) - 1) / 3)).fit_transform(points.numpy())


def main(run: tyro.conf.Positional[Path], out: Path = Path("figures")):
    model, data, _, held_out = open_run(run)
    c = model.config
    if not (c.token_moe and c.task_moe):
        raise BadInput(f"{run} lacks an MoE: both routers are drawn")
    if held_out.sum() < 3:
        raise BadInput(f"{run} has {held_out.sum()} held-out tasks: a map of tasks needs at least 3")
    E = data["rewards"].shape[1]
    at = np.linspace(0, E - 1, min(EPISODES, E)).astype(int)
    stored = (torch.as_tensor(data[k][held_out][:, at]).flatten(0, 1) for k in ("states", "actions", "rewards"))
    token, task = route(model, *stored)
    n, S = len(token.logits), len(range(0, model.horizon, c.stride))
    names = ["state", "action", "reward", "query"][: 4 if c.mode == "dpt" else 3]
    modality = torch.cat([torch.arange(3).repeat(S), torch.full((token.logits.shape[1] - 3 * S,), 3)])  # of each token
    shares = torch.stack([chosen(token)[:, modality == i].mean((0, 1)) for i in range(len(names))])  # (modalities, E)
    final = chosen(task)[:, 3 * S - 1 : 3 * S] > 0  # (n, 1, E)
    agreement = (chosen(task)[:, 2 : 3 * S : 3] * final).sum(2)  # (n, S), after each step

    fig = Figure(figsize=(17, 3.8))
    tokens, bars, tasks, settling = fig.subplots(1, 4)
    pick = torch.as_tensor(np.random.default_rng(0).permutation(token.logits[..., 0].numel())[:POINTS])
    points, of_point = tsne(token.logits.flatten(0, 1)[pick], 30), modality.repeat(n)[pick]
    for i, name in enumerate(names):
        tokens.scatter(*points[of_point == i].T, s=4, label=name)
    tokens.legend(markerscale=3, fontsize=7)
    tokens.set(title="token-wise router, t-SNE of its logits", xticks=[], yticks=[])

    bars.imshow(shares, vmin=0, vmax=1 / c.top_k, cmap="Blues", aspect="auto")
    print("share of each modality's choices that goes to each expert of the token-wise MoE")
    for i, name in enumerate(names):
        print(f"{name:8}" + " ".join(f"{share:5.0%}" for share in shares[i]))
        for j, share in enumerate(shares[i]):
            bars.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8)
    bars.set(title="share of the modality's choices", xlabel="expert", yticks=range(len(names)), yticklabels=names)

    value, label, colors = np.arange(held_out.sum()), "task", dict(cmap="viridis")
    if c.env == "point_robot":
        x, y = data["tasks"][held_out].T
        value, label, colors = np.arctan2(y, x), "direction of the goal", dict(cmap="hsv", vmin=-np.pi, vmax=np.pi)
    elif c.env == "cheetah_vel":
        value, label = data["tasks"][held_out, 0], "target velocity"
    elif "expert_return" in data:
        value, label = data["expert_return"][held_out], "expert's return"
    points = tsne(task.logits[:, 3 * S - 1], 20)
    fig.colorbar(tasks.scatter(*points.T, c=value.repeat(n // len(value)), s=10, **colors), ax=tasks, label=label)
    tasks.set(title="task-wise router, t-SNE after an episode", xticks=[], yticks=[])

    steps, mean = np.arange(1, model.horizon + 1, c.stride), agreement.mean(0)
    error = agreement.std(0) / n**0.5
    settling.plot(steps, mean)
    settling.fill_between(steps, mean - error, mean + error, alpha=0.2, lw=0)
    settling.set(xlabel="steps of the task seen", ylabel="share of the final experts", title="the task router settles")
    print("share of the task-wise MoE's final experts that are chosen after a number of steps")
    some = np.unique(np.linspace(0, S - 1, 8).astype(int))
    print("steps   " + " ".join(f"{steps[i]:5}" for i in some))
    print("share   " + " ".join(f"{mean[i]:5.0%}" for i in some))
    if data["simulator"]:
        after = chosen(task)[:, 3 * S - 1].unflatten(0, (held_out.sum(), -1)).transpose(0, 1)  # (episodes, tasks, E)
        compare_contexts(model, data["tasks"][held_out], after, 3 * S - 1)
    fig.tight_layout()
    path = out / f"{run.stem if run.suffix == '.pt' else run.resolve().name}-routing.png"
    write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))
    print(f"picture: {path}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

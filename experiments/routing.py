"""Draws what the routers of a run's last T2MIR layer do in held-out tasks, as the paper's Fig. 1.

    python experiments/routing.py RUN

Contexts are single stored episodes, evenly spaced over each task's history, and the queries behind
them are their states. The picture, FOLDER/NAME-routing.png, has four panels: a t-SNE map of the
logits of the token-wise router, coloured by modality; the share of each modality's choices that
goes to each expert; a map of the logits of the task-wise router after a whole episode, coloured by
task; and how soon the task-wise router settles, which is the share of its experts after the whole
episode that are already chosen after each step. The second and the fourth are printed too, and with
a simulator whether the task-wise router chooses alike in an agent's own episodes and in stored
ones.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command, write_atomically
from experiments.report import open_run

EPISODES = 10  # stored ones of each task, and own ones
POINTS = 1500  # tokens in the map of the token-wise router
MODALITIES = ("state", "action", "reward", "query")


@torch.no_grad()
def route(model, x):
    """The Routings of both routers, which read n episodes: arrays of x are (n, T, ...).

    The tokens are those of the S steps, s a r s a r ..., and then S queries, the same states. In
    DPT the queries see the whole episode, in AD the steps before them.
    """
    n, T = x["rewards"].shape
    stride = model.config.stride
    one_episode = {name: array[:, None] for name, array in x.items()}
    tasks = torch.arange(n)[:, None]
    context = t2mir.gather_steps(one_episode, tasks, torch.zeros_like(tasks), stride)
    S = context.rewards.shape[1]
    seen = torch.full((n, S), S)
    times = torch.full((n, S), T)
    if model.config.mode == "ad":
        seen = torch.arange(S).expand(n, S)
        times = context.times.expand(n, S)
    batch = t2mir.Batch(
        context=context,
        queries=context.states,
        query_times=times,
        seen=seen,
        targets=context.actions,  # nothing reads them
        task_ids=tasks[:, 0],
    )
    _, routings = model.predict(batch)
    return routings[-2], routings[-1]  # of the token-wise and the task-wise MoE


def choices(routing):
    """1 / k for each chosen expert of each token, else 0: (n, L, experts)."""
    share = torch.full_like(routing.gates, 1 / routing.chosen.shape[-1])
    return torch.zeros_like(routing.logits).scatter(-1, routing.chosen, share)


def arrays_of_episodes(history):
    """Episodes (N, E, T, ...) of a dataset or an agent as tensors of n = N E of them, (n, T, ...)."""
    names = ("states", "actions", "rewards")
    return {name: torch.as_tensor(history[name]).flatten(0, 1) for name in names}


def tsne(points, perplexity):
    """A t-SNE map, (n, 2), of points (n, dim)."""
    perplexity = min(perplexity, (len(points) - 1) / 3)  # must be below n
    return TSNE(random_state=0, perplexity=perplexity).fit_transform(points.numpy())


# ---- Panels --------------------------------------------------------------------------------------


def draw_tokens(ax, token, modality):
    """A map of tokens by the logits of the token-wise router; `modality` (L,) of each token."""
    n, L, _ = token.logits.shape
    pick = np.random.default_rng(0).permutation(n * L)[:POINTS]
    points = tsne(token.logits.flatten(0, 1)[pick], 30)
    of_point = modality.repeat(n)[pick]
    for i, name in enumerate(MODALITIES):
        ax.scatter(*points[of_point == i].T, s=4, label=name)
    ax.legend(markerscale=3, fontsize=7)
    ax.set(title="token-wise router, t-SNE of its logits", xticks=[], yticks=[])


def draw_shares(ax, token, modality):
    """The share of each modality's choices that goes to each expert."""
    chosen = choices(token)
    print("share of each modality's choices that goes to each expert of the token-wise MoE")
    shares = []
    for i, name in enumerate(MODALITIES):
        share = chosen[:, modality == i].mean((0, 1))
        shares.append(share)
        print(f"{name:8}" + " ".join(f"{x:5.0%}" for x in share))
        for j, x in enumerate(share):
            ax.text(j, i, f"{x:.0%}", ha="center", va="center", fontsize=8)
    ax.imshow(torch.stack(shares).numpy(), vmin=0, vmax=0.5, cmap="Blues", aspect="auto")
    ax.set_yticks(range(len(MODALITIES)), MODALITIES)
    ax.set(title="share of the modality's choices", xlabel="expert")


def draw_tasks(ax, logits, env, data, held_out):
    """A map of episodes (n,) by the logits (n, experts) of the task-wise router after them."""
    value = np.flatnonzero(held_out)  # what the colour of a task shows
    label = "task"
    colors = {"cmap": "viridis"}
    if env == "point_robot" and data["simulator"]:
        x, y = data["tasks"][held_out].T
        value = np.arctan2(y, x)
        label = "direction of the goal"
        colors = {"cmap": "hsv", "vmin": -np.pi, "vmax": np.pi}
    elif env == "cheetah_vel" and data["simulator"]:
        value = data["tasks"][held_out, 0]
        label = "target velocity"
    elif data["simulator"]:
        value = data["expert_return"][held_out]
        label = "expert's return"
    points = tsne(logits, 20)
    value = value.repeat(len(logits) // len(value))
    drawn = ax.scatter(*points.T, c=value, s=10, **colors)
    ax.figure.colorbar(drawn, ax=ax, label=label)
    ax.set(title="task-wise router, t-SNE after an episode", xticks=[], yticks=[])


def draw_settling(ax, chosen, times):
    """The share of the final experts that are chosen after each step: chosen (n, S, experts)."""
    final = chosen[:, -1:] > 0
    agreement = (chosen * final).sum(2)  # (n, S)
    mean = agreement.mean(0)
    error = agreement.std(0) / len(agreement) ** 0.5
    ax.plot(times, mean)
    ax.fill_between(times, mean - error, mean + error, alpha=0.2, lw=0)
    ax.set(title="the task router settles", xlabel="steps of the task seen")
    ax.set_ylabel("share of the final experts")
    print("share of the task-wise MoE's final experts that are chosen after a number of steps")
    some = np.unique(np.linspace(0, len(times) - 1, 8).astype(int))
    print("steps   " + " ".join(f"{times[i]:5}" for i in some))
    print("share   " + " ".join(f"{mean[i]:5.0%}" for i in some))


def compare_contexts(own, stored):
    """Prints the share of experts that two contexts of one task have in common.

    `own` and `stored` (N, episodes, experts) are the choices of the task-wise router after an
    agent's own episodes and after stored ones.
    """

    def common(a, b):
        return torch.minimum(a[:, :, None], b[:, None]).sum(-1)  # (N, episodes, episodes)

    others = ~torch.eye(stored.shape[1], dtype=torch.bool)
    print("share of the task-wise MoE's experts that two contexts have in common")
    print(f"two stored episodes of a task   {common(stored, stored)[:, others].mean():5.0%}")
    print(f"an agent's own and a stored one {common(own, stored).mean():5.0%}")
    print(f"stored ones of two tasks        {common(stored, stored.roll(1, 0)).mean():5.0%}")


def main(run: tyro.conf.Positional[Path], out: Path = Path("figures")):
    """Draws and prints.

    Args:
        run: folder of a run
        out: folder of the picture
    """
    model, data, _, held_out = open_run(run)
    c = model.config
    N = int(held_out.sum())
    require(c.token_moe and c.task_moe, f"{run} lacks an MoE: both routers are drawn")
    require(N >= 3, f"{run} has {N} held-out tasks: a map of tasks needs at least 3")
    E = data["rewards"].shape[1]
    at = np.linspace(0, E - 1, min(EPISODES, E)).astype(int)
    stored = {name: data[name][held_out][:, at] for name in ("states", "actions", "rewards")}
    token, task = route(model, arrays_of_episodes(stored))
    times = np.arange(0, model.horizon, c.stride) + 1
    S = len(times)
    modality = torch.cat([torch.arange(3).repeat(S), torch.full((S,), 3)])  # of each token
    chosen = choices(task)[:, 2 : 3 * S : 3]  # after each step, (N * episodes, S, experts)

    fig = Figure(figsize=(17, 3.8))
    axes = fig.subplots(1, 4)
    draw_tokens(axes[0], token, modality)
    draw_shares(axes[1], token, modality)
    draw_tasks(axes[2], task.logits[:, 3 * S - 1], c.env, data, held_out)
    draw_settling(axes[3], chosen, times)
    if data["simulator"]:
        history = t2mir.evaluate(model, data["tasks"][held_out], EPISODES, seed=1)
        _, of_own = route(model, arrays_of_episodes(history))
        own = choices(of_own)[:, 3 * S - 1]
        compare_contexts(own.unflatten(0, (N, -1)), chosen[:, -1].unflatten(0, (N, -1)))

    fig.tight_layout()
    name = run.resolve().name.removesuffix(".pt")
    path = out / f"{name}-routing.png"
    write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

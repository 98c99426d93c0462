"""Draws what the routers of a run's last T2MIR layer do in held-out tasks, as the paper's Fig. 1.

    python experiments/routing.py RUN

Contexts are single stored episodes, evenly spaced over each task's history, and the queries behind
them are their states. The picture, FOLDER/NAME-routing.png, has four panels: a t-SNE map of the
logits of the token-wise router, coloured by modality; the share of each modality's choices that
goes to each expert; a map of the logits of the task-wise router after a whole episode, coloured by
task; and how soon the task-wise router settles, which is the share of its experts after the whole
episode that are already chosen after each step. The second and the fourth are printed too. With a
simulator it is also printed whether the task-wise router chooses alike in an agent's own episodes
and in stored ones, and whether it chooses alike in tasks that are alike: the rank correlation, over
all pairs of held-out tasks, of the distance of the tasks and the distance of their experts. The
same is printed for the agent before its training.
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
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command, write_atomically
from experiments.compare import append, commit
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
    """The share of each modality's choices that goes to each expert, (modalities, experts)."""
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
    return torch.stack(shares)


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
    ax.axhline(final.double().mean(), color="k", ls=":", lw=1, label="by chance")
    ax.legend(fontsize=8)
    ax.set(title="the task-wise router settles", xlabel="steps of the task seen", ylim=(0, 1.03))
    ax.set_ylabel("share of the final experts")
    print("share of the task-wise MoE's final experts that are chosen after a number of steps")
    some = np.unique(np.linspace(0, len(times) - 1, 8).astype(int))
    print("steps   " + " ".join(f"{times[i]:5}" for i in some))
    print("share   " + " ".join(f"{mean[i]:5.0%}" for i in some))


def compare_contexts(own, stored):
    """Prints the shares of experts that two contexts have in common, and returns them as a dict.

    `own` and `stored` (N, episodes, experts) are the choices of the task-wise router after an
    agent's own episodes and after stored ones.
    """

    def common(a, b):
        return torch.minimum(a[:, :, None], b[:, None]).sum(-1)  # (N, episodes, episodes)

    others = ~torch.eye(stored.shape[1], dtype=torch.bool)
    print("share of the task-wise MoE's experts that two contexts have in common")
    shares = {
        "two stored episodes of a task": common(stored, stored)[:, others].mean().item(),
        "an agent's own and a stored one": common(own, stored).mean().item(),
        "stored ones of two tasks": common(stored, stored.roll(1, 0)).mean().item(),
    }
    for name, share in shares.items():
        print(f"{name:31} {share:5.0%}")
    return shares


def correlation(tasks, chosen):
    """Spearman's correlation of the distances of tasks and of their experts, over pairs of tasks.

    tasks (N, task_dim), and the choices after episodes in them, (N, episodes, experts). The first
    distance is Euclidean, the second one half of the sum of absolute differences between the tasks'
    mean choices, which is 0 for the same experts and 1 for others.
    """
    between_experts = pdist(chosen.mean(1).numpy(), "cityblock") / 2
    return spearmanr(pdist(tasks), between_experts).statistic


def before_training(model, data, train_tasks):
    """The agent as it was before the first step of its training."""
    torch.manual_seed(model.config.seed)
    return t2mir.new_model(model.config, data, train_tasks).eval()


def main(run: tyro.conf.Positional[Path], out: Path = Path("figures"), csv: Path | None = None):
    """Draws and prints.

    Args:
        run: folder of a run
        out: folder of the picture
        csv: file to which a row with what is printed is added
    """
    model, data, train_tasks, held_out = open_run(run)
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

    fig = Figure(figsize=(9.6, 7.4), layout="tight")
    axes = fig.subplots(2, 2).flat
    draw_tokens(axes[0], token, modality)
    shares = draw_shares(axes[1], token, modality)
    draw_tasks(axes[2], task.logits[:, 3 * S - 1], c.env, data, held_out)
    draw_settling(axes[3], chosen, times)
    if data["simulator"]:
        history = t2mir.evaluate(model, data["tasks"][held_out], EPISODES, seed=1)
        _, of_own = route(model, arrays_of_episodes(history))
        own = choices(of_own)[:, 3 * S - 1]
        of_tasks = chosen[:, -1].unflatten(0, (N, -1))
        row = {"env": c.env, "mode": c.mode, "layers": len(c.moe_layers), "seed": c.seed}
        row["actions and rewards"] = torch.minimum(shares[1], shares[2]).sum().item()
        row |= compare_contexts(own.unflatten(0, (N, -1)), of_tasks)
        _, task = route(before_training(model, data, train_tasks), arrays_of_episodes(stored))
        untrained = choices(task)[:, 3 * S - 1].unflatten(0, (N, -1))
        tasks = data["tasks"][held_out]
        print("rank correlation of the distance of tasks and the distance of their experts")
        row["correlation"] = correlation(tasks, of_tasks)
        row["correlation, untrained"] = correlation(tasks, untrained)
        print(f"trained   {row['correlation']:5.2f}")
        print(f"untrained {row['correlation, untrained']:5.2f}")
        if csv is not None:
            append(csv, row | {"commit": commit()})

    name = run.resolve().name.removesuffix(".pt")
    path = out / f"{name}-routing.png"
    write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

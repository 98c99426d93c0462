"""Does T2MIR pay where tasks conflict? Point-Robots whose controls differ by task.

    python experiments/dial.py --family turned180 --mode dpt
    python experiments/dial.py --draw

In each task of these families the robot's movement is a matrix times its action, and neither the
matrix nor the goal is observed. In `turnedX` the matrix turns the action by an angle from -X to X
degrees. Two tasks with goals on opposite sides call for opposite actions in all of these families.
With a large X, even two tasks with the same goal can need opposite actions. The agent then has to
look at how the robot moved, and not only at which actions were taken. In `mixed` a quarter of the
tasks each is plain, turned by any angle, mirrored, and scaled to between 0.3 and 1 of its size.

The first command collects data (`--train-tasks` 200 or 1,000) and trains T2MIR and its dense
baseline with each of the seeds and the default settings of Point-Robot, AD with `--steps 3000 --lr
8e-3`. It measures them in fresh tasks, and adds a row for each run to a table. The second command
draws T2MIR minus dense against the dial.

With --gradients, a run logs at ten points of its training how alike the gradients of four groups of
training tasks are: the mean cosine of different groups. A group has a quarter of the angles, or in
`mixed` the tasks of one kind. In `turned0` the groups are arbitrary. When training has converged,
the gradients of any four groups sum to about zero, and then the mean cosine is about -1/3.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import collect, dataset_path, require, run_command
from envs import ENVS, PointRobot
from experiments.compare import FEW_SEEDS, append, commit, interval
from experiments.figures import save
from experiments.gradients import cosines
from experiments.stairs import AGENTS, act, of_episode, percent, read, trained

ANGLES = (0, 45, 90, 180)  # degrees
BATCHES = 5  # of a gradient


class Controls(PointRobot):
    """A Point-Robot whose controls are part of the task.

    A task is the goal's position (x, y), and the 2 x 2 matrix by which actions are multiplied.
    """

    task_dim = 6

    def advance(self, actions):
        matrices = self.tasks[:, 2:].reshape(-1, 2, 2)
        self.state = self.state + 0.1 * np.einsum("nij,nj->ni", matrices, actions)
        return -np.linalg.norm(self.state - self.tasks[:, :2], axis=1)


def rotations(angles):
    """Matrices that turn by `angles` (N,) in radians, (N, 2, 2)."""
    cos = np.cos(angles)
    sin = np.sin(angles)
    return np.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)


def turned(largest):
    """The family whose controls are turned by up to `largest` degrees."""

    class Turned(Controls):
        id = f"t2mir/Turned{largest}-v0"

        @staticmethod
        def draw_tasks(rng, num_tasks):
            drawn = rng.uniform(-1, 1, (num_tasks, 3))  # row by row, as every family draws
            matrices = rotations(drawn[:, 2] * np.radians(largest))
            return np.hstack([drawn[:, :2], matrices.reshape(-1, 4)])

    return Turned


class Mixed(Controls):
    """Plain, turned, mirrored and scaled controls, a quarter of the tasks each."""

    id = "t2mir/MixedControls-v0"

    @staticmethod
    def draw_tasks(rng, num_tasks):
        goals = []
        matrices = []
        for _ in range(num_tasks):
            goals.append(rng.uniform(-1, 1, 2))
            kind = rng.integers(4)
            amount = rng.uniform()
            matrix = np.eye(2)
            if kind == 1:
                matrix = rotations(np.array([2 * np.pi * amount]))[0]
            elif kind == 2:
                matrix = np.diag([-1.0, 1.0])
            elif kind == 3:
                matrix = np.eye(2) * (0.3 + 0.7 * amount)
            matrices.append(matrix.flatten())
        return np.hstack([goals, matrices])


FAMILIES = {f"turned{angle}": turned(angle) for angle in ANGLES} | {"mixed": Mixed}
IN_WORDS = {f"turned{angle}": f"up to ±{angle}°" for angle in ANGLES} | {"mixed": "mixed"}


def groups(family, data):
    """Four groups of training tasks whose controls are alike: masks (N,)."""
    matrices = data["tasks"][:, 2:].reshape(-1, 2, 2)
    train = np.flatnonzero(~data["test"])
    if family == "mixed":
        determinant = np.linalg.det(matrices[train])
        plain = (matrices[train] == np.eye(2)).all((1, 2))
        mirrored = determinant < 0
        scaled = (determinant < 1 - 1e-9) & ~mirrored
        parts = [train[plain], train[mirrored], train[scaled]]
        parts.append(train[~plain & ~mirrored & ~scaled])
    else:
        angle = np.arctan2(matrices[train, 1, 0], matrices[train, 0, 0])
        parts = np.array_split(train[angle.argsort()], 4)
    masks = np.zeros((4, len(matrices)), bool)
    for mask, part in zip(masks, parts):
        mask[part] = True
    return masks


def with_cosines(measure):
    """`t2mir.measure`, with the mean cosine between the gradients of different groups added."""

    def measure_both(model, data, tasks, x):
        numbers = measure(model, data, tasks, x)
        similarity = cosines(model.eval(), data, groups(model.config.env, data), BATCHES).cpu()
        others = ~torch.eye(4, dtype=torch.bool)
        return numbers | {"cosine": similarity[others].mean().item()}

    return measure_both


def measure(c, table, seeds, fresh_tasks, gradients):
    """Trains and measures what the table does not have."""
    for seed in seeds:
        for agent, fields in AGENTS.items():
            key = {"family": c.env, "mode": c.mode, "data": Path(c.data).name, "agent": agent}
            key |= {"seed": str(seed), "steps": str(c.steps), "count": str(fresh_tasks)}
            key["gradients"] = str(gradients)
            if any(key.items() <= row.items() for row in read(table)):
                continue
            name = f"dial/{key['data']}/{c.env}-{c.mode}-{c.steps}-{agent}-seed{seed}"
            if gradients:
                name += "-gradients"
            run = trained(dataclasses.replace(c, **fields, name=name, seed=seed))
            heldout, score, dataset = act(run, {}, fresh_tasks)
            cells = {"lr": c.lr, "heldout": " ".join(f"{loss:.4f}" for loss in heldout)}
            cells["mean"] = percent(score.mean(0))
            cells["episode_1"] = percent(score[:, 0])
            cells["after_1"] = percent(score[:, 1:].mean(1))
            log = t2mir.read_checkpoint(run)["log"]
            cells["logged_at"] = " ".join(str(row["step"]) for row in log)
            cells["cosine"] = " ".join(f"{row.get('cosine', math.nan):.3f}" for row in log)
            loss = np.mean(heldout)
            print(f"{name}: held-out {loss:.4f}, percent by episode {cells['mean']}", flush=True)
            append(table, key | cells | {"dataset": dataset, "commit": commit()})


# ---- Picture -------------------------------------------------------------------------------------


def differences(table):
    """T2MIR minus dense: a dict (mode, data) -> family -> quantity -> mean and interval.

    Raises BadInput if the runs of a family differ in more than agent and seed.
    """
    runs = {}
    settings = {}
    for row in read(table):
        runs[row["mode"], row["data"], row["family"], row["agent"], row["seed"]] = row
        same = [row[name] for name in ("steps", "count", "dataset", "lr")]
        first = settings.setdefault((row["mode"], row["data"], row["family"]), same)
        advice = "name another --table"
        require(same == first, f"{table}: runs of {row['family']} have other settings: {advice}")
    found = {}
    for mode, data in sorted({key[:2] for key in runs}):
        of_families = found.setdefault((mode, data), {})
        for family in FAMILIES:
            seeds = [key[4] for key in runs if key[:4] == (mode, data, family, "dense")]
            pairs = []
            for seed in seeds:
                pair = [runs.get((mode, data, family, agent, seed)) for agent in AGENTS]
                if None not in pair:
                    pairs.append(pair)
            if pairs:
                of_families[family] = {
                    "after_1": interval(np.mean, gaps(pairs, "after_1")),
                    "episode_1": interval(np.mean, gaps(pairs, "episode_1")),
                    "heldout": interval(np.mean, gaps(pairs, "heldout")),
                    "pairs": len(pairs),
                }
    require(any(found.values()), f"{table} has no pair of runs with the same seed")
    return found


def gaps(pairs, column):
    """First minus second of pairs of rows, (seeds, tasks)."""
    if column == "heldout":
        losses = [[row[column].split() for row in pair] for pair in pairs]
        first, second = np.moveaxis(np.array(losses, float), 1, 0)
        return first - second
    return np.stack(
        [of_episode(first, column) - of_episode(second, column) for first, second in pairs]
    )


def markdown(found):
    """The table: a line for each mode, number of tasks and family."""
    titles = ("mode", "data", "family", "pairs", "episode 1", "episodes 2 to last", "held-out loss")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (mode, data), of_families in found.items():
        for family, of_family in of_families.items():
            cells = [mode, data, family, str(of_family["pairs"])]
            for column in ("episode_1", "after_1", "heldout"):
                cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*of_family[column]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found):
    """T2MIR minus dense against the dial: the score above, the held-out loss below."""
    fig = Figure(figsize=(7, 6), layout="tight")
    above, below = fig.subplots(2, 1, sharex=True)
    titles = {"after_1": "score in fresh tasks,\nepisodes 2 to last", "heldout": "held-out loss"}
    names = list(FAMILIES)
    for i, ((mode, data), of_families) in enumerate(found.items()):
        x = np.array([names.index(family) for family in of_families]) + 0.08 * i
        for ax, (column, title) in zip((above, below), titles.items()):
            values = [of_family[column] for of_family in of_families.values()]
            mean, low, high = np.array(values).T
            label = f"{mode.upper()}, {data.removeprefix('data')} tasks"
            ax.errorbar(x, mean, [mean - low, high - mean], fmt="o", ms=4, lw=1, label=label)
            ax.set_ylabel(f"T2MIR minus dense:\n{title}", fontsize=8)
    below.set_xticks(range(len(names)), IN_WORDS.values())
    below.set_xlabel("angle by which the controls are turned")
    for ax in (above, below):
        ax.axhline(0, color="k", lw=1)
    above.legend(fontsize=8, loc="lower left")
    return fig


def picture_of_cosines(rows):
    """The mean cosine between gradients of different groups while training, by family."""
    logged = [row for row in rows if "nan" not in row["cosine"]]
    names = [name for name in FAMILIES if any(row["family"] == name for row in logged)]
    fig = Figure(figsize=(1 + 2.4 * len(names), 2.8), layout="tight")
    axes = fig.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names):
        for row in logged:
            if row["family"] == name:
                style = {"t2mir": "C0-", "dense": "C1--"}[row["agent"]]
                steps = np.array(row["logged_at"].split(), int)
                ax.plot(steps, np.array(row["cosine"].split(), float), style, lw=1)
        ax.axhline(0, color="k", lw=0.5)
        ax.axhline(-1 / 3, color="k", ls=":", lw=0.8)
        ax.set_title(IN_WORDS[name], fontsize=9)
        ax.set_xlabel("training step", fontsize=8)
    axes[0].set_ylabel("mean cosine of\ndifferent groups", fontsize=8)
    axes[0].plot([], [], "C0-", label="T2MIR")
    axes[0].plot([], [], "C1--", label="dense")
    axes[0].plot([], [], "k:", label="sum to zero")
    axes[0].legend(fontsize=7)
    return fig


def main(
    family: tuple[str, ...] = tuple(FAMILIES),
    mode: Literal["dpt", "ad"] = "dpt",
    train_tasks: int = 200,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    fresh_tasks: int = 200,
    runs: str = "runs",
    table: Path = Path("figures/dial.csv"),
    gradients: bool = False,
    draw: bool = False,
):
    """Collects, trains and measures; or draws.

    Args:
        family: which families
        mode: ad or dpt
        train_tasks: training tasks; the datasets are in the folder data200, data1000, ...
        seeds: seeds of the training
        fresh_tasks: number of fresh tasks in which the agents act
        runs: folder of the runs
        table: CSV file, to which rows are added
        gradients: log the cosines of gradients
        draw: draw the picture, instead of training
    """
    ENVS.update(FAMILIES)
    require(fresh_tasks > 1, "--fresh-tasks must be at least 2, because an interval needs two")
    if draw:
        found = differences(table)
        print("T2MIR minus dense")
        print(markdown(found))
        if any(
            of_family["pairs"] < 3 for families in found.values() for of_family in families.values()
        ):
            print(FEW_SEEDS)
        save(picture(found), table.parent / "dial.png")
        if any("nan" not in row["cosine"] for row in read(table)):
            save(picture_of_cosines(read(table)), table.parent / "dial-gradients.png")
        return
    if gradients:
        t2mir.measure = with_cosines(t2mir.measure)
    for name in family:
        require(name in FAMILIES, f"no family {name!r}: there are {', '.join(FAMILIES)}")
        given = {}
        if mode == "ad":
            given = {"steps": 3_000, "lr": 8e-3, "eval_episodes": 30}
        c = t2mir.preset(name, mode, data=f"data{train_tasks}", runs=runs, **given)
        c.eval_every = c.steps
        if gradients:
            c.eval_every = max(1, c.steps // 10)
        if not dataset_path(c.data, name).exists():
            collect(name, out=c.data, train_tasks=train_tasks, test_tasks=50)
        measure(c, table, seeds, fresh_tasks, gradients)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

"""Writes a part of a dataset. The test tasks stay the same.

    python experiments/subset.py data/point_robot.npz --out data45 --train-tasks 45
    python experiments/subset.py data/point_robot.npz --out data_early --episodes early

The early half of each learning history is data of low quality, and the late half is data of high
quality. The mixed half is the control for both: as many episodes, from the whole history.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import expand, load, require, run_command, write_atomically

OF_TASKS = ("test", "tasks", "random_return", "expert_return")  # first axis: tasks
OF_STEPS = ("states", "actions", "rewards", "expert_actions", "learner_actions")  # tasks, episodes


def main(
    dataset: tyro.conf.Positional[Path],
    out: Path,
    train_tasks: int | None = None,
    episodes: Literal["all", "early", "late", "mixed"] = "all",
):
    """Writes OUT/NAME.npz, where NAME is the dataset's name, and prints what it holds.

    Args:
        dataset: a dataset as `collect.py` writes it
        out: folder of the new dataset
        train_tasks: keep the first so many training tasks, or all
        episodes: all, a half of each history, or four episodes of every eight (mixed)
    """
    data = load(dataset)
    path = Path(expand(out)) / f"{dataset.name.removesuffix('.npz')}.npz"
    training = np.flatnonzero(~data["test"])
    if train_tasks is None:
        train_tasks = len(training)
    enough = 1 <= train_tasks <= len(training)
    require(enough, f"--train-tasks must be from 1 to {len(training)}")
    require(not path.exists(), f"{path} exists: name another folder")
    test = np.flatnonzero(data["test"])
    tasks = np.sort(np.concatenate([training[:train_tasks], test]))

    E = data["rewards"].shape[1]
    every = np.arange(E)
    halves = {
        "all": every,
        "early": every[: E // 2],
        "late": every[E // 2 :],
        "mixed": every[every % 8 < 4],
    }
    kept = halves[episodes]
    require(len(kept) > 0, f"--episodes {episodes}: {dataset} has too few episodes")

    arrays = {}
    for name, x in data.items():
        if name in OF_TASKS:
            arrays[name] = x[tasks]
        elif name in OF_STEPS:
            arrays[name] = x[tasks][:, kept]
        elif name == "guest":
            arrays[name] = x[kept]
    write_atomically(path, lambda file: np.savez(file, **arrays))
    mean_return = arrays["rewards"].sum(-1).mean()
    print(f"{path}: {train_tasks} training and {len(test)} test tasks, ", end="")
    print(f"{len(kept)} episodes of each, mean return {mean_return:.2f}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

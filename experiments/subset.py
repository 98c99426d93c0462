"""Writes a part of a dataset: fewer training tasks, or a part of each task's episodes. The test tasks stay the same.

    python experiments/subset.py data/point_robot.npz --out data45 --train-tasks 45
    python experiments/subset.py data/point_robot.npz --out data_early --episodes early

The early half of each learning history is data of low quality and the late half is data of high quality. The mixed half
is the control for both: as many episodes, from the whole history.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import BadInput, load, require, write_atomically  # noqa: E402

OF_TASK = ("test", "tasks", "random_return", "expert_return")  # first axis: tasks
OF_EPISODE = ("states", "actions", "rewards", "expert_actions", "learner_actions")  # first axes: tasks, episodes


def main(
    dataset: tyro.conf.Positional[Path],
    out: Path,
    train_tasks: int = 0,
    episodes: Literal["all", "early", "late", "mixed"] = "all",
):
    """Writes OUT/NAME.npz, where NAME.npz is the dataset's name, and prints what it holds.

    Args:
        dataset: a dataset as `collect.py` writes it
        out: folder of the new dataset
        train_tasks: keep the first so many training tasks; 0 keeps all
        episodes: keep all, the early or the late half of each history, or every other group of four episodes
    """
    data, path = load(dataset), out / dataset.name
    training, E = np.flatnonzero(~data["test"]), data["rewards"].shape[1]
    require(0 <= train_tasks <= len(training), f"--train-tasks {train_tasks}: there are {len(training)}")
    require(not path.exists(), f"{path} exists: name another folder")
    tasks = np.sort(np.concatenate([training[: train_tasks or None], np.flatnonzero(data["test"])]))
    n = np.arange(E)
    kept = np.flatnonzero(dict(all=n >= 0, early=n < E // 2, late=n >= E // 2, mixed=n // 4 % 2 == 0)[episodes])
    arrays = {k: data[k][tasks] for k in OF_TASK if k in data}
    arrays |= {k: data[k][tasks][:, kept] for k in OF_EPISODE if k in data}
    arrays |= {k: data[k][kept] for k in ("guest",) if k in data}
    write_atomically(path, lambda file: np.savez(file, **arrays))
    returns = arrays["rewards"].sum(-1)
    number = f"{(~arrays['test']).sum()} training and {arrays['test'].sum()} test tasks"
    print(f"{path}: {number}, {returns.shape[1]} episodes of each, mean return {returns.mean():.2f}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

"""How fast do HalfCheetah agents run in each task of their dataset, and how well do they score? A table, a row a task.

    python experiments/speeds.py RUN [RUN ...] --out FILE

Speeds are means over steps 50 to 200 of the second episode in context; score_1 and score_2 are those of the first and
the second episode. The last number of a column's name counts the runs.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput  # noqa: E402
from envs import ENVS, CheetahVel  # noqa: E402
from experiments.fresh_tasks import open_run  # noqa: E402

VELOCITY = 8  # of the torso along the track, in the observation (8 positions come first)


def act(agent, tasks):
    """Returns (2, num_tasks) of two episodes in `tasks`, and the speeds (num_tasks,) in the second one."""
    seen = []

    class Watched(CheetahVel):
        def step(self, actions):
            result = super().step(actions)
            seen.append(result[0][:, VELOCITY])
            return result

    ENVS["cheetah_vel"] = Watched  # what `make_vec` looks up
    returns = t2mir.evaluate(agent, tasks, 2, seed=1)
    ENVS["cheetah_vel"] = CheetahVel
    return returns, np.stack(seen).reshape(2, -1, len(tasks))[1, 50:].mean(0)


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("speeds.csv")):
    if not runs:
        raise BadInput("name at least one run of cheetah_vel")
    columns, datasets = {}, set()
    for i, run in enumerate(runs):
        agent, data, _, held_out = open_run(run)
        if agent.config.env != "cheetah_vel":
            raise BadInput(f"{run} is of {agent.config.env}: speeds are those of cheetah_vel")
        datasets.add(data["fingerprint"])
        returns, speed = act(agent, data["tasks"])
        scores = t2mir.normalised(returns, data, np.ones(len(held_out), bool))
        columns |= {f"speed_{i}": speed, f"score_1_{i}": scores[0], f"score_2_{i}": scores[1]}
        print(f"{run}: mean score of episode 2 in training tasks {np.nanmean(scores[1, ~held_out]):.3f}", end="")
        print(f", in held-out tasks {np.nanmean(scores[1, held_out]):.3f}")
    if len(datasets) > 1:
        raise BadInput("the runs must be of one dataset")
    target = data["tasks"][:, 0]
    with open(out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "target", *columns])
        for task in np.argsort(target):
            split = "held-out" if held_out[task] else "training"
            writer.writerow([split, *(f"{column[task]:.3f}" for column in (target, *columns.values()))])
    print(f"table: {out}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

"""How fast do HalfCheetah agents run in each task, and how well do they score? Prints CSV, a row a task.

    python experiments/speeds.py runs/cheetah_vel-t2mir_dpt-seed0 [more runs of the agent] > assets/cheetah_vel-speeds.csv

Speeds are means over steps 50 to 200 of the second episode in context, in the test tasks and in the training tasks.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402

VELOCITY = 8  # of the torso along the track, in the observation (8 positions come first)


def act(run, tasks):
    """Returns (episodes, num_tasks) and mean speeds (num_tasks,) of a run's agent."""
    seen, make_vec = [], t2mir.make_vec

    def watched(*args):
        env = make_vec(*args)
        step = env.step

        def watched_step(actions):
            out = step(actions)
            seen.append(out[0][:, VELOCITY])
            return out

        env.step = watched_step
        return env

    t2mir.make_vec = watched
    returns = t2mir.evaluate(t2mir.restore(Path(run) / "ckpt.pt")[0], tasks, 2, seed=1)
    t2mir.make_vec = make_vec
    return returns, np.stack(seen).reshape(2, -1, len(tasks))[1, 50:].mean(0)


runs, data = sys.argv[1:], t2mir.open_dataset(t2mir.make_config("cheetah_vel"))
low, high, target = data["random_return"], data["expert_return"], data["tasks"][:, 0]
results = [act(run, data["tasks"]) for run in runs]
print(f"# python experiments/speeds.py {' '.join(runs)}")
print("split,target," + ",".join(f"speed_{i},score_1_{i},score_2_{i}" for i in range(len(runs))))
for task in np.argsort(target):
    cells = [
        f"{speed[task]:.3f},{','.join(f'{x:.3f}' for x in (returns[:, task] - low[task]) / (high[task] - low[task]))}"
        for returns, speed in results
    ]
    print(f"{'test' if data['test'][task] else 'training'},{target[task]:.3f},{','.join(cells)}")

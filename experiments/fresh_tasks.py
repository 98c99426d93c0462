"""Acts with the agents of finished runs in fresh tasks, which no dataset holds: mean returns by episode in context.

    python experiments/fresh_tasks.py RUN [RUN ...] [--tasks 100] [--seed 0] [--context hidden] [--csv FILE]

Several runs (seeds) of one agent act in the same tasks, and a task's return is the mean over the runs. Behind each mean
stands its 95% interval, bootstrapped over the tasks, which says nothing about the runs, and with two or more runs the
standard error over the runs.
"""

import csv
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput, average_return  # noqa: E402
from envs import ENVS, sample_tasks  # noqa: E402


def open_run(run):
    """The agent of a run, the dataset that it has been trained on, and its training and held-out tasks (masks)."""
    agent = t2mir.load_agent(run)
    c = dataclasses.replace(agent.config, resume=str(run))  # a missing dataset is not collected
    data, train, held_out = t2mir.open_dataset(c)
    if data["fingerprint"] != t2mir.read_checkpoint(run)["fingerprint"]:
        raise BadInput(f"{c.data}/{c.env}.npz is not the dataset that {run} has been trained on")
    return agent, data, train, held_out


def check_agent(runs):
    """Raises BadInput if the runs are not of one agent, that is, if they differ in more than their seeds."""
    own, saved = ("seed", "name", "runs", "data", "device", "resume"), [t2mir.read_checkpoint(run) for run in runs]
    if len({str((s["config"] | dict.fromkeys(own), s["fingerprint"])) for s in saved}) != 1:
        raise BadInput("name the runs of one agent, which differ in their seeds only")


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    tasks: int = 100,
    seed: int = 0,
    context: Literal["own", "hidden", "other"] = "own",
    csv: Path | None = None,
):
    """Acts and prints.

    Args:
        runs: folders of runs, or checkpoints, of one environment
        tasks: how many tasks are drawn
        seed: random seed of the tasks, of the start states and of the exploration
        context: the agent's own context, or one of the two controls of `t2mir.evaluate`
        csv: file to which a row for each episode is added
    """
    if tasks < 2 or seed < 0:
        raise BadInput("--tasks must be at least 2, because an interval needs two, and --seed at least 0")
    check_agent(runs)
    agents = [t2mir.load_agent(run) for run in runs]
    env = agents[0].config.env
    if env not in ENVS:
        raise BadInput(f"{env} has no simulator in envs.py")
    fresh = sample_tasks(env, tasks, [seed, 2])  # a stream of its own: the seed of a dataset is one number
    returns = [t2mir.evaluate(agent, fresh, agent.config.eval_episodes, seed, context) for agent in agents]
    by_run = np.mean(returns, axis=2)  # (runs, episodes)
    errors = by_run.std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.full(by_run.shape[1], np.nan)
    returns = np.mean(returns, axis=0)  # (episodes, tasks)
    random = average_return(env, fresh, None, 1, seed, "cpu")
    names = " ".join(str(run) for run in runs)
    print(f"{names}: {env}, context {context}, {tasks} fresh tasks of seed {seed}")
    print("            mean return   95% interval over tasks   standard error over runs")
    rows = []
    for episode, of_task, error in [("random", random, np.nan), *zip(range(1, 1 + len(returns)), returns, errors)]:
        ends = bootstrap((of_task,), np.mean, method="percentile", rng=0).confidence_interval
        print(f"{episode if episode == 'random' else f'episode {episode}':12}", end="")
        print(f"{of_task.mean():9.2f}   {ends.low:9.2f} to {ends.high:6.2f}   {error:9.2f}")
        rows.append((names, env, context, tasks, seed, episode, *(f"{r:.6g}" for r in (of_task.mean(), *ends, error))))
    if csv is not None:
        append(csv, ("runs", "env", "context", "tasks", "seed", "episode", "return", "low", "high", "error"), rows)


def append(path, header, rows):
    """Adds rows to a CSV file, which begins with `header`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(rows if file.tell() else [header, *rows])


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

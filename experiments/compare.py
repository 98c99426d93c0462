"""Measures agents in fresh tasks, which no dataset holds, and compares two agents in pairs of runs.

    python experiments/compare.py --first RUN [RUN ...] [--second RUN [RUN ...]]

The runs of an agent differ in nothing but their seeds, and a pair is a run of each agent with the
same seed. For each agent there are the mean returns by episode, with their standard error over the
runs. Two agents are compared by the held-out loss, which is -log P of the actions in the dataset's
held-out tasks, and by the score in the fresh tasks. A fresh task has no expert, so a score is
(R - R_random) / (R_expert - R_random) with the mean returns of the dataset's tasks. There are the
scores of episode 1, of episode 2, and the mean from episode 2 on. The interquartile mean of the
last leaves out the lowest and the highest quarter of all runs and tasks.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import tyro
from scipy.stats import trim_mean

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import average_return, require, run_command
from envs import sample_tasks
from experiments.report import open_run

NAMES = {
    "heldout": "held-out loss",
    "score_1": "score, episode 1",
    "score_2": "score, episode 2",
    "score": "score, episodes 2 to last",
    "iqm": "its interquartile mean",
}
LOGGED = ("nll", "token_experts", "task_experts", "seconds")
FEW_SEEDS = "With fewer than three seeds, an interval leaves the seeds out: it is over tasks only."
NOT_OF_AN_AGENT = ("seed", "device", "dtype", "data", "runs", "name")  # fields of a Config


def check_agent(runs):
    """Raises BadInput unless the runs differ in nothing but their seeds."""
    agents = set()
    for run in runs:
        saved = t2mir.read_checkpoint(run)
        settings = saved["config"] | dict.fromkeys(NOT_OF_AN_AGENT)
        agents.add((str(settings), saved["fingerprint"]))
    require(len(agents) == 1, "name the runs of one agent, which differ in nothing but their seeds")


def measure_run(run, tasks, seed):
    """What a run measures, a dict: `heldout` (held-out tasks,), `returns` and `score` (tasks,
    episodes) in fresh tasks, `log`, and `same`, which the runs of a comparison have in common."""
    agent, data, train_tasks, held_out = open_run(run)
    c = agent.config
    saved = t2mir.read_checkpoint(run)
    require(data["simulator"], f"{c.env} is no family of envs.py, or its dataset has no returns")
    require(c.eval_episodes > 1, f"{run} acts in one episode: scores need --eval-episodes 2")
    require(saved["step"] == c.steps, f"{run} has not ended: go on with it by --resume {run}")

    x = t2mir.to_tensors(data, held_out)
    heldout = []
    for task in x["tasks"].split(1):
        heldout.append(t2mir.held_out_loss(agent, x | {"tasks": task}))
    history = t2mir.evaluate(agent, sample_tasks(c.env, tasks, [seed, 2]), c.eval_episodes, seed)
    returns = history["rewards"].sum(-1).numpy()
    low = data["random_return"].mean()
    high = data["expert_return"].mean()
    require(high > low, f"{run} has no scores: its experts are no better than random actions")
    same = {
        "env": c.env,
        "mode": c.mode,
        "training_tasks": int(train_tasks.sum()),
        "steps": c.steps,
        "episodes": c.eval_episodes,
        "fingerprint": data["fingerprint"],
    }
    return {
        "heldout": np.array(heldout),
        "returns": returns,
        "score": (returns - low) / (high - low),
        "log": saved["log"][-1],
        "same": same,
    }


def measure_agent(runs, tasks, seed):
    """A dict seed -> `measure_run`, in the order of the seeds."""
    check_agent(runs)
    measured = {}
    for run in runs:
        seed_of_run = t2mir.read_checkpoint(run)["config"]["seed"]
        require(seed_of_run not in measured, f"{run} is the second run with seed {seed_of_run}")
        measured[seed_of_run] = measure_run(run, tasks, seed)
    return dict(sorted(measured.items()))


def quantities(agent):
    """What is compared, a dict name -> array (seeds, tasks)."""
    score = np.stack([run["score"] for run in agent.values()])  # (seeds, tasks, episodes)
    after_first = score[:, :, 1:].mean(2)
    return {
        "heldout": np.stack([run["heldout"] for run in agent.values()]),
        "score_1": score[:, :, 0],
        "score_2": score[:, :, 1],
        "score": after_first,
        "iqm": after_first,
    }


def interquartile_mean(x):
    return trim_mean(x, 0.25, axis=None)


def interval(statistic, *arrays):
    """statistic(*arrays) of arrays (seeds, tasks), and the ends of its 95% interval.

    It is a percentile bootstrap, which draws seeds and tasks with replacement, the same ones in all
    arrays. Fewer than three seeds say nothing of their spread, so then it draws tasks only.
    """
    seeds, tasks = arrays[0].shape
    rng = np.random.default_rng(0)
    values = []
    for _ in range(2000):
        some_seeds = np.arange(seeds)
        if seeds >= 3:
            some_seeds = rng.integers(seeds, size=seeds)
        some_tasks = rng.integers(tasks, size=tasks)
        drawn = np.ix_(some_seeds, some_tasks)
        values.append(statistic(*(x[drawn] for x in arrays)))
    low, high = np.quantile(values, [0.025, 0.975])
    return statistic(*arrays), low, high


def returns_by_episode(which, agent):
    """Prints an agent's returns; returns cells of the table: means and errors by episode."""
    returns = np.stack([run["returns"].mean(0) for run in agent.values()])  # (seeds, episodes)
    mean = returns.mean(0)
    print(f"{which + ' agent':16}" + "".join(f"{value:9.2f}" for value in mean))
    error = np.full_like(mean, np.nan)
    if len(returns) > 1:
        error = returns.std(0, ddof=1) / len(returns) ** 0.5
        print(f"{'standard error':16}" + "".join(f"{value:9.2f}" for value in error))
    return {
        f"{which}_return": " ".join(f"{value:.5g}" for value in mean),
        f"{which}_error": " ".join(f"{value:.3g}" for value in error),
    }


def differences(first, second):
    """Prints the comparison of two agents; returns cells of the table."""
    cells = {}
    print(f"{'':27}    first   second   difference [95% interval]")
    ours = quantities(first)
    others = quantities(second)
    for name, text in NAMES.items():
        statistic = np.mean
        if name == "iqm":
            statistic = interquartile_mean
        a = statistic(ours[name])
        b = statistic(others[name])
        difference, low, high = interval(
            lambda x, y, of=statistic: of(x) - of(y), ours[name], others[name]
        )
        print(f"{text:27}{a:9.3f}{b:9.3f}   {difference:.3f} [{low:.3f}, {high:.3f}]")
        values = {"first": a, "second": b, "difference": difference, "low": low, "high": high}
        cells |= {f"{name}_{key}": value for key, value in values.items()}
    if len(first) < 3:
        print(FEW_SEEDS)
    return cells


def means_of_logs(agents):
    """The mean over an agent's runs of what the last row of their logs has; cells of the table."""
    cells = {}
    for name in LOGGED:
        for which, agent in agents.items():
            values = [run["log"].get(name, np.nan) for run in agent.values()]
            cells[f"{which}_{name}"] = np.mean(values)
    return cells


def commit():
    """The commit of this code; empty if there is no git."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def append(path, row):
    """Adds a row, a dict, to a CSV file, whose first line has the names of the columns."""
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = f"{value:.5g}"
    header = list(row)
    if path.exists():
        with open(path, newline="") as file:
            header = next(csv.reader(file), [])
    require(header == list(row), f"{path} has other columns: name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def main(
    first: tuple[Path, ...],
    second: tuple[Path, ...] = (),
    tasks: int = 400,
    seed: int = 1,
    label: str = "",
    csv: Path | None = None,
):
    """Measures, prints, and adds a row to a table.

    Args:
        first: folders of the runs of one agent, one for each seed
        second: runs with the same seeds of the agent that is subtracted
        tasks: number of fresh tasks
        seed: random seed of the fresh tasks, of the start states and of the exploration
        label: name of the comparison in the table
        csv: file of the table, which is for comparisons
    """
    require(tasks > 1, "--tasks must be at least 2, because an interval needs two")
    require(seed >= 0, "--seed must be at least 0")
    require(csv is None or second, "--csv is for comparisons: name a --second agent")
    agents = {"first": measure_agent(first, tasks, seed)}
    if second:
        agents["second"] = measure_agent(second, tasks, seed)
    seeds = list(agents["first"])
    same = agents["first"][seeds[0]]["same"]
    for agent in agents.values():
        require(list(agent) == seeds, f"the seeds must be the same: {seeds} and {list(agent)}")
        alike = all(run["same"] == same for run in agent.values())
        advice = "one environment, mode, dataset, and number of steps and of episodes"
        require(alike, f"the two agents must have {advice}")

    row = {"label": label} | same
    row["seeds"] = " ".join(map(str, seeds))
    row["fresh_tasks"] = tasks
    row["first_runs"] = " ".join(map(str, first))
    row["second_runs"] = " ".join(map(str, second))
    print(f"{label or 'agents'}: {same['env']}, {same['mode']}, seeds {row['seeds']}, ", end="")
    print(f"{same['training_tasks']} training tasks, {same['steps']} steps, {tasks} fresh tasks")
    fresh = sample_tasks(same["env"], tasks, [seed, 2])
    random_return = average_return(same["env"], fresh, None, 1, seed, "cpu").mean()
    row["random_return"] = random_return
    print(f"mean return of random actions {random_return:.2f}, of the agents by episode")
    for which, agent in agents.items():
        row |= returns_by_episode(which, agent)
    if second:
        row |= differences(agents["first"], agents["second"])
    row |= means_of_logs(agents)
    if csv is not None:
        append(csv, row)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

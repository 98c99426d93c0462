"""Compares two agents in pairs of runs with the same seed, on held-out and in fresh tasks, with 95% intervals.

    python experiments/compare.py --first RUN [RUN ...] --second RUN [RUN ...] [--tasks 400] [--seed 1] [--label TEXT]
        [--csv FILE]

Two quantities are compared: the loss -log P on the dataset's held-out tasks, and the score in fresh tasks, which no
dataset holds. A fresh task has no expert, so a score is (R - R_random) / (R_expert - R_random) with the mean returns of
the dataset's tasks. It is compared in episode 1, in episode 2, and as the mean of the episodes from the second one on,
of which there is an interquartile mean too: it leaves out the lowest and the highest quarter of all runs and tasks.
Intervals are percentile bootstraps that draw seeds and tasks anew, each with replacement.
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import bootstrap, trim_mean

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput  # noqa: E402
from envs import sample_tasks  # noqa: E402
from experiments.fresh_tasks import append, check_agent, open_run  # noqa: E402


NAMES = {"heldout": "held-out loss", "score_1": "score, episode 1", "score_2": "score, episode 2"}
NAMES |= {"score": "score, episodes 2 to last", "iqm": "its interquartile mean"}


def measure(runs, tasks, seed):
    """A dict seed -> what its run measures: `heldout` by held-out task, `score` by episode and fresh task, the log."""
    measured = {}
    check_agent(runs)
    for run in runs:
        agent, data, _, held_out = open_run(run)
        c, saved = agent.config, t2mir.read_checkpoint(run)
        if not data["simulator"]:
            raise BadInput(f"{c.env} has no simulator in envs.py, or its dataset has no returns of random and expert")
        if c.eval_episodes < 2:
            raise BadInput(f"{run} acts in one episode: the scores from episode 2 on need --eval-episodes 2")
        if c.seed in measured:
            raise BadInput(f"two runs of one agent have seed {c.seed}: {run} is the second one")
        if saved["step"] < c.steps:
            raise BadInput(f"{run} has not ended: continue it with --resume")
        one_task = (np.arange(len(held_out)) == i for i in np.flatnonzero(held_out))
        heldout = [t2mir.held_out_loss(agent, t2mir.tensors(data, task, "cpu"))[1].mean() for task in one_task]
        returns = t2mir.evaluate(agent, sample_tasks(c.env, tasks, [seed, 2]), c.eval_episodes, seed)
        low, high = data["random_return"].mean(), data["expert_return"].mean()
        row = {"log": saved["log"][-1], "heldout": np.array(heldout), "score": (returns - low) / (high - low)}
        same = {"env": c.env, "mode": c.mode, "training_tasks": agent.sizes["num_tasks"], "steps": c.steps}
        measured[c.seed] = row | {"same": same | {"episodes": c.eval_episodes, "fingerprint": data["fingerprint"]}}
    return measured


def interval(first, second, statistic):
    """statistic(first) - statistic(second), arrays (seeds, tasks) of pairs, and the ends of its 95% interval."""
    at = [np.arange(n) if n > 1 else np.zeros(2, int) for n in first.shape]  # one seed is drawn again and again

    def difference(seeds, tasks):
        drawn = np.ix_(seeds, tasks)
        return statistic(first[drawn]) - statistic(second[drawn])

    options = dict(n_resamples=2000, method="percentile", vectorized=False, rng=0)
    return statistic(first) - statistic(second), *bootstrap(at, difference, **options).confidence_interval


def interquartile_mean(x):
    return trim_mean(x, 0.25, axis=None)


def main(
    first: tuple[Path, ...],
    second: tuple[Path, ...],
    tasks: int = 400,
    seed: int = 1,
    label: str = "",
    csv: Path | None = None,
):
    """Compares and prints.

    Args:
        first: folders of the runs of one agent, one per seed
        second: folders of the runs of the agent that is subtracted, with the same seeds
        tasks: how many fresh tasks are drawn
        seed: random seed of the fresh tasks, of the start states and of the exploration
        label: name of this comparison
        csv: file to which a row is added
    """
    if tasks < 2 or seed < 0:
        raise BadInput("--tasks must be at least 2, because an interval needs two, and --seed at least 0")
    agents = measure(first, tasks, seed), measure(second, tasks, seed)
    seeds = sorted(agents[0])
    if seeds != sorted(agents[1]):
        raise BadInput(f"the seeds must be the same: {seeds} and {sorted(agents[1])}")
    same = agents[0][seeds[0]]["same"]
    if any(run["same"] != same for agent in agents for run in agent.values()):
        raise BadInput("the runs must have one environment, backbone, dataset, and number of steps and of episodes")
    heldout, score = ([np.stack([agent[s][k] for s in seeds]) for agent in agents] for k in ("heldout", "score"))
    pairs = {"heldout": heldout, "score_1": [s[:, 0] for s in score], "score_2": [s[:, 1] for s in score]}
    pairs |= {"score": [s[:, 1:].mean(1) for s in score]}  # (seeds, tasks) each
    pairs["iqm"] = pairs["score"]
    row = {"label": label, **same, "seeds": " ".join(map(str, seeds)), "fresh_tasks": tasks}
    row |= {f"{which}_runs": " ".join(map(str, runs)) for which, runs in (("first", first), ("second", second))}
    print(f"{label}: {row['env']}, {row['mode']}, {row['training_tasks']} training tasks, {row['steps']} steps")
    print(f"seeds {row['seeds']}                     first   second   difference [95% interval]")
    for name, (a, b) in pairs.items():
        statistic = interquartile_mean if name == "iqm" else np.mean
        difference, low, high = interval(a, b, statistic)
        print(f"{NAMES[name]:27}{statistic(a):9.3f}{statistic(b):9.3f}   {difference:.3f} [{low:.3f}, {high:.3f}]")
        values = dict(first=statistic(a), second=statistic(b), difference=difference, low=low, high=high)
        row |= {f"{name}_{key}": value for key, value in values.items()}
    for name in ("nll", "token_experts", "task_experts", "seconds"):
        for which, agent in zip(("first", "second"), agents):
            row[f"{which}_{name}"] = np.mean([agent[s]["log"].get(name, np.nan) for s in seeds])
    if csv is not None:
        append(csv, row, [[f"{v:.5g}" if isinstance(v, float) else v for v in row.values()]])


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

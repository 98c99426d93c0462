"""Makes tables and pictures of finished runs.

    python experiments/figures.py RUN [RUN ...]
    python experiments/figures.py --pairs figures/pairs.csv

The first command writes a table (results.md), a row for each run (results.csv) and a picture
(scores.png). The runs (seeds) of an agent are those with the same settings. Scores are
(R - R_random) / (R_expert - R_random) in the held-out tasks; brackets and bands are the 95%
intervals of `compare.interval`. The picture has a column for each environment: above, the score of
the last episode while training (the paper's Fig. 3), with a line for each run; below, the score by
episode in context. An agent has the colour of its dense baseline, which is dashed.

The second command draws the comparisons of a table of compare.py (pairs.png). In both panels the
first agent is better on the right of the line; the axes are linear near 0 and logarithmic outside.
In a label such as "DPT, 2,500 steps: 45 tasks" the name of a group stands before the colon.
"""

import csv
import dataclasses
import io
import os
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import has_score, require, run_command, write_atomically
from experiments.compare import FEW_SEEDS, NOT_OF_AN_AGENT, interval

CONTEXTS = ("own", "hidden", "other")
# Fields of a Config that do not make another agent, and those that a dense agent does not use.
NO_SETTINGS = (*NOT_OF_AN_AGENT, "eval_every", "eval_episodes")
MOE = ("token_moe", "task_moe", "token_experts", "task_experts", "top_k")
MOE += ("w_imp", "w_load", "w_con", "momentum")
COLUMNS = ("environment", "agent", "seeds", "episode 1", "episode 2", "episodes 2 to last", "last")
COLUMNS += ("hidden", "other")

COLORS = {"dpt": "C0", "ad": "C1"}
LINEAR = 0.02  # half of the range in which the axes of pairs.png are linear


def save(fig, path):
    write_atomically(path, lambda file: fig.savefig(file, dpi=130, format="png"))
    print(f"picture: {path}")


# ---- Runs ----------------------------------------------------------------------------------------


def read(folder):
    """A finished run, a dict; None, and a line that says so, if it has no scores to show."""
    saved = t2mir.read_checkpoint(folder)
    path = folder / "result.npz"
    require(path.exists(), f"{folder} is not a finished run: python experiments/report.py {folder}")
    with np.load(path) as arrays:
        result = dict(arrays)
    whole = result["step"] == saved["step"] == saved["config"]["steps"]
    advice = f"--resume it, or python experiments/report.py {folder}"
    require(whole, f"{folder} is not finished, or its report is of an earlier step: {advice}")
    if "tasks" not in result or "other" not in result or len(result["own"]) < 2:
        print(f"left out, because it has no returns of two or more episodes and tasks: {folder}")
        return None
    scores = {}  # by context, (episodes, tasks) of the tasks that have scores
    better = has_score(result["random_return"], result["expert_return"])
    require(better.sum() > 1, f"{folder} needs two held-out tasks with an expert above random")
    for context in CONTEXTS:
        scores[context] = t2mir.scores(result[context].T, result, slice(None)).T[:, better]
    run = names(saved["config"])
    run["env"] = saved["config"]["env"]
    run["seed"] = saved["config"]["seed"]
    run["fingerprint"] = saved["fingerprint"]
    run["log"] = saved["log"]
    run["result"] = result
    run["scores"] = scores
    return run


def names(config):
    """The name of a run's agent, of its dense baseline (None if it is dense), and its command.

    The name has the settings in which the agent differs from the nearer one of the two recipes.
    """
    found = []
    for recipe in ("ours", "paper"):
        preset = dataclasses.asdict(t2mir.preset(config["env"], config["mode"], recipe))
        found.append((recipe, {k: v for k, v in config.items() if v != preset[k]}))
    recipe, changed = min(found, key=lambda pair: len(pair[1]))

    command = f"python t2mir.py --env {config['env']} --mode {config['mode']}"
    words = []
    words_of_baseline = []
    if recipe == "paper":
        command += " --recipe paper"
        words.append("paper")
        words_of_baseline.append("paper")
    for name, value in changed.items():
        if name not in ("device", "data", "runs", "name"):
            command += flag(name, value)
        if name not in NO_SETTINGS:
            words.append(f"{name}={value}")
        if name not in (*NO_SETTINGS, *MOE):
            words_of_baseline.append(f"{name}={value}")
    mode = config["mode"].upper()
    baseline = " ".join([mode, *words_of_baseline])
    if config["token_moe"] or config["task_moe"]:
        agent = " ".join([f"T2MIR-{mode}", *words])
        return {"agent": agent, "baseline": baseline, "command": command}
    return {"agent": baseline, "baseline": None, "command": command}


def flag(name, value):
    """The field of a Config as a flag of the command line."""
    name = name.replace("_", "-")
    if value is True:
        return f" --{name}"
    if value is False:
        return f" --no-{name}"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f" --{name} {value}"


def group_by_agent(table):
    """Runs as a dict environment -> agent -> list of runs, once they can be compared."""
    groups = defaultdict(lambda: defaultdict(list))
    for run in table:
        first = next(iter(groups[run["env"]].values()), [run])[0]
        same = np.array_equal(run["result"]["tasks"], first["result"]["tasks"])
        same = same and run["fingerprint"] == first["fingerprint"]
        require(same, f"the runs of {run['env']} have other data or other held-out tasks")
        members = groups[run["env"]][run["agent"]]
        of_agent = f"runs of {run['agent']} on {run['env']}"
        seeds = [member["seed"] for member in members]
        require(run["seed"] not in seeds, f"two {of_agent} have seed {run['seed']}: name one")
        episodes = {len(member["scores"]["own"]) for member in (*members, run)}
        require(len(episodes) == 1, f"the {of_agent} act in different numbers of episodes")
        members.append(run)
    return groups


def cell(scores):
    """Mean and interval of scores (seeds, tasks)."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(np.mean, scores))


def markdown(groups):
    """The table results.md: a row for each agent."""
    lines = [f"| {' | '.join(COLUMNS)} |\n", "|---" * len(COLUMNS) + "|\n"]
    for env, agents in groups.items():
        for agent, members in agents.items():
            own, hidden, other = [
                np.stack([run["scores"][context] for run in members], axis=1)
                for context in CONTEXTS
            ]  # (episodes, seeds, tasks) each
            cells = [env, agent, str(len(members))]
            for scores in (own[0], own[1], own[1:].mean(0), own[-1]):
                cells.append(cell(scores))
            for scores in (hidden, other):
                cells.append(cell(scores[1:].mean(0)))
            lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def csv_row(run):
    """A run's row in results.csv. Returns and scores are by episode, score_of_task is by task."""

    def text(numbers):
        return " ".join(f"{x:.4g}" for x in numbers)

    row = {key: run[key] for key in ("env", "agent", "seed", "command")}
    row["seconds"] = run["log"][-1]["seconds"]
    row["random"] = f"{run['result']['random_return'].mean():.4g}"
    row["expert"] = f"{run['result']['expert_return'].mean():.4g}"
    row["return"] = text(run["result"]["own"].mean(1))
    row["score_of_task"] = text(run["scores"]["own"][1:].mean(0))
    for context in CONTEXTS:
        row[f"score_{context}"] = text(run["scores"][context].mean(1))
    return row


def draw_scores(groups):
    """The figure scores.png."""
    fig = Figure(figsize=(1 + 4 * len(groups), 6), layout="tight")
    colors = {}  # of each dense baseline
    for (above, below), (env, agents) in zip(
        fig.subplots(2, len(groups), squeeze=False).T, groups.items()
    ):
        for agent, runs in agents.items():
            color = colors.setdefault(runs[0]["baseline"] or agent, f"C{len(colors)}")
            style = "--"
            if runs[0]["baseline"]:
                style = "-"
            for run in runs:
                steps = [row["step"] for row in run["log"]]
                of_steps = [row.get("score", np.nan) for row in run["log"]]
                above.plot(steps, of_steps, style, color=color, lw=1, marker=".", ms=3)
            scores = np.stack([run["scores"]["own"] for run in runs], axis=1)
            mean, low, high = np.array([interval(np.mean, x) for x in scores]).T
            episodes = np.arange(1, len(mean) + 1)
            label = f"{agent}, {len(runs)} runs"
            below.plot(episodes, mean, style, color=color, lw=1, label=label)
            below.fill_between(episodes, low, high, color=color, alpha=0.15, lw=0)
        above.set_xlabel("training step")
        below.set_xlabel("episode in context, end of training")
        for ax in (above, below):
            ax.axhline(0, color="k", ls=":", lw=1, label="random")
            ax.axhline(1, color="k", ls=(0, (6, 2)), lw=1, label="expert")
            ax.set(ylabel="score in held-out tasks", title=env, ylim=(-0.05, 1.15))
        below.legend(fontsize=7, loc="lower right").set_in_layout(False)
    return fig


def compare_runs(runs, out):
    """Writes results.md, results.csv and scores.png into the folder `out`."""
    table = [run for run in map(read, runs) if run is not None]
    require(table, "name at least one folder of a finished run in an environment of envs.py")
    groups = group_by_agent(table)
    if any(len(members) < 3 for agents in groups.values() for members in agents.values()):
        print(FEW_SEEDS)
    text = markdown(groups)
    print(text, end="")
    rows = [csv_row(run) for run in table]
    cells = io.StringIO()
    writer = csv.DictWriter(cells, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "results.md", lambda file: file.write(text.encode()))
    write_atomically(out / "results.csv", lambda file: file.write(cells.getvalue().encode()))
    save(draw_scores(groups), out / "scores.png")


# ---- Pairs ---------------------------------------------------------------------------------------


def numbers(row, quantity):
    """Difference, and the ends of its interval, of a row of the table."""
    return [float(row[f"{quantity}_{key}"]) for key in ("difference", "low", "high")]


def draw_pairs(rows):
    """The figure pairs.png: a line for each of the rows."""
    fig = Figure(figsize=(9, 1.4 + 0.28 * len(rows)), layout="tight")
    axes = fig.subplots(1, 2, sharey=True)
    titles = ("score in fresh tasks, episodes 2 to last", "held-out loss, axis turned round")
    for ax, quantity, title in zip(axes, ("score", "heldout"), titles):
        group = rows[0]["label"].split(":")[0]
        for i, row in enumerate(rows):
            color = COLORS[row["mode"]]
            middle, low, high = numbers(row, quantity)
            ax.plot([low, high], [i, i], color=color, lw=2, solid_capstyle="butt")
            ax.plot(middle, i, "o", color=color, ms=4)
            before = group
            group = row["label"].split(":")[0]
            if group != before:
                ax.axhline(i - 0.5, color="0.85", lw=0.8)
        ax.axvline(0, color="k", lw=1)
        ax.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
        ax.margins(x=0.08)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("difference; on the right the first agent is better", fontsize=8)
        low, high = ax.get_xlim()
        ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1]
        ax.set_xticks([tick for tick in ticks if low <= tick <= high])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.tick_params(labelsize=8)
    labels = []
    for row in rows:
        pairs = len(row["seeds"].split())
        labels.append(f"{row['label']} ({pairs} pair{'s' * (pairs > 1)})")
    axes[0].set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5))
    axes[1].invert_xaxis()
    for mode, color in COLORS.items():
        axes[1].plot([], [], "o-", color=color, ms=4, label=mode.upper())
    axes[1].legend(fontsize=7)
    return fig


def compare_pairs(table, out):
    """Draws pairs.png from a table of compare.py into the folder `out`."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    require(rows and "score_difference" in rows[0], f"{table} has no row of compare.py")
    save(draw_pairs(rows), out / "pairs.png")


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    pairs: Path | None = None,
    out: Path = Path("figures"),
):
    """Makes the tables and pictures of runs, or the picture of a table of pairs.

    Args:
        runs: folders of finished runs
        pairs: a table of compare.py
        out: folder of what is made
    """
    require(runs or pairs, "name folders of finished runs, or a table with --pairs")
    if runs:
        compare_runs(runs, out)
    if pairs is not None:
        compare_pairs(pairs, out)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

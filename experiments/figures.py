"""Compares finished runs: a table (results.md), a row per run (results.csv), and a picture (scores.png).

    python experiments/figures.py RUN [RUN ...] --out FOLDER

The runs (seeds) of an agent are those whose settings are the same. Scores are (R - R_random) / (R_expert - R_random) on
the held-out tasks. Behind each mean stands its 95% interval: a percentile bootstrap that draws seeds and tasks anew,
each with replacement, and is too narrow where there are few seeds. The picture has a column for each environment:
above, the score of the last episode while training (the paper's Fig. 3), a line per run; below, the score against the
episode in context, with the interval. An agent has the colour of its dense baseline, which is dashed. `compare.py`
compares two agents in pairs.
"""

import csv
import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput, write_atomically  # noqa: E402

CONTEXTS = ("own", "hidden", "other")
NO_SETTING = {"seed", "device", "dtype", "data", "runs", "name", "resume", "eval_every", "eval_episodes"}
MOE = {"token_moe", "task_moe", "token_experts", "task_experts", "top_k", "w_imp", "w_load", "w_con", "momentum"}


def read(folder):
    """A finished run as a dict: what its folder holds, its agent, the agent's dense baseline, the scores; else None."""
    try:
        config = json.loads((folder / "config.json").read_text())
        log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        with np.load(folder / "result.npz") as arrays:
            result = dict(arrays)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is not a finished run ({str(error).splitlines()[0]})") from None
    if "tasks" not in result or "other" not in result or len(result["own"]) < 2:
        return print(f"left out, because it has no returns of two or more episodes and tasks: {folder}")
    base = dataclasses.asdict(t2mir.preset(config["env"], config["mode"]))
    changed = {k: config[k] for k in base if k in config and config[k] != base[k]}
    settings = {k: v for k, v in changed.items() if k not in NO_SETTING}
    backbone, dense = config["mode"].upper(), not (config["token_moe"] or config["task_moe"])
    without_moe = " ".join([backbone, *(f"{k}={v}" for k, v in settings.items() if k not in MOE)])
    agent = without_moe if dense else " ".join([f"T2MIR-{backbone}", *(f"{k}={v}" for k, v in settings.items())])
    command = f"python t2mir.py --env {config['env']} --mode {config['mode']}"
    for k, v in changed.items():
        if k not in {"device", "data", "runs", "name", "resume"}:
            flag = k.replace("_", "-")
            command += f" --{'' if v else 'no-'}{flag}" if isinstance(v, bool) else f" --{flag} {v}"
    scores = {k: t2mir.normalised(result[k], result, slice(None)) for k in CONTEXTS}  # (episodes, tasks) each
    run = {"env": config["env"], "agent": agent, "baseline": None if dense else without_moe, "seed": config["seed"]}
    run |= {"dataset": t2mir.read_checkpoint(folder)["fingerprint"]}
    return run | {"command": command, "log": log, "result": result, "scores": scores}


def interval(scores):
    """Mean of scores (seeds, tasks) and the ends of its 95% interval."""
    at = [np.arange(n) if n > 1 else np.zeros(2, int) for n in scores.shape]  # one seed is drawn again and again

    def mean(seeds, tasks, axis):
        return scores[seeds[..., :, None], tasks[..., None, :]].mean((-2, -1))

    drawn = bootstrap(at, mean, n_resamples=2000, method="percentile", rng=0)
    return scores.mean(), *drawn.confidence_interval


def cell(scores):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(scores))


def csv_row(run):
    """The run's row in results.csv; cells with several numbers have them by episode, or score_of_task by task."""
    row = {k: run[k] for k in ("env", "agent", "seed", "command")} | {"seconds": run["log"][-1]["seconds"]}
    lists = {k: run["result"][f"{k}_return"].mean(keepdims=True) for k in ("random", "expert")}
    lists |= {"return": run["result"]["own"].mean(1), "score_of_task": run["scores"]["own"][1:].mean(0)}
    lists |= {f"score_{k}": np.nanmean(run["scores"][k], axis=1) for k in CONTEXTS}
    return row | {k: " ".join(f"{x:.4g}" for x in numbers) for k, numbers in lists.items()}


def picture(groups, out):
    """Draws scores.png; `groups` is a dict environment -> agent -> list of runs."""
    fig, colors = Figure(figsize=(1 + 4 * len(groups), 6), layout="tight"), {}
    for axes, (env, agents) in zip(fig.subplots(2, len(groups), squeeze=False).T, groups.items()):
        for agent, runs in agents.items():
            color = colors.setdefault(runs[0]["baseline"] or agent, f"C{len(colors)}")
            look = dict(color=color, ls="-" if runs[0]["baseline"] else "--", lw=1)
            for run in runs:
                axes[0].plot(*([float(row[k]) for row in run["log"]] for k in ("step", "score")), **look)
            scores = np.stack([run["kept"]["own"] for run in runs], axis=1)  # (episodes, seeds, tasks)
            mean, low, high = np.array([interval(s) for s in scores]).T
            axes[1].plot(range(1, len(mean) + 1), mean, **look, label=f"{agent}, {len(runs)} runs")
            axes[1].fill_between(range(1, len(mean) + 1), low, high, color=color, alpha=0.15, lw=0)
        for ax, what in zip(axes, ("training step", "episode in context, end of training")):
            ax.axhline(0, color="k", ls=":", lw=1, label="random")
            ax.axhline(1, color="k", ls=(0, (6, 2)), lw=1, label="expert")
            ax.set(xlabel=what, ylabel="score in held-out tasks", title=env, ylim=(-0.05, 1.15))
        axes[1].legend(fontsize=7, loc="lower right").set_in_layout(False)
    write_atomically(out / "scores.png", lambda file: fig.savefig(file, dpi=130, format="png"))


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("figures")):
    table, groups = [run for run in map(read, runs) if run], {}
    if not table:
        raise BadInput("name at least one folder of a finished run in an environment of envs.py")
    for run in table:
        first = next(r for r in table if r["env"] == run["env"])
        same_tasks = np.array_equal(run["result"]["tasks"], first["result"]["tasks"])
        if not same_tasks or run["dataset"] != first["dataset"]:
            raise BadInput(f"the runs of {run['env']} have other data or held-out tasks: compare runs of one dataset")
        members = groups.setdefault(run["env"], {}).setdefault(run["agent"], [])
        if run["seed"] in [r["seed"] for r in members]:
            raise BadInput(f"two runs of {run['agent']} on {run['env']} have seed {run['seed']}: name one of them")
        if members and len(run["scores"]["own"]) != len(members[0]["scores"]["own"]):
            raise BadInput(f"the runs of {run['agent']} on {run['env']} act in different numbers of episodes")
        members.append(run)
        kept = np.isfinite(run["scores"]["own"][0])  # where the expert is better than random
        if kept.sum() < 2:
            raise BadInput(f"{run['env']} needs two held-out tasks in which the expert is better than random")
        run["kept"] = {k: scores[:, kept] for k, scores in run["scores"].items()}
    columns = "environment, agent, seeds, episode 1, episode 2, episodes 2 to last, last, hidden, other".split(", ")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for env, agents in groups.items():
        for agent, members in agents.items():
            own, hidden, other = (np.stack([r["kept"][k] for r in members]) for k in CONTEXTS)  # seeds, episodes, tasks
            means = own[:, 0], own[:, 1], own[:, 1:].mean(1), own[:, -1], hidden[:, 1:].mean(1), other[:, 1:].mean(1)
            lines.append(f"| {env} | {agent} | {len(members)} | {' | '.join(map(cell, means))} |")
    picture(groups, out)
    text = "\n".join(lines)
    print(text)
    write_atomically(out / "results.md", lambda file: file.write(f"{text}\n".encode()))
    rows, cells = [csv_row(run) for run in table], io.StringIO()
    writer = csv.DictWriter(cells, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "results.csv", lambda file: file.write(cells.getvalue().encode()))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

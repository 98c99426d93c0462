"""From the published AD and DPT to ours, one change at a time, with T2MIR and without.

    python experiments/stairs.py choose --mode dpt
    python experiments/stairs.py measure --mode dpt
    python experiments/stairs.py draw --mode dpt

The first stair is the published form (`--recipe paper`). Each of the next ones takes one change of
`Config` more, and with all of them it is ours. "without X" is ours with one change taken back. On
each stair there is a T2MIR agent, and a dense one.

`choose` tries the learning rates of GRID with seed 0, in 40 training tasks that it holds out for
this. The rate of a stair is the one with the best mean score over all episodes. If it is the lowest
or the highest of GRID, a better one may lie outside. A stair that was left out (`--stair`) takes
the rate of the next one with the same optimizer that has rows, or else of the last one before it. Some changes affect acting only, and stairs
with the same rate that differ only in these use one trained agent. `measure` trains with the chosen
rates and several seeds, and acts in fresh tasks. Both add a row to the table for each stair, agent,
rate and seed, and skip what the table has. `draw` makes a picture and prints the table with
intervals. What a change is worth is a stair minus the one before it, or ours minus the stair
without the change, in pairs of T2MIR's runs with the same seed.

A score is (R - R_random) / (R_expert - R_random) with the mean returns of the dataset's tasks.
"""

import csv
import dataclasses
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command
from envs import sample_tasks
from experiments.compare import FEW_SEEDS, append, commit, interval
from experiments.figures import save
from experiments.report import open_run

# The changes in the order in which they are made. Those of ACTING need no training.
ORDER = {
    "dpt": ("stride", "optimizer", "policy", "sample", "grow_prompt", "remember_best"),
    "ad": (
        "stride",
        "worse_episodes",
        "late_episode",
        "clean_targets",
        "guests",
        "optimizer",
        "policy",
        "sample",
        "remember_best",
    ),
}
ACTING = ("sample", "grow_prompt", "remember_best")
IN_WORDS = {
    "stride": "every n-th step",
    "worse_episodes": "worse episodes",
    "late_episode": "a late episode",
    "clean_targets": "targets without noise",
    "guests": "guests",
    "optimizer": "Muon",
    "policy": "Gaussian policy",
    "sample": "sampled actions",
    "grow_prompt": "growing prompt",
    "remember_best": "best remembered",
}
AGENTS = {"t2mir": {}, "dense": {"token_moe": False, "task_moe": False}}
GRID = (2e-3, 5e-3, 1.25e-2)  # learning rates
VALIDATION_TASKS = 40
COLUMNS = {"episode_1": 0, "episode_2": 1, "episode_5": 4, "last": -1}  # column -> index of episode


def stairs(env, mode):
    """The stairs: a dict name -> fields of a Config, from the published form to ours."""
    ours = dataclasses.asdict(t2mir.preset(env, mode))
    changes = [name for name in ORDER[mode] if ours[name] != t2mir.PAPER[name]]
    fields = {name: t2mir.PAPER[name] for name in changes}
    found = {"published": fields}
    for name in changes:
        fields = fields | {name: ours[name]}
        found[f"+ {name}"] = fields
    for name in changes[:-1]:  # without the last change, it is the stair before the last one
        back = {name: t2mir.PAPER[name]}
        if name == "clean_targets":
            back["guests"] = False  # or guests would be imitated
        found[f"without {name}"] = fields | back
    return found


def in_words(name):
    """The name of a stair as it is printed: "+ Muon" for "+ optimizer"."""
    *sign, change = name.split()
    return " ".join([*sign, IN_WORDS.get(change, change)])


def training(fields):
    """The part of a stair's fields that the trained agent depends on, as a text."""
    return " ".join(f"{name}={value}" for name, value in fields.items() if name not in ACTING)


def trained(c):
    """The folder of the trained agent of a Config. A run that has ended is not repeated.

    Raises BadInput if the folder holds a run with other settings.
    """
    folder = Path(c.runs) / c.name
    if not (folder / "ckpt.pt").exists():
        return t2mir.train(c)
    saved = t2mir.read_checkpoint(folder)
    wanted = dataclasses.asdict(c) | {"data": str(Path(c.data).resolve())}
    different = [name for name in wanted if wanted[name] != saved["config"][name]]
    names = ", ".join(different)
    require(not different, f"{folder} is a run with other settings ({names}): move it away")
    if saved["step"] < c.steps:
        t2mir.train(c, folder)
    return folder


def act(run, fields, fresh_tasks):
    """What a run is worth: its held-out loss in each held-out task, scores, and its dataset.

    The scores, (tasks, episodes), are those of an agent that acts as `fields` say in as many fresh
    tasks, or if this is 0 in the held-out tasks of its training.
    """
    model, data, _, held_out = open_run(run)
    c = model.config
    model.config = dataclasses.replace(c, **{k: v for k, v in fields.items() if k in ACTING})
    x = t2mir.to_tensors(data, held_out)
    heldout = [t2mir.held_out_loss(model, x | {"tasks": task}) for task in x["tasks"].split(1)]
    tasks = data["tasks"][held_out]
    if fresh_tasks > 0:
        tasks = sample_tasks(c.env, fresh_tasks, [1, 2])
    returns = t2mir.evaluate(model, tasks, c.eval_episodes, 1)["rewards"].sum(-1).numpy()
    low = data["random_return"].mean()
    high = data["expert_return"].mean()
    return heldout, (returns - low) / (high - low), data["fingerprint"][:8]


def read(table):
    """The rows of the table, a list of dicts."""
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def of_episode(row, column):
    """The scores in a cell of the table, which holds percent."""
    return np.array(row[column].split(), float) / 100


def best_rate(rows, env, mode, name, agent):
    """The learning rate of an agent on the stair `name`, from the rows of `choose`.

    They are the stair's own rows. If there are none, they are those of the next stair that has rows
    and the same optimizer, or of the last one before. Raises BadInput if a rate of GRID is missing.
    """
    found = stairs(env, mode)
    optimizer = found[name]["optimizer"]
    alike = [other for other in found if found[other]["optimizer"] == optimizer]
    at = alike.index(name)
    for candidate in (*alike[at:], *alike[:at][::-1]):
        wanted = {"env": env, "mode": mode, "stair": candidate, "agent": agent}
        wanted |= {"tasks": "validation"}
        score = {}
        for row in rows:
            if wanted.items() <= row.items():
                score[float(row["lr"])] = of_episode(row, "mean").mean()
        if score:
            break
    missing = [lr for lr in GRID if lr not in score]
    advice = "first choose the learning rates with `choose`"
    require(
        not missing, f"the table has no {agent} agent of {candidate!r} with {missing}: {advice}"
    )
    return max(GRID, key=score.get)


def climb(c, table, names, agents, seeds, fresh_tasks):
    """Adds what is missing to the table: `choose` if `fresh_tasks` is 0, else `measure`."""
    found = stairs(c.env, c.mode)
    for name in names:
        require(name in found, f"no stair {name!r}: there are {', '.join(found)}")
    kind = "fresh"
    if fresh_tasks == 0:
        kind = "validation"
    for name in names or found:
        fields = found[name]
        for agent in agents:
            rates = GRID
            if kind == "fresh":
                rates = [best_rate(read(table), c.env, c.mode, name, agent)]
            for lr in rates:
                for seed in seeds:
                    key = {"env": c.env, "mode": c.mode, "stair": name, "agent": agent}
                    key |= {"tasks": kind, "lr": f"{lr:.5g}", "seed": str(seed)}
                    key |= {"steps": str(c.steps), "count": str(fresh_tasks)}
                    if not any(key.items() <= row.items() for row in read(table)):
                        append(table, key | measured(c, key, fields, fresh_tasks))


def measured(c, key, fields, fresh_tasks):
    """Trains one agent and acts with it; the other cells of its row of the table."""
    name = f"stairs/{c.env}-{c.mode}-{c.steps}/{training(fields)}/{key['agent']}-lr{key['lr']}"
    if key["tasks"] == "validation":
        name += "-validation"
    fields_of_run = fields | AGENTS[key["agent"]] | {"name": f"{name}-seed{key['seed']}"}
    fields_of_run |= {"lr": float(key["lr"]), "seed": int(key["seed"]), "eval_every": c.steps}
    if key["tasks"] == "validation":
        fields_of_run["val_tasks"] = VALIDATION_TASKS
    # The way of acting is no part of the trained agent, which several stairs share.
    ours = t2mir.preset(c.env, c.mode)
    fields_of_run |= {field: getattr(ours, field) for field in ACTING}
    run = trained(dataclasses.replace(c, **fields_of_run))

    heldout, score, dataset = act(run, fields, fresh_tasks)
    cells = {"heldout": " ".join(f"{loss:.4f}" for loss in heldout)}
    cells["mean"] = percent(score.mean(0))
    for column, index in COLUMNS.items():
        cells[column] = percent(score[:, index])
    cells["after_1"] = percent(score[:, 1:].mean(1))
    said = ", ".join(key.values())
    loss = np.mean(heldout)
    print(f"{said}: held-out {loss:.4f}, percent by episode {cells['mean']}", flush=True)
    cells |= {"dataset": dataset, "commit": commit()}
    return cells


def percent(scores):
    """Scores as a cell of the table."""
    return " ".join(f"{100 * score:.1f}" for score in scores)


# ---- Table and picture ---------------------------------------------------------------------------


def seeds_and_tasks(rows, column):
    """A column of the rows of one agent and stair as an array (seeds, tasks)."""
    rows = sorted(rows, key=lambda row: int(row["seed"]))
    if column == "heldout":
        return np.array([row["heldout"].split() for row in rows], float)
    return np.stack([of_episode(row, column) for row in rows])


def by_stair(table, env, mode):
    """The rows in fresh tasks: stair -> agent -> list of rows.

    They are those of the seeds that both agents have. A stair may have T2MIR alone. Raises BadInput
    if the runs of an agent on a stair differ in more than their seeds.
    """
    found = {}
    for name in stairs(env, mode):
        agents = {}
        for agent in AGENTS:
            wanted = {"env": env, "mode": mode, "stair": name, "agent": agent, "tasks": "fresh"}
            agents[agent] = [row for row in read(table) if wanted.items() <= row.items()]
            same = ("lr", "steps", "count", "dataset")
            alike = len({tuple(row[name] for name in same) for row in agents[agent]}) <= 1
            advice = "name another --table"
            require(
                alike, f"{table}: {agent} agents of {name!r} differ in more than seeds: {advice}"
            )
        seeds = {row["seed"] for row in agents["t2mir"]}
        if agents["dense"]:
            seeds &= {row["seed"] for row in agents["dense"]}
        else:
            del agents["dense"]
        if seeds:
            found[name] = {a: [r for r in rows if r["seed"] in seeds] for a, rows in agents.items()}
    require(found, f"{table} has no stair of {env} and {mode} with a seed that both agents have")
    return found


def difference(first, second, column):
    """First minus second, lists of rows, and its interval, in pairs of runs with the same seed."""
    both = {row["seed"] for row in first} & {row["seed"] for row in second}
    first = [row for row in first if row["seed"] in both]
    second = [row for row in second if row["seed"] in both]
    return interval(np.mean, seeds_and_tasks(first, column) - seeds_and_tasks(second, column))


def worth(found):
    """What the change of a stair is worth to T2MIR: a dict stair -> difference, see `draw`."""
    climbed = [name for name in found if not name.startswith("without")]
    ours = found[climbed[-1]]["t2mir"]
    values = {}
    for below, name in pairwise(climbed):
        values[name] = difference(found[name]["t2mir"], found[below]["t2mir"], "after_1")
    for name in found:
        if name not in climbed:
            values[name] = difference(ours, found[name]["t2mir"], "after_1")
    return values


def markdown(found):
    """The table: a line for each stair."""
    titles = ["stair", "learning rates", "seeds"]
    titles += [f"T2MIR, {column.replace('_', ' ')}" for column in COLUMNS]
    titles += [f"dense, {column.replace('_', ' ')}" for column in COLUMNS]
    titles += ["worth to T2MIR, episodes 2 to last"]
    titles += ["T2MIR minus dense, episodes 2 to last", "the same, held-out loss"]
    lines = [" | ".join(titles), "|".join(["---"] * len(titles))]
    worths = worth(found)
    for name, agents in found.items():
        rates = [rows[0]["lr"] for rows in agents.values()]
        cells = [in_words(name), ", ".join(rates), str(len(agents["t2mir"]))]
        for agent in AGENTS:
            for column in COLUMNS:
                if agent in agents:
                    values = interval(np.mean, seeds_and_tasks(agents[agent], column))
                    cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*values))
                else:
                    cells.append("")
        differences = [worths.get(name, (np.nan, np.nan, np.nan))]
        if "dense" in agents:
            for column in ("after_1", "heldout"):
                differences.append(difference(agents["t2mir"], agents["dense"], column))
        cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*x) for x in differences]
        cells += [""] * (len(titles) - len(cells))
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def picture(found, title):
    """Scores by stair above, and T2MIR minus dense below."""
    climbed = len([name for name in found if not name.startswith("without")])
    place = np.arange(len(found), dtype=float)
    place[climbed:] += 0.5
    fig = Figure(figsize=(1.5 + 0.75 * len(found), 6.5), layout="tight")
    above, below = fig.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    episodes = len(next(iter(found.values()))["t2mir"][0]["mean"].split())
    has_dense = np.array(["dense" in agents for agents in found.values()])
    shown = {"t2mir": place, "dense": place[has_dense] + 0.12}
    for i, column in enumerate(COLUMNS):
        for agent, marker, line in (("t2mir", "o", "-"), ("dense", "s", "--")):
            values = []
            for agents in found.values():
                if agent in agents:
                    values.append(interval(np.mean, seeds_and_tasks(agents[agent], column)))
            mean, low, high = np.array(values).T
            x = shown[agent]
            label = f"{agent}, {column.replace('_', ' ').replace('last', f'episode {episodes}')}"
            style = {"fmt": marker, "color": f"C{i}", "lw": 1, "ms": 4}
            style["label"] = label.replace("t2mir", "T2MIR")
            above.errorbar(x, mean, [mean - low, high - mean], **style)
            above.plot(x[:climbed], mean[:climbed], line, color=f"C{i}", lw=1)
    values = []
    for agents in found.values():
        if "dense" in agents:
            values.append(difference(agents["t2mir"], agents["dense"], "after_1"))
    mean, low, high = np.array(values).T
    below.errorbar(place[has_dense], mean, [mean - low, high - mean], fmt="ko", lw=1, ms=4)
    below.axhline(0, color="k", lw=1)
    above.axhline(1, color="k", ls=":", lw=1)
    above.set(ylabel="score in fresh tasks", title=title)
    above.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.02))
    below.set_ylabel("T2MIR minus dense,\nepisodes 2 to last", fontsize=8)
    names = [in_words(name) for name in found]
    below.set_xticks(place, names, rotation=60, ha="right", fontsize=8)
    return fig


def main(
    command: tyro.conf.Positional[Literal["choose", "measure", "draw"]],
    mode: Literal["dpt", "ad"] = "dpt",
    env: str = "point_robot",
    stair: tuple[str, ...] = (),
    agents: tuple[Literal["t2mir", "dense"], ...] = ("t2mir", "dense"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    fresh_tasks: int = 100,
    steps: int = 0,
    data: str = "data",
    runs: str = "runs",
    table: Path = Path("figures/stairs.csv"),
):
    """Chooses learning rates, measures, or draws.

    Args:
        command: choose (learning rates, with seed 0), measure (in fresh tasks), or draw
        mode: ad or dpt
        env: task family
        stair: names of stairs, by default all of them
        agents: which agents
        seeds: seeds of the training
        fresh_tasks: number of fresh tasks in which the agents act
        steps: training steps, by default those of the preset with DPT, and 2,000 with AD
        data: folder of the dataset
        runs: folder of the runs
        table: CSV file, to which rows are added
    """
    require(fresh_tasks > 1, "--fresh-tasks must be at least 2, because an interval needs two")
    c = t2mir.preset(env, mode, data=data, runs=runs)
    if mode == "ad":
        c = dataclasses.replace(c, steps=2_000, eval_episodes=30)
    if steps > 0:
        c = dataclasses.replace(c, steps=steps)
    if command == "choose":
        climb(c, table, stair, agents, (0,), 0)
    elif command == "measure":
        climb(c, table, stair, agents, seeds, fresh_tasks)
    else:
        found = by_stair(table, env, mode)
        if any(len(agents["t2mir"]) < 3 for agents in found.values()):
            print(FEW_SEEDS)
        print(markdown(found))
        title = f"From the published {mode.upper()} to ours, on {env}"
        save(picture(found, title), table.parent / f"stairs-{env}-{mode}.png")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

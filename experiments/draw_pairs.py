"""Draws the differences between pairs of agents that `compare.py --csv FILE` has written, with their 95% intervals.

    python experiments/draw_pairs.py experiments/results/pairs.csv [--out FOLDER]

`pairs.png` has all of them. On the left the difference of the scores in fresh tasks, on the right that of the held-out
losses, whose axis is turned round: in both panels a point on the right of the line speaks for the first agent of the
pair. The axes are linear from -0.02 to 0.02 and logarithmic outside. A label such as "DPT, 2,500 steps: 45 tasks" has
the name of a group before its colon.

`growth.png` has those whose labels end with a number of tasks or of steps: on the left the difference of the scores
against the number of training tasks, with a curve for each backbone and number of steps, on the right against the
number of steps, with a curve for each backbone and number of tasks.
"""

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import BadInput, require, write_atomically  # noqa: E402

COLORS = {"dpt": "C0", "ad": "C1"}
UNITS = {"training_tasks": "tasks", "steps": "steps"}  # column -> what it counts
LINEAR = 0.02  # half of the range in which the axes are linear


def draw_all(rows):
    """A figure with a line for each of the `rows`."""
    fig = Figure(figsize=(9, 1.4 + 0.28 * len(rows)), layout="tight")
    axes, before = fig.subplots(1, 2, sharey=True), ""
    for i, row in enumerate(rows):
        group = row["label"].split(":")[0]
        for ax, name in zip(axes, ("score", "heldout")):
            middle, low, high = (float(row[f"{name}_{key}"]) for key in ("difference", "low", "high"))
            ax.plot([low, high], [i, i], color=COLORS[row["mode"]], lw=2, solid_capstyle="butt")
            ax.plot(middle, i, "o", color=COLORS[row["mode"]], ms=4)
            if i and group != before:
                ax.axhline(i - 0.5, color="0.85", lw=0.8)
        before = group
    for ax, what in zip(axes, ("score in fresh tasks, episodes 2 to last", "held-out loss, axis turned round")):
        ax.axvline(0, color="k", lw=1)
        ax.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
        ax.margins(x=0.08)
        ax.set_title(what, fontsize=9)
        ax.set_xlabel("difference; on the right the first agent is better", fontsize=8)
        ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1]
        low, high = ax.get_xlim()
        ax.set_xticks([tick for tick in ticks if low <= tick <= high])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.tick_params(labelsize=8)
    pairs = [len(row["seeds"].split()) for row in rows]
    names = [f"{row['label']} ({n} pair{'s' * (n > 1)})" for row, n in zip(rows, pairs)]
    axes[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    axes[1].invert_xaxis()
    for mode, color in COLORS.items():
        axes[1].plot([], [], "o-", color=color, ms=4, label=mode.upper())
    axes[1].legend(fontsize=7)
    return fig


def draw_growth(rows):
    """A figure of the difference against the number of training tasks, and against the number of steps."""
    rows = [row for row in rows if re.search(r"[0-9] (tasks|steps)$", row["label"])]
    fig = Figure(figsize=(9, 3.4), layout="tight")
    for ax, x, other in zip(fig.subplots(1, 2, sharey=True), UNITS, reversed(UNITS)):
        curves = defaultdict(dict)  # (mode, the other number) -> {x: row}
        for row in rows:
            curves[row["mode"], int(row[other])][int(row[x])] = row
        curves = sorted((key, sorted(curve.items())) for key, curve in curves.items() if len(curve) > 1)
        for i, ((mode, number), curve) in enumerate(curves):
            middle, low, high = ([float(row[f"score_{k}"]) for _, row in curve] for k in ("difference", "low", "high"))
            at = [n * 1.04 ** (i - len(curves) / 2) for n, _ in curve]  # side by side, so that bars do not overlap
            bars = [[m - l for m, l in zip(middle, low)], [h - m for m, h in zip(middle, high)]]
            name = f"{mode.upper()}, {number:,} {UNITS[other]}"
            style = dict(color=COLORS[mode], ls=("-", "--", ":")[i % 3], marker="os^D"[i % 4], ms=4, lw=1.2)
            ax.errorbar(at, middle, bars, capsize=2, label=name, **style)
        ticks = sorted({n for _, curve in curves for n, _ in curve})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=90)
        ax.minorticks_off()
        ax.axhline(0, color="k", lw=1)
        ax.set_xlabel(f"training {UNITS[x]}", fontsize=8)
        ax.tick_params(labelsize=8)
        if curves:
            ax.legend(fontsize=7)
    fig.axes[0].set_ylabel("score in fresh tasks:\nT2MIR minus the dense agent", fontsize=8)
    return fig


def main(table: tyro.conf.Positional[Path], out: Path = Path("figures")):
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    require(rows and "score_difference" in rows[0], f"{table} has no row of compare.py")
    for name, draw in (("pairs", draw_all), ("growth", draw_growth)):
        figure = draw(rows)
        write_atomically(out / f"{name}.png", lambda file: figure.savefig(file, dpi=130, format="png"))
        print(f"picture: {out / name}.png")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

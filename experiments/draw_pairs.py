"""Draws the differences between pairs of agents that `compare.py --csv FILE` has written, with their 95% intervals.

    python experiments/draw_pairs.py experiments/results/pairs.csv [--out FILE]

On the left the difference of the scores in fresh tasks, on the right that of the held-out losses, whose axis is turned
round: in both panels a point on the right of the line speaks for the first agent of the pair. The axes are linear from
-0.02 to 0.02 and logarithmic outside. A label such as "training tasks: 45" has the name of a group before its colon.
"""

import csv
import sys
from pathlib import Path

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import BadInput, require, write_atomically  # noqa: E402

COLORS = {"dpt": "C0", "ad": "C1"}
LINEAR = 0.02  # half of the range in which the axes are linear


def main(table: tyro.conf.Positional[Path], out: Path = Path("figures/pairs.png")):
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    require(rows and "score_difference" in rows[0], f"{table} has no row of compare.py")
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
    names = [f"{row['label']} ({len(row['seeds'].split())} pairs)" for row in rows]
    axes[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    axes[1].invert_xaxis()
    for mode, color in COLORS.items():
        axes[1].plot([], [], "o-", color=color, ms=4, label=mode.upper())
    axes[1].legend(fontsize=7)
    write_atomically(out, lambda file: fig.savefig(file, dpi=130, format="png"))
    print(f"picture: {out}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

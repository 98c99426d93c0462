"""Draws the T2MIR layer, with the equations' numbers of t2mir.py, and writes FOLDER/layer.png.

    python experiments/draw_layer.py [--out FOLDER]
"""

import sys
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import BadInput, write_atomically  # noqa: E402

KINDS = {"s": ("state", "#4c78a8"), "a": ("action", "#f58518"), "r": ("reward", "#54a24b"), "q": ("query", "#e45756")}
TOKEN, TASK = "#d6e4f5", "#fde3c8"  # colours of the two mixtures of experts


def box(ax, x, y, width, height, text="", face="white", **style):
    """A box with centre (x, y), and a text in it."""
    corner = (x - width / 2, y - height / 2)
    shape = dict(boxstyle="round,pad=0,rounding_size=0.08", fc=face, ec="0.25", lw=1) | style
    ax.add_patch(FancyBboxPatch(corner, width, height, **shape))
    ax.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(ax, start, end, **style):
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", lw=1.2, color="0.25", shrinkA=0, shrinkB=0) | style)


def mixture(ax, x, name, kind, router, num, chosen, face):
    """One mixture of experts, drawn upwards from y = 1.95 to y = 5.2: router, experts, weighted sum."""
    width = 0.62 * num + 0.4
    box(ax, x, 3.6, width, 3.5, face=face, ec="none")
    ax.text(x, 5.12, name, ha="center", va="center", fontsize=10, weight="bold")
    box(ax, x, 2.35, width - 0.5, 0.55, router)
    for i in range(num):
        at = x + 0.62 * (i - (num - 1) / 2)
        on = i in chosen
        box(ax, at, 3.6, 0.48, 0.62, f"$E_{i + 1}$", "white" if on else "0.93", ec="0.1" if on else "0.75")
        arrow(ax, (at, 2.66), (at, 3.26), color="0.1" if on else "0.8", lw=2 if on else 0.8)
        if on:
            arrow(ax, (at, 3.94), (x, 4.5), lw=2, color="0.1")
    total = f"$\\sum_i w_i E^{{{kind}}}_i(h)$ of 2 experts, $d/2$ wide"
    ax.text(x, 4.72, total, ha="center", va="center", fontsize=9)


def main(out: Path = Path("figures")):
    fig = Figure(figsize=(9.6, 5.4), layout="tight")
    ax = fig.subplots()
    for i, kind in enumerate("sarsarsarqq"):
        box(ax, 2.6 + 0.55 * i + 0.3 * (kind == "q"), 0.3, 0.45, 0.45, f"${kind}$", KINDS[kind][1] + "55")
    for i, (name, color) in enumerate(KINDS.values()):
        ax.text(9.5, 0.62 - 0.3 * i, f"■ {name}", color=color, fontsize=9, va="center")
    ax.text(2.2, 0.3, "context, queries", ha="right", va="center", fontsize=9)
    box(ax, 5.5, 1.15, 7.2, 0.5, "attention, then layer norm: $h$, one vector of width $d$ for each token")
    arrow(ax, (5.5, 0.6), (5.5, 0.88))
    mixture(ax, 2.6, "token-wise MoE (1)", "tok", "router $G_{tok}(h)$ + noise", 6, (1, 4), TOKEN)
    mixture(ax, 8.2, "task-wise MoE (3)", "task", "router $G_{task}(\\bar{h})$", 8, (2, 5), TASK)
    arrow(ax, (2.6, 1.42), (2.6, 2.04))
    arrow(ax, (8.2, 1.42), (8.2, 2.04))
    ax.text(8.35, 1.62, "$\\bar{h}$: mean of $h$ over\nthe tokens so far", fontsize=8, va="center")
    ax.text(2.75, 1.62, "$h$ of this token", fontsize=8, va="center")
    box(ax, 5.5, 5.95, 4.2, 0.5, "concatenation, $d$ wide, plus the residual (5)")
    arrow(ax, (5.09, 1.42), (5.09, 5.67))
    label = dict(ha="center", va="center", fontsize=8, rotation=90, backgroundcolor="white")
    ax.text(5.09, 3.6, "residual, before the norm", **label)
    arrow(ax, (2.6, 5.38), (3.9, 5.67))
    arrow(ax, (8.2, 5.38), (7.1, 5.67))
    of_token, of_task = dict(fontsize=9, va="center", color="#30577f"), dict(fontsize=9, va="center", color="#9a5a12")
    ax.text(0.2, 6.0, "balance loss (2): all\nexperts are used alike", **of_token)
    ax.text(8.4, 6.0, "InfoNCE (4): two sequences of\none task have similar logits", **of_task)
    ax.set(xlim=(0, 11.1), ylim=(-0.4, 6.35))
    ax.axis("off")
    write_atomically(out / "layer.png", lambda file: fig.savefig(file, dpi=130, format="png"))
    print(f"picture: {out / 'layer.png'}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

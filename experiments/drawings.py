"""Draws the T2MIR layer and the attention masks: FOLDER/layer.png and FOLDER/masks.png.

    python experiments/drawings.py --out figures

The layer has the numbers of the equations in t2mir.py. The masks are those of small batches that
the functions of t2mir.py make, one of the published AD and one of DPT.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import run_command
from experiments.figures import save

COLORS = {
    "state": "#4c78a8",
    "action": "#f58518",
    "reward": "#54a24b",
    "query": "#e45756",
}
DARK = "0.1"
GREY = "0.25"
MIDDLE = {"ha": "center", "va": "center"}


def box(ax, x, y, width, height, text="", face="white", edge=GREY):
    """A box with centre (x, y), and a text in it."""
    corner = (x - width / 2, y - height / 2)
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, fc=face, ec=edge, lw=1))
    ax.text(x, y, text, fontsize=9, **MIDDLE)


def arrow(ax, x, y, to_x, to_y, color=GREY, lw=1.2):
    """An arrow from (x, y) to (to_x, to_y)."""
    style = {"arrowstyle": "-|>", "lw": lw, "color": color, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (to_x, to_y), (x, y), arrowprops=style)


def mixture(ax, x, name, kind, router, num, chosen, side):
    """One mixture of experts, from y = 1.95 to y = 5.2: router, experts, weighted sum.

    h enters the experts at the left (side = -1) or at the right (side = 1).
    """
    width = 0.62 * num + 0.4
    box(ax, x, 3.6, width, 3.5, face="0.92", edge="none")
    lane = x + side * (width / 2 - 0.12)
    ax.plot([lane, lane], [1.42, 3.6], color=GREY, lw=1.2)
    arrow(ax, lane, 3.6, x + side * (0.31 * num - 0.07), 3.6)
    ax.text(lane - side * 0.14, 2.93, "$h$", fontsize=9, **MIDDLE)
    ax.text(x, 5.12, name, fontsize=10, weight="bold", **MIDDLE)
    box(ax, x, 2.35, width - 0.5, 0.55, router)
    for i in range(num):
        at = x + 0.62 * (i - (num - 1) / 2)
        text = f"$E_{i}$"
        if i in chosen:
            box(ax, at, 3.6, 0.48, 0.62, text, "white", DARK)
            arrow(ax, at, 2.66, at, 3.26, DARK, 2)
            arrow(ax, at, 3.94, x, 4.5, DARK, 2)
        else:
            box(ax, at, 3.6, 0.48, 0.62, text, "0.86", "0.7")
            arrow(ax, at, 2.66, at, 3.26, "0.7", 0.8)
    total = f"$\\sum_i w_i E^{{{kind}}}_i(h)$ of the best 2, $d/2$ wide"
    ax.text(x, 4.72, total, fontsize=9, **MIDDLE)


def draw_tokens(ax):
    """A row of tokens and its legend."""
    ax.text(2.2, 0.3, "context, queries", ha="right", va="center", fontsize=9)
    note = "In the last block no expert computes the context: its routing is for the losses (2) and (4)"
    ax.text(0.2, -0.3, note, va="center", fontsize=8)
    kinds = 3 * ["state", "action", "reward"] + 2 * ["query"]
    for i, kind in enumerate(kinds):
        x = 2.6 + 0.55 * i
        if kind == "query":
            x += 0.3
        box(ax, x, 0.3, 0.45, 0.45, f"${kind[0]}$", COLORS[kind] + "55")
    for i, (kind, color) in enumerate(COLORS.items()):
        ax.text(9.5, 0.62 - 0.3 * i, f"■ {kind}", color=color, fontsize=9, va="center")


def small_batch(mode, K, T, queries):
    """A Batch of two tasks, made by the published recipe from K episodes of T steps with zeros."""
    c = t2mir.preset("point_robot", mode, "paper", batch=4, context=K, queries=queries)
    N, E = 2, K + 1
    x = {name: torch.zeros(N, E, T, 2) for name in ("states", "actions", "expert_actions")}
    x["rewards"] = torch.zeros(N, E, T)
    x["tasks"] = torch.arange(N)
    x["by_return"] = torch.arange(E).expand(N, E)
    x["guest"] = torch.zeros(E, dtype=torch.bool)
    x["own"] = torch.arange(E)
    return t2mir.DRAW_BATCH[mode](c, x, 0, c.batch)


def draw_mask(ax, batch, T, title):
    """Which tokens (columns) a token (row) sees, in the first sequence of a batch."""
    S = batch.context.rewards.shape[1]
    Q = batch.seen.shape[1]
    n = 3 * S
    causal = torch.ones(n, n + Q).tril().bool()
    sees = torch.cat([causal, t2mir.who_sees_what(n, 3 * batch.seen)[0]])
    kinds = S * ["state", "action", "reward"] + Q * ["query"]
    for row, column in sees.nonzero().tolist():
        color = COLORS[kinds[column]]
        ax.add_patch(Rectangle((column, row), 1, 1, fc=color, ec="white", lw=0.5))
    names = [f"${kinds[i][0]}_{{{i // 3 + 1}}}$" for i in range(n)]
    names += [f"$q_{{{i + 1}}}$" for i in range(Q)]
    for episode in range(1, S // T):
        ax.axvline(3 * T * episode, color=DARK, lw=1)
        ax.axhline(3 * T * episode, color=DARK, lw=1)
    ax.axvline(n, color=DARK, lw=2)
    ax.axhline(n, color=DARK, lw=2)
    ax.set(xlim=(0, n + Q), ylim=(n + Q, 0), aspect="equal")
    ax.set_title(title, fontsize=11, pad=10)
    middle = [i + 0.5 for i in range(n + Q)]
    ax.set_xticks(middle, names, fontsize=9)
    ax.set_yticks(middle, names, fontsize=9)
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    ax.set_xlabel("... this token?", fontsize=9)
    ax.set_ylabel("does this token see ...", fontsize=9)


def draw_masks():
    """The masks of the published AD and of DPT beside each other."""
    torch.manual_seed(0)
    fig = Figure(figsize=(12, 6.7), layout="tight")
    left, right = fig.subplots(1, 2)
    title = "AD as published: queries repeat the context's states.\n"
    title += "A query sees the steps before its own"
    draw_mask(left, small_batch("ad", 2, 3, 1), 3, title)
    title = "DPT: queries are states of other episodes.\n"
    title += "A query sees a random number of the prompt's steps"
    draw_mask(right, small_batch("dpt", 1, 6, 6), 6, title)
    for i, (kind, color) in enumerate(COLORS.items()):
        fig.text(0.36 + 0.08 * i, 0.015, f"■ {kind}", color=color, fontsize=11)
    return fig


def draw_layer():
    """The layer: two routers, their experts, and the concatenation."""
    fig = Figure(figsize=(9.6, 5.4), layout="tight")
    ax = fig.subplots()
    ax.set(xlim=(0, 11.1), ylim=(-0.4, 6.35))
    ax.axis("off")
    draw_tokens(ax)
    arrow(ax, 5.5, 0.6, 5.5, 0.88)
    text = "attention, then layer norm: $h$, one vector of width $d$ for each token"
    box(ax, 5.5, 1.15, 7.2, 0.5, text)

    arrow(ax, 2.6, 1.42, 2.6, 2.04)
    ax.text(2.75, 1.62, "$h$ of this token", fontsize=8, va="center")
    router = "router $G_{tok}(h)$ + noise in training"
    mixture(ax, 2.6, "token-wise MoE (1)", "tok", router, 6, (1, 4), 1)
    balance = "balance loss (2): all\nexperts are used alike"
    ax.text(0.2, 6.0, balance, fontsize=9, va="center")

    arrow(ax, 8.2, 1.42, 8.2, 2.04)
    ax.text(8.35, 1.62, "$m$: mean of $h$ over the\ntokens that it sees", fontsize=8, va="center")
    router = "router $G_{task}(m)$"
    mixture(ax, 8.2, "task-wise MoE (3)", "task", router, 8, (2, 5), -1)
    info_nce = "InfoNCE (4): two sequences of one\ntask have similar logits, others not"
    ax.text(8.4, 6.0, info_nce, fontsize=9, va="center")

    box(ax, 5.5, 5.95, 4.2, 0.5, "concatenation, $d$ wide, plus the residual (5)")
    arrow(ax, 2.6, 5.38, 3.9, 5.67)
    arrow(ax, 8.2, 5.38, 7.1, 5.67)
    arrow(ax, 5.09, 1.42, 5.09, 5.67)
    residual = "residual, before the norm"
    ax.text(5.09, 3.6, residual, fontsize=8, rotation=90, backgroundcolor="white", **MIDDLE)
    return fig


def main(out: Path = Path("figures")):
    """Draws.

    Args:
        out: folder of the pictures
    """
    save(draw_layer(), out / "layer.png")
    save(draw_masks(), out / "masks.png")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

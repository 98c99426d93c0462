"""Do the gradients of different tasks conflict? Their cosine similarity between Point-Robot's quadrants (Fig. 8).

    python experiments/gradients.py RUN [RUN ...] [--out FOLDER]

A quadrant's gradient is that of the action loss on its training tasks, with respect to the last T2MIR layer of the
agent, or to the dense layer there. The goals of quadrants I and III lie in opposite directions. The cosines of all runs
with the same backbone and the same MoEs are averaged. Writes FOLDER/gradients.png.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput, write_atomically  # noqa: E402
from experiments.fresh_tasks import open_run  # noqa: E402

BATCHES = 20  # of a gradient
QUADRANTS = {"I": (1, 1), "II": (-1, 1), "III": (-1, -1), "IV": (1, -1)}  # signs of the goal's x and y


def cosines(run):
    """Cosine similarities (4, 4) of the quadrants' gradients, and the agent's name."""
    model, data, train, _ = open_run(run)  # in evaluation mode: no dropout and no noise in the routers
    c = model.config
    if c.env != "point_robot":
        raise BadInput(f"{run} is of {c.env}: quadrants are those of point_robot")
    block, gradients = model.blocks[max(c.moe_blocks)], []
    parameters = [p for p in (block.moe or block.mlp).parameters() if p.requires_grad]
    for name, signs in QUADRANTS.items():
        members = train & (np.sign(data["tasks"]) == signs).all(1)
        if not members.any():
            raise BadInput(f"{run} has no training task in quadrant {name}")
        x, loss = t2mir.tensors(data, members, c.device), 0.0
        for i in range(BATCHES):
            torch.manual_seed(i)
            loss = loss + model(t2mir.BACKBONES[c.mode].batch(c, x, i, 2 * int(members.sum())))["action"]
        of_quadrant = torch.autograd.grad(loss, parameters, allow_unused=True)  # InfoNCE's W has no part in acting
        gradients.append(torch.cat([g.flatten() for g in of_quadrant if g is not None]))
    g = F.normalize(torch.stack(gradients), dim=1)
    moes = [name for name, on in (("token", c.token_moe), ("task", c.task_moe)) if on]
    agent = c.mode.upper() if not moes else f"T2MIR-{c.mode.upper()}" + f", {moes[0]} MoE only" * (len(moes) == 1)
    return g @ g.T, agent


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("figures")):
    if not runs:
        raise BadInput("name at least one run of point_robot")
    agents = {}
    for run in runs:
        similarity, agent = cosines(run)
        agents.setdefault(agent, []).append(similarity)
    fig, others = Figure(figsize=(3.2 * len(agents), 3.4)), ~torch.eye(4, dtype=torch.bool)
    for ax, (agent, similarities) in zip(fig.subplots(1, len(agents), squeeze=False)[0], agents.items()):
        mean = torch.stack(similarities).mean(0)
        ax.imshow(mean, vmin=-1, vmax=1, cmap="RdBu_r")
        for i in range(4):
            for j in range(4):
                ax.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=8)
        ax.set(xticks=range(4), yticks=range(4), xticklabels=QUADRANTS, yticklabels=QUADRANTS)
        ax.set(title=f"{agent}: {mean[others].mean():.2f}")
        of_runs = ", ".join(f"{s[others].mean():.3f}" for s in similarities)
        print(f"{agent}: cosine of quadrants I and III {mean[0, 2]:.3f}, ", end="")
        print(f"mean of all pairs {mean[others].mean():.3f} (runs: {of_runs})")
    fig.tight_layout()
    write_atomically(out / "gradients.png", lambda file: fig.savefig(file, dpi=150, format="png"))
    print(f"picture: {out / 'gradients.png'}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

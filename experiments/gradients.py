"""Do the gradients of different tasks conflict? Their cosine similarity on Point-Robot (Fig. 8).

    python experiments/gradients.py RUN [RUN ...]

A quadrant's gradient is that of the action loss in its training tasks, with respect to the last
T2MIR layer, or to the dense layer there. The goals of quadrants I and III lie in opposite
directions. The cosines of all runs with the same mode and the same MoEs are averaged. The picture
is FOLDER/gradients.png.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command, write_atomically
from experiments.compare import append, commit
from experiments.report import open_run

BATCHES = 20  # of a gradient
QUADRANTS = {"I": (1, 1), "II": (-1, 1), "III": (-1, -1), "IV": (1, -1)}  # signs of a goal's x, y


def cosines(model, data, groups, batches=BATCHES):
    """Cosine similarities of the gradients of groups of tasks, (G, G); `groups` are masks (N,).

    A gradient is that of the action loss with respect to the model's last T2MIR layer, or to the
    dense layer there. The model must be in evaluation mode, without dropout and noise.
    """
    c = model.config
    last = max(i % c.n_layers for i in c.moe_layers)
    layer = model.blocks[last].moe or model.blocks[last].mlp
    parameters = [p for p in layer.parameters() if p.requires_grad]
    gradients = []
    for members in groups:
        x = t2mir.to_tensors(data, members)
        loss = 0
        for i in range(batches):
            torch.manual_seed(i)
            batch = t2mir.DRAW_BATCH[c.mode](c, x, i, 2 * int(members.sum()))
            batch = batch.to(model.state_statistics.device)
            outputs, _ = model.predict(batch)
            loss = loss + model.policy.loss(outputs, batch.targets)
        # InfoNCE's W and the noise of the token router have no part in acting.
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(torch.cat([part.flatten() for part in parts if part is not None]))
    g = F.normalize(torch.stack(gradients), dim=1)
    return g @ g.T


def cosines_of_quadrants(run):
    """The `cosines` of the gradients of the quadrants, (4, 4), at the end of a run."""
    model, data, train_tasks, _ = open_run(run)
    env = model.config.env
    require(env == "point_robot", f"{run} is of {env}: quadrants are those of point_robot")
    groups = []
    for name, signs in QUADRANTS.items():
        members = train_tasks & (np.sign(data["tasks"]) == signs).all(1)
        require(members.any(), f"{run} has no training task in quadrant {name}")
        groups.append(members)
    return cosines(model, data, groups)


def agent_name(run):
    """The mode of a run, and which MoEs it has."""
    config = t2mir.read_checkpoint(run)["config"]
    mode = config["mode"].upper()
    if config["token_moe"] and config["task_moe"]:
        return f"T2MIR-{mode}"
    if config["token_moe"]:
        return f"T2MIR-{mode}, token MoE only"
    if config["task_moe"]:
        return f"T2MIR-{mode}, task MoE only"
    return mode


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("figures"),
    csv: Path | None = None,
):
    """Prints the cosines of each agent and draws them.

    Args:
        runs: folders of runs of point_robot
        out: folder of the picture
        csv: file to which a row for each run is added
    """
    require(runs, "name at least one run of point_robot")
    agents = defaultdict(list)
    others = ~torch.eye(4, dtype=torch.bool)
    for run in runs:
        similarity = cosines_of_quadrants(run)
        agents[agent_name(run)].append(similarity)
        if csv is not None:
            saved = t2mir.read_checkpoint(run)
            row = {"agent": agent_name(run)}
            row |= {name: saved["config"][name] for name in (*t2mir.PAPER, "steps", "lr", "seed")}
            row |= {"I_and_III": similarity[0, 2].item(), "mean": similarity[others].mean().item()}
            append(csv, row | {"dataset": saved["fingerprint"][:8], "commit": commit()})
    fig = Figure(figsize=(3.2 * len(agents), 3.4))
    axes = fig.subplots(1, len(agents), squeeze=False)[0]
    for ax, (agent, similarities) in zip(axes, agents.items()):
        mean = torch.stack(similarities).mean(0)
        ax.imshow(mean, vmin=-1, vmax=1, cmap="RdBu_r")
        for i in range(4):
            for j in range(4):
                ax.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=8)
        ax.set_xticks(range(4), QUADRANTS)
        ax.set_yticks(range(4), QUADRANTS)
        ax.set_title(f"{agent}: {mean[others].mean():.2f}", fontsize=10)
        by_run = ", ".join(f"{similarity[others].mean():.3f}" for similarity in similarities)
        print(f"{agent}: cosine of quadrants I and III {mean[0, 2]:.3f}, ", end="")
        print(f"mean of all pairs {mean[others].mean():.3f} (runs: {by_run})")
    fig.tight_layout()
    path = out / "gradients.png"
    write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

"""Are the stored labels the experts' actions? Clones of them, one a task, must earn what the experts earn.

    python experiments/clone_experts.py data/cheetah_vel.npz [--steps 4000]

Each clone is fitted to its task's (state, expert action) pairs by least squares alone, and then plays 20 episodes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import BadInput, BatchedMLP, average_return, load  # noqa: E402
from envs import ENVS  # noqa: E402


class Clones(nn.Module):
    """A network per task, from states (N, M, obs_dim) to actions."""

    def __init__(self, states, act_dim):
        super().__init__()
        self.mean, self.std = states.mean(1, keepdim=True), states.std(1, keepdim=True) + 0.01
        self.net = BatchedMLP(len(states), (states.shape[-1], 128, 128, act_dim))

    def act(self, states):
        return torch.tanh(self.net((states - self.mean) / self.std)), None


def main(path: tyro.conf.Positional[Path], steps: int = 4000):
    torch.manual_seed(0)
    data, name = load(path), path.stem
    if name not in ENVS or not {"tasks", "expert_actions", "expert_return", "random_return"} <= data.keys():
        raise BadInput(f"{path} is not a dataset that collect.py has made")
    states, labels = (torch.as_tensor(data[key]).flatten(1, 2) for key in ("states", "expert_actions"))  # (N, E * T, .)
    clones = Clones(states, labels.shape[-1])
    optimizer = torch.optim.Adam(clones.parameters(), lr=1e-3, fused=True)
    row = torch.arange(len(states))[:, None]
    for step in trange(steps, desc="clone", disable=None):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        pick = torch.randint(states.shape[1], (len(states), 128))
        loss = (clones.act(states[row, pick])[0] - labels[row, pick]).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    random, expert = data["random_return"], data["expert_return"]
    cloned = average_return(name, data["tasks"], clones, 20, 2, "cpu")
    score = (cloned - random) / np.where(expert > random, expert - random, np.nan)
    print(f"{name}: mean squared error of an action {loss.item() / len(states):.4f}")
    print(f"return, mean over tasks: random {random.mean():.1f}, expert {expert.mean():.1f}, clone {cloned.mean():.1f}")
    print(f"(clone - random) / (expert - random): mean {np.nanmean(score):.3f}, ", end="")
    print(f"median {np.nanmedian(score):.3f}, worst {np.nanmin(score):.3f}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

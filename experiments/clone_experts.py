"""Are the stored labels the experts' actions? Clones of them, one a task, must earn what the experts earn.

    python experiments/clone_experts.py data/cheetah_vel.npz [STEPS]

Each clone is fitted to its task's (state, expert action) pairs by least squares alone, in STEPS steps (4000), and then
plays 20 episodes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import BatchedMLP, average_return, load  # noqa: E402


class Clones(nn.Module):
    def __init__(self, states, labels):
        super().__init__()
        self.mean, self.std = states.mean(1, keepdim=True), states.std(1, keepdim=True) + 0.01
        self.net = BatchedMLP(len(states), (states.shape[-1], 128, 128, labels.shape[-1]))

    def act(self, states):
        return torch.tanh(self.net((states - self.mean) / self.std)), None


torch.manual_seed(0)
data = load(sys.argv[1])
states, labels = (torch.as_tensor(data[key]).flatten(1, 2) for key in ("states", "expert_actions"))  # (N, E * T, .)
clones = Clones(states, labels)
optimizer = torch.optim.Adam(clones.parameters(), lr=1e-3, fused=True)
row = torch.arange(len(states))[:, None]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 4000
for step in trange(steps, desc="clone", disable=None):
    optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
    pick = torch.randint(states.shape[1], (len(states), 128))
    loss = (clones.act(states[row, pick])[0] - labels[row, pick]).square().mean((1, 2)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
name, random, expert = Path(sys.argv[1]).stem, data["random_return"], data["expert_return"]
cloned = average_return(name, data["tasks"], clones, 20, 2, "cpu")
score = (cloned - random) / (expert - random)
print(f"{name}: mean squared error of an action {loss.item() / len(states):.4f}")
print(f"return, mean over tasks: random {random.mean():.1f}, expert {expert.mean():.1f}, clone {cloned.mean():.1f}")
print(f"(clone - random) / (expert - random): mean {score.mean():.3f}, median {np.median(score):.3f}, ", end="")
print(f"worst {score.min():.3f}")

"""Clones of the experts' labels, fitted by least squares alone: do they earn what the experts earn?

    python experiments/clone_experts.py data/cheetah_vel.npz [--steps 4000]
    python experiments/clone_experts.py data/walker_param.npz --shared [--steps 4000]

The first command fits a clone to each task's own pairs of state and expert action, and lets it act in 20 episodes. If
the labels are the experts' actions, it earns what the expert earns. The second command estimates what there is
to gain from inferring the task, which is not a bound. It fits two clones to all training tasks at once: one sees the
state alone, the other is told the task as well. If both earn the same, there is nothing to infer.
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

    def act(self, states, noise=None):
        return torch.tanh(self.net((states - self.mean) / self.std)), None


class SharedClone(nn.Module):
    """One network for all tasks, which sees states (N, M, obs_dim) and what it is `told` of each task, (N, n)."""

    def __init__(self, states, act_dim, told):
        super().__init__()
        self.mean, self.std, self.told = states.mean((0, 1)), states.std((0, 1)) + 0.01, told
        self.net = BatchedMLP(1, (states.shape[-1] + told.shape[1], 256, 256, act_dim))

    def act(self, states, noise=None):
        told = self.told[: len(states), None].expand(-1, states.shape[1], -1)
        x = torch.cat([(states - self.mean) / self.std, told], dim=-1)
        return torch.tanh(self.net(x.flatten(0, 1)[None])).view(*states.shape[:2], -1), None


def fit(clone, states, labels, steps, text):
    """Fits `clone` to the labels (N, M, act_dim) of states (N, M, obs_dim); prints the last mean squared error."""
    optimizer = torch.optim.Adam(clone.parameters(), lr=1e-3, fused=True)
    row = torch.arange(len(states))[:, None]
    for step in trange(steps, desc="clone", disable=None):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        pick = torch.randint(states.shape[1], (len(states), 128))
        loss = (clone.act(states[row, pick])[0] - labels[row, pick]).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{text}: mean squared error of an action {loss.item() / len(states):.4f}")


def main(path: tyro.conf.Positional[Path], steps: int = 4000, shared: bool = False):
    torch.manual_seed(0)
    data, name = load(path), path.stem
    if name not in ENVS or not {"tasks", "expert_actions", "expert_return", "random_return"} <= data.keys():
        raise BadInput(f"{path} is not a dataset that collect.py has made")
    order = np.argsort(data["test"], kind="stable")  # training tasks first
    states, labels = (torch.as_tensor(data[k][order]).flatten(1, 2) for k in ("states", "expert_actions"))
    tasks, random, expert = (data[k][order] for k in ("tasks", "random_return", "expert_return"))
    N, train = len(states), int((~data["test"]).sum())
    clones = {"a clone per task": Clones(states, labels.shape[-1])}
    groups = {f"{N} tasks": slice(None)}
    if shared:
        told = torch.as_tensor(np.log(tasks) if name == "walker_param" else tasks, dtype=torch.float32)
        told = (told - told[:train].mean(0)) / told[:train].std(0)
        clones = {
            "one clone, told the state alone": SharedClone(states[:train], labels.shape[-1], told[:, :0]),
            "one clone, told the task as well": SharedClone(states[:train], labels.shape[-1], told),
        }
        groups = {f"{train} training tasks": slice(train), f"{N - train} test tasks": slice(train, None)}
    for text, clone in clones.items():
        n = train if shared else N
        fit(clone, states[:n], labels[:n], steps, text)
        cloned = average_return(name, tasks, clone, 20, 2, "cpu")
        score = (cloned - random) / np.where(expert > random, expert - random, np.nan)
        for group, of in groups.items():
            print(f"  {group}: return random {random[of].mean():.1f}, expert {expert[of].mean():.1f}, ", end="")
            print(f"clone {cloned[of].mean():.1f}; score of the clone: mean {np.nanmean(score[of]):.3f}, ", end="")
            print(f"median {np.nanmedian(score[of]):.3f}, worst {np.nanmin(score[of]):.3f}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

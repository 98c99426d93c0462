"""How much is there to gain from inferring the task? A clone of the expert, with and without it.

    python experiments/clone_experts.py data/cheetah_vel.npz --steps 2000
    python experiments/clone_experts.py data/walker_param.npz --steps 4000

A network is fitted by least squares to the expert's actions in all training tasks, and then acts in
20 episodes of each task. It sees the state alone, or it is told the task as well. If both earn the
same, there is nothing to infer. The difference is an estimate and not a bound.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import average_return, has_score, load, require, run_command


class Clone(nn.Module):
    """One network for all tasks, which sees states and what it is `told` of each task, (N, n)."""

    def __init__(self, states, act_dim, told):
        super().__init__()
        self.mean = states.mean((0, 1))
        self.std = states.std((0, 1)) + 0.01
        self.told = told
        self.net = nn.Sequential(
            nn.Linear(states.shape[-1] + told.shape[1], 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, act_dim),
        )

    def act(self, states, task):
        """Actions for states (..., obs_dim) of tasks (...), and None, as `SAC.act` without noise."""
        x = torch.cat([(states - self.mean) / self.std, self.told[task]], dim=-1)
        return torch.tanh(self.net(x)), None


def fit(clone, states, labels, steps):
    """Fits a clone to the labels (N, M, act_dim) of states (N, M, obs_dim)."""
    optimizer = torch.optim.Adam(clone.parameters(), lr=1e-3, fused=True)
    task = torch.arange(len(states))[:, None].expand(-1, 128)
    for step in trange(steps, desc="clone", disable=None):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        pick = torch.randint(states.shape[1], (len(states), 128))
        actions, _ = clone.act(states[task, pick], task)
        loss = (actions - labels[task, pick]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(dataset: tyro.conf.Positional[Path], steps: int = 4000):
    """Fits both clones, lets them act, and prints their scores.

    Args:
        dataset: a dataset of a family of envs.py
        steps: gradient steps of each clone
    """
    torch.manual_seed(0)
    data = load(dataset)
    family = dataset.stem
    usable = data["simulator"] and "expert_actions" in data
    require(usable, f"{dataset} is not a dataset that collect.py has made")
    order = np.argsort(data["test"], kind="stable")  # training tasks first
    train = int((~data["test"]).sum())
    states = torch.from_numpy(data["states"][order]).float().flatten(1, 2)  # (N, E * T, obs_dim)
    labels = torch.from_numpy(data["expert_actions"][order]).flatten(1, 2)
    tasks = data["tasks"][order]
    random_return = data["random_return"][order]
    expert_return = data["expert_return"][order]
    scored = has_score(random_return, expert_return)
    gain = np.where(scored, expert_return - random_return, np.nan)

    rows = tasks
    if family == "walker_param":
        rows = np.log(tasks)  # of multipliers
    told = torch.from_numpy(rows).float()
    told = (told - told[:train].mean(0)) / told[:train].std(0)
    for name, seen in (("the state alone", told[:, :0]), ("the task as well", told)):
        clone = Clone(states[:train], labels.shape[-1], seen)
        fit(clone, states[:train], labels[:train], steps)
        score = (average_return(family, tasks, clone, 20, 2, "cpu") - random_return) / gain
        print(
            f"a clone that sees {name}: mean score {np.nanmean(score[:train]):.3f} in the ", end=""
        )
        print(f"training tasks, {np.nanmean(score[train:]):.3f} in the test tasks")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

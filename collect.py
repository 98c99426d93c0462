"""Collects learning histories: one SAC agent per task, all agents trained as one batch. Writes `data/ENV.npz`.

    python collect.py --env point_robot

Every network has a leading agent dimension, so one call computes all 250 agents (60 on MuJoCo), without a loop.
The file holds N tasks with E stored episodes of T steps each, in any type of number; float32 is what is used:

    states           (N, E, T, obs_dim)   E whole episodes in the order in which the agent experienced them
    actions          (N, E, T, act_dim)   the actions taken, in [-1, 1]
    rewards          (N, E, T)
    test             (N,) bool            tasks that in-context training never sees: some of the tasks, but not all
    expert_actions   (N, E, T, act_dim)   what the trained agent does in `states`, without noise: DPT's targets
    learner_actions  (N, E, T, act_dim)   what the agent of that moment would have done, without noise: AD's targets,
                                          which are `actions` where this array is missing
    guest            (E,) bool            episodes in which the agent of a random task acted, mostly another one
    tasks            (N, task_dim)        float64, one row per task, see envs.py
    random_return    (N,) float64         mean return of uniformly random actions: a score of 0
    expert_return    (N,) float64         mean return of the trained agent without noise: a score of 1
    info             str                  JSON: the settings and the library versions

The first four arrays are enough for AD, with `expert_actions` for DPT as well. The last four are for tasks of envs.py.
"""

import argparse
import copy
import ctypes
import dataclasses
import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from envs import ENVS, make_vec, sample_tasks

SAVE_EVERY = 300  # seconds between saves of an unfinished collection
PROGRESS = {"unit": "round", "mininterval": 0.1 if sys.stderr.isatty() else 30}  # seconds: fewer lines in a log file

# Makes glibc keep large freed blocks: page faults of new tensors would cost a quarter of an update of 60 agents.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD

# ---- Files: written atomically, used by one process at a time, checked when they are read ----------------------------
class BadInput(ValueError):
    """Input that cannot work. The message is one line that says what is wrong and what to do."""
def require(condition, message):
    """Raises BadInput with `message` unless `condition` holds."""
    if not condition:
        raise BadInput(message)

def write_atomically(path, write):
    """Calls write(file) on a temporary file and renames it to `path`, which is always the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({str(error).splitlines()[0]})") from None

@contextmanager
def claim(path):
    """Keeps other processes away from `path` in a `with` block. Raises BadInput if another process has claimed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise BadInput(f"{path} is in use by another process: wait for it, or choose another name") from None

def load(path):
    """Reads and checks a dataset; returns a dict: its arrays, the file's `fingerprint`, and if there is a `simulator`.

    Raises BadInput if the file is missing or damaged, or if an array is missing or is not what it should be.
    """
    path = Path(path)
    require(path.exists(), f"{path} is missing: run collect.py, or write the arrays that are listed at its beginning")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            data = dict(arrays, fingerprint=hashlib.sha256(path.read_bytes()).hexdigest())
    except Exception as error:  # a damaged file can raise almost anything
        raise BadInput(f"{path} is damaged or not a dataset ({(str(error) or repr(error)).splitlines()[0]})") from None
    shapes = dict(states="N E T obs", actions="N E T act", rewards="N E T", test="N", expert_actions="N E T act",
                  learner_actions="N E T act", guest="E", random_return="N", expert_return="N")
    for name in ("states", "actions", "rewards", "test"):
        require(name in data, f"{path} has no array `{name}`: collect.py begins with the list of arrays")
        x, full = data[name], data[name].size > 0 and data[name].ndim == len(shapes[name].split())
        require(full, f"{path}: `{name}` must have shape ({shapes[name]}), all at least 1, not {x.shape}")
    sizes = dict(zip("NET", data["rewards"].shape), obs=data["states"].shape[-1], act=data["actions"].shape[-1])
    if family := ENVS.get(path.stem):
        sizes |= dict(T=family.horizon, obs=family.obs_dim, act=family.act_dim, task=family.task_dim)
        shapes["tasks"] = "N task"
    types = dict(test=bool, guest=bool, tasks=float, random_return=float, expert_return=float)  # the others are float32
    for name in [name for name in shapes if name in data]:
        x, shape = data[name], tuple(sizes[size] for size in shapes[name].split())
        require(x.shape == shape, f"{path}: `{name}` must have shape ({shapes[name]}) = {shape}, not {x.shape}")
        require(x.dtype.kind in "fiub", f"{path}: `{name}` must hold numbers, not {x.dtype}")
        require((largest := float(abs(x).max())) < 3e38, f"{path}: `{name}` has non-finite values in float32")
        inside = "actions" not in name or largest <= 1 + 1e-6
        require(inside, f"{path}: `{name}` must lie in [-1, 1]: divide by the largest action of your robot")
        data[name] = x.astype(types.get(name, np.float32))
    require(0 < data["test"].sum() < len(data["test"]), f"{path}: `test` must mark some of the tasks, but not all")
    return data | {"simulator": path.stem in ENVS and {"tasks", "random_return", "expert_return"} <= data.keys()}

# ---- Settings --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Settings:
    """What a collection depends on. PRESETS has what differs by environment."""
    env: str = "point_robot"  # task family: a name in ENVS
    steps: int = 3_300  # environment steps of each copy (whole episodes); after the random steps, one update per step
    copies: int = 4  # copies of its environment in which each agent acts
    hidden: int = 64  # width of the two hidden layers of actor and critics
    batch: int = 64  # transitions in an update of one agent
    lr: float = 1.5e-3  # Adam's learning rate, which falls to zero over the last quarter of the run
    gamma: float = 0.9  # discount factor
    n_step: int = 1  # rewards summed before the target critics are asked for the rest
    recency: float = 1.0  # 1 draws all stored steps equally often; larger values draw recent steps more often
    tau: float = 0.02  # fraction by which the target critics move towards the critics in each update
    temperature: float = 0.02  # weight of the policy's entropy, in units of reward
    critic_norm: bool = True  # layer norm in the critics: more stable and slower
    random_steps: int = 800  # steps with uniformly random actions before learning starts
    train_tasks: int = 200  # tasks to train in-context agents on
    test_tasks: int = 50  # tasks held out for their evaluation
    episodes: int = 400  # episodes stored per task, evenly spaced over the history; at most those that were made
    history: float = 0.667  # part of the run that is stored; in the rest the agents only become better experts
    seed: int = 0  # random seed, which also draws the tasks
    device: str = "auto"  # cpu, cuda, or auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of the hidden layers' matrix products
    out: str = "data"  # folder of the dataset

    def __post_init__(self):
        self.device = pick_device(self.device)
        if self.dtype == "auto":  # bfloat16 where the hardware has instructions for its matrix products
            cpu, gpu = torch.cpu.get_capabilities(), self.device != "cpu"
            self.dtype = "bfloat16" if gpu or cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "float32"
        require(self.env in ENVS, f"unknown --env {self.env}: choose one of {', '.join(ENVS)}")
        low, high = dict(seed=0, temperature=0), dict(gamma=0.9999, tau=1, history=1, copies=62, seed=10**12)
        for f in dataclasses.fields(self):
            if f.type in (int, float):
                x, least, most = getattr(self, f.name), low.get(f.name, f.type is int or 1e-9), high.get(f.name, 1e99)
                require(least <= x <= most, f"--{f.name} {x} must lie between {least:g} and {most:g}")
        learns = self.steps - self.steps % ENVS[self.env].horizon > self.random_steps
        require(learns, f"--steps {self.steps} leaves nothing to learn after --random_steps {self.random_steps}")

# How these recipes were found: experiments/RESULTS.md. Point-Robot acts randomly for the first quarter of its run,
# because an in-context agent also moves randomly when it meets a new task.
MUJOCO = dict(hidden=128, batch=128, gamma=0.98, tau=0.05, random_steps=400, train_tasks=45, test_tasks=15,
              episodes=80, history=1.0)
PRESETS = {"cheetah_vel": dict(MUJOCO, lr=3e-3, critic_norm=False, temperature=0.05, steps=24_000),
           "walker_param": dict(MUJOCO, lr=2e-3, n_step=3, recency=4.0, temperature=0.2, steps=48_000)}

def pick_device(name):
    """The device called `name`; auto is cuda where there is one. Raises BadInput if torch cannot use it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA raise the latter
        raise BadInput(f"--device {name} does not work here ({str(error).splitlines()[0]})") from None
    return name

# ---- Soft actor-critic for many agents at once -----------------------------------------------------------------------
class BatchedMLP(nn.Module):
    """`num` independent multi-layer perceptrons at once: (num, B, sizes[0]) -> (num, B, sizes[-1]) float32.

    `norm`, a layer norm before each ReLU, bounds a critic's values of untried actions. Hidden layers use `dtype`.
    """
    def __init__(self, num, sizes, norm=False, dtype=torch.float32):
        super().__init__()
        self.norm, self.dtype = norm, dtype
        shapes = [(fan_in**-0.5, fan_in, fan_out) for fan_in, fan_out in zip(sizes[:-1], sizes[1:])]
        self.weights = nn.ParameterList(torch.empty(num, i, o).uniform_(-b, b) for b, i, o in shapes)
        self.biases = nn.ParameterList(torch.empty(num, 1, o).uniform_(-b, b) for b, _, o in shapes)

    def forward(self, x):
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases)
        x = x.to(self.dtype)
        for weight, bias in hidden:
            x = torch.baddbmm(bias.to(self.dtype), x, weight.to(self.dtype))  # (num, B, hidden)
            x = F.relu_(F.layer_norm(x, x.shape[-1:]) if self.norm else x)
        if last_weight.shape[-1] == 1:  # a critic: faster than a matrix product with a single column
            return (x * last_weight.mT.to(self.dtype)).sum(-1, keepdim=True, dtype=last_bias.dtype) + last_bias
        return torch.baddbmm(last_bias, x.to(last_weight.dtype), last_weight)

class BatchedSAC(nn.Module):
    """Soft actor-critic (Haarnoja et al. 2018) for `num` agents at once, one per task, which share nothing.

    The losses are summed over agents and Adam is elementwise, so each agent learns what it would learn alone. Networks
    see normalised states, and critics predict (1 - gamma) times the usual return, which has the size of one reward.
    """
    def __init__(self, num, obs_dim, act_dim, s):
        super().__init__()
        self.s, dtype = s, getattr(torch, s.dtype)
        self.actor = BatchedMLP(num, (obs_dim, s.hidden, s.hidden, 2 * act_dim), dtype=dtype)
        # Both critics of all agents are one batch of 2 * num networks.
        self.critic = BatchedMLP(2 * num, (obs_dim + act_dim, s.hidden, s.hidden, 1), s.critic_norm, dtype)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("moments", torch.zeros(3, num, 1, obs_dim))  # sums of 1, x and x^2 over visited states
        self.register_buffer("mean", torch.zeros(num, 1, obs_dim))
        self.register_buffer("std", torch.ones(num, 1, obs_dim))
        self.to(s.device)
        self.lr = torch.tensor(s.lr, device=s.device)  # shared by both optimizers; `run_round` lowers it
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=self.lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr=self.lr, fused=True)

    def update_normalisation(self, states):
        """Adds visited states (num, ..., obs_dim) to the mean and deviation that normalise the networks' inputs."""
        x = states.flatten(1, -2)  # (num, M, obs_dim)
        self.moments += torch.stack([torch.ones_like(x), x, x**2]).sum(2, keepdim=True)
        count, total, squares = self.moments
        self.mean = total / count
        self.std = (squares / count - self.mean**2).clamp_min(0).sqrt() + 0.01

    def act(self, states, noise=None):
        """Actions for states (num, B, obs_dim) and their log-densities (num, B); without `noise`, the mean action."""
        mean, log_std = self.actor((states - self.mean) / self.std).chunk(2, dim=-1)
        if noise is None:
            return torch.tanh(mean), None
        log_std = log_std.clamp(-5, 2)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        log_tanh_slope = 2 * (np.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), stable for large |u|
        return torch.tanh(u), (log_normal - log_tanh_slope).sum(-1)

    def value(self, critic, states, actions):
        """Values of both critics, (2, num, B): (1 - gamma) times the discounted sum of rewards and entropy."""
        x = torch.cat([(states - self.mean) / self.std, actions], dim=-1)  # (num, B, obs_dim + act_dim)
        return critic(x.repeat(2, 1, 1)).view(2, len(states), -1)

    def update(self, states, actions, rewards, discounts, next_states, noise, policy=True):
        """One step of the critics, their targets and, if `policy`, the actors on a batch (num, B, ...).

        `next_states` lie n steps after `states`, `rewards` (num, B) are the discounted sums over these steps and
        `discounts` (num, B) gamma^n. `noise` (2, num, B, act_dim) is standard normal. No state is terminal, so no mask.
        """
        entropy_weight = (1 - self.s.gamma) * self.s.temperature
        with torch.no_grad():
            next_actions, log_prob = self.act(next_states, noise[0])
            next_value = self.value(self.target, next_states, next_actions).amin(0) - entropy_weight * log_prob
            target = (1 - self.s.gamma) * rewards + discounts * next_value  # (num, B)
        loss = (self.value(self.critic, states, actions) - target).square().mean(-1).sum()
        self.critic_opt.zero_grad()
        loss.backward()
        self.critic_opt.step()
        if policy:
            new_actions, log_prob = self.act(states, noise[1])
            loss = (entropy_weight * log_prob - self.value(self.critic, states, new_actions).amin(0)).mean(-1).sum()
            self.actor_opt.zero_grad()
            loss.backward(inputs=list(self.actor.parameters()))  # the critics' gradients would be wasted
            self.actor_opt.step()
        torch._foreach_lerp_(list(self.target.parameters()), [p.detach() for p in self.critic.parameters()], self.s.tau)

@torch.no_grad()
def average_return(name, tasks, agents, copies, seed, device):
    """Mean return of each task over `copies` episodes, (num_tasks,): noiseless `agents`, or random actions if None."""
    env = make_vec(name, np.repeat(tasks, copies, axis=0))
    rng = np.random.default_rng([seed, 1])  # a different stream from that of the start states
    states, _ = env.reset(seed=seed)
    returns = 0
    for _ in range(env.horizon):
        actions = rng.uniform(-1, 1, env.action_space.shape)
        if agents is not None:
            actions = agents.act(torch.as_tensor(states, device=device).view(len(tasks), copies, -1))[0].cpu().numpy()
        states, rewards, *_ = env.step(actions)
        returns = returns + rewards
    env.close()
    return returns.reshape(len(tasks), copies).mean(1)

# ---- Collection ------------------------------------------------------------------------------------------------------
class Collection:
    """All agents of one family, their environments and their histories, which are also their replay buffers.

    In each round every copy runs one episode of T steps, stored as episode round * copies + copy of each of `arrays`.
    """
    def __init__(self, s, num):
        family, self.s, self.num = ENVS[s.env], s, num
        self.T, self.device = family.horizon, torch.device(s.device)
        self.tasks = sample_tasks(s.env, num, s.seed)
        self.env = make_vec(s.env, np.repeat(self.tasks, s.copies, axis=0))
        torch.manual_seed(s.seed)
        self.agents = BatchedSAC(num, family.obs_dim, family.act_dim, s)
        self.rng, self.rounds, self.round = torch.Generator(self.device), s.steps // self.T, 0
        episodes = self.rounds * s.copies
        self.states = torch.zeros(num, episodes, self.T + 1, family.obs_dim, device=self.device)
        self.actions = torch.zeros(num, episodes, self.T, family.act_dim, device=self.device)
        self.learner_actions = torch.zeros_like(self.actions)
        self.rewards = torch.zeros(num, episodes, self.T, device=self.device)
        self.arrays = self.states, self.actions, self.learner_actions, self.rewards

    def run_round(self):
        """T steps of every copy and, after the random steps, one update of every agent in each of them."""
        s, T, c, num = self.s, self.T, self.s.copies, self.num
        self.agents.lr.fill_(s.lr * min(1, 4 * (1 - self.round / self.rounds)))
        self.rng.manual_seed(s.seed * 2**20 + self.round)  # a seed per round makes a resumed collection exact
        observations, _ = self.env.reset(seed=s.seed * 2**20 + self.round)
        episodes = slice(self.round * c, self.round * c + c)
        states, actions, learner, rewards = (x[:, episodes] for x in self.arrays)  # (num, c, T, ...)
        states[:, :, 0] = torch.as_tensor(observations, device=self.device).view(num, c, -1)
        copies = torch.arange(c, device=self.device)
        repeat = 2 ** copies[:, None]  # (c, 1): steps for which a copy repeats each random action, which leads farther
        noisy = (copies[:, None] > 0) | (c < 3)  # (c, 1): later the first of three or more copies acts without noise
        # In the last of several copies a guest acts, the agent of a random task of the split: a slow cheetah never runs
        # by itself, so only a guest can show it how to slow down.
        host = torch.arange(num, device=self.device)[:, None].repeat(1, c)  # agent a acts in copy c of task host[a, c]
        if c > 1:
            train = min(num, s.train_tasks)
            host[:train, -1] = torch.randperm(train, device=self.device, generator=self.rng)
            host[train:, -1] = torch.randperm(num - train, device=self.device, generator=self.rng) + train
        for t in range(T):
            step = self.round * T + t
            with torch.no_grad():
                learner[:, :, t] = self.agents.act(states[:, :, t])[0]
                if step < s.random_steps:
                    new = torch.rand(num, c, actions.shape[-1], device=self.device, generator=self.rng) * 2 - 1
                    actions[:, :, t] = torch.where(t % repeat == 0, new, actions[:, :, t - 1])
                else:
                    noise = torch.randn(num, c, actions.shape[-1], device=self.device, generator=self.rng)
                    actions[host, copies, t] = self.agents.act(states[host, copies, t], noise * noisy)[0]
            to_simulator = actions[:, :, t].reshape(num * c, -1).cpu().numpy()
            if step >= s.random_steps:  # queued before the simulator runs, so that a GPU learns meanwhile
                self.agents.update(*self.sample(step), policy=step % 2 == 0)  # actors at every second step, as in TD3
            observations, reward, *_ = self.env.step(to_simulator)
            states[:, :, t + 1] = torch.as_tensor(observations, device=self.device).view(num, c, -1)
            rewards[:, :, t] = torch.as_tensor(reward, device=self.device).view(num, c)
        self.agents.update_normalisation(states[:, :, :-1])
        self.round += 1
        finite = all(x.isfinite().all() for x in (states, actions, rewards))
        require(finite, f"states, actions or rewards became non-finite in round {self.round}: try a smaller --lr")
        return rewards[:, 0].sum(-1)  # (num,): return of the first copies

    def sample(self, step):
        """A batch for `update` from everything stored in each agent's own task before `step`.

        The age of a drawn step, as a fraction of the run so far, is U^recency, U uniform in (0, 1] (after Wang & Ross
        2019). It is followed for `n_step` steps, or until its episode ends, so values travel n times as fast (Watkins
        1989). The rewards on the way are those of the actions taken, and only one entropy term in n is counted.
        """
        s, shape = self.s, (self.num, self.s.batch)
        row = torch.arange(self.num, device=self.device)[:, None]
        age = step - torch.randint(step, shape, device=self.device, generator=self.rng)  # uniform from 1 to `step`
        which_copy = torch.randint(s.copies, shape, device=self.device, generator=self.rng)
        noise = torch.randn(2, *shape, self.actions.shape[-1], device=self.device, generator=self.rng)
        age = (step * (age / step) ** s.recency).round().long().clamp(min=1)
        i, t = (step - age) // self.T * s.copies + which_copy, (step - age) % self.T  # episode, step of the episode
        n = torch.minimum(age, self.T - t).clamp(max=s.n_step)  # (num, B): up to the newest step or the episode's end
        k = torch.arange(s.n_step, device=self.device)[:, None, None]
        ahead = self.rewards[row, i, (t + k).clamp(max=self.T - 1)]  # (n_step, num, B)
        rewards = (ahead * s.gamma**k * (k < n)).sum(0)
        return self.states[row, i, t], self.actions[row, i, t], rewards, s.gamma**n, self.states[row, i, t + n], noise

    def save(self, path):
        content = dict(settings=dataclasses.asdict(self.s), round=self.round, agents=self.agents.state_dict())
        content["optim"] = [self.agents.actor_opt.state_dict(), self.agents.critic_opt.state_dict()]
        content["history"] = [x[:, : self.round * self.s.copies].clone() for x in self.arrays]  # a view is saved whole
        write_atomically(path, lambda file: torch.save(content, file))

    def restore(self, path):
        """Continues from the last `save`. Raises BadInput if the settings differ."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        free = "episodes", "history", "device", "out"  # these may differ; another device draws other random numbers
        different = [k for k, v in saved["settings"].items() if k not in free and v != getattr(self.s, k, None)]
        require(not different, f"{path} has another {' and '.join(different)}: repeat its settings, or delete it")
        for whole, part in zip(self.arrays, saved["history"]):
            whole[:, : part.shape[1]] = part
        self.agents.load_state_dict(saved["agents"])
        for optimizer, state in zip((self.agents.actor_opt, self.agents.critic_opt), saved["optim"]):
            optimizer.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = self.agents.lr  # the shared tensor, of which load_state_dict made a copy
        self.round = saved["round"]

def collect(name, **settings):
    """Trains one SAC agent per task of family `name` and writes the dataset; returns its path.

    `settings` are fields of Settings. An interrupted collection continues from its last save. Raises BadInput if the
    settings make no sense, the dataset exists, another process collects it, or a number becomes non-finite.
    """
    s = Settings(**{"env": name, **PRESETS.get(name, {}), **settings})
    path, part = Path(s.out) / f"{name}.npz", Path(s.out) / f"{name}.part"
    with claim(path):
        require(not path.exists(), f"{path} exists: delete it to collect it again, or name another folder with --out")
        run = Collection(s, s.train_tasks + s.test_tasks)
        if part.exists():
            run.restore(part)
            print(f"continuing from round {run.round} of {run.rounds}, found in {part}")
        bar = tqdm(range(run.round, run.rounds), f"collect {name}", run.rounds, initial=run.round, **PROGRESS)
        saved = time.time()
        for _ in bar:
            returns = run.run_round()
            bar.set_postfix_str(f"return {returns.mean():.1f}, from {returns.min():.1f} to {returns.max():.1f}", False)
            if time.time() - saved > SAVE_EVERY:
                run.save(part)
                saved = time.time()
        run.env.close()
        arrays = select(run)
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
        part.unlink(missing_ok=True)
    random, expert = arrays["random_return"], arrays["expert_return"]
    print(f"{path}: mean return random {random.mean():.2f}, experts {expert.mean():.2f}, worst {expert.min():.2f}")
    if (expert <= random).any():
        print(f"no scores for tasks whose expert is no better than random actions: {np.flatnonzero(expert <= random)}")
    return path

@torch.no_grad()
def select(run):
    """The arrays of the dataset: episodes evenly spaced over the history's rounds, taken from the copies in turn."""
    s, rounds = run.s, max(1, int(run.rounds * run.s.history))
    j = np.arange(min(s.episodes, rounds * s.copies))
    which_round, which_copy = j * rounds // len(j), j % s.copies
    stored = which_round * s.copies + which_copy
    names = "states", "actions", "learner_actions", "rewards"
    arrays = {name: x[:, stored, : run.T].cpu().numpy() for name, x in zip(names, run.arrays)}  # (N, E, T, ...)
    expert_actions = run.agents.act(run.states[:, stored, : run.T].flatten(1, 2))[0]
    arrays["expert_actions"] = expert_actions.cpu().numpy().reshape(arrays["actions"].shape)
    guest = (which_copy == s.copies - 1) & (s.copies > 1) & ((which_round + 1) * run.T > s.random_steps)
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    info = json.dumps({"settings": dataclasses.asdict(s), "versions": versions})
    arrays |= dict(tasks=run.tasks, test=np.arange(run.num) >= s.train_tasks, guest=guest, info=info)
    arrays["random_return"] = average_return(s.env, run.tasks, None, 20, s.seed + 1, run.device)
    arrays["expert_return"] = average_return(s.env, run.tasks, run.agents, 20, s.seed + 1, run.device)
    return arrays

def main():
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, value in (("--env", "point_robot"), ("--device", "auto")):  # these two decide the defaults of the others
        first.add_argument(flag, default=value)
    given = vars(first.parse_known_args()[0])
    settings = tyro.cli(Settings, default=Settings(**PRESETS.get(given["env"], {}), **given), description=__doc__)
    collect(settings.env, **dataclasses.asdict(settings))

if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues from the last save (every 5 minutes) or begins again")

"""Learning histories and experts: one SAC agent a task, all agents trained as one batch. Writes `data/ENV.npz`.

    python collect.py --env point_robot

Every network carries a leading agent dimension, (num_agents, inputs, outputs) for a weight, so that 60 agents cost one
set of kernels (`torch.baddbmm`) and nothing loops over tasks. It writes, with N tasks and E stored episodes of T steps:

    tasks           (N, task_dim) float64    a task is a row, see envs.py
    test            (N,) bool                tasks held out from in-context training; they come last
    guest           (E,) bool                episodes in which a guest acted: an agent drawn from all of the split,
                                             so as a rule another task's
    states          (N, E, T, obs_dim)       E whole episodes, evenly spaced over the run, in its order
    actions         (N, E, T, act_dim)       what the learning agent (or the guest) did: random first, expert last
    rewards         (N, E, T)
    expert_actions  (N, E, T, act_dim)       what the final agent, without noise, would have done in `states`
    random_return   (N,) float64             mean return of uniformly random actions
    expert_return   (N,) float64             mean return of the final agent without noise: the oracle
    curve           (N, rounds)              return of the first copy, by round: random first, then without noise (of
                                             fewer than 3 copies the first has noise too)
    info            JSON string              format, environment, settings, library versions

(float32 where nothing is said) and `data/ENV.png`, the learning curves. While it runs, `data/ENV.part/` holds what it
needs to go on after a stop.
"""

import argparse
import copy
import ctypes
import dataclasses
import difflib
import io
import json
import os
import re
import shutil
import statistics
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from envs import ENVS, make_vec, sample_tasks

FORMAT = 3  # of the dataset file; raise it when the arrays change
SAVE_EVERY = 30  # seconds of work that a stopped run may lose, and a round more


# glibc hands large freed blocks back to the system, and the next tensor is faulted in again page by page: 7,244 faults
# and a quarter of the processor's time in an update of 60 agents. Told to keep them, it makes 48.
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that it takes


class BadInput(Exception):
    """What the user gave does not work; the message is one line that says what is wrong and what to do."""


def flag(default, text, group=None):
    """A dataclass field that is also a command line flag: its default and help text in one place.

    `group` begins a new heading of the help, under which the fields that follow stand too.
    """
    return dataclasses.field(default=default, metadata={"help": text, "group": group})


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises BadInput instead of printing its usage, and knows what a misspelt flag meant."""

    def error(self, message):
        wrong = re.search(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        raise BadInput(message + (f": did you mean {near[0]}?" if near else " (--help lists the flags)"))


def parse_flags(cls, argv, description, **extra):
    """Reads the flags of dataclass `cls` from argv; returns a dict of those that were given.

    `extra` adds flags that are no fields: name=dict of argparse settings. Raises BadInput on a bad flag.
    """
    parser = group = Parser(allow_abbrev=False, description=description)
    for f in dataclasses.fields(cls):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default = "differs by environment" if f.default is None else f.default
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
        text = f.metadata["help"] + f" [{default}]" * (default not in (False, ""))
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    group = parser.add_argument_group("instead of that") if extra else parser
    for name, settings in extra.items():
        group.add_argument(f"--{name}", **{"default": argparse.SUPPRESS, **settings})
    return vars(parser.parse_args(argv))


def check_device(device):
    """Raises BadInput where torch cannot put a tensor on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch builds without CUDA assert
        raise BadInput(f"--device {device} does not work here ({str(error).splitlines()[0]}): use cpu") from None


def write_atomically(path, write):
    """Calls write(file) on a file in memory, brings that to disk beside `path`, then renames it to `path`.

    Whenever it is stopped, `path` is the old file or the new one. Raises BadInput where the disk takes no file.
    """
    path, content = Path(path), io.BytesIO()
    write(content)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise BadInput(f"{path} cannot be written ({error.strerror}): make room, or name another folder") from None


@dataclass
class Settings:
    """What `collect` can be told. Fields of None take the environment's entry in DEFAULTS."""

    env: str = flag("point_robot", f"task family: {', '.join(ENVS)}", group="what to collect")
    steps: int = flag(None, "environment steps of each copy; one update a step after the random ones")
    copies: int = flag(4, "environment copies that each agent acts in", group="learning")
    hidden: int = flag(None, "width of the two hidden layers of actor and critics")
    batch: int = flag(None, "transitions in an agent's update")
    lr: float = flag(None, "Adam's learning rate; over the last quarter of the run it falls to zero")
    gamma: float = flag(None, "discount")
    n_step: int = flag(None, "rewards that are summed, discounted, before the target critics judge the rest")
    recency: float = flag(None, "1: all lived steps are drawn equally often; more: recent ones more often")
    tau: float = flag(None, "target critics move this fraction towards the critics in each update")
    temperature: float = flag(None, "weight of the policy's entropy, in units of reward; fixed")
    critic_norm: bool = flag(None, "layer norm in the critics: safer, slower")
    random_steps: int = flag(None, "steps of uniformly random actions before learning starts")
    train_tasks: int = flag(45, "tasks to train in-context agents on", group="the dataset")
    test_tasks: int = flag(15, "tasks held out for their evaluation")
    episodes: int = flag(None, "episodes stored for each task, evenly spaced over the run")
    seed: int = flag(0, "random seed, of the tasks too", group="system")
    device: str = flag("cpu", "cpu or cuda")
    dtype: str = flag(None, "float32 or bfloat16: of the hidden layers' products; bfloat16 where the hardware has it")
    out: str = flag("data", "folder of the dataset")


# Point-Robot is random for the first third. An agent that meets a new task has moved at random too; and from prompts
# that are mostly an expert's, a transformer learns to copy them and not to infer the goal from rewards. Its targets
# are slow too: in one trial with tau 0.05 the agents ended better and the transformer that learned from them worse. The
# MuJoCo recipes were picked in short trials (the walkers' are in assets/walker_trials.csv) and sized for a laptop. The
# cheetahs' curve ends flat, the walkers' does not: there more --steps pay.
SMALL = dict(hidden=64, batch=64, lr=1.5e-3, gamma=0.9, tau=0.01, temperature=0.05, critic_norm=True)
LARGE = dict(hidden=128, batch=128, tau=0.05, random_steps=400, episodes=80)
CHEETAH = dict(lr=3e-3, gamma=0.98, temperature=0.05, critic_norm=False, n_step=1, recency=1.0)
WALKER = dict(lr=2e-3, gamma=0.98, temperature=0.2, critic_norm=True, n_step=3, recency=4.0)
DEFAULTS = {
    "point_robot": dict(SMALL, n_step=1, recency=1.0, steps=2_200, random_steps=800, episodes=400),
    "cheetah_vel": dict(LARGE, **CHEETAH, steps=24_000),
    "walker_param": dict(LARGE, **WALKER, steps=48_000),
}
PAPER_STEPS = {"cheetah_vel": 250_000, "walker_param": 1_000_000}  # environment steps a task


def fast_dtype(device):
    """bfloat16 where `device` multiplies it natively, else float32."""
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16") if torch.device(device).type == "cpu" else True
    return "bfloat16" if native else "float32"


class BatchedMLP(nn.Module):
    """`num` independent multi-layer perceptrons evaluated at once: (num, B, sizes[0]) -> (num, B, sizes[-1]) float32.

    `norm` puts a layer norm without parameters before each ReLU; in a critic it bounds the values that a young network
    can claim for actions it has never seen. Layers multiply in `dtype`, but results are summed in float32: a value near
    -3 must not be rounded to the next 64th.
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
        if last_weight.shape[-1] == 1:  # a critic; element by element is faster than a product with one column
            return (x * last_weight.mT.to(self.dtype)).sum(-1, keepdim=True, dtype=last_bias.dtype) + last_bias
        return torch.baddbmm(last_bias, x.to(last_weight.dtype), last_weight)


class BatchedSAC(nn.Module):
    """Soft actor-critic (Haarnoja et al. 2018) for `num` agents at once, one a task, that share nothing.

    Losses are summed over agents and Adam works element by element, so an agent learns what it would learn alone.
    Two things make it learn in few updates. The networks see states normalised by what the agent has lived (`see`): a
    cheetah's joints turn at up to 30 rad/s and its x passes 30 m, beside which actions in [-1, 1] would be lost. And
    values are counted a step: Q here is (1 - gamma) times the usual one, so of the size of a reward whatever gamma is.
    """

    def __init__(self, num, obs_dim, act_dim, s):
        super().__init__()
        self.num, self.s = num, s
        dtype = getattr(torch, s.dtype)
        self.actor = BatchedMLP(num, (obs_dim, s.hidden, s.hidden, 2 * act_dim), dtype=dtype)
        # Both critics of all agents are one batch of 2 * num networks.
        self.critic = BatchedMLP(2 * num, (obs_dim + act_dim, s.hidden, s.hidden, 1), s.critic_norm, dtype)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3, num, 1, obs_dim))  # sums of 1, x and x^2 over the lived states
        self.register_buffer("mean", torch.zeros(num, 1, obs_dim))
        self.register_buffer("std", torch.ones(num, 1, obs_dim))
        self.to(s.device)
        self.lr = torch.tensor(s.lr, device=s.device)  # of both optimizers; `live` lowers it
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=self.lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr=self.lr, fused=True)

    def see(self, states):
        """Adds lived states (num, ..., obs_dim) to those that the networks' inputs are normalised by."""
        x = states.flatten(1, -2)  # (num, M, obs_dim)
        self.seen += torch.stack([torch.ones_like(x), x, x**2]).sum(2, keepdim=True)
        count, total, squares = self.seen
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
        """Both critics' values, (2, num, B), per step: (1 - gamma) times the discounted sum of rewards and entropy (of
        every n-th entropy where `sample` follows n steps)."""
        x = torch.cat([(states - self.mean) / self.std, actions], dim=-1)  # (num, B, obs_dim + act_dim)
        return critic(x.repeat(2, 1, 1)).view(2, self.num, -1)

    def update(self, states, actions, rewards, discounts, next_states, noise, policy=True):
        """One step of critics, targets and, where `policy`, actors on a batch (num, B, ...).

        `next_states` came n steps after `states` (n may differ from row to row), `rewards` (num, B) is the discounted
        sum of those from `states` on to there, and `discounts` (num, B) is gamma^n. `noise` (2, num, B, act_dim) is
        standard normal, for the actions in the next states and in the states. Episodes end by the clock alone, so the
        value of the next state always counts.
        """
        gamma, entropy_weight = self.s.gamma, (1 - self.s.gamma) * self.s.temperature
        with torch.no_grad():
            next_actions, log_prob = self.act(next_states, noise[0])
            next_value = self.value(self.target, next_states, next_actions).amin(0) - entropy_weight * log_prob
            wanted = (1 - gamma) * rewards + discounts * next_value  # (num, B)
        loss = (self.value(self.critic, states, actions) - wanted).square().mean(-1).sum()
        self.critic_opt.zero_grad()
        loss.backward()
        self.critic_opt.step()
        if policy:
            new_actions, log_prob = self.act(states, noise[1])
            self.critic.requires_grad_(False)  # the critics judge here, they do not learn
            loss = (entropy_weight * log_prob - self.value(self.critic, states, new_actions).amin(0)).mean(-1).sum()
            self.actor_opt.zero_grad()
            loss.backward()
            self.actor_opt.step()
            self.critic.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.s.tau)


@torch.no_grad()
def play(name, tasks, agents, copies, seed, device):
    """Mean return of each task over `copies` episodes, (num_tasks,): of the agents without noise, or random if None."""
    env = make_vec(name, np.repeat(tasks, copies, axis=0))
    rng = np.random.default_rng([seed, 1])  # not the stream of the start states
    states, _ = env.reset(seed=seed)
    returns = np.zeros(env.num_envs)
    for _ in range(env.horizon):
        if agents is None:
            actions = rng.uniform(-1, 1, env.action_space.shape)
        else:
            actions = agents.act(torch.as_tensor(states, device=device).view(len(tasks), copies, -1))[0]
            actions = actions.reshape(env.num_envs, -1).cpu().numpy()
        states, rewards, _, _, _ = env.step(actions)
        returns += rewards
    env.close()
    return returns.reshape(len(tasks), copies).mean(1)


def resolve(name, **given):
    """Settings of environment `name`: the defaults, with what is given on top. Raises BadInput on nonsense."""
    if name not in ENVS:
        raise BadInput(f"unknown environment {name!r}: choose one of {', '.join(ENVS)}")
    s = Settings(**{"env": name, **DEFAULTS[name], **given})
    check_device(s.device)
    s.dtype = s.dtype or fast_dtype(s.device)
    if s.dtype not in ("float32", "bfloat16", "float64"):
        raise BadInput(f"--dtype {s.dtype} is unknown: choose float32 or bfloat16")
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        lowest = 0 if f.name in ("seed", "temperature", "test_tasks") else 1
        if f.type is int and value < lowest or f.type is float and not (value > 0 or value == lowest):
            raise BadInput(
                f"--{f.name} {value} is too small: it must be {f'at least {lowest}' if f.type is int else 'positive'}"
            )
    if s.gamma >= 1 or s.tau > 1:
        raise BadInput(f"--gamma {s.gamma} must be below 1 and --tau {s.tau} at most 1")
    if s.n_step > ENVS[name].horizon:
        raise BadInput(f"--n_step {s.n_step} is longer than an episode: at most {ENVS[name].horizon}")
    rounds = s.steps // ENVS[name].horizon
    if s.episodes > rounds * s.copies:
        raise BadInput(
            f"--episodes {s.episodes} is more than {s.steps} steps make ({rounds * s.copies} a task): "
            "more --steps, or fewer --episodes"
        )
    if rounds * ENVS[name].horizon <= s.random_steps:
        raise BadInput(f"--steps {s.steps} leaves nothing to learn from after --random_steps {s.random_steps}")
    return s


class Collection:
    """All agents of one family, their environments and everything they have lived: a run of `collect` at any moment.

    Time is cut into rounds: in one round every copy lives one episode of T steps. `states` (num, episodes, T + 1,
    obs_dim), `actions` (num, episodes, T, act_dim) and `rewards` (num, episodes, T) hold the run in its order, episode
    round * copies + copy; they are the replay buffer, and the dataset is a selection of their episodes.
    """

    def __init__(self, s, num):
        family, self.s, self.num = ENVS[s.env], s, num
        self.T, self.device = family.horizon, torch.device(s.device)
        self.tasks = sample_tasks(s.env, num, s.seed)
        self.env = make_vec(s.env, np.repeat(self.tasks, s.copies, axis=0))  # copies of a task stand together
        torch.manual_seed(s.seed)
        self.agents = BatchedSAC(num, family.obs_dim, family.act_dim, s)
        self.rng = torch.Generator(self.device)
        self.rounds, self.round = s.steps // self.T, 0
        episodes = self.rounds * s.copies
        self.states = torch.zeros(num, episodes, self.T + 1, family.obs_dim, device=self.device)
        self.actions = torch.zeros(num, episodes, self.T, family.act_dim, device=self.device)
        self.rewards = torch.zeros(num, episodes, self.T, device=self.device)
        # The copies of an environment differ, so that the histories hold what an in-context agent meets when it acts.
        # While actions are random, copy c holds each for 2^c steps: that leads farther than twitching on the spot and
        # shows where the reward grows. Later the first copy acts on the policy's mean, noiseless even while it is
        # wrong, and the others draw from the policy. In the last copy the policy is another task's, a guest: a slow
        # cheetah never runs by itself, so nothing else shows its agent how to slow down, nor an in-context agent what
        # running is worth where it is wrong. SAC learns from any of it.
        self.hold = 2 ** torch.arange(s.copies, device=self.device)[:, None]
        self.boldness = (torch.arange(s.copies, device=self.device)[:, None] > 0) | (s.copies < 3)  # some must draw

    def live(self):
        """One round: T steps of every copy and, once the random steps are over, an update of every agent at each."""
        s, T, c, num = self.s, self.T, self.s.copies, self.num
        self.agents.lr.fill_(s.lr * min(1, 4 * (1 - self.round / self.rounds)))
        # Each round has its own seed, so that nothing but the agents and the past decides how a run goes on.
        self.rng.manual_seed(s.seed * 2**20 + self.round)
        observed, _ = self.env.reset(seed=s.seed * 2**20 + self.round)
        episodes = slice(self.round * c, self.round * c + c)
        states, actions, rewards = (x[:, episodes] for x in (self.states, self.actions, self.rewards))  # (num, c, T, .)
        states[:, :, 0] = torch.as_tensor(observed, device=self.device).view(num, c, -1)
        # acts_in[agent, copy] is a task: the agent's own, for a guest any. Test tasks' agents visit test tasks.
        acts_in, copies = (
            torch.arange(num, device=self.device)[:, None].repeat(1, c),
            torch.arange(c, device=self.device),
        )
        if c > 1:
            train = min(num, s.train_tasks)
            visits = [torch.randperm(n, device=self.device, generator=self.rng) for n in (train, num - train)]
            acts_in[:, -1] = torch.cat([visits[0], visits[1] + train])
        for t in range(T):
            step = self.round * T + t
            if step < s.random_steps:
                new = torch.rand(num, c, actions.shape[-1], device=self.device, generator=self.rng) * 2 - 1
                actions[:, :, t] = torch.where(t % self.hold == 0, new, actions[:, :, t - 1])
            else:
                noise = torch.randn(num, c, actions.shape[-1], device=self.device, generator=self.rng)
                with torch.no_grad():
                    acted = self.agents.act(states[acts_in, copies, t], noise * self.boldness)[0]
                    actions[acts_in, copies, t] = acted
            chosen = actions[:, :, t].reshape(num * c, -1).cpu().numpy()
            if step >= s.random_steps:  # a GPU learns while the CPU moves the bodies
                self.agents.update(*self.sample(step), policy=step % 2 == 0)
            observed, reward, *_ = self.env.step(chosen)
            states[:, :, t + 1] = torch.as_tensor(observed, device=self.device).view(num, c, -1)
            rewards[:, :, t] = torch.as_tensor(reward, device=self.device).view(num, c)
        self.agents.see(states[:, :, :-1])
        self.round += 1

    def sample(self, step):
        """A batch for `update` from all that was lived in each agent's own task before `step`.

        A draw's age, as a fraction of all that was lived, is U^recency, U uniform in (0, 1]: with a recency of 4 half
        of the draws are from the last 1/16, 16% from the older half. A critic must be right where the policy is now,
        and what went before is not forgotten (Wang & Ross 2019, "emphasizing recent experience").

        A drawn step is followed for `n_step` steps, or to the end of its episode or of what is lived of it: with n
        steps instead of one, values travel n times as fast (Watkins 1989). Two things are given up. The actions on the
        way are those that were lived, a guest's and random ones too, not what the policy would do now. And the values
        count entropy once in n steps only, so that a temperature weighs about 1/n in them.
        """
        s, shape = self.s, (self.num, self.s.batch)
        row = torch.arange(self.num, device=self.device)[:, None]
        when = torch.randint(step, shape, device=self.device, generator=self.rng)
        which = torch.randint(s.copies, shape, device=self.device, generator=self.rng)
        noise = torch.randn(2, *shape, self.actions.shape[-1], device=self.device, generator=self.rng)
        if s.recency != 1:  # U comes from the whole number drawn, so some of the oldest steps are skipped
            when = step - (step * ((step - when) / step) ** s.recency).round().long().clamp(min=1)
        i, t = when // self.T * s.copies + which, when % self.T  # episode, step of the episode
        lived = torch.where(when // self.T == step // self.T, step % self.T, self.T)  # steps lived of that episode
        n = (lived - t).clamp(max=s.n_step)  # (num, B)
        k = torch.arange(s.n_step, device=self.device)
        ahead = self.rewards[row[..., None], i[..., None], (t[..., None] + k).clamp(max=self.T - 1)]  # (num, B, n_step)
        rewards = (ahead * s.gamma**k * (k < n[..., None])).sum(-1)
        return self.states[row, i, t], self.actions[row, i, t], rewards, s.gamma**n, self.states[row, i, t + n], noise

    def save(self, folder, since):
        """Writes the rounds lived from `since` on, then the agents: what `restore` needs, and nothing twice.

        A kill between the two leaves the agents of `since`; their next save writes the same rounds' file anew.
        """
        c = self.s.copies
        new = [x[:, since * c : self.round * c].clone().cpu() for x in (self.states, self.actions, self.rewards)]
        write_atomically(folder / f"lived-{since:05d}.pt", lambda file: torch.save(new, file))
        optimizers = [self.agents.actor_opt.state_dict(), self.agents.critic_opt.state_dict()]
        content = dict(settings=self.identity(), round=self.round, agents=self.agents.state_dict(), optim=optimizers)
        write_atomically(folder / "agents.pt", lambda file: torch.save(content, file))

    def identity(self):
        """The settings that decide how a run goes: one with the same may go on from another's folder."""
        free = ("episodes", "device", "out")
        return {k: v for k, v in dataclasses.asdict(self.s).items() if k not in free}

    def restore(self, folder):
        """Goes on where the last `save` into `folder` was. Raises BadInput where other settings made it, or damage."""
        begin = "delete the folder to begin anew"
        other = set()
        try:
            saved = torch.load(folder / "agents.pt", map_location=self.device, weights_only=True)
            other = {key for key, value in self.identity().items() if saved["settings"].get(key) != value}
            while not other and self.round < saved["round"]:
                lived = torch.load(folder / f"lived-{self.round:05d}.pt", map_location=self.device, weights_only=True)
                at = self.round * self.s.copies
                for whole, part in zip((self.states, self.actions, self.rewards), lived):
                    whole[:, at : at + part.shape[1]] = part
                self.round += lived[0].shape[1] // self.s.copies
            if not other:
                self.agents.load_state_dict(saved["agents"])
                for optimizer, state in zip((self.agents.actor_opt, self.agents.critic_opt), saved["optim"]):
                    optimizer.load_state_dict(state)
                    optimizer.param_groups[0]["lr"] = self.agents.lr  # not the copy that was read
                if self.round != saved["round"]:
                    raise ValueError("its files do not fit together")
        except Exception as error:  # a damaged file can raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"{folder} is damaged ({reason}): {begin}") from None
        if other:
            raise BadInput(
                f"{folder} holds a run with other {', '.join(sorted(other))}: repeat its settings, or {begin}"
            )


def collect(name, **given):
    """Trains one SAC agent for each task of family `name` in one batch and writes the dataset; returns its path.

    `given` are fields of Settings. A run that was stopped goes on by itself. Raises BadInput where `given` makes no
    sense. Takes about half a minute for point_robot.
    """
    s = resolve(name, **given)
    num = s.train_tasks + s.test_tasks
    path, part = Path(s.out) / f"{name}.npz", Path(s.out) / f"{name}.part"
    if path.exists():
        raise BadInput(f"{path} exists: delete it to collect it anew, or name another folder with --out")
    run = Collection(s, num)
    if (part / "agents.pt").exists():
        run.restore(part)
        print(f"going on from round {run.round} of {run.rounds}, found in {part}")
    settings = json.dumps(dataclasses.asdict(s), indent=1).encode()
    write_atomically(part / "settings.json", lambda file: file.write(settings))  # a wrong folder shows now, not later
    start = written = time.time()
    saved = run.round
    progress = tqdm(total=run.rounds, initial=run.round, desc=f"collect {name}", unit="round", disable=None)
    try:
        while run.round < run.rounds:
            run.live()
            progress.update()
            returns = run.rewards[:, (run.round - 1) * s.copies].sum(-1)  # (num,): of the first copies
            each = f"return {returns.mean():.1f} (worst task {returns.min():.1f}, best {returns.max():.1f})"
            progress.set_postfix_str(each)
            if time.time() - written > SAVE_EVERY or run.round == run.rounds:
                run.save(part, saved)
                left = (time.time() - written) / (run.round - saved) * (run.rounds - run.round)
                tqdm.write(f"round {run.round} of {run.rounds}: {each}, {left / 60:.0f} min left")
                saved, written = run.round, time.time()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped in round {run.round + 1}: the same command goes on from {saved}") from None
    progress.close()
    run.env.close()

    history = run.states[:, :, :-1], run.actions, run.rewards
    j = np.arange(s.episodes)
    stored = j * run.rounds // s.episodes * s.copies + j % s.copies  # evenly spaced rounds, the copies in turn
    history = [x[:, stored] for x in history]  # (num, E, T, ...)
    with torch.no_grad():
        labels = run.agents.act(history[0].flatten(1, 2))[0].view_as(history[1])
    random_return = play(name, run.tasks, None, 20, s.seed + 1, run.device)
    expert_return = play(name, run.tasks, run.agents, 20, s.seed + 1, run.device)
    info = {
        "format": FORMAT,
        "settings": dataclasses.asdict(s),
        "versions": {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)},
    }
    arrays = {k: v.cpu().numpy() for k, v in zip(("states", "actions", "rewards"), history)}
    arrays |= dict(tasks=run.tasks, test=np.arange(num) >= s.train_tasks, expert_actions=labels.cpu().numpy())
    guest = (stored % s.copies == s.copies - 1) & (s.copies > 1) & ((stored // s.copies + 1) * run.T > s.random_steps)
    arrays |= dict(guest=guest)
    arrays |= dict(random_return=random_return, expert_return=expert_return)
    arrays |= dict(curve=run.rewards[:, :: s.copies].sum(-1).cpu().numpy(), info=json.dumps(info))
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    draw(arrays, path.with_suffix(".png"), s)
    (part / "agents.pt").unlink()  # first, so that what a kill leaves of the folder is not taken for a run
    shutil.rmtree(part)
    summarise(arrays)
    steps = run.rounds * run.T
    print(f"{num} agents, {steps - s.random_steps} updates and {steps * s.copies} environment steps each")
    print(f"wrote {path} and {path.with_suffix('.png')} in {(time.time() - start) / 60:.1f} min")
    return path


def summarise(data):
    """Prints the returns of random and expert by fifths of the tasks, ordered by a single task parameter or else by
    the expert's return."""
    one = data["tasks"].shape[1] == 1
    key = data["tasks"][:, 0] if one else data["expert_return"]
    print(f"{'task' if one else 'expert'} from .. to    tasks   random   expert    worst     best")
    everything = np.arange(len(key))
    for fifth in [f for f in np.array_split(np.argsort(key), 5) if len(f)] + [everything]:
        random, expert = data["random_return"][fifth], data["expert_return"][fifth]
        print(
            f"{key[fifth].min():8.2f} ..{key[fifth].max():8.2f} {len(fifth):7d} {random.mean():8.1f} "
            f"{expert.mean():8.1f} {expert.min():8.1f} {expert.max():8.1f}"
        )


def draw(data, path, s):
    """Writes the learning curves of all tasks, their mean, and the mean returns of random and expert as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curve = data["curve"]
    steps = (np.arange(curve.shape[1]) + 1) * ENVS[s.env].horizon
    fig, ax = plt.subplots(figsize=(7, 4))
    ranks = np.argsort(np.argsort(data["tasks"][:, 0] if data["tasks"].shape[1] == 1 else data["expert_return"]))
    for task, rank in enumerate(ranks):
        ax.plot(steps, curve[task], color=plt.cm.viridis(rank / max(1, len(ranks) - 1)), lw=0.5, alpha=0.7)
    ax.plot(steps, curve.mean(0), color="black", lw=2, label="mean over tasks")
    ax.axhline(data["expert_return"].mean(), color="black", ls="--", label="final agents, no noise")
    ax.axhline(data["random_return"].mean(), color="gray", ls=":", label="random actions")
    ax.set(xlabel=f"steps of each of {s.copies} copies; one update a step", ylabel="return of an episode", title=s.env)
    ax.legend()
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png", dpi=120))
    plt.close(fig)


def flops_of_update(family, s):
    """FLOPs of the matrix products in one agent's update, a policy update in every second one counted half."""
    actor_input, critic_input = family.obs_dim * s.hidden, (family.obs_dim + family.act_dim) * s.hidden
    actor = actor_input + s.hidden**2 + s.hidden * 2 * family.act_dim  # weights, so multiply-adds of one transition
    critic = critic_input + s.hidden**2  # its last layer is no product
    targets = actor + 2 * critic  # forward
    critics = 2 * (3 * critic - critic_input)  # forward, backward to weights and to all but the first layer's input
    policy = 3 * actor - actor_input + 2 * 2 * critic  # the same for the actor; critics forward and to their inputs
    return 2 * s.batch * (targets + critics + policy / 2)


def bench(name, **given):
    """Prints agent-updates a second of all agents in one batch and of one agent alone, how much of the machine's rate
    of matrix products the batch reaches, and where its time goes. Takes about a minute."""
    s = resolve(name, **{**given, "steps": 4 * ENVS[name].horizon, "random_steps": 1, "episodes": 1})
    num, rates, seconds, threads = s.train_tasks + s.test_tasks, {}, [], torch.get_num_threads()
    runs = {n: Collection(s, n) for n in (num, 1)}
    for _ in range(4):  # in turn, so that a busy moment of the machine meets both; the first round warms up
        for n, run in runs.items():
            torch.set_num_threads(threads if n > 1 else 1)  # one agent is fastest on one
            start = time.time()
            run.live()
            rates.setdefault(n, []).append(n * run.T / (time.time() - start))
    torch.set_num_threads(threads)
    many, one = (statistics.median(rates[n][1:]) for n in runs)
    a = torch.randn(2 * num, s.batch, s.hidden, dtype=getattr(torch, s.dtype), device=s.device)
    b = torch.randn(2 * num, s.hidden, s.hidden, dtype=a.dtype, device=s.device)
    for _ in range(100):  # the critics' hidden layer, alone
        start = time.time()
        (a @ b)[0, 0, 0].item()
        seconds.append(time.time() - start)
    peak = 2 * a.numel() * s.hidden / statistics.median(seconds)
    flops = flops_of_update(ENVS[name], s)
    reached = many * flops / peak
    print(f"{name}: hidden {s.hidden}, batch {s.batch}, {s.dtype}, environment steps included, medians of 3 rounds")
    print(f"{num} agents in a batch  {many:6.0f} agent-updates/s")
    print(f"one agent alone       {one:6.0f} agent-updates/s: the batch is {many / one:.1f} times as fast")
    print(f"matrix products alone {many / reached:6.0f} agent-updates/s, of which this is {reached:.0%}:")
    print(f"    {flops / 1e6:.0f} MFLOP an update, and the machine makes {peak / 1e9:.0f} GFLOP/s")
    run, start, steps = runs[num], time.time(), 20
    run.env.reset(seed=0)
    for _ in range(steps):
        run.env.step(np.zeros(run.env.action_space.shape))
    parts, total = {"environments": (time.time() - start) / steps}, num / many
    kinds = {"bmm": "matrix products", "layer_norm": "layer norm", "copy_": "casts and copies", "clamp_min": "ReLU"}
    kinds |= {"threshold": "ReLU", "adam": "Adam and targets", "lerp": "Adam and targets", "index": "sampling"}
    with torch.profiler.profile() as profiler:
        for step in range(steps):
            run.agents.update(*run.sample(4 * run.T), policy=step % 2 == 0)
    for event in profiler.key_averages():
        kind = next((kind for key, kind in kinds.items() if key in event.key), "the rest")
        microseconds = event.self_cpu_time_total if run.device.type == "cpu" else event.self_device_time_total
        parts[kind] = parts.get(kind, 0) + microseconds / 1e6 / steps
    print(f"one step of the batch {1e3 * total:6.1f} ms; its parts, each measured alone:")
    for kind, t in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {kind:18}{1e3 * t:6.1f} ms")


def load(path):
    """Reads a dataset; returns a dict of the arrays that this module's first lines list, `info` as a dict.

    Raises BadInput where the file is missing, damaged, no dataset, or of another format.
    """
    command = f"python collect.py --env {Path(path).stem}"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            data = {key: arrays[key] for key in arrays.files}
        data["info"] = json.loads(str(data["info"]))
        version = data["info"]["format"]
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: run {command}") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} is damaged or no dataset ({reason}): delete it and run {command}") from None
    if version != FORMAT:
        raise BadInput(f"{path} has format {version}, this code reads {FORMAT}: delete it and run {command}")
    if bad := [key for key, x in data.items() if key != "info" and not np.isfinite(x).all()]:
        raise BadInput(f"{path} has infinite values or none in {', '.join(bad)}: delete it and run {command}")
    return data


def main(argv):
    switch = {"action": "store_true"}
    given = parse_flags(
        Settings,
        argv,
        "Trains a SAC agent for each task, all in one batch, and stores what they lived and learned.",
        paper={**switch, "help": "the paper's environment steps a task, all copies together: 250k or 1M"},
        bench={**switch, "help": "measure the speed and stop"},
    )
    name = given.pop("env", "point_robot")
    if given.pop("paper", False):
        if name not in PAPER_STEPS:
            raise BadInput(f"--paper is for {' and '.join(PAPER_STEPS)}: the others' defaults go as far")
        given.setdefault("steps", PAPER_STEPS[name] // max(1, given.get("copies", Settings.copies)))
    bench(name, **given) if given.pop("bench", False) else collect(name, **given)


def command_line(main):
    """Runs main(flags) as a command: bad input ends in one line and exit code 2, Ctrl-C in one line and 130."""
    try:
        main(sys.argv[1:])
    except (BadInput, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line(main)

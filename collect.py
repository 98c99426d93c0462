"""Learning histories and experts: one SAC agent a task, all agents trained as one batch. Writes `data/ENV.npz`.

    python collect.py --env point_robot

Every network carries a leading agent dimension, (num_agents, inputs, outputs) for a weight, so that 60 agents cost one
set of kernels (`torch.baddbmm`) and nothing loops over tasks. It writes, with N tasks and E stored episodes of T steps:

    tasks           (N, task_dim) float64    a task is a row, see envs.py
    test            (N,) bool                held-out tasks: never trained on
    states          (N, E, T, obs_dim)       E whole episodes, evenly spaced over the run, in the order they were lived
    actions         (N, E, T, act_dim)       what the learning agent did: random first, expert last
    rewards         (N, E, T)
    expert_actions  (N, E, T, act_dim)       what the final agent, without noise, would have done in `states`
    random_return   (N,)                     mean return of uniformly random actions
    expert_return   (N,)                     mean return of the final agent without noise: the oracle
    info            JSON string              format, environment, settings, library versions
"""

import argparse
import dataclasses
import json
import os
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

FORMAT = 1  # of the dataset file; raise it when the arrays change


class BadInput(Exception):
    """What the user gave does not work; the message is one line that says what is wrong and what to do."""


def flag(default, text):
    """A dataclass field that is also a command line flag: its default and help text in one place."""
    return dataclasses.field(default=default, metadata={"help": text})


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises BadInput instead of printing its usage."""

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def parse_flags(cls, argv, **extra):
    """Reads the flags of dataclass `cls` from argv; returns a dict of those that were given.

    `extra` adds flags that are no fields: name=dict of argparse settings. A bad flag exits with code 2 and one line.
    """
    parser = Parser(allow_abbrev=False)
    for f in dataclasses.fields(cls):
        default = "differs by environment" if f.default is None else f.default
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{default}]", **kind)
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **{"default": argparse.SUPPRESS, **settings})
    return vars(parser.parse_args(argv))


def check_device(device):
    """Raises BadInput where torch cannot put a tensor on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch builds without CUDA assert
        raise BadInput(f"--device {device} does not work here ({str(error).splitlines()[0]}): use cpu") from None


def write_atomically(path, write):
    """Calls write(file) on a temporary binary file beside `path`, flushes it to disk, then renames it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Settings:
    """What `collect` can be told. Fields of None take the environment's entry in DEFAULTS."""

    env: str = flag("point_robot", f"task family: {', '.join(ENVS)}")
    steps: int = flag(None, "environment steps of each copy; one update a step")
    copies: int = flag(4, "environment copies that each agent acts in")
    hidden: int = flag(None, "width of the two hidden layers of actor and critics")
    batch: int = flag(None, "transitions in an agent's update")
    lr: float = flag(None, "Adam's learning rate")
    gamma: float = flag(None, "discount")
    tau: float = flag(0.01, "target critics move this fraction towards the critics in each update")
    temperature: float = flag(None, "weight of the policy's entropy, fixed")
    random_steps: int = flag(None, "steps of uniformly random actions before learning starts")
    buffer: int = flag(100_000, "transitions that an agent's replay buffer holds")
    train_tasks: int = flag(45, "tasks to train in-context agents on")
    test_tasks: int = flag(15, "tasks held out for their evaluation")
    episodes: int = flag(None, "episodes stored for each task, evenly spaced over the run")
    seed: int = flag(0, "random seed, of the tasks too")
    device: str = flag("cpu", "cpu or cuda")
    out: str = flag("data", "folder of the dataset")


# Point-Robot is random for the first third. An agent that meets a new task has moved at random too; and from prompts
# that are mostly an expert's, a transformer learns to copy them and not to infer the goal from rewards.
SMALL = dict(hidden=64, batch=64, lr=1.5e-3, gamma=0.9, temperature=0.05)
LARGE = dict(hidden=128, batch=128, lr=3e-4, gamma=0.98, temperature=0.01)
DEFAULTS = {
    "point_robot": dict(SMALL, steps=2_200, random_steps=800, episodes=400),
    "cheetah_vel": dict(LARGE, steps=16_000, random_steps=1_000, episodes=80),
    "walker_param": dict(LARGE, steps=16_000, random_steps=1_000, episodes=80),
}


class BatchedMLP(nn.Module):
    """`num` independent multi-layer perceptrons evaluated at once: (num, B, sizes[0]) -> (num, B, sizes[-1]).

    `norm` puts a layer norm without parameters before each ReLU; in a critic it bounds the values that a young network
    can claim for actions it has never seen.
    """

    def __init__(self, num, sizes, norm=False):
        super().__init__()
        self.norm = norm
        bounds = [fan_in**-0.5 for fan_in in sizes[:-1]]
        shapes = list(zip(bounds, sizes[:-1], sizes[1:]))
        self.weights = nn.ParameterList(torch.empty(num, i, o).uniform_(-b, b) for b, i, o in shapes)
        self.biases = nn.ParameterList(torch.empty(num, 1, o).uniform_(-b, b) for b, _, o in shapes)

    def forward(self, x):
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)  # (num, B, out)
            if layer < last:
                x = F.relu(F.layer_norm(x, x.shape[-1:]) if self.norm else x)
        return x


class BatchedSAC:
    """Soft actor-critic (Haarnoja et al. 2018) for `num` agents at once, one a task, that share nothing.

    Losses are summed over agents and Adam works element by element, so an agent learns what it would learn alone.
    """

    def __init__(self, num, obs_dim, act_dim, s, device="cpu"):
        self.num, self.s = num, s
        self.actor = BatchedMLP(num, (obs_dim, s.hidden, s.hidden, 2 * act_dim)).to(device)
        # Both critics of all agents are one batch of 2 * num networks.
        self.critic = BatchedMLP(2 * num, (obs_dim + act_dim, s.hidden, s.hidden, 1), norm=True).to(device)
        self.target = BatchedMLP(2 * num, (obs_dim + act_dim, s.hidden, s.hidden, 1), norm=True).to(device)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=s.lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr=s.lr, fused=True)

    def act(self, states, noise=None):
        """Actions for states (num, B, obs_dim) and their log-densities (num, B); without `noise`, the mean action."""
        mean, log_std = self.actor(states).chunk(2, dim=-1)
        if noise is None:
            return torch.tanh(mean), None
        log_std = log_std.clamp(-5, 2)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        log_tanh_slope = 2 * (np.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), stable for large |u|
        return torch.tanh(u), (log_normal - log_tanh_slope).sum(-1)

    def value(self, critic, states, actions):
        """Both critics' values, (2, num, B)."""
        x = torch.cat([states, actions], dim=-1).repeat(2, 1, 1)  # (2 * num, B, obs_dim + act_dim)
        return critic(x).view(2, self.num, -1)

    def update(self, states, actions, rewards, next_states, noise, policy=True):
        """One step of critics, targets and, where `policy`, actors on a batch (num, B, ...).

        `noise` (2, num, B, act_dim) is standard normal, for the actions in the next states and in the states. Episodes
        end by the clock alone, so the value of the next state always counts.
        """
        with torch.no_grad():
            next_actions, log_prob = self.act(next_states, noise[0])
            next_value = self.value(self.target, next_states, next_actions).amin(0) - self.s.temperature * log_prob
            wanted = rewards + self.s.gamma * next_value  # (num, B)
        loss = (self.value(self.critic, states, actions) - wanted).square().mean(-1).sum()
        self.critic_opt.zero_grad()
        loss.backward()
        self.critic_opt.step()
        if policy:
            new_actions, log_prob = self.act(states, noise[1])
            self.critic.requires_grad_(False)  # the critics judge here, they do not learn
            loss = (self.s.temperature * log_prob - self.value(self.critic, states, new_actions).amin(0)).mean(-1).sum()
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
    rng = np.random.default_rng(seed)
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
    for f in dataclasses.fields(s):
        value, lowest = getattr(s, f.name), 0 if f.name in ("seed", "temperature", "random_steps") else 1
        if f.type is int and value < lowest or f.type is float and not (value > 0 or value == lowest):
            raise BadInput(
                f"--{f.name} {value} is too small: it must be {f'at least {lowest}' if f.type is int else 'positive'}"
            )
    total = s.steps // ENVS[name].horizon * s.copies
    if s.episodes > total:
        raise BadInput(
            f"--episodes {s.episodes} is more than {s.steps} steps make ({total} a task): more --steps, or fewer"
        )
    if s.steps // ENVS[name].horizon * ENVS[name].horizon <= s.random_steps:
        raise BadInput(f"--steps {s.steps} leaves nothing to learn from after --random_steps {s.random_steps}")
    if s.buffer < s.copies:
        raise BadInput(f"--buffer {s.buffer} must hold at least one step of all --copies {s.copies}")
    check_device(s.device)
    return s


def collect(name, **given):
    """Trains one SAC agent for each task of family `name` in one batch and writes the dataset; returns its path.

    `given` are fields of Settings. Raises BadInput where they make no sense. Takes about a minute for point_robot.
    """
    s = resolve(name, **given)
    family, device, num = ENVS[name], torch.device(s.device), s.train_tasks + s.test_tasks
    T, c = family.horizon, s.copies
    tasks = sample_tasks(name, num, s.seed)
    torch.manual_seed(s.seed)
    rng = torch.Generator(device).manual_seed(s.seed)
    agents = BatchedSAC(num, family.obs_dim, family.act_dim, s, device)
    env = make_vec(name, np.repeat(tasks, c, axis=0))  # copies of a task stand together

    def empty(*shape):
        return torch.zeros(num, *shape, device=device)

    size = min(s.buffer, s.steps * c) // c * c
    replay = [empty(size, family.obs_dim), empty(size, family.act_dim), empty(size), empty(size, family.obs_dim)]
    rounds = s.steps // T  # one round: each copy lives one episode
    stored = np.linspace(0, rounds * c - 1, s.episodes).round().astype(int)  # which episodes of the run are kept
    history = [empty(s.episodes, T, family.obs_dim), empty(s.episodes, T, family.act_dim), empty(s.episodes, T)]
    # The copies of an environment differ, so that the histories hold what an in-context agent meets when it acts. While
    # actions are random, copy c holds each for 2^c steps: that leads farther than twitching on the spot and shows where
    # the reward grows. Later the first copy acts on the policy's mean, noiseless even while it is wrong, the last one
    # draws from the policy, and those between have less noise. SAC learns from any of it.
    hold = 2 ** torch.arange(c, device=device)[:, None]
    boldness = torch.linspace(1, 0, c, device=device).flip(0)[:, None]  # a single copy draws from the policy
    actions = empty(c, family.act_dim)
    curve = []
    start = time.time()
    progress = tqdm(range(rounds * T), desc=f"collect {name}", unit="step", disable=None)
    for step in progress:
        if step % T == 0:
            states = torch.as_tensor(env.reset(seed=s.seed if step == 0 else None)[0], device=device).view(num, c, -1)
            returns = np.zeros((num, c))
        if step < s.random_steps:
            new = torch.rand(num, c, family.act_dim, device=device, generator=rng) * 2 - 1
            actions = torch.where(step % T % hold == 0, new, actions)
        else:
            with torch.no_grad():
                noise = torch.randn(num, c, family.act_dim, device=device, generator=rng)
                actions = agents.act(states, noise * boldness)[0]
        observed, rewards, *_ = env.step(actions.reshape(num * c, -1).cpu().numpy())
        next_states = torch.as_tensor(observed, device=device).view(num, c, -1)
        reward = torch.as_tensor(rewards, dtype=torch.float32, device=device).view(num, c)
        returns += rewards.reshape(num, c)
        at = step * c % size
        for memory, new in zip(replay, (states, actions, reward, next_states)):
            memory[:, at : at + c] = new
        kept = np.flatnonzero(stored // c == step // T)  # places in the history of this round's kept episodes
        for memory, new in zip(history, (states, actions, reward)):
            memory[:, kept, step % T] = new[:, stored[kept] % c]
        states = next_states
        if step >= s.random_steps:
            index = torch.randint(min(size, (step + 1) * c), (num, s.batch), device=device, generator=rng)
            row = torch.arange(num, device=device)[:, None]
            noise = torch.randn(2, num, s.batch, family.act_dim, device=device, generator=rng)
            agents.update(*(memory[row, index] for memory in replay), noise, policy=step % 2 == 0)
        if step % T == T - 1:
            curve.append(returns.mean())
            progress.set_postfix_str(f"return {curve[-1]:.1f}")
    env.close()

    with torch.no_grad():
        labels = agents.act(history[0].view(num, s.episodes * T, -1))[0].view_as(history[1])
    random_return = play(name, tasks, None, 20, s.seed + 1, device)
    expert_return = play(name, tasks, agents, 20, s.seed + 1, device)
    info = {
        "format": FORMAT,
        "settings": dataclasses.asdict(s),
        "versions": {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)},
        "seconds": round(time.time() - start, 1),
    }
    arrays = {k: v.cpu().numpy() for k, v in zip(("states", "actions", "rewards"), history)}
    path = Path(s.out) / f"{name}.npz"
    write_atomically(
        path,
        lambda file: np.savez_compressed(
            file,
            tasks=tasks,
            test=np.arange(num) >= s.train_tasks,
            **arrays,
            expert_actions=labels.cpu().numpy(),
            random_return=random_return,
            expert_return=expert_return,
            info=json.dumps(info),
        ),
    )
    print(f"{num} agents, {rounds * T * c} steps each, {time.time() - start:.0f} s: wrote {path}")
    print(f"return, mean over tasks: random {random_return.mean():.1f}, expert {expert_return.mean():.1f}")
    print(f"expert of the worst task {expert_return.min():.1f}, of the best {expert_return.max():.1f}")
    return path


def load(path):
    """Reads a dataset; returns a dict of the arrays that this module's first lines list, `info` as a dict.

    Raises BadInput where the file is missing, damaged, no dataset, or of another format.
    """
    run = f"python collect.py --env {Path(path).stem}"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            data = {key: arrays[key] for key in arrays.files}
        data["info"] = json.loads(str(data["info"]))
        version = data["info"]["format"]
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: run {run}") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} is damaged or no dataset ({reason}): delete it and run {run}") from None
    if version != FORMAT:
        raise BadInput(f"{path} has format {version}, this code reads {FORMAT}: delete it and run {run}")
    return data


if __name__ == "__main__":
    try:
        given = parse_flags(Settings, sys.argv[1:])
        collect(given.pop("env", "point_robot"), **given)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)

"""Collects the learning histories of a SAC agent in many tasks and writes them to `data/ENV.npz`.

    python collect.py --env point_robot

The authors' code trains one SAC agent for each task. Here one agent, which is told the task, learns
in all tasks at once, the held-out ones among them. That takes a fraction of the time, because what
it learns in one task helps in the others. Its episodes in a task are this task's learning history.

A dataset is a file data/NAME.npz, or a folder data/NAME/ with one .npy file per array. Arrays of a
folder are mapped, so they may be larger than the memory, if they have the type that is used. The
arrays of N tasks, each with E episodes of T steps, are:

    states           (N, E, T, obs_dim)  whole episodes, in the order in which the agent experienced
                                         them
    actions          (N, E, T, act_dim)  the actions taken, in [-1, 1]; or (N, E, T) integers 0, 1,
                                         2, ..., which are discrete actions
    rewards          (N, E, T)
    test             (N,) bool           tasks that in-context training never sees: some of the
                                         tasks, but not all; 0 and 1 will do
    expert_actions   as `actions`        what the trained agent does in `states`, without noise: the
                                         targets of DPT
    learner_actions  as `actions`        what the agent of that moment, told this task, would have
                                         done without noise: the targets of AD, where
                                         `clean_targets` is on
    guest            (E,) bool           episodes in which the agent was a guest, which means that
                                         it was told a random task, mostly not this one; 0 and 1
                                         will do
    tasks            (N, task_dim)       one row per task, see envs.py
    random_return    (N,)                mean return of uniformly random actions: score 0
    expert_return    (N,)                mean return of the trained agent without noise: score 1
    info             str                 JSON: the settings and the library versions; for people,
                                         `load` does not read it

The first four are enough for AD; DPT also needs `expert_actions`. The last four are for tasks of
envs.py. Any type of number will do. `load` makes float32 of it, and in `states` and `rewards`
float64 if float32 cannot hold it. Integers are kept in discrete actions.
"""

import argparse
import copy
import ctypes
import dataclasses
import errno
import hashlib
import json
import math
import numbers
import os
import re
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn
from tqdm import tqdm

try:
    from envs import ENVS, TaskVec, make_vec, sample_tasks
except ImportError as error:
    advice = "give your own envs.py another name, because collect.py needs the one beside it"
    raise ImportError(f"{error}: {advice}") from None

SAVE_EVERY = 300  # seconds between saves of an unfinished collection


# ---- Errors and files ----------------------------------------------------------------------------


class BadInput(ValueError):
    """Input that cannot work. The message is one line that says what is wrong and what to do."""


def require(condition, message):
    """Raises BadInput with `message` unless `condition` holds."""
    if not condition:
        raise BadInput(message)


def first_line(error):
    """The first line of an error's message."""
    text = str(error) or repr(error)
    return text.splitlines()[0]


def run_command(main, interrupted=""):
    """Calls `main`, and ends the script with one line if there is an error that a user can mend."""
    if hasattr(sys.stdout, "reconfigure"):  # that of a notebook has not
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal lacks
    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted {interrupted}")


def check_fields(settings):
    """Raises BadInput unless each field of a dataclass has a value of its type.

    Numbers must be finite and not negative. Those of numpy become Python's, which a checkpoint and
    a JSON file can hold.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        flag = f"--{field.name.replace('_', '-')} {value}"
        choices = get_args(field.type)
        kind = field.type
        if kind in (int, float):
            wanted = numbers.Integral
            if kind is float:
                wanted = numbers.Real
            is_number = isinstance(value, wanted) and not isinstance(value, bool)
            fits = is_number and 0 <= value < math.inf
            require(fits, f"{flag} must be of type {kind.__name__}, at least 0 and finite")
            setattr(settings, field.name, kind(value))
        elif kind in (bool, str):
            require(isinstance(value, kind), f"{flag} must be of type {kind.__name__}")
            setattr(settings, field.name, kind(value))
        elif isinstance(choices[0], str):
            require(value in choices, f"{flag} must be one of {', '.join(choices)}")
            setattr(settings, field.name, str(value))


def expand(folder):
    """The folder as a str, with the home directory in place of ~."""
    return os.path.expanduser(folder)


def write_atomically(path, write):
    """Calls write(file) on a temporary file and renames it to `path`.

    So `path` is always the whole old file or the whole new one. Raises BadInput if the file cannot
    be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = error
        if isinstance(error.__context__, OSError):  # of which torch.save makes a RuntimeError
            reason = error.__context__
        raise BadInput(f"{path} cannot be written ({first_line(reason)})") from None


@contextmanager
def reading(path, damaged):
    """Turns an error of reading `path` in a `with` block into a BadInput.

    A file that cannot be read now may be a good one, so `damaged` is said of wrong content only.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        # PyTorch has no class of its own for "can't allocate memory".
        no_memory = isinstance(error, MemoryError) or "allocate" in str(error)
        if no_memory or (isinstance(error, OSError) and error.errno is not None):
            raise BadInput(f"{path} cannot be read ({reason})") from None
        raise BadInput(f"{path} {damaged} ({reason})") from None


@contextmanager
def claim(path):
    """Keeps other processes away from `path` during a `with` block.

    Raises BadInput if another process has claimed it. Where the file system has no locks, it says
    so and goes on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        advice = "wait for it, or choose another name"
        raise BadInput(f"{path} is in use by another process: {advice}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"no locks here, so let no other process write {path}", stacklevel=3)
    try:
        yield
    finally:
        lock.release()


# ---- Reading a dataset ---------------------------------------------------------------------------

SHAPES = {
    "rewards": "N E T",
    "states": "N E T obs",
    "actions": "N E T act",
    "test": "N",
    "expert_actions": "N E T act",
    "learner_actions": "N E T act",
    "guest": "E",
    "tasks": "N task",
    "random_return": "N",
    "expert_return": "N",
}
NEEDED = ("test", "states", "actions", "rewards")
ACTIONS = ("actions", "expert_actions", "learner_actions")
SIMULATOR = ("tasks", "random_return", "expert_return")


def dataset_path(folder, name):
    """Where dataset `name` lies: the folder FOLDER/NAME if it exists, else FOLDER/NAME.npz.

    Raises BadInput if both exist.
    """
    file = Path(expand(folder)) / f"{name}.npz"
    unpacked = file.with_suffix("")
    both = unpacked.is_dir() and file.exists()
    require(not both, f"there are both {file} and the folder {unpacked}: move one of them away")
    if unpacked.is_dir():
        return unpacked
    return file


def load(path):
    """Reads and checks a dataset: a file NAME.npz, or a folder NAME of .npy files.

    `path` may end in .npz or not, in both cases. An array of a folder stays mapped if it has the
    type that is used; otherwise it is copied into memory.

    Returns a dict with the arrays that are used, their `fingerprint`, and `simulator`, which says
    whether an agent can act in the tasks. Actions are discrete if `actions` has three dimensions.
    Raises BadInput if the data is missing or damaged, or if an array is not what it should be.
    """
    path = Path(expand(path))
    name = path.name.removesuffix(".npz")
    path = dataset_path(path.parent, name)
    advice = "if it has moved, name its folder with --data"
    if name in ENVS:
        advice += f", else run collect.py --env {name}"
    require(path.exists(), f"{path} is missing: {advice}")

    family = ENVS.get(name)
    shapes = dict(SHAPES)
    if family is None:
        del shapes["tasks"]  # only a simulator of ours can use it
    data = read_arrays(path, shapes)
    for array in NEEDED:
        advice = "collect.py begins with the list of arrays"
        require(array in data, f"{path} has no array `{array}`: {advice}")

    actions = data["actions"]
    integers = actions.dtype.kind in "iu"
    discrete = family is None and actions.ndim == 3 and integers
    advice = "give them shape (N, E, T) if they are discrete, else make them floats"
    clear = not integers or actions.shape[-1:] != (1,)
    require(clear, f"{path}: `actions` are integers of shape {actions.shape}: {advice}")
    if discrete:
        shapes |= dict.fromkeys(ACTIONS, "N E T")

    sizes = read_sizes(path, data, shapes)
    if family is not None:
        sizes["T"] = family.horizon
        sizes["obs"] = family.obs_dim
        sizes["act"] = family.act_dim
        sizes["task"] = family.task_dim
    for array, x in data.items():
        where = f"{path}: `{array}`"
        shape = tuple(sizes[symbol] for symbol in shapes[array].split())
        wanted = f"({shapes[array]}) = {shape}"
        require(x.shape == shape, f"{where} must have shape {wanted}, not {x.shape}")
        data[array] = convert(where, array, x, discrete)

    test_tasks = data["test"].sum()
    some = 0 < test_tasks < len(data["test"])
    require(some, f"{path}: `test` must mark some of the tasks, but not all")
    simulator = data.keys() >= set(SIMULATOR)
    return data | {"fingerprint": fingerprint(data), "simulator": simulator}


def read_arrays(path, names):
    """Those of the arrays `names` that a file or a folder has, as a dict.

    The arrays of a folder are mapped. What is written to them changes the memory and not the files.
    """
    data = {}
    with reading(path, "is damaged or not a dataset"):
        if path.is_dir():
            found = [file.stem for file in path.glob("*.npy")]
            for name in names:
                if name in found:
                    data[name] = np.load(path / f"{name}.npy", mmap_mode="c")
        else:
            with np.load(path) as file:
                found = file.files
                for name in names:
                    if name in found:
                        data[name] = file[name]
    unused = ", ".join(sorted(set(found) - set(names) - {"info", "tasks"}))
    if unused:
        warnings.warn(f"{path}: arrays that are not used: {unused}", stacklevel=3)
    return data


def read_sizes(path, data, shapes):
    """The size that each symbol of `shapes` stands for; `rewards`, the last, says N, E and T."""
    sizes = {}
    for name in NEEDED:
        shape = data[name].shape
        symbols = shapes[name].split()
        fits = len(shape) == len(symbols) and min(shape) > 0
        wanted = f"({shapes[name]})"
        if name == "actions":
            wanted += ", or (N E T) integers"
        require(fits, f"{path}: `{name}` must have shape {wanted}, all at least 1, not {shape}")
        sizes |= dict(zip(symbols, shape))
    return sizes


def convert(where, name, x, discrete):
    """Checks the values of the array `name` and returns it in the type that is used.

    An array that has this type already is not copied.
    """
    require(x.dtype.kind in "fiub", f"{where} must hold real numbers, not {x.dtype}")
    if name in ("test", "guest"):
        require(np.isin(x, (0, 1)).all(), f"{where} must be bool, or hold only 0 and 1")
        return x.astype(bool, copy=False)

    native = x.dtype.newbyteorder("=")
    if discrete and name in ACTIONS:
        counts = x.dtype.kind in "iu" and x.min() >= 0
        require(counts, f"{where} must hold integers from 0, because `actions` holds integers")
        return x.astype(native, copy=False)

    wanted = np.float32
    if name in SIMULATOR:
        wanted = np.float64
    if name in ("states", "rewards") and not np.can_cast(native, np.float32):
        wanted = np.float64  # large integers would be rounded
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
        x = x.astype(wanted, copy=False)

    # The extremes show what is not finite, and no second array is needed to find them.
    extremes = [(part.min(), part.max()) for part in in_parts(x, f"checking {name}")]
    low = float(np.min(extremes))
    high = float(np.max(extremes))
    advice = "all episodes must have T steps, see exercise 6"
    require(-3e38 < low and high < 3e38, f"{where} has non-finite values in float32: {advice}")
    if name in ACTIONS:
        inside = -1 - 1e-6 <= low and high <= 1 + 1e-6
        advice = "scale them with the bounds of your robot, 2 (a - low) / (high - low) - 1"
        require(inside, f"{where} must lie in [-1, 1]: {advice}")
        largest = max(-low, high)
        if largest < 0.1:
            warnings.warn(f"{where} is at most {largest:.2g}: {advice}", stacklevel=3)
    return x


def in_parts(x, what):
    """The rows of an array, one after the other, with a bar if that takes long."""
    return tqdm(x, what, leave=False, delay=5, disable=None)


def fingerprint(arrays):
    """A sha256 of names, types, shapes and values, which is the same for every file with them."""
    digest = hashlib.sha256()
    for name, x in arrays.items():  # in the order of SHAPES
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        for part in in_parts(x, f"reading {name}"):  # in parts, as `ascontiguousarray` may copy
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def statistics(array, tasks):
    """Mean, deviation, lowest and highest value of array (N, E, T, dim) over `tasks`: (4, dim).

    One task at a time is read. The deviation of a dimension that does not move, up to the rounding
    of its type, is replaced by its largest absolute value, so that rounding is not blown up.
    """
    chosen = np.flatnonzero(tasks)
    count = len(chosen) * array.shape[1] * array.shape[2]
    total = np.zeros(array.shape[3])
    low = np.full(array.shape[3], np.inf)
    high = np.full(array.shape[3], -np.inf)
    for i in in_parts(chosen, "mean of the training data"):
        total += array[i].sum((0, 1), dtype=np.float64)
        low = np.minimum(low, array[i].min((0, 1)))
        high = np.maximum(high, array[i].max((0, 1)))
    mean = total / count
    squares = 0
    for i in in_parts(chosen, "deviation of the training data"):
        squares += ((array[i] - mean) ** 2).sum((0, 1))
    largest = np.maximum(abs(low), abs(high))
    std = np.sqrt(squares / count)
    std = np.where(std > 4 * np.finfo(array.dtype).eps * largest, std, largest)
    std[std == 0] = 1
    return np.stack([mean, std, low, high])


# ---- Checks of an environment in which an agent acts ---------------------------------------------


def check_environment(env, sizes):
    """Raises BadInput unless `env` is a vector environment whose spaces are those of training.

    `sizes` is a dict of obs_dim, act_dim and `discrete`, as of a T2MIR.
    """
    is_vector = isinstance(env, VectorEnv)
    wanted = "an array of tasks or a vector environment, such as SyncVectorEnv([make_robot])"
    require(is_vector, f"`evaluate` takes {wanted}, not {type(env).__name__}")

    twice = env.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP
    advice = "make it with autoreset_mode=AutoresetMode.NEXT_STEP, which is the default"
    require(not twice, f"with AutoresetMode.SAME_STEP each episode would begin twice: {advice}")

    space = env.single_observation_space
    shape = (sizes["obs_dim"],)
    advice = "gymnasium.wrappers.FlattenObservation makes a vector of other observations"
    fits = isinstance(space, Box) and space.shape == shape
    require(fits, f"observations must be of shape {shape}, as in training, not {space}: {advice}")

    space = env.single_action_space
    act_dim = sizes["act_dim"]
    if sizes.get("discrete", False):
        fits = isinstance(space, Discrete) and space.start == 0 and space.n >= act_dim
        require(fits, f"actions must be Discrete({act_dim}), as in training, not {space}")
    else:
        fits = isinstance(space, Box) and space.shape == (act_dim,) and space.dtype.kind == "f"
        wanted = f"floats of shape ({act_dim},)"
        require(fits, f"actions must be {wanted}, as in training, not {space}")
        unit = (space.low == -1).all() and (space.high == 1).all()
        advice = "wrap each robot in gymnasium.wrappers.RescaleAction(robot, -1, 1)"
        if not space.is_bounded():
            advice = "leave out gymnasium.wrappers.ClipAction, or give the space its bounds"
        require(unit, f"actions must lie in [-1, 1], not {space}: {advice}")


def checked(x, shape, name):
    """What an environment has returned, as a float64 tensor of `shape`.

    Raises BadInput if it has another shape or is not finite.
    """
    x = torch.from_numpy(np.array(x, dtype=np.float64))  # of any type and layout
    found = tuple(x.shape)
    require(found == shape, f"the environment's {name} have shape {found} instead of {shape}")
    require(x.isfinite().all(), f"the environment's {name} are not finite, so the agent stops")
    return x


def check_end(ended, steps, T):
    """Raises BadInput if an episode has `ended` (N,) bool after fewer than T steps."""
    early = steps < T and ended.any()
    advice = "let a wrapper go on until then, or see experiments/exercises/6_early_ends.patch"
    require(not early, f"an episode ended after {steps} of {T} steps: {advice}")


def warn_of_other_units(name, x, statistics):
    """Warns if states or rewards x (..., dim) leave the range of the training data by far.

    By more than its width, or than the deviation where nothing moved. `statistics` are those of the
    function with this name, and `name` has {} in the place of the dimension.
    """
    _, std, low, high = statistics.cpu()
    margin = torch.maximum(high - low, std)
    outside = ((x < low - margin) | (x > high + margin)).flatten(0, -2).any(0)
    for i in outside.nonzero()[:1].flatten():
        seen = f"from {x[..., i].min():.4g} to {x[..., i].max():.4g}"
        trained = f"from {low[i]:.4g} to {high[i]:.4g}"
        said = f"{name.format(i)} is {seen}, but was {trained} in training"
        warnings.warn(f"{said}: is it in the same unit?", stacklevel=3)


# ---- Settings ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """What a collection depends on. A family's `collecting` in envs.py changes some defaults."""

    env: str = "point_robot"  # task family: a name in ENVS
    steps: int = 3_300  # environment steps of each copy, in whole episodes
    copies: int = 4  # copies of each task's environment in which the agent acts
    hidden: int = 64  # width of the two hidden layers of actor and critics
    batch: int = 256  # transitions in an update
    updates: int = 2  # updates after each step
    lr: float = 2e-3  # Adam's learning rate, which falls to zero over the last quarter of the run
    gamma: float = 0.9  # discount factor
    n_step: int = 1  # rewards that are summed before the target critics value the rest
    recency: float = 1.0  # 1 draws all stored steps equally often; more prefers recent steps
    tau: float = 0.02  # fraction by which the target critics move towards the critics per update
    temperature: float = 0.02  # weight of the policy's entropy, in units of reward
    critic_norm: bool = False  # layer norm in the critics
    random_steps: int = 800  # steps with uniformly random actions before learning starts
    train_tasks: int = 200  # tasks to train in-context agents on
    test_tasks: int = 50  # tasks held out for their evaluation, drawn after the training tasks
    episodes: int = 400  # episodes stored per task, evenly spaced; at most those that were made
    history: float = 0.667  # part of the run that is stored; the rest only makes a better expert
    seed: int = 0  # random seed, which also draws the tasks
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of hidden layers
    out: str = "data"  # folder of the dataset

    def __post_init__(self):
        require(self.env in ENVS, f"unknown --env {self.env}: choose one of {', '.join(ENVS)}")
        self.out = expand(self.out)  # a str, so that the settings can be written as JSON
        check_fields(self)
        self.device = pick_device(self.device)
        if self.dtype == "auto":
            self.dtype = pick_dtype(self.device)

        counts = ("steps", "copies", "hidden", "batch", "updates", "n_step", "random_steps")
        counts += ("train_tasks", "test_tasks", "episodes")
        for name in counts:
            value = getattr(self, name)
            require(value >= 1, f"--{name} {value} must be at least 1")
        for name in ("lr", "gamma", "recency", "tau", "history"):
            value = getattr(self, name)
            require(value > 0, f"--{name} {value} must be positive")
        require(self.gamma <= 0.9999, f"--gamma {self.gamma} must be at most 0.9999")
        require(self.tau <= 1, f"--tau {self.tau} must be at most 1")
        require(self.history <= 1, f"--history {self.history} must be at most 1")
        # Copy c repeats its random actions for 2^c steps, which must fit into an int64. The seed is
        # multiplied by 2^20, which must fit as well.
        require(self.copies <= 62, f"--copies {self.copies} must be at most 62")
        require(self.seed <= 10**12, f"--seed {self.seed} must be at most 10^12")

        whole_episodes = self.steps - self.steps % ENVS[self.env].horizon
        learns = whole_episodes > self.random_steps
        after = f"after --random_steps {self.random_steps}"
        require(learns, f"--steps {self.steps} leaves nothing to learn {after}")


def settings_of(name, **given):
    """The Settings of family `name`: the defaults, then its `collecting`, then `given` on top."""
    family = ENVS.get(name, TaskVec)  # Settings refuses an unknown name
    return Settings(env=name, **family.collecting | given)


def pick_device(name):
    """The device called `name`, where auto is cuda if there is one and else cpu.

    Raises BadInput if PyTorch cannot use it.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    known = re.fullmatch(r"cpu|cuda(:\d+)?", name)
    require(known, f"--device {name} must be auto, cpu, cuda, or cuda:N for GPU number N")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA raise the latter
        raise BadInput(f"--device {name} does not work here ({first_line(error)})") from None
    return name


def pick_dtype(device):
    """bfloat16 where the hardware has instructions for its matrix products, else float32."""
    cpu = torch.cpu.get_capabilities()
    if device != "cpu" or cpu.get("avx512_bf16") or cpu.get("amx_bf16"):
        return "bfloat16"
    return "float32"


# ---- Soft actor-critic for all tasks at once -----------------------------------------------------


class BatchedMLP(nn.Module):
    """`num` independent multi-layer perceptrons with the same inputs, computed together.

    (B, sizes[0]) -> (num, B, sizes[-1]) float32. The hidden layers are computed in `dtype`. `norm`
    is a layer norm before each ReLU, which bounds a critic's values of untried actions.
    """

    def __init__(self, num, sizes, norm=False, dtype=torch.float32):
        super().__init__()
        self.norm = norm
        self.dtype = dtype
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5
            self.weights.append(torch.empty(num, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x):
        x = x.to(self.dtype).expand(len(self.weights[0]), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = torch.baddbmm(bias.to(self.dtype), x, weight.to(self.dtype))  # (num, B, hidden)
            if self.norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = F.relu_(x)
        weight = self.weights[-1]
        return torch.baddbmm(self.biases[-1], x.to(weight.dtype), weight)


class SAC(nn.Module):
    """Soft actor-critic (Haarnoja et al. 2018): one agent for all tasks, which is told the task.

    Actor and critics see the normalised state and the normalised row of `tasks`, (N, task_dim). The
    critics predict (1 - gamma) times the usual return, which has the size of one reward.
    """

    def __init__(self, tasks, obs_dim, act_dim, s):
        super().__init__()
        self.s = s
        dtype = getattr(torch, s.dtype)
        seen = obs_dim + tasks.shape[1]
        self.actor = BatchedMLP(1, (seen, s.hidden, s.hidden, 2 * act_dim), dtype=dtype)
        sizes = (seen + act_dim, s.hidden, s.hidden, 1)
        self.critics = BatchedMLP(2, sizes, s.critic_norm, dtype)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)

        # All numbers of a task together weigh as much as one of the state, or the networks would
        # first have to learn to ignore the 65 of Walker2d. A number that is the same in all tasks
        # becomes 0.
        std = tasks.std(0)
        varies = std > 1e-9 * abs(tasks).max(0)
        told = (tasks - tasks.mean(0)) / np.where(varies, std, np.inf)
        told = told / max(1, varies.sum()) ** 0.5
        self.register_buffer("told", torch.tensor(told, dtype=torch.float32))
        # The sums of 1, x and x^2 over the visited states x, and what follows from them.
        self.register_buffer("moments", torch.zeros(3, obs_dim, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

        self.to(s.device)
        self.lr = torch.tensor(s.lr, device=s.device)  # of both optimizers; `run_round` lowers it
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=self.lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critics.parameters(), lr=self.lr, fused=True)

    def update_normalisation(self, states):
        """Adds visited states (..., obs_dim) to the statistics that normalise the inputs."""
        x = states.flatten(0, -2).double()  # float32 would lose a small deviation of large numbers
        self.moments += torch.stack([torch.ones_like(x), x, x**2]).sum(1)
        count, total, squares = self.moments
        mean = total / count
        variance = squares / count - mean**2
        self.mean.copy_(mean)
        self.std.copy_(variance.clamp_min(0).sqrt() + 0.01)

    def inputs(self, states, task):
        """What the networks see in states (..., obs_dim) of tasks with indices `task`, (...)."""
        normalised = (states - self.mean) / self.std
        return torch.cat([normalised, self.told[task]], dim=-1)

    def act(self, states, task, noise=None):
        """Actions for states (..., obs_dim) of tasks (...), and their log-densities (...).

        Without `noise`, these are the mean actions and None.
        """
        x = self.inputs(states, task)
        mean, log_std = self.actor(x.flatten(0, -2)).view(*x.shape[:-1], -1).chunk(2, dim=-1)
        if noise is None:
            return torch.tanh(mean), None
        log_std = log_std.clamp(-5, 2)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        # log(1 - tanh(u)^2), in a form that is exact for large |u| too
        log_slope = 2 * (np.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(-1)

    def value(self, critics, states, task, actions):
        """The values of both critics, (2, B).

        A value is (1 - gamma) times the discounted sum of rewards and entropy.
        """
        x = torch.cat([self.inputs(states, task), actions], dim=-1)
        return critics(x)[..., 0]

    def update(self, states, task, actions, rewards, discounts, next_states, noise, policy=True):
        """One step of the critics, the target critics and, if `policy`, the actor.

        The batch is (B, ...). `next_states` lie n steps after `states`, `rewards` (B,) are the
        discounted sums over these steps, and `discounts` (B,) are gamma^n. `noise` (2, B, act_dim)
        is standard normal. No state is terminal, so there is no mask.
        """
        s = self.s
        entropy_weight = (1 - s.gamma) * s.temperature
        with torch.no_grad():
            next_actions, log_prob = self.act(next_states, task, noise[0])
            next_value = self.value(self.targets, next_states, task, next_actions).amin(0)
            next_value = next_value - entropy_weight * log_prob
            target = (1 - s.gamma) * rewards + discounts * next_value  # (B,)

        error = self.value(self.critics, states, task, actions) - target  # (2, B)
        critic_loss = error.square().mean(-1).sum()
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()

        if policy:
            new_actions, log_prob = self.act(states, task, noise[1])
            new_value = self.value(self.critics, states, task, new_actions).amin(0)
            actor_loss = (entropy_weight * log_prob - new_value).mean()
            self.actor_opt.zero_grad()
            actor_loss.backward(inputs=list(self.actor.parameters()))  # not those of the critics
            self.actor_opt.step()

        critics = [p.detach() for p in self.critics.parameters()]
        torch._foreach_lerp_(list(self.targets.parameters()), critics, s.tau)


@torch.no_grad()
def average_return(name, tasks, agent, copies, seed, device):
    """The mean return of each task over `copies` episodes, (num_tasks,).

    The agent acts without noise and is told the task; if it is None, actions are uniformly random.
    """
    env = make_vec(name, np.repeat(tasks, copies, axis=0))
    rng = np.random.default_rng([seed, 1])  # another stream than that of the start states
    observations, _ = env.reset(seed=seed)
    task = torch.arange(len(tasks), device=device).repeat_interleave(copies)
    returns = 0
    for _ in range(env.horizon):
        actions = rng.uniform(-1, 1, env.action_space.shape)
        if agent is not None:
            states = torch.as_tensor(observations, device=device)
            actions = agent.act(states, task)[0].cpu().numpy()
        observations, rewards, *_ = env.step(actions)
        returns = returns + rewards
    env.close()
    return returns.reshape(len(tasks), copies).mean(1)


# ---- Collection ----------------------------------------------------------------------------------


class Collection:
    """The agent of one family, the environments of all tasks and their histories.

    In each round every copy of an environment runs one episode of T steps. Copy c of round r is
    episode r * copies + c of the task's history. All histories together are the replay buffer.
    """

    def __init__(self, s, num):
        family = ENVS[s.env]
        self.s = s
        self.num = num
        self.T = family.horizon
        self.device = torch.device(s.device)
        self.tasks = sample_tasks(s.env, num, s.seed)
        self.env = make_vec(s.env, np.repeat(self.tasks, s.copies, axis=0))
        self.simulator = ThreadPoolExecutor(1)
        torch.manual_seed(s.seed)
        self.agent = SAC(self.tasks, family.obs_dim, family.act_dim, s)
        self.rng = torch.Generator(self.device)
        self.draw = {"device": self.device, "generator": self.rng}  # for torch's random functions
        self.rounds = s.steps // self.T
        self.round = 0

        shape = (num, self.rounds * s.copies, self.T)
        self.states = torch.zeros(*shape[:2], self.T + 1, family.obs_dim, device=self.device)
        self.actions = torch.zeros(*shape, family.act_dim, device=self.device)
        self.learner_actions = torch.zeros_like(self.actions)
        self.rewards = torch.zeros(shape, device=self.device)
        self.guest = torch.zeros(shape[1], dtype=torch.bool)  # episodes with the agent as a guest
        self.history = {
            "states": self.states,
            "actions": self.actions,
            "learner_actions": self.learner_actions,
            "rewards": self.rewards,
        }

    def run_round(self):
        """Runs T steps of every copy and, after the random steps, updates the agent in each step.

        Returns the returns of the first copies, (num,).
        """
        s = self.s
        remaining = 1 - self.round / self.rounds
        self.agent.lr.fill_(s.lr * min(1, 4 * remaining))
        # A seed per round makes a resumed collection exact. That of the tasks is not among them.
        seed = (s.seed + 1) * 2**20 + self.round
        self.rng.manual_seed(seed)
        observations, _ = self.env.reset(seed=seed)

        first = self.round * s.copies
        episodes = slice(first, first + s.copies)
        states = self.states[:, episodes]  # (num, copies, T + 1, obs_dim), a view, as the next two
        actions = self.actions[:, episodes]
        rewards = self.rewards[:, episodes]
        states[:, :, 0] = self.by_task(observations)
        told = self.draw_told()

        for t in range(self.T):
            step = self.round * self.T + t
            self.choose_actions(step, episodes, told)
            to_simulator = actions[:, :, t].flatten(0, 1).cpu().numpy()
            stepping = self.simulator.submit(self.env.step, to_simulator)
            if step >= s.random_steps:  # the agent learns while the simulator runs
                for i in range(step * s.updates, (step + 1) * s.updates):
                    # The actor changes in every second update, as in TD3.
                    self.agent.update(*self.sample(step), policy=i % 2 == 0)
            observations, reward, *_ = stepping.result()
            states[:, :, t + 1] = self.by_task(observations)
            rewards[:, :, t] = self.by_task(reward)

        self.agent.update_normalisation(states[:, :, :-1])
        self.round += 1
        finite = all(x.isfinite().all() for x in (states, actions, rewards))
        what = "states, actions or rewards became non-finite"
        require(finite, f"{what} in round {self.round}: try a smaller --lr")
        return rewards[:, 0].sum(-1)

    def by_task(self, x):
        """What the batched environment returns, (num * copies, ...) -> (num, copies, ...)"""
        return torch.as_tensor(x, device=self.device).unflatten(0, (self.num, self.s.copies))

    def draw_told(self):
        """Draws which task the agent is told in each copy of this round, (num, copies).

        It is the copy's own task, but in the last of several copies a random one of the same split,
        mostly another: there the agent acts as a guest. For example, it is told a fast run
        in a slow task, and the data shows the rewards of running too fast.
        """
        s = self.s
        told = torch.arange(self.num, device=self.device)[:, None].repeat(1, s.copies)
        if s.copies > 1:
            train = min(self.num, s.train_tasks)
            told[:train, -1] = torch.randperm(train, **self.draw)
            told[train:, -1] = torch.randperm(self.num - train, **self.draw) + train
            # In an episode whose actions are all random the agent does not act, so it is no guest.
            agent_acts = (self.round + 1) * self.T > s.random_steps
            self.guest[(self.round + 1) * s.copies - 1] = agent_acts
        return told

    @torch.no_grad()
    def choose_actions(self, step, episodes, told):
        """Stores the actions of one step in `episodes`.

        Also stores what the agent would do without noise if it is told the episode's own task.
        """
        s = self.s
        t = step % self.T
        states = self.states[:, episodes]
        actions = self.actions[:, episodes]  # (num, copies, T, act_dim)
        task = torch.arange(self.num, device=self.device)[:, None].expand(-1, s.copies)
        self.learner_actions[:, episodes, t] = self.agent.act(states[:, :, t], task)[0]
        copies = torch.arange(s.copies, device=self.device)
        if step < s.random_steps:
            # Copy c repeats each random action for 2^c steps, which leads farther.
            repeat = 2 ** copies[:, None]
            new = torch.rand(*actions[:, :, t].shape, **self.draw) * 2 - 1
            actions[:, :, t] = torch.where(t % repeat == 0, new, actions[:, :, t - 1])
        else:
            # The first of three or more copies acts without noise.
            noisy = (copies[:, None] > 0) | (s.copies < 3)
            noise = torch.randn(*actions[:, :, t].shape, **self.draw)
            actions[:, :, t] = self.agent.act(states[:, :, t], told, noise * noisy)[0]

    def sample(self, step):
        """Draws a batch for `update` from what is stored of all tasks before `step`.

        The age of a drawn step, as a fraction of the run so far, is U^recency with U uniform in
        (0, 1] (after Wang & Ross 2019). The step is followed for `n_step` steps, or until its
        episode or what is stored ends, so that values travel n times as fast (Watkins 1989). The
        rewards on the way are those of the actions taken. Only one entropy term in n is counted.
        """
        s = self.s
        shape = (s.batch,)
        task = torch.randint(self.num, shape, **self.draw)
        uniform = step - torch.randint(step, shape, **self.draw)  # from 1 to `step`
        which_copy = torch.randint(s.copies, shape, **self.draw)
        noise = torch.randn(2, *shape, self.actions.shape[-1], **self.draw)
        age = (step * (uniform / step) ** s.recency).round().long().clamp(min=1)
        episode = (step - age) // self.T * s.copies + which_copy
        t = (step - age) % self.T

        n = torch.minimum(age, self.T - t).clamp(max=s.n_step)  # (B,)
        k = torch.arange(s.n_step, device=self.device)[:, None]
        ahead = self.rewards[task, episode, (t + k).clamp(max=self.T - 1)]  # (n_step, B)
        rewards = (ahead * s.gamma**k * (k < n)).sum(0)

        states = self.states[task, episode, t]
        actions = self.actions[task, episode, t]
        next_states = self.states[task, episode, t + n]
        return states, task, actions, rewards, s.gamma**n, next_states, noise

    def save(self, path):
        """Saves all that `restore` needs."""
        episodes = self.round * self.s.copies
        content = {
            "settings": dataclasses.asdict(self.s),
            "round": self.round,
            "agent": self.agent.state_dict(),
            "actor_opt": self.agent.actor_opt.state_dict(),
            "critic_opt": self.agent.critic_opt.state_dict(),
            # A view would be saved with all that it is a view of.
            "history": {name: x[:, :episodes].clone() for name, x in self.history.items()},
            "guest": self.guest[:episodes].clone(),
        }
        write_atomically(path, lambda file: torch.save(content, file))

    def restore(self, path):
        """Continues from the last `save`. BadInput if it is damaged or its settings differ."""
        with reading(path, "is damaged, so delete it to begin again"):
            saved = torch.load(path, map_location=self.device, weights_only=True)
        require("agent" in saved, f"{path} is from an older version of collect.py: delete it")
        # These may differ. Another device draws other random numbers.
        free = ("episodes", "history", "device", "out")
        different = []
        for name, value in dataclasses.asdict(self.s).items():
            if name not in free and value != saved["settings"].get(name):
                different.append(name)
        names = " and ".join(different)
        require(not different, f"{path} has another {names}: repeat its settings, or delete it")

        for name, part in saved["history"].items():
            self.history[name][:, : part.shape[1]] = part
        self.guest[: len(saved["guest"])] = saved["guest"]
        self.agent.load_state_dict(saved["agent"])
        for name in ("actor_opt", "critic_opt"):
            optimizer = getattr(self.agent, name)
            optimizer.load_state_dict(saved[name])
            # `load_state_dict` has put a copy in the place of the shared learning rate.
            optimizer.param_groups[0]["lr"] = self.agent.lr
        self.round = saved["round"]


def collect(name, **settings):
    """Trains a SAC agent in tasks of family `name`, writes the dataset and returns its path.

    `settings` are fields of Settings. An interrupted collection continues from its last save.
    Raises BadInput if the settings make no sense, the dataset exists, another process collects it,
    or a number becomes non-finite.
    """
    s = settings_of(name, **settings)
    keep_freed_memory()
    path = Path(s.out) / f"{name}.npz"
    part = path.with_suffix(".part")
    with claim(path):
        existing = dataset_path(s.out, name)
        advice = "delete it to collect it again, or name another folder with --out"
        require(not existing.exists(), f"{existing} exists: {advice}")
        run = Collection(s, s.train_tasks + s.test_tasks)
        if part.exists():
            run.restore(part)
            print(f"continuing from round {run.round} of {run.rounds}, found in {part}")
        finish_rounds(run, part)
        arrays = select(run)
        finite = all(np.isfinite(arrays[x]).all() for x in (*ACTIONS, "expert_return"))
        require(finite, "the last updates have spoiled the agent: try a smaller --lr")
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
        part.unlink(missing_ok=True)

    random = arrays["random_return"]
    expert = arrays["expert_return"]
    returns = f"random {random.mean():.2f}, expert {expert.mean():.2f}"
    returns += f", in its worst task {expert.min():.2f}"
    print(f"{path}: mean return {returns}")
    no_score = np.flatnonzero(~has_score(random, expert))
    if len(no_score) > 0:
        print(
            f"no scores in tasks in which the expert hardly gains over random actions: {no_score}"
        )
    return path


def has_score(random_return, expert_return):
    """Tasks (N,) bool in which the expert gains enough over random actions to measure others.

    That is more than a twentieth of the median of all gains above 0. A gain of hardly more than 0
    is mostly chance, and a score, which is divided by it, could have any value.
    """
    gain = expert_return - random_return
    better = gain > 0
    if better.any():
        better = gain > 0.05 * np.median(gain[better])
    return better


def keep_freed_memory():
    """Makes glibc keep large freed blocks, for the whole process.

    Otherwise the page faults of new tensors would cost a part of each update.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def finish_rounds(run, part):
    """Runs the remaining rounds of a collection, with a progress bar, and saves it to `part`."""
    seconds = 30  # between updates of the bar, so that a log file has fewer lines
    if sys.stderr.isatty():
        seconds = 0.1
    bar = tqdm(
        range(run.round, run.rounds),
        desc=f"collect {run.s.env}",
        total=run.rounds,
        initial=run.round,
        unit="round",
        mininterval=seconds,
    )
    saved = time.time()
    for _ in bar:
        returns = run.run_round()
        text = f"return {returns.mean():.1f}, from {returns.min():.1f} to {returns.max():.1f}"
        bar.set_postfix_str(text, refresh=False)
        if time.time() - saved > SAVE_EVERY:
            run.save(part)
            saved = time.time()
    run.env.close()


@torch.no_grad()
def select(run):
    """The arrays of the dataset.

    Its episodes are evenly spaced over the rounds of the history and taken from the copies in turn.
    """
    s = run.s
    rounds = max(1, int(run.rounds * s.history))
    j = np.arange(min(s.episodes, rounds * s.copies))
    which_round = j * rounds // len(j)
    which_copy = j % s.copies
    stored = which_round * s.copies + which_copy  # (E,)

    states = run.states[:, stored, : run.T]  # (N, E, T, obs_dim)
    actions = run.actions[:, stored]
    expert_actions = torch.empty_like(actions)
    for i in range(run.num):  # one task at a time, to save memory
        task = torch.tensor(i, device=run.device).expand(states[i].shape[:-1])
        expert_actions[i] = run.agent.act(states[i], task)[0]
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    info = {"settings": dataclasses.asdict(s), "versions": versions}
    return {
        "states": states.cpu().numpy(),
        "actions": actions.cpu().numpy(),
        "learner_actions": run.learner_actions[:, stored].cpu().numpy(),
        "rewards": run.rewards[:, stored].cpu().numpy(),
        "expert_actions": expert_actions.cpu().numpy(),
        "tasks": run.tasks,
        "test": np.arange(run.num) >= s.train_tasks,
        "guest": run.guest[stored].numpy(),
        "info": json.dumps(info),
        "random_return": average_return(s.env, run.tasks, None, 20, s.seed + 1, run.device),
        "expert_return": average_return(s.env, run.tasks, run.agent, 20, s.seed + 1, run.device),
    }


def main():
    # These two flags decide the defaults of the others, so they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", default="point_robot")
    first.add_argument("--device", default="auto")
    given, _ = first.parse_known_args()
    default = settings_of(given.env, device=given.device)
    settings = dataclasses.asdict(tyro.cli(Settings, default=default, description=__doc__))
    collect(settings.pop("env"), **settings)


if __name__ == "__main__":
    run_command(main, "(the same command continues from the last save, every 5 minutes, or begins)")

"""Measures how fast `collect.py` trains its agents: all of them in one batch, one alone, and where the time goes.

    python experiments/bench_collect.py ENV

Rates are medians of three rounds, environment steps included, and the first round warms up. They stand beside the rate
that the matrix products alone would allow, on this machine and at the size of the critics' hidden layer. Takes about a
minute.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import PRESETS, BadInput, Collection, Settings  # noqa: E402
from envs import ENVS  # noqa: E402

# What an operation's name contains, and what it is.
KINDS = {"bmm": "matrix products", "layer_norm": "layer norm", "copy_": "casts and copies", "clamp_min": "ReLU"}
KINDS |= {"threshold": "ReLU", "adam": "Adam and targets", "lerp": "Adam and targets", "index": "sampling"}


def flops_of_update(family, s):
    """FLOPs of the matrix products in one agent's update, a policy update in every second one counted half."""
    actor_input, critic_input = family.obs_dim * s.hidden, (family.obs_dim + family.act_dim) * s.hidden
    actor = actor_input + s.hidden**2 + s.hidden * 2 * family.act_dim  # weights, so multiply-adds of one transition
    critic = critic_input + s.hidden**2  # its last layer is no product
    targets = actor + 2 * critic  # forward
    critics = 2 * (3 * critic - critic_input)  # forward, backward to weights and to all but the first layer's input
    policy = 3 * actor - actor_input + 2 * 2 * critic  # the same for the actor; critics forward and to their inputs
    return 2 * s.batch * (targets + critics + policy / 2)


def update_rates(runs):
    """Agent-updates a second of each Collection in `runs`, a dict from its number of agents."""
    rates, threads = {n: [] for n in runs}, torch.get_num_threads()
    for _ in range(4):  # in turn, so that a busy moment of the machine meets both; the first round warms up
        for n, run in runs.items():
            torch.set_num_threads(threads if n > 1 else 1)  # one agent is fastest on one
            start = time.perf_counter()
            run.run_round()
            rates[n].append(n * run.T / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return {n: statistics.median(r[1:]) for n, r in rates.items()}


def product_rate(s, num):
    """FLOP/s of the product in the hidden layer of the critics of `num` agents, alone."""
    a = torch.randn(2 * num, s.batch, s.hidden, dtype=getattr(torch, s.dtype), device=s.device)
    b, seconds = torch.randn(2 * num, s.hidden, s.hidden, dtype=a.dtype, device=s.device), []
    for _ in range(100):
        start = time.perf_counter()
        (a @ b)[0, 0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * a.numel() * s.hidden / statistics.median(seconds)


def parts_of_step(run, steps=20):
    """Seconds that the parts of one step of the Collection `run` take, each measured alone: a dict, name -> number."""
    run.env.reset(seed=0)
    start = time.perf_counter()
    for _ in range(steps):
        run.env.step(np.zeros(run.env.action_space.shape))
    parts = {"environments": (time.perf_counter() - start) / steps}
    with torch.profiler.profile() as profiler:
        for step in range(steps):
            run.agents.update(*run.sample(run.round * run.T), policy=step % 2 == 0)
    for event in profiler.key_averages():
        kind = next((kind for key, kind in KINDS.items() if key in event.key), "the rest")
        microseconds = event.self_cpu_time_total if run.device.type == "cpu" else event.self_device_time_total
        parts[kind] = parts.get(kind, 0) + microseconds / 1e6 / steps
    return parts


def main(env: tyro.conf.Positional[Literal["point_robot", "cheetah_vel", "walker_param"]], device: str = "auto"):
    family = ENVS[env]
    short = dict(steps=4 * family.horizon, random_steps=1, episodes=1, device=device)
    s = Settings(**{"env": env, **PRESETS.get(env, {}), **short})
    num = s.train_tasks + s.test_tasks
    runs = {n: Collection(s, n) for n in (num, 1)}
    many, one = update_rates(runs).values()
    flops, product = flops_of_update(family, s), product_rate(s, num)
    print(f"{env}: hidden {s.hidden}, batch {s.batch}, {s.dtype}")
    print(f"{num} agents in a batch  {many:6.0f} agent-updates/s")
    print(f"one agent alone       {one:6.0f} agent-updates/s: the batch is {many / one:.1f} times as fast")
    share = many * flops / product
    print(f"matrix products alone {product / flops:6.0f} agent-updates/s, of which the batch makes {share:.0%}:")
    print(f"    {flops / 1e6:.0f} MFLOP an update, and the machine makes {product / 1e9:.0f} GFLOP/s")
    print(f"one step of the batch {1e3 * num / many:6.1f} ms; its parts, each measured alone:")
    for kind, seconds in sorted(parts_of_step(runs[num]).items(), key=lambda item: -item[1]):
        print(f"    {kind:18}{1e3 * seconds:6.1f} ms")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except BadInput as error:
        sys.exit(f"error: {error}")

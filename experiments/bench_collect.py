"""Measures how fast `collect.py` trains its agents: all in one batch, one alone, and its parts.

    python experiments/bench_collect.py ENV

Rates are medians of three rounds, environment steps included, after a round that warms up. They
stand beside the rate that the matrix products alone would allow on this machine, at the size of the
critics' hidden layer. Takes about a minute.
"""

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import Collection, run_command, settings_of
from envs import ENVS

# What an operation's name contains, and what it is.
KINDS = {
    "bmm": "matrix products",
    "layer_norm": "layer norm",
    "copy_": "casts and copies",
    "clamp_min": "ReLU",
    "threshold": "ReLU",
    "adam": "Adam and targets",
    "lerp": "Adam and targets",
    "index": "sampling",
}


def flops_of_update(family, s):
    """FLOPs of the matrix products in one agent's update. Every second one updates the policy."""
    actor_input = family.obs_dim * s.hidden
    critic_input = (family.obs_dim + family.act_dim) * s.hidden
    # Weights, which are the multiply-adds of a forward pass of one transition.
    actor = actor_input + s.hidden**2 + s.hidden * 2 * family.act_dim
    critic = critic_input + s.hidden**2  # its last layer is no matrix product

    # A backward pass computes the gradients of weights and inputs, the first layer's only of weights.
    targets = actor + 2 * critic
    critics = 2 * (3 * critic - critic_input)
    # For the policy, the critics need no gradients of weights, but those of all inputs.
    policy = 3 * actor - actor_input + 2 * 2 * critic
    return 2 * s.batch * (targets + critics + policy / 2)


def update_rates(runs):
    """Agent-updates per second of the Collections `runs`, a dict: number of agents -> rate."""
    rates = defaultdict(list)
    threads = torch.get_num_threads()
    for _ in range(4):  # in turn, so that a busy moment of the machine meets both
        for num, run in runs.items():
            if num == 1:
                torch.set_num_threads(1)  # one agent is fastest on one
            start = time.perf_counter()
            run.run_round()
            rates[num].append(num * run.T / (time.perf_counter() - start))
            torch.set_num_threads(threads)
    return {num: statistics.median(measured[1:]) for num, measured in rates.items()}


def product_rate(s, num):
    """FLOP/s of the product in the hidden layer of the critics of `num` agents, alone."""
    of = {"dtype": getattr(torch, s.dtype), "device": s.device}
    a = torch.randn(2 * num, s.batch, s.hidden, **of)
    b = torch.randn(2 * num, s.hidden, s.hidden, **of)
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        (a @ b)[0, 0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * a.numel() * s.hidden / statistics.median(seconds)


def parts_of_step(run, steps=20):
    """Seconds of each part of one step of a Collection, measured alone: a dict name -> number."""
    run.env.reset(seed=0)
    start = time.perf_counter()
    for _ in range(steps):
        run.env.step(np.zeros(run.env.action_space.shape))
    parts = defaultdict(float)
    parts["environments"] = (time.perf_counter() - start) / steps

    with torch.profiler.profile() as profiler:
        for step in range(steps):
            batch = run.sample(run.round * run.T)
            run.agents.update(*batch, policy=step % 2 == 0)
    for event in profiler.key_averages():
        kinds = [kind for key, kind in KINDS.items() if key in event.key]
        kind = [*kinds, "the rest"][0]
        microseconds = event.self_device_time_total
        if run.device.type == "cpu":
            microseconds = event.self_cpu_time_total
        parts[kind] += microseconds / 1e6 / steps
    return parts


def main(
    env: tyro.conf.Positional[Literal["point_robot", "cheetah_vel", "walker_param"]],
    device: str = "auto",
):
    """Measures.

    Args:
        env: task family
        device: cpu, cuda, or auto: cuda if there is one
    """
    family = ENVS[env]
    steps = 4 * family.horizon
    s = settings_of(env, steps=steps, random_steps=1, episodes=1, device=device)
    num = s.train_tasks + s.test_tasks
    runs = {num: Collection(s, num), 1: Collection(s, 1)}
    rates = update_rates(runs)
    flops = flops_of_update(family, s)
    rate = product_rate(s, num)
    share = rates[num] * flops / rate
    print(f"{env}: hidden {s.hidden}, batch {s.batch}, {s.dtype}")
    print(f"{num} agents in a batch  {rates[num]:6.0f} agent-updates/s")
    print(f"one agent alone       {rates[1]:6.0f} agent-updates/s: ", end="")
    print(f"the batch is {rates[num] / rates[1]:.1f} times as fast")
    print(f"matrix products alone {rate / flops:6.0f} agent-updates/s, ", end="")
    print(f"of which the batch makes {share:.0%}:")
    print(f"    {flops / 1e6:.0f} MFLOP an update, and the machine makes {rate / 1e9:.0f} GFLOP/s")
    print(f"one step of the batch {1000 * num / rates[num]:6.1f} ms; ", end="")
    print("its parts, each measured alone:")
    parts = parts_of_step(runs[num])
    for kind in sorted(parts, key=parts.get, reverse=True):
        print(f"    {kind:18}{1000 * parts[kind]:6.1f} ms")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

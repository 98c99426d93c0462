"""Measures how fast `collect.py` trains its agents: all of them in one batch, one alone, and where the time goes.

    python experiments/bench_collect.py cheetah_vel
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from collect import PRESETS, Collection, Settings  # noqa: E402
from envs import ENVS  # noqa: E402


def make_settings(name, **given):
    return Settings(**{"env": name, **PRESETS.get(name, {}), **given})


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
    s = make_settings(name, **{**given, "steps": 4 * ENVS[name].horizon, "random_steps": 1, "episodes": 1})
    num, rates, seconds, threads = s.train_tasks + s.test_tasks, {}, [], torch.get_num_threads()
    runs = {n: Collection(s, n) for n in (num, 1)}
    for _ in range(4):  # in turn, so that a busy moment of the machine meets both; the first round warms up
        for n, run in runs.items():
            torch.set_num_threads(threads if n > 1 else 1)  # one agent is fastest on one
            start = time.time()
            run.run_round()
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


if __name__ == "__main__":
    bench(sys.argv[1])

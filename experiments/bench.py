"""Measures how fast T2MIR and its dense baseline train and act, on made-up data.

    python experiments/bench.py [--env ENV] [--mode MODE] [--device DEVICE]

The sizes are those of the paper's release. The two agents take their steps in turn, so that a busy
moment of the machine meets both. Times are medians of five rounds, after one that warms up. The
floor is what a training step of the baseline spends in matrix products, at the rate that the
machine reaches on one large product. T2MIR has as many active parameters, and so the same floor.
"""

import dataclasses
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import pick_device, run_command
from envs import ENVS

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

# AD on HalfCheetah has 24 sequences in the release.
SIZES = {
    ("point_robot", "dpt"): {"d_model": 128, "n_layers": 3, "n_heads": 8, "batch": 32},
    ("point_robot", "ad"): {"d_model": 128, "n_layers": 3, "n_heads": 8, "batch": 32},
    ("cheetah_vel", "dpt"): {"d_model": 128, "n_layers": 4, "n_heads": 4, "batch": 32},
    ("cheetah_vel", "ad"): {"d_model": 256, "n_layers": 3, "n_heads": 8, "batch": 4},
}
AGENTS = ("T2MIR", "dense")
ROUNDS = 6  # the first one warms up
TASKS = 15  # in which the agents act at once


def flops_of_step(c):
    """FLOPs of the matrix products in a training step of the dense baseline (stride 1).

    A context token sees half of the context on average, and so does a query. The last block's
    feed-forward layer computes the queries only.
    """
    d = c.d_model
    episodes = 1  # in a context of DPT
    queries = c.queries
    if c.mode == "ad":
        episodes = c.context
        queries = min(c.queries, ENVS[c.env].horizon)
    context = 3 * episodes * ENVS[c.env].horizon  # tokens
    tokens = context + queries
    moe_blocks = [i % c.n_layers for i in c.moe_layers]
    products = 0  # multiply-adds of one sequence in a forward pass
    for block in range(c.n_layers):
        products += tokens * 4 * d**2  # projections of attention
        products += tokens * context / 2 * 2 * d  # scores, and the mixing of values
        width = 4 * d
        if block in moe_blocks:
            width = 6 * d
        computed = tokens
        if block == c.n_layers - 1:
            computed = queries
        products += computed * 2 * width * d
    # A multiply-add is two FLOPs, and the backward pass costs twice as much as the forward pass.
    return c.batch * products * 2 * 3


def made_up_data(c, num_tasks=45, episodes=8):
    """Arrays in the format of a dataset, with normally distributed numbers."""
    family = ENVS[c.env]
    rng = np.random.default_rng(0)
    widths = {
        "states": (family.obs_dim,),
        "actions": (family.act_dim,),
        "expert_actions": (family.act_dim,),
        "rewards": (),
    }
    data = {}
    for name, width in widths.items():
        shape = (num_tasks, episodes, family.horizon, *width)
        data[name] = rng.normal(size=shape).astype(np.float32)
    return data


class Agent:
    """A model and its optimizers, with the work that is measured on the data of `x`."""

    def __init__(self, c, data, x, device):
        torch.manual_seed(0)
        everything = np.ones(len(data["states"]), bool)
        self.c = c
        self.x = x
        self.device = device
        self.model = t2mir.new_model(c, data, everything).to(device)
        self.optimizers = t2mir.new_optimizers(self.model)
        names = ("states", "actions", "rewards")
        self.history = {name: x[name][:TASKS] for name in names}
        self.cache = None

    def train(self):
        """A training step as in `t2mir.fit`, which keeps its gradients; returns its tokens."""
        c = self.c
        batch = t2mir.DRAW_BATCH[c.mode](c, self.x, c.context - 1, c.batch)  # AD: K - 1 finished
        loss, _ = self.model.train()(batch.to(self.device))
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.step_optimizers()
        for module in self.model.modules():
            if isinstance(module, t2mir.TaskMoE):
                module.update_key_router()
        return 3 * batch.context.rewards.numel() + batch.seen.numel()

    def step_optimizers(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def begin_episode(self):
        """The first step of an episode: the agent reads what it remembers into an empty cache."""
        self.model.eval()
        self.cache = t2mir.Cache(3 * self.c.context * self.model.horizon + 1)
        self.act(0)

    @torch.no_grad()
    def act(self, t):
        """Step t of an episode, behind as many finished ones as the agent remembers."""
        states = self.history["states"][:, self.c.context, t].to(self.device)
        context = t2mir.own_context(self.c, self.history, self.c.context, t).to(self.device)
        x = self.model.act(context, states, t, self.cache)
        self.model.policy.sample(x, True, None).cpu()


def measure(c, device):
    """Seconds of each round, a dict (agent, work) -> list; tokens of a step; FLOPs of `product`."""
    data = made_up_data(c)
    x = t2mir.to_tensors(data, np.ones(len(data["states"]), bool))
    dense = dataclasses.replace(c, token_moe=False, task_moe=False)
    agents = {"T2MIR": Agent(c, data, x, device), "dense": Agent(dense, data, x, device)}
    dtype = torch.float32
    if device != "cpu":
        dtype = torch.bfloat16  # the default of training there
    a = torch.randn(16_384, 4 * c.d_model, device=device, dtype=dtype)
    b = torch.randn(4 * c.d_model, c.d_model, device=device, dtype=dtype)
    seconds = defaultdict(list)

    def clock(what, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        torch.zeros(1, device=device).item()  # waits for the device
        seconds[what].append(time.perf_counter() - start)
        return result

    for i in range(ROUNDS):
        if i == 1:  # the first round was for warming up
            seconds.clear()
        for name, agent in agents.items():
            tokens = clock((name, "train"), agent.train)
            clock((name, "optimizers"), agent.step_optimizers)
            clock((name, "remember"), agent.begin_episode)
            for t in range(1, 6):
                clock((name, "act"), agent.act, t)
        clock("product", torch.matmul, a, b)
    return seconds, tokens, 2 * a.numel() * c.d_model


def bench(c, device):
    """Measures both agents at the sizes of the Config `c`, and prints the results."""
    seconds, tokens, flops_of_product = measure(c, device)
    ms = {what: 1000 * statistics.median(times) for what, times in seconds.items()}
    rate = flops_of_product / ms["product"]  # FLOPs in a millisecond
    flops = flops_of_step(c)
    floor = flops / rate
    print(f"{c.env} {c.mode}: width {c.d_model}, {c.n_layers} layers, ", end="")
    print(f"{c.batch} sequences, {tokens} tokens")
    print(f"    floor: {flops / 1e9:,.0f} GFLOP a step, ", end="")
    print(f"and the machine makes {rate / 1e6:,.0f} GFLOP/s")
    for name in AGENTS:
        step = ms[name, "train"]
        share = ms[name, "optimizers"] / step
        per_second = 1000 * tokens / step
        print(f"    {name} trains {per_second:9,.0f} tokens/s: {step:,.0f} ms a step, ", end="")
        print(f"of which the floor is {floor / step:.0%} and the optimizers {share:.0%}")
        print(f"    {name} acts in {TASKS} tasks in {ms[name, 'act']:.1f} ms a step, ", end="")
        print(f"and remembers in {ms[name, 'remember']:.0f} ms")
    ratios = [x / y for x, y in zip(seconds["T2MIR", "train"], seconds["dense", "train"])]
    print(f"    T2MIR's training step takes {statistics.median(ratios):.2f} times the dense one's")
    if device != "cpu":
        print(f"    peak memory so far {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    elif resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":  # where it is in bytes
            peak *= 1024
        print(f"    peak memory so far {peak / 2**30:.1f} GiB")


def main(
    env: Literal["all", "point_robot", "cheetah_vel"] = "all",
    mode: Literal["all", "ad", "dpt"] = "all",
    device: str = "auto",
):
    """Measures.

    Args:
        env: one task family or both
        mode: one mode or both
        device: cpu, cuda, or auto: cuda if there is one
    """
    device = pick_device(device)
    for (of_env, of_mode), sizes in SIZES.items():
        if env in ("all", of_env) and mode in ("all", of_mode):
            bench(t2mir.preset(of_env, of_mode, stride=1, **sizes), device)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

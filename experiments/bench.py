"""Measures how fast T2MIR and its dense baseline train and act, at the sizes of the paper, on made-up data.

    python experiments/bench.py [--env ENV] [--mode MODE] [--device DEVICE]

The two agents take their steps in turn, so that a busy moment of the machine meets both; times are medians of five, and
the first round warms up. The floor is what a training step of the baseline spends in matrix products at the rate that
the machine reaches on one large product. T2MIR's active parameters, and so its floor, are the same.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput  # noqa: E402
from envs import ENVS  # noqa: E402

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

# What the paper's release trains at; AD on HalfCheetah has 24 sequences there.
SIZES = {
    ("point_robot", "dpt"): dict(d_model=128, n_layers=3, n_heads=8, batch=32),
    ("point_robot", "ad"): dict(d_model=128, n_layers=3, n_heads=8, batch=32),
    ("cheetah_vel", "dpt"): dict(d_model=128, n_layers=4, n_heads=4, batch=32, stride=1),
    ("cheetah_vel", "ad"): dict(d_model=256, n_layers=3, n_heads=8, batch=4, stride=1),
}
Env, Mode = Literal["all", "point_robot", "cheetah_vel"], Literal["all", "ad", "dpt"]
ROUNDS, TASKS = 6, 15  # rounds of measurements; tasks in which the agents act at once


def flops_of_step(c):
    """FLOPs that a training step of the dense baseline must spend in matrix products, counted from shapes (stride 1).

    A token sees half of the context on average, and the last block's feed-forward layer computes only what is read.
    """
    T, d = ENVS[c.env].horizon, c.d_model
    context = 3 * T * (c.context if c.mode == "ad" else 1)  # tokens
    queries = c.queries if c.mode == "dpt" else min(c.queries, T)
    tokens = context + queries
    products = 0  # multiply-adds of one sequence, forward
    for i in range(c.n_layers):
        width = 6 if i in c.moe_blocks else 4
        products += tokens * 4 * d * d + tokens * context / 2 * 2 * d  # projections; scores and mixing of values
        products += (queries if i == c.n_layers - 1 else tokens) * 2 * width * d * d
    return c.batch * products * 2 * 3  # two FLOPs each, and backward costs twice as much as forward


def made_up_data(c, num_tasks=45, episodes=8):
    """Arrays of the shapes of a dataset, with normally distributed numbers."""
    family, rng = ENVS[c.env], np.random.default_rng(0)
    widths = {"states": (family.obs_dim,), "actions": (family.act_dim,), "expert_actions": (family.act_dim,)}
    shape = num_tasks, episodes, family.horizon
    return {k: rng.normal(size=(*shape, *w)).astype(np.float32) for k, w in (widths | {"rewards": ()}).items()}


def training_step(model, optimizers, x):
    """A step on the arrays `x` of `t2mir.tensors`, as in `t2mir.fit`; returns the number of tokens."""
    c = model.config
    batch = t2mir.BACKBONES[c.mode].batch(c, x, c.context - 1, c.batch)  # in AD with K - 1 finished episodes
    with torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16"):
        losses = model(batch)
        loss = sum(weight * losses[name] for name, weight in c.loss_weights.items() if name in losses)
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    for optimizer in optimizers:
        optimizer.step()
    for block in model.blocks:
        if block.moe is not None and block.moe.task_moe is not None:
            block.moe.task_moe.update_key_router()
    return 3 * batch["rewards"].numel() + batch["seen"].numel()


def bench(c):
    """Measures both agents at the sizes of the Config `c`, and prints the results."""
    data, everything, agents, seconds = made_up_data(c), np.ones(45, bool), {}, {}
    x = t2mir.tensors(data, everything, c.device)
    for name, moe in (("T2MIR", True), ("dense", False)):
        torch.manual_seed(0)
        model = t2mir.new_model(dataclasses.replace(c, token_moe=moe, task_moe=moe), data, everything)
        agents[name] = model, t2mir.new_optimizers(model), t2mir.BACKBONES[c.mode](model, TASKS)
    finished = c.context - 1 if c.mode == "ad" else 1  # episodes in the memory of an agent that acts
    memory = [tuple(x[key][:TASKS, i] for key in ("states", "actions", "rewards")) for i in range(finished)]
    a, b = (torch.randn(n, 4 * c.d_model, device=c.device, dtype=getattr(torch, c.dtype)) for n in (16_384, c.d_model))

    def clock(what, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        if c.device != "cpu":
            torch.zeros(1, device=c.device).item()  # waits for the device
        seconds.setdefault(what, []).append(time.perf_counter() - start)
        return result

    @torch.no_grad()
    def act(agent, t):
        actions, _ = agent.act(memory[0][0][:, t], t)
        agent.observe(memory[0][0][:, t], actions, memory[0][2][:, t], t)

    for _ in range(ROUNDS):
        for name, (model, optimizers, agent) in agents.items():
            tokens = clock((name, "train"), training_step, model.train(), optimizers, x)
            clock((name, "optimizers"), lambda: [optimizer.step() for optimizer in optimizers])
            model.eval()
            clock((name, "remember"), torch.no_grad()(agent.begin_episode), memory)
            for t in range(5):
                clock((name, "act"), act, agent, t)
        clock("product", lambda: a @ b.T)
    ratio = statistics.median(t / u for t, u in zip(seconds["T2MIR", "train"][1:], seconds["dense", "train"][1:]))
    t = {what: statistics.median(times[len(times) // ROUNDS :]) for what, times in seconds.items()}
    rate, flops = 2 * a.numel() * len(b) / t["product"], flops_of_step(c)
    print(f"{c.env} {c.mode}: width {c.d_model}, {c.n_layers} layers, {c.dtype}, {c.batch} sequences, {tokens} tokens")
    print(f"    floor: {flops / 1e9:,.0f} GFLOP a step, and the machine makes {rate / 1e9:,.0f} GFLOP/s")
    for name in agents:
        train, step, remember, acting = (1e3 * t[name, what] for what in ("train", "optimizers", "remember", "act"))
        print(f"    {name} trains {1e3 * tokens / train:9,.0f} tokens/s: {train:,.0f} ms a step", end="")
        print(f", of which the floor is {1e3 * flops / rate / train:.0%} and the optimizers {step / train:.0%}")
        print(f"    {name} acts in {TASKS} tasks in {acting:.1f} ms a step, and remembers in {remember:.0f} ms")
    print(f"    T2MIR's training step takes {ratio:.2f} times the dense one's")
    if c.device.startswith("cuda"):
        print(f"    peak memory so far {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    elif resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"    peak memory so far {peak / 2**30:.1f} GiB")


def main(env: Env = "all", mode: Mode = "all", device: str = "auto"):
    for (of_env, of_mode), sizes in SIZES.items():
        if env in ("all", of_env) and mode in ("all", of_mode):
            bench(t2mir.preset(of_env, of_mode, device=device, **sizes))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except BadInput as error:
        sys.exit(f"error: {error}")

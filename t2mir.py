"""T2MIR: token- and task-wise mixture of experts for in-context reinforcement learning, in one file.

    python t2mir.py --env point_robot --mode dpt

The paper: Wu et al., "Mixture-of-Experts Meets In-Context Reinforcement Learning", NeurIPS 2025, arXiv 2506.05426.
The numbers (1) to (6) below are the README's; each stands where its equation is computed. Read it from top to bottom:
config, attention, experts and routers, losses, block and model, data, evaluation, training, figures, main.

What this model does that a plain causal transformer does not:
- three tokens a step (state, action, reward), each kind with its own embedding, and a time step within the episode;
- in the blocks named by `moe_layers` (the last one) the feed-forward layer is two mixtures of experts side by side: the
  token-wise one routes each token, the task-wise one by the mean of all tokens so far, so by what the task looks like;
- the task router is trained as a task encoder: InfoNCE pulls sequences of one task together, keys from a momentum copy;
- DPT has queries: states at the end of the sequence that see a prefix of the prompt and themselves, never one another.
"""

import argparse
import csv
import dataclasses
import datetime
import difflib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from collect import BadInput, average_return, collect, fast_dtype, load, pick_device, write_atomically
from envs import ENVS, make_vec, sample_tasks

# ----------------------------------------------------------------------------------------------------------------------
# Command line


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


def command_line(main):
    """Runs main(flags) as a command: bad input ends in one line and exit code 2, Ctrl-C in one line and 130."""
    try:
        main(sys.argv[1:])
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        sys.exit(130)

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    """Everything that a run depends on; each field is a flag. PRESETS holds what differs by environment and mode."""

    env: str = flag("point_robot", f"task family: {', '.join(ENVS)}", group="what to train")
    mode: str = flag("dpt", "ad (Algorithm Distillation) or dpt (Decision-Pretrained Transformer)")
    d_model: int = flag(64, "width of the token embeddings", group="model")
    n_layers: int = flag(3, "transformer blocks")
    n_heads: int = flag(4, "attention heads")
    dropout: float = flag(0.0, "dropout of the embeddings and of each sublayer's output")
    moe_layers: str = flag(
        "last", "blocks with a T2MIR layer: last, all, or indices such as 0,2", group="mixture of experts"
    )
    token_experts: int = flag(6, "experts of the token-wise MoE (the paper's K1)")
    task_experts: int = flag(8, "experts of the task-wise MoE (the paper's K2)")
    top_k: int = flag(2, "experts that a token is sent to, in each MoE")
    w_imp: float = flag(0.01, "weight of the importance term in the balance loss")
    w_load: float = flag(0.01, "weight of the load term in the balance loss")
    w_con: float = flag(0.01, "weight of the InfoNCE loss")
    momentum: float = flag(0.005, "the key router moves this fraction towards the task router in each step")
    no_token_moe: bool = flag(False, "ablation: no token-wise MoE, the task-wise one takes its width")
    no_task_moe: bool = flag(False, "ablation: no task-wise MoE; with --no_token_moe plain AD or DPT")
    no_balance: bool = flag(False, "ablation: no balance loss")
    no_contrastive: bool = flag(False, "ablation: no InfoNCE loss")
    task_router: str = flag("prefix", "what routes in the task-wise MoE: prefix, token, or sequence (see TaskMoE)")
    context: int = flag(4, "AD: episodes in a context", group="context")
    history: str = flag("sorted", "AD: order of a context's episodes: sorted (by return) or chronological")
    stride: int = flag(1, "every so many steps enter the context; AD's running episode does with all of them")
    queries: int = flag(40, "DPT: query states trained on each prompt")
    steps: int = flag(1_500, "training steps", group="optimisation")
    batch: int = flag(32, "sequences in a batch: two from each of batch / 2 tasks")
    lr: float = flag(3e-3, "AdamW's peak learning rate")
    warmup: int = flag(100, "steps of linear warm-up; a cosine to zero follows")
    weight_decay: float = flag(1e-4, "AdamW's weight decay")
    clip: float = flag(1.0, "largest norm of the gradient")
    eval_every: int = flag(
        500, "training steps between evaluations on the test tasks; a checkpoint goes with each", group="evaluation"
    )
    explore: float = flag(0.6, "standard deviation of the actions in the first episode, when nothing is in context")
    noise: float = flag(0.0, "standard deviation of the actions in all later episodes")
    eval_episodes: int = flag(10, "episodes that a test task is acted in, in one context")
    seed: int = flag(0, "random seed of training (the data has its own)", group="system")
    device: str = flag("cpu", "cpu, cuda or mps")
    dtype: str = flag("float32", "float32, bfloat16 for autocast (routers stay in float32), or auto: by processor")
    compile: bool = flag(False, "torch.compile the training step, after two minutes' wait; on a CPU it was no faster")
    data: str = flag("data", "folder of the datasets")
    runs: str = flag("runs", "folder of the runs")
    name: str = flag("", "the run's folder in --runs; by default made from env, mode, variant and seed")

    @property
    def changed(self):
        """The fields that differ from the preset, name -> value, but for where things are."""
        preset = Config(**{"env": self.env, "mode": self.mode, **PRESETS[self.env, self.mode]})
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(preset)
        return {k: v for k, v in ours.items() if v != theirs[k] and k not in ("data", "runs", "name")}

    @property
    def command(self):
        """What to type for this run."""
        flags = [f"--{k}" if v is True else f"--{k} {v}" for k, v in self.changed.items()]
        return " ".join([f"python t2mir.py --env {self.env} --mode {self.mode}", *flags])

    @property
    def variant(self):
        """The agent's name in tables and figures, made of what bears on its results: T2MIR-DPT, DPT (lr=0.0001), ..."""
        dense = self.no_token_moe and self.no_task_moe
        free = ("seed", "device", "compile", "eval_every")
        free += ("dtype",) * ("dtype" in PRESETS[self.env, self.mode])  # that preset lets the processor choose
        settings = [k if v is True else f"{k}={v}" for k, v in self.changed.items() if k not in free]
        return named("T2MIR-" * (not dense) + self.mode.upper(), settings, dense)

    @property
    def moe_blocks(self):
        """Indices of the blocks that `moe_layers` names."""
        if self.moe_layers in ("last", "all"):
            return range(self.n_layers - 1 if self.moe_layers == "last" else 0, self.n_layers)
        return [int(i) for i in self.moe_layers.split(",")]

    @property
    def context_steps(self):
        """Episode and time of each step in a full context, (S,) both: by `stride`, but AD's last episode is whole."""
        T = ENVS[self.env].horizon
        finished = torch.arange(0, T, self.stride)
        if self.mode == "dpt":
            return torch.zeros_like(finished), finished
        times = [finished] * (self.context - 1) + [torch.arange(T)]
        return torch.cat([torch.full_like(t, i) for i, t in enumerate(times)]), torch.cat(times)


def named(agent, settings, dense):
    """`agent (settings)`; a dense baseline has none of those that only a MoE has."""
    only_moe = ("token_experts", "task_experts", "top_k", "w_", "momentum", "no_", "task_router")
    settings = [s for s in settings if s and not (dense and s.startswith(only_moe))]
    return agent + f" ({', '.join(settings)})" * bool(settings)


# All sizes are a laptop's. The paper's: d_model 128 (AD on MuJoCo 256), 8 heads (DPT on MuJoCo 4), stride 1, batch 32
# (AD on MuJoCo 24), dropout 0.05, lr 3e-4, and 10,000 steps of warm-up in 100,000.
MUJOCO = dict(d_model=128, stride=8, steps=1_000, eval_every=250, dtype="auto")
AD = dict(w_imp=0.1, w_load=0.1)
PRESETS = {
    ("point_robot", "dpt"): {},
    ("point_robot", "ad"): dict(AD, batch=16, steps=4_000, noise=0.3),
    ("cheetah_vel", "dpt"): dict(MUJOCO, lr=4e-3, n_layers=4, explore=0.3),
    ("cheetah_vel", "ad"): dict(MUJOCO, **AD, lr=4e-3, batch=8),
    ("walker_param", "dpt"): dict(MUJOCO, lr=1e-3, n_layers=4),
    ("walker_param", "ad"): dict(MUJOCO, **AD, lr=1e-3, batch=8),
}


def make_config(env="point_robot", mode="dpt", **given):
    """The preset of `env` and `mode` with `given` fields on top; raises BadInput where a field makes no sense."""
    for field, value, choices in (("env", env, tuple(ENVS)), ("mode", mode, ("ad", "dpt"))):
        if value not in choices:
            raise BadInput(f"unknown --{field} {value!r}: choose one of {', '.join(choices)}")
    c = Config(**{"env": env, "mode": mode, **PRESETS[env, mode], **given})
    for f in dataclasses.fields(c):
        lowest = 1 if f.type is int and f.name not in ("seed", "warmup") else 0
        lowest = 2 if f.name == "eval_episodes" else lowest
        if f.type in (int, float) and not getattr(c, f.name) >= lowest:
            raise BadInput(f"--{f.name} {getattr(c, f.name)} is too small: the least is {lowest}")
    choices = {"history": ("sorted", "chronological"), "dtype": ("float32", "bfloat16", "auto")}
    choices["task_router"] = ("prefix", "token", "sequence")
    for field, allowed in choices.items():
        if getattr(c, field) not in allowed:
            raise BadInput(f"unknown --{field} {getattr(c, field)!r}: choose one of {', '.join(allowed)}")
    try:
        blocks_fit = all(0 <= i < c.n_layers for i in c.moe_blocks)
    except ValueError:
        blocks_fit = False
    for wrong, message in (
        (not blocks_fit, f"--moe_layers {c.moe_layers}: last, all, or block indices below {c.n_layers} such as 0,2"),
        (c.d_model % 16 or c.d_model % c.n_heads, f"--d_model {c.d_model} must be a multiple of 16 and of --n_heads"),
        (c.batch % 2, f"--batch {c.batch} must be even: two sequences a task"),
        (c.top_k >= min(c.token_experts, c.task_experts), f"--top_k {c.top_k} must be below the numbers of experts"),
        (c.dropout >= 1, f"--dropout {c.dropout} must be below 1"),
    ):
        if wrong:
            raise BadInput(message)
    pick_device(c.device)
    c.dtype = fast_dtype(c.device) if c.dtype == "auto" else c.dtype
    if c.compile and c.dtype != "bfloat16":
        raise BadInput("--compile needs --dtype bfloat16: torch compiles grouped_mm in no other")
    return c


# ----------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each computes its share of the batch, and all take the same step


def this_process():
    """This process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_all(x):
    """x of all processes, one behind the other along the first dimension, with gradients; without torchrun x itself.

    A loss of what this returns is the whole batch's, the same in every process, and the mean over processes of its
    gradients is its gradient.
    """
    return torch.cat(dist.nn.functional.all_gather(x.contiguous())) if dist.is_initialized() else x


def average_gradients(parameters):
    """Replaces all gradients by their mean over the processes, in one exchange."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def visible(length, prefix=None, past=0, device=None):
    """Which token sees which, as a bool mask, True where the row's token sees the column's.

    Without `prefix`: a causal sequence behind `past` cached tokens, (L, past + L). With `prefix` (B, Q): the rows of Q
    queries that end the sequence, (B, 1, Q, L). Query q of sequence b sees the first prefix[b, q] tokens of the prompt
    before them and itself, never another query; the prompt, which has no rows here, is causal and sees no query.
    """
    if prefix is None:
        return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    Q = prefix.shape[1]
    prompt = torch.arange(length - Q, device=device) < prefix[..., None]  # (B, Q, L - Q)
    itself = torch.eye(Q, dtype=torch.bool, device=device).expand(len(prefix), Q, Q)
    return torch.cat([prompt, itself], dim=2)[:, None]


class Attention(nn.Module):
    """Multi-head attention: the last tokens by the rows of `mask`, the first by order; `cache` adds the past's keys."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, mask, cache=None):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, heads, past + L, D / heads)
        n = L - (0 if mask is None else mask.shape[-2])
        parts, cpu = [], x.device.type == "cpu"
        if cpu and q.dtype == torch.bfloat16:  # there the kernel is slower in bfloat16 than in float32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=not cpu and torch.is_autocast_enabled(x.device.type)):
            first, last = q.split([n, L - n], dim=2)
            if n > 0:  # told that it is causal, the kernel skips half of the work, which a mask cannot tell it
                parts.append(F.scaled_dot_product_attention(first, k[:, :, :n], v[:, :, :n], is_causal=True))
            if n < L:
                parts.append(F.scaled_dot_product_attention(last, k, v, attn_mask=mask))
        return self.out(torch.cat(parts, dim=2).transpose(1, 2).reshape(B, L, D))


# ----------------------------------------------------------------------------------------------------------------------
# Experts and routers


class Experts(nn.Module):
    """`num` two-layer networks without biases; each token is computed by its chosen experts only.

    Tokens are sorted by expert, so that each expert multiplies only the tokens that chose it. Forward and backward of
    7,680 tokens on one core (d 128, 6 experts 256 wide, top 2): 76 ms, and 392 ms where every expert computes every
    token. Nothing is counted on the host. float32 and bfloat16 only: F.grouped_mm has no other.
    """

    def __init__(self, num, d_in, hidden, d_out):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num, d_in, hidden).uniform_(-1, 1) * d_in**-0.5)
        self.w2 = nn.Parameter(torch.empty(num, hidden, d_out).uniform_(-1, 1) * hidden**-0.5)

    def forward(self, h, gates, chosen):
        """sum_k gates[k] E_chosen[k](h) of each token: h (..., d_in), gates, chosen (..., top_k) -> (..., d_out)."""
        shape, device = h.shape[:-1], h.device.type
        if torch.is_autocast_enabled(device):  # it does not know grouped_mm
            h = h.to(torch.get_autocast_dtype(device))
        h, gates, chosen = (x.flatten(0, -2) for x in (h, gates, chosen))  # (N, .)
        expert, order = chosen.flatten().sort(stable=True)  # pairs of (token, choice), by expert
        token = order // chosen.shape[1]  # (N * top_k,)
        ends = torch.searchsorted(expert, torch.arange(len(self.w1), device=h.device), right=True).int()
        hidden = F.gelu(F.grouped_mm(h[token], self.w1.to(h.dtype), offs=ends))  # rows up to ends[i] by expert i
        y = F.grouped_mm(hidden, self.w2.to(h.dtype), offs=ends)  # (N * top_k, d_out)
        y = y * gates.flatten()[order, None]
        return y.new_zeros(len(h), y.shape[1]).index_add(0, token, y).view(*shape, -1)


def top_k_gates(logits, k):
    """softmax(topk(logits)): gates (..., k) and the chosen experts' indices (..., k)."""
    top, chosen = logits.topk(k, dim=-1)
    return top.softmax(-1), chosen


class TokenMoE(nn.Module):
    """Token-wise mixture of experts, equations (1) and (2); its router sees one token."""

    def __init__(self, d_model, d_out, hidden, num_experts, top_k, w_imp=1.0, w_load=1.0):
        super().__init__()
        self.top_k, self.w_imp, self.w_load = top_k, w_imp, w_load
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.W_noise = nn.Linear(d_model, num_experts, bias=False)
        self.experts = Experts(num_experts, d_model, hidden, d_out)

    def forward(self, h, read=slice(None)):
        """h (B, L, d_model) -> y_tok (B, l, d_out) of tokens h[:, read], the balance loss of all (0 if evaluating)."""
        with torch.autocast(h.device.type, enabled=False):  # routing decides on small differences: always float32
            exact = h.float() if h.dtype == torch.bfloat16 else h
            clean = noisy = self.router(exact)  # g(h), (B, L, K1)
            if self.training:
                # Noisy top-k routing: sometimes a token tries an expert that it would not choose, and that could
                # otherwise never show what it can do; and the load below becomes a probability, which has a gradient
                # (a count has none).
                sigma = F.softplus(self.W_noise(exact)) + 1e-2  # the constant keeps the division in the load finite
                noisy = clean + torch.randn_like(clean) * sigma
            # (1) Token-wise MoE: y_tok = sum_i w_tok(i; h) E_i(h), w_tok = softmax(topk(G_tok(h))), G_tok(h) the noisy
            # logits. The weights are made here; the sum over experts is in `Experts`.
            gates, chosen = top_k_gates(noisy, self.top_k)
            balance = clean.new_zeros(())
            if self.training:
                # (2) Balance loss: w_imp CV(Imp)^2 + w_load CV(Load)^2.
                importance = torch.zeros_like(clean).scatter(-1, chosen, gates)
                load = load_probability(clean, noisy, sigma, self.top_k)
                both = torch.stack([importance.flatten(0, -2).sum(0), load.flatten(0, -2).sum(0)])
                importance, load = of_all(both[None]).sum(0)  # (K1,) each
                balance = self.w_imp * cv_squared(importance) + self.w_load * cv_squared(load)
        return self.experts(h[:, read], gates[:, read], chosen[:, read]), balance


class TaskMoE(nn.Module):
    """Task-wise mixture of experts, equation (3); its router sees the mean of the tokens so far.

    It adds no noise: it has no balance loss, which noise is for, and InfoNCE trains it whatever it chooses.

    The mean so far is `--task_router prefix`. To compare: `token` routes each token by itself, `sequence` by the mean
    of the whole context in training, the future included, and of what there is when acting (this is the release's).
    """

    def __init__(self, d_model, d_out, hidden, num_experts, top_k, momentum=0.005):
        super().__init__()
        self.top_k, self.momentum = top_k, momentum
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.key_router = nn.Linear(d_model, num_experts, bias=False).requires_grad_(False)  # lags: steadier keys
        self.key_router.load_state_dict(self.router.state_dict())
        self.W = nn.Parameter(torch.eye(num_experts))  # bilinear score of InfoNCE
        self.experts = Experts(num_experts, d_model, hidden, d_out)

    def forward(self, h, h_mean):
        """h and h_mean (..., d_model), h_mean from `prefix_mean` -> y_task (..., d_out)."""
        # (3) Task-wise MoE: y_task = sum_i w_task(i; h_mean) E_i(h). The experts act on the token; the task decides
        # which ones, by what has been seen of it up to this token. The sum is in `Experts`, as for (1).
        with torch.autocast(h.device.type, enabled=False):
            gates, chosen = top_k_gates(self.router(h_mean), self.top_k)
        return self.experts(h, gates, chosen)

    def contrast(self, h_mean, task_ids):
        """InfoNCE loss (4) of whole contexts: h_mean (B, d_model), task_ids (B,)."""
        with torch.autocast(h_mean.device.type, enabled=False):
            z, k = of_all(self.router(h_mean)), of_all(self.key_router(h_mean).detach())
            return info_nce(z, k, self.W, of_all(task_ids))

    @torch.no_grad()
    def update_key_router(self):
        """Momentum (EMA) update of the key router, after each training step."""
        self.key_router.weight.lerp_(self.router.weight, self.momentum)


def prefix_mean(h, prefix=None, past_sum=None, past=0):
    """Mean of the layer's inputs over the tokens that each token may attend to, itself included; (B, L, d_model).

    Why the prefix and not the whole sequence: when the agent acts, the future is not there yet. A mean over the whole
    sequence would show the router, and through it every token, what attention is forbidden to see, and what the agent
    will miss: AD on HalfCheetah then scored 0.38 instead of 0.62 (README, at lr 1e-3). Arguments as of `visible`;
    past_sum (B, d_model) is the sum over the `past` cached tokens.
    """
    h = h.float() if h.dtype == torch.bfloat16 else h
    Q = 0 if prefix is None else prefix.shape[1]
    prompt, queries = h.split([h.shape[1] - Q, Q], dim=1)
    sums = prompt.cumsum(1) if past_sum is None else prompt.cumsum(1) + past_sum[:, None]
    count = past + torch.arange(1, prompt.shape[1] + 1, device=h.device)
    means = sums / count[:, None]
    if Q == 0:
        return means
    before = F.pad(sums, (0, 0, 1, 0))  # before[:, n] is the sum of the first n prompt tokens
    before = before.gather(1, prefix[..., None].expand(-1, -1, h.shape[2]))  # (B, Q, d_model)
    return torch.cat([means, (before + queries) / (prefix[..., None] + 1)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def cv_squared(x):
    """Squared coefficient of variation, variance / mean^2, of a vector (K,)."""
    return x.var(correction=0) / (x.mean() ** 2 + 1e-10)


def load_probability(clean, noisy, sigma, k):
    """P(expert i is among the top k, were its own noise drawn afresh), (..., K) (Shazeer et al. 2017, appendix A).

    clean, noisy and sigma (..., K): logits without noise, with noise, the noise's deviation. Expert i makes it if it
    beats the k-th largest noisy logit of the others, which is the (k+1)-th of all where i itself is in the top k.
    """
    top = noisy.topk(k + 1, dim=-1).values
    kth, next_best = top[..., k - 1 : k], top[..., k : k + 1]
    bar = torch.where(noisy >= kth, next_best, kth)
    return torch.special.ndtr((clean - bar) / sigma)


def info_nce(z, k, W, task_ids):
    """(4) InfoNCE: mean over i of -log [sum_pos exp(z_i W k_p) / (sum_pos exp(z_i W k_p) + sum_neg exp(z_i W k_n))].

    z (B, K) router outputs, k (B, K) those of the momentum router, W (K, K), task_ids (B,) int. Positives are the other
    sequences of i's task, negatives those of other tasks; i itself is neither. Each task needs at least two sequences.
    """
    scores = z @ W @ k.T  # (B, B)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (task_ids[:, None] == task_ids) & ~itself
    return (
        scores.masked_fill(itself, -math.inf).logsumexp(1) - scores.masked_fill(~positive, -math.inf).logsumexp(1)
    ).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Block and model


class T2MIRLayer(nn.Module):
    """(5) T2MIR layer: h + concat(y_tok, y_task), each half as wide as h; a MoE that stands alone takes the full width.

    At top_k 2, active parameters are those of a dense layer 6 d_model wide, 12 d_model^2: with both MoEs, four experts
    of (d -> 2d -> d/2); with one, two experts of (d -> 3d -> d). The residual sum is in `Block`.
    """

    def __init__(self, c):
        super().__init__()
        d, both = c.d_model, not (c.no_token_moe or c.no_task_moe)
        shape = (d // 2, 2 * d) if both else (d, 3 * d)
        w_imp, w_load = (0.0, 0.0) if c.no_balance else (c.w_imp, c.w_load)
        self.token_moe = self.task_moe = None
        if not c.no_token_moe:
            self.token_moe = TokenMoE(d, *shape, c.token_experts, c.top_k, w_imp, w_load)
        if not c.no_task_moe:
            self.task_moe = TaskMoE(d, *shape, c.task_experts, c.top_k, c.momentum)

    def forward(self, h, h_mean, read=slice(None)):
        """h, h_mean (B, L, d_model) -> outputs (B, l, d_model) of tokens h[:, read], and the balance loss of all."""
        outputs, balance = [], 0.0
        if self.token_moe is not None:
            y, balance = self.token_moe(h, read)
            outputs.append(y)
        if self.task_moe is not None:
            outputs.append(self.task_moe(h[:, read], h_mean[:, read]))
        return torch.cat(outputs, dim=-1), balance


class Block(nn.Module):
    """Pre-norm transformer block whose feed-forward part is a T2MIR layer in the blocks that `moe_layers` names."""

    def __init__(self, c, index):
        super().__init__()
        d, here, self.task_router = c.d_model, index in c.moe_blocks, c.task_router
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, c.n_heads)
        self.dropout = nn.Dropout(c.dropout)
        self.moe = T2MIRLayer(c) if here and not (c.no_token_moe and c.no_task_moe) else None
        if self.moe is None:
            width = 6 * d if here else 4 * d  # the baseline spends there what the T2MIR layer would
            self.mlp = nn.Sequential(nn.Linear(d, width, bias=False), nn.GELU(), nn.Linear(width, d, bias=False))

    def forward(self, x, mask, prefix, cache=None, read=slice(None)):
        """x (B, L, d_model) -> outputs of tokens x[:, read], the task router's prefix means or None, balance loss."""
        x = x + self.dropout(self.attention(self.norm1(x), mask, cache))
        h = self.norm2(x)
        if self.moe is None:
            return x[:, read] + self.dropout(self.mlp(h[:, read])), None, 0.0
        h_mean = routed_by = None
        if self.moe.task_moe is not None:
            h_mean = routed_by = prefix_mean(h, prefix) if cache is None else cache.prefix_mean(h)
            if self.task_router == "token":
                routed_by = h
            elif self.task_router == "sequence" and self.training:  # the last context token's mean: it leaks the future
                last = -1 - (0 if prefix is None else prefix.shape[1])
                routed_by = h_mean[:, last, None].expand_as(h_mean)
        y, balance = self.moe(h, routed_by, read)
        return x[:, read] + self.dropout(y), h_mean, balance  # (5) the residual sum


class T2MIR(nn.Module):
    """The agent: a transformer over (state, action, reward) tokens that predicts actions, for both modes.

    With both MoEs off it is plain AD or DPT. `state_mean` and `state_std` (obs_dim,) normalise the states.
    """

    def __init__(self, config, state_mean=None, state_std=None):
        super().__init__()
        c, family = config, ENVS[config.env]
        self.config, self.horizon = c, family.horizon
        self.register_buffer("state_mean", torch.zeros(family.obs_dim) if state_mean is None else state_mean)
        self.register_buffer("state_std", torch.ones(family.obs_dim) if state_std is None else state_std)
        self.embed_state = nn.Linear(family.obs_dim, c.d_model)
        self.embed_action = nn.Linear(family.act_dim, c.d_model)
        self.embed_reward = nn.Linear(1, c.d_model)
        self.embed_time = nn.Embedding(family.horizon + 1, c.d_model)  # the last row marks a query, which has no time
        nn.init.normal_(self.embed_time.weight, std=1.0)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = nn.LayerNorm(c.d_model)
        self.head = nn.Linear(c.d_model, family.act_dim)

    @property
    def task_moes(self):
        return [b.moe.task_moe for b in self.blocks if b.moe is not None and b.moe.task_moe is not None]

    def state_tokens(self, states, times):
        """States (B, T, obs_dim) at times (T,) or one time for all -> (B, T, d_model); time `horizon` marks a query."""
        return self.embed_state((states - self.state_mean) / self.state_std) + self.embed_time.weight[times]

    def tokens(self, states, actions, rewards, times):
        """Interleaves steps into tokens: (B, T, obs_dim), (B, T, act_dim), (B, T), times (T,) -> (B, 3 T, d_model)."""
        s, time = self.state_tokens(states, times), self.embed_time.weight[times]
        a, r = self.embed_action(actions) + time, self.embed_reward(rewards[..., None]) + time
        return torch.stack([s, a, r], dim=2).flatten(1, 2)

    def trunk(self, x, prefix=None, cache=None, read=slice(None)):
        """The blocks: tokens (B, L, d_model) -> outputs of the tokens `read`, prefix means by MoE block, balance loss.

        Only actions are predicted, so the last block's experts are computed for the few tokens that predict them.
        """
        past = 0 if cache is None else cache.length
        mask = None if prefix is None and past == 0 else visible(x.shape[1], prefix, past, x.device)
        x, means, balance = self.dropout(x), [], 0.0
        for i, block in enumerate(self.blocks):
            if cache is not None:
                cache.index = i
            last = i == len(self.blocks) - 1
            x, h_mean, b = block(x, mask, prefix, cache, read if last else slice(None))
            if h_mean is not None:
                means.append(h_mean)
            balance = balance + b
        return self.norm(x), means, balance

    def act(self, x):
        """Actions in [-1, 1] from outputs of `trunk`: (..., d_model) -> (..., act_dim)."""
        return torch.tanh(self.head(x))

    def forward(self, batch):
        """Losses of (6) on a batch from `Batches`: a dict of scalars `action`, `balance`, `contrastive`.

        L = L_action + L_balance + w_con L_InfoNCE, the latter two summed over the T2MIR layers. -log P of a continuous
        action is the squared error (a Gaussian of fixed variance), the mean over predictions and action dimensions.
        """
        actions = batch["actions"]
        x = self.tokens(batch["states"], actions, batch["rewards"], batch["times"])
        n = x.shape[1]  # tokens in the context, three for each of S steps
        if self.config.mode == "ad":
            # AD: a context of K episodes, ordered by `history`; the action that the learning agent took at each step is
            # predicted at the step's state token. A guest is not the agent that learns, so what it did is seen, but not
            # imitated. Without guests an agent's gait gives away its task, so that rewards, we think, would be looked
            # at less; and the gait in the trained agent's context is its own.
            x, means, balance = self.trunk(x, read=slice(0, None, 3))
            share = of_all(batch["own"].float().mean()[None]).mean()
            learn = batch["own"][..., None] / share.clamp_min(1e-6)  # a small batch can be guests' alone
            predicted, wanted = self.act(x), actions  # (B, S, act_dim)
        else:
            # DPT: one episode as prompt, then the queries. They come last, so that the prompt cannot see them: one
            # prompt serves them all, and when acting its cached keys and values stay valid whatever is asked.
            queries = self.state_tokens(batch["queries"], self.horizon)
            x, means, balance = self.trunk(torch.cat([x, queries], dim=1), batch["prefix"], read=slice(n, None))
            predicted, wanted, learn = self.act(x), batch["labels"], 1  # (B, Q, act_dim)
        zero = predicted.new_zeros((), dtype=torch.float32)
        contrastive = zero
        if not self.config.no_contrastive:
            for moe, h_mean in zip(self.task_moes, means):  # z is read where the whole context has been seen
                contrastive = contrastive + moe.contrast(h_mean[:, n - 1], batch["task_ids"])
        action = ((predicted.float() - wanted).square() * learn).mean()
        return {"action": action, "balance": balance + zero, "contrastive": contrastive}

    def step(self, cache, x, keep=True):
        """One cached step: tokens x (B, L, d_model) behind those in `cache` -> action (B, act_dim) of the last token.

        `keep` adds x to the cache; DPT's queries are not kept.
        """
        x, _, _ = self.trunk(x, cache=cache, read=slice(-1, None))
        if keep:
            cache.keep()
        return self.act(x[:, -1])


class Cache:
    """What the past leaves behind: keys and values of every block, and the sum of the MoE's inputs for `prefix_mean`.

    The model is causal, so no later token changes any of it: acting with the cache equals the full pass.
    Buffers hold `capacity` tokens of `batch` sequences. What a forward pass writes counts only after `keep`.
    """

    def __init__(self, model, batch, capacity):
        c, like = model.config, model.state_mean
        shape = (c.n_layers, 2, batch, c.n_heads, capacity, c.d_model // c.n_heads)
        self.kv = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.sums = torch.zeros(c.n_layers, batch, c.d_model, device=like.device, dtype=like.dtype)
        self.new_sums = self.sums.clone()
        self.length = self.new = self.index = 0

    def append(self, k, v):
        """Puts k and v (B, heads, L, ...) of the current layer behind the kept ones; returns both with their past."""
        self.new = k.shape[2]
        end = self.length + self.new
        self.kv[self.index, 0, :, :, self.length : end] = k
        self.kv[self.index, 1, :, :, self.length : end] = v
        return self.kv[self.index, :, :, :, :end].to(k.dtype)  # (2, B, heads, past + L, ...)

    def prefix_mean(self, h):
        """`prefix_mean` of h (B, L, d_model) with the kept tokens before it."""
        self.new_sums[self.index] = self.sums[self.index] + h.to(self.sums.dtype).sum(1)
        return prefix_mean(h, None, self.sums[self.index], self.length)

    def clear(self):
        self.length = 0
        self.sums.zero_()

    def keep(self):
        self.sums.copy_(self.new_sums)
        self.length += self.new


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Batches:
    """Draws training batches from a dataset's training tasks; all of it lives on the device, nothing loops over tasks.

    A batch holds batch / 2 distinct tasks with two sequences each, so that in InfoNCE a sequence has exactly one
    positive, and no negative is of its own task. `rng` is the only source of randomness.
    """

    def __init__(self, c, data):
        train = ~data["test"]
        if c.batch // 2 > train.sum():
            raise BadInput(f"--batch {c.batch} needs {c.batch // 2} training tasks, the dataset has {train.sum()}")
        if c.mode == "ad" and c.context > (E := data["rewards"].shape[1]):
            raise BadInput(f"--context {c.context} is more than the dataset's {E} episodes a task")
        rank, processes = this_process()
        if c.batch % processes:
            raise BadInput(f"--batch {c.batch} must be a multiple of the {processes} processes")
        self.c, self.mine = c, slice(rank, None, processes)  # all processes draw the batch, each looks up its rows
        self.rng = torch.Generator(c.device).manual_seed(c.seed)
        keys = ("states", "actions", "rewards", "expert_actions")
        tensors = (torch.as_tensor(data[key][train], device=c.device) for key in keys)
        self.states, self.actions, self.rewards, self.labels = tensors  # (tasks, E, T, ...)
        self.by_return = self.rewards.sum(-1).argsort(dim=1, stable=True)  # (tasks, E) episodes, worst to best
        self.own = torch.as_tensor(~data["guest"], device=c.device)  # (E,)
        self.which, self.times = (x.to(c.device) for x in c.context_steps)
        self.drawn = self.tokens = 0  # batches so far, and the tokens in them

    def draw(self, *shape, below):
        return torch.randint(below, shape, generator=self.rng, device=self.c.device)

    def next(self):
        """Draws a batch: a dict of a context's states, actions, rewards (B, S, ...), its times (S,), and task_ids (B,).

        own (B, S) says which of its steps were acted by the task's own agent, not by a guest.
        DPT adds queries (B, Q, obs_dim), labels (B, Q, act_dim), and how many prompt tokens each sees, prefix (B, Q).
        """
        c, (num_tasks, E, T), start = self.c, self.rewards.shape, 0
        task = torch.rand(num_tasks, generator=self.rng, device=c.device).argsort()[: c.batch // 2].repeat(2)  # (B,)
        if c.mode == "ad":
            # K distinct episodes, from the worst to the best, or from the first to the last.
            shuffled = torch.rand(c.batch, E, generator=self.rng, device=c.device).argsort(dim=1)
            place = shuffled[:, : c.context].sort(dim=1).values  # (B, K)
            episode = place if c.history == "chronological" else self.by_return[task[:, None], place]
            # When acting, the running episode, which is whole, follows 0 to K - 1 finished ones. Without a stride the
            # beginnings of one context are all of these, the worst episode with nothing before it. With one, batches
            # have as many in turn, and the running episode is always the last of the K.
            if c.stride > 1:
                start = self.drawn % c.context * len(range(0, T, c.stride))
        else:
            episode = self.draw(c.batch, 1, below=E)  # a prompt of any quality
        task, times = task[self.mine], self.times[start:]
        at = task[:, None], episode[self.mine][:, self.which[start:]], times
        batch = {"states": self.states[at], "actions": self.actions[at], "rewards": self.rewards[at]}
        batch |= {"times": times, "task_ids": task, "own": self.own[at[1]]}
        self.drawn += 1
        self.tokens += c.batch * (3 * len(times) + (c.queries if c.mode == "dpt" else 0))
        if c.mode == "dpt":
            below = (E, T, len(times) + 1)
            episode, time, seen = (self.draw(c.batch, c.queries, below=n)[self.mine] for n in below)
            at = task[:, None], episode, time
            batch |= {"queries": self.states[at], "labels": self.labels[at], "prefix": 3 * seen}
        return batch


def open_dataset(c):
    """The dataset of c.env as a dict of arrays (see collect.py); collects it first where it is missing."""
    path = Path(c.data) / f"{c.env}.npz"
    if not path.exists() and this_process() == (0, 1):
        print(f"{path} is missing: collecting it now (half a minute for point_robot, the others far longer)")
        collect(c.env, out=c.data)
    data = load(path)
    return data


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation in context


@torch.no_grad()
def evaluate(model, tasks, episodes, seed=0, context="own"):
    """Acts in unseen `tasks` (num_tasks, task_dim), all together, no weight update; returns (episodes, num_tasks).

    AD's context is its last K - 1 finished episodes, ordered as in training, and the episode so far. DPT's is its last
    finished episode, or in the first one the episode so far. As controls, `context` may be "hidden" (an empty context
    at every step) or "other" (the remembered episodes are those of the task before; in DPT's first episode so are the
    steps so far, while AD always sees the running episode's own steps).
    """
    c, device, N, T = model.config, model.state_mean.device, len(tasks), model.horizon
    was_training = model.training
    model.eval()
    env = make_vec(c.env, tasks)
    remembered = deque(maxlen=c.context - 1 if c.mode == "ad" else 1)  # of (states, actions, rewards), each (N, T, ...)
    rng = torch.Generator(device).manual_seed(seed)
    cache = Cache(model, N, 3 * len(c.context_steps[1]) + 1)
    returns = []
    for episode in range(episodes):
        cache.clear()
        if remembered and context != "hidden":
            memory = [torch.stack(part, dim=1)[:, :, :: c.stride] for part in zip(*remembered)]  # (N, n, T / stride, .)
            if c.mode == "ad" and c.history == "sorted":
                order = torch.stack([r.sum(1) for _, _, r in remembered], 1).argsort(dim=1, stable=True)  # (N, n)
                memory = [part[torch.arange(N, device=device)[:, None], order] for part in memory]
            if context == "other":
                memory = [part.roll(1, dims=0) for part in memory]
            times = torch.arange(0, T, c.stride, device=device).repeat(len(remembered))
            model.step(cache, model.tokens(*(part.flatten(1, 2) for part in memory), times))
        steps = []
        states = torch.as_tensor(env.reset(seed=seed if episode == 0 else None)[0], device=device)
        waiting = None  # AD: the last step's action and reward tokens, to be fed together with the next state's
        for t in range(T):
            if context == "hidden":
                cache.clear()
                waiting = None
            if c.mode == "ad":
                token = model.state_tokens(states[:, None], t)
                actions = model.step(cache, token if waiting is None else torch.cat([waiting, token], dim=1))
            else:
                actions = model.step(cache, model.state_tokens(states[:, None], T), keep=False)
            # The policy is a Gaussian around the head's output, as in the loss. The first episode draws from it widely:
            # with nothing in context the mean over Point-Robot's tasks is to stand still, which shows nothing. Later,
            # the agent acts on the mean, like the expert that it imitates. But for AD on Point-Robot, which imitates a
            # learner that explores: on the mean it can repeat one wrong episode for ever.
            spread = c.explore if episode == 0 else c.noise
            actions = (actions + spread * torch.randn(actions.shape, generator=rng, device=device)).clamp(-1, 1)
            observed, rewards, *_ = env.step(actions.float().cpu().numpy())
            rewards = torch.as_tensor(rewards, dtype=torch.float32, device=device)
            steps.append((states, actions, rewards))
            if c.mode == "ad" or (episode == 0 and context != "hidden" and t % c.stride == 0):
                triple = model.tokens(states[:, None], actions[:, None], rewards[:, None], t)
                if c.mode == "ad":
                    waiting = triple[:, 1:]
                else:
                    model.step(cache, triple.roll(1, dims=0) if context == "other" else triple)
            states = torch.as_tensor(observed, device=device)
        episode_data = [torch.stack(part, dim=1) for part in zip(*steps)]
        remembered.append(episode_data)
        returns.append(episode_data[2].sum(1))
    env.close()
    model.train(was_training)
    return torch.stack(returns).cpu().numpy()


def normalised(returns, data):
    """Normalised scores (R - R_random) / (R_oracle - R_random) of returns (..., num_test_tasks), task by task."""
    low, high = data["random_return"][data["test"]], data["expert_return"][data["test"]]
    return (returns - low) / (high - low)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, c):
    """Linear warm-up to c.lr, then a cosine to zero at c.steps."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup)))


FORMAT = 4  # of a checkpoint; raise it when its content changes


def make_optimizer(model):
    """AdamW over what is trained: all but the key routers."""
    c = model.config
    parameters = (p for p in model.parameters() if p.requires_grad)
    return torch.optim.AdamW(parameters, c.lr, weight_decay=c.weight_decay, fused=c.device != "mps")


def take_step(model, optimizer, batches, c):
    """One step of training; returns [loss, action, balance, contrastive], (4,); action is this process's share."""
    with torch.autocast(c.device.split(":")[0], torch.bfloat16, enabled=c.dtype == "bfloat16"):
        losses = model(batches.next())
    loss = losses["action"] + losses["balance"] + c.w_con * losses["contrastive"]  # (6) the objective
    optimizer.zero_grad()
    loss.backward()
    average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    optimizer.step()
    for moe in model.task_moes:
        moe.update_key_router()
    return torch.stack([loss, losses["action"], losses["balance"], losses["contrastive"]]).detach()


def save(path, model, optimizer, batches, step, pending):
    """Writes a checkpoint: all that is needed to act (`config`, `model`) and to go on training.

    `pending` is what the log has not seen yet: the sums of the losses, the step after which they begin, and the seconds
    that the run has taken. Under torchrun all processes call this, and the first one writes.
    """
    rng = {"torch": of_all(torch.get_rng_state()[None]), "batches": batches.rng.get_state()}
    if model.state_mean.is_cuda:
        rng["cuda"] = of_all(torch.cuda.get_rng_state(model.state_mean.device)[None])
    if this_process()[0] != 0:
        return
    content = {"format": FORMAT, "config": dataclasses.asdict(model.config), "model": model.state_dict()}
    content |= {"optimizer": optimizer.state_dict(), "rng": rng, "step": step, "pending": pending}
    write_atomically(path, lambda file: torch.save(content, file))


def restore(path, device="cpu"):
    """Reads a checkpoint; returns the model (in evaluation mode) and the checkpoint's dict. Raises BadInput."""
    pick_device(device)
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, this code reads {FORMAT}")
        model = T2MIR(Config(**{**content["config"], "device": device})).to(device)
        model.load_state_dict(content["model"])
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: name the folder of a run that has saved a checkpoint") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} is damaged or does not fit this code ({reason}): train again") from None
    return model.eval(), content


CHECK_EVERY = 50  # training steps between looks at the loss; on a GPU a look costs a wait


@contextmanager
def interruptible():
    """Yields an event that Ctrl-C sets, so that the step in progress can end and be saved; a second one breaks in."""
    stop = threading.Event()

    def handler(*_):
        if stop.is_set():
            raise KeyboardInterrupt("stopped at once")
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def train(c, resume=None):
    """Trains, evaluates and leaves the run folder that it returns; `resume` is the checkpoint dict to go on from.

    The folder holds config.json, log.csv, ckpt.pt (the last state), best.pt (that of the best test score in the log:
    picked on the test tasks, so nothing reported comes from it), result.csv and incontext.png (of the last state).
    Raises BadInput where the data does not fit, and FloatingPointError on a loss that is no number.
    """
    rank, processes = this_process()
    code, data = commit(), open_dataset(c)
    default = "-".join([c.env, *c.variant.replace("T2MIR-", "t2mir_").split(), f"seed{c.seed}"]).lower()
    folder = Path(c.runs) / (c.name or default.translate(str.maketrans("", "", "()")).replace(",-", "-"))
    if resume is None and (folder / "ckpt.pt").exists():
        raise BadInput(f"{folder} holds a run: go on with --resume {folder}, take another --name, or delete it")
    torch.manual_seed(c.seed)
    states = data["states"][~data["test"]].reshape(-1, data["states"].shape[-1])
    std = states.std(0, dtype=np.float64)
    mean, std = (
        torch.tensor(x, dtype=torch.float32) for x in (states.mean(0, dtype=np.float64), np.where(std > 1e-6, std, 1))
    )
    model = T2MIR(c, mean, std).to(c.device)
    optimizer = make_optimizer(model)
    batches = Batches(c, data)
    test_tasks = data["tasks"][data["test"]]
    start_step = 0
    if rank:
        torch.manual_seed(c.seed + rank)  # dropout and the routers' noise differ between processes
    if resume is not None:
        if len(resume["rng"]["torch"]) != processes:
            raise BadInput(f"{folder} ran in {len(resume['rng']['torch'])} processes: go on with as many")
        start_step = resume["step"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        batches.rng.set_state(resume["rng"]["batches"].cpu())
        batches.drawn = start_step
        torch.set_rng_state(resume["rng"]["torch"][rank].cpu())
        if "cuda" in resume["rng"]:
            torch.cuda.set_rng_state(resume["rng"]["cuda"][rank].cpu(), c.device)
    if rank == 0:
        config = json.dumps(dataclasses.asdict(c), indent=1).encode()
        write_atomically(folder / "config.json", lambda f: f.write(config))
    columns = "step loss action balance contrastive test_return test_score tokens_per_s seconds".split()
    rows = []
    if (folder / "log.csv").exists():
        with open(folder / "log.csv", newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= start_step]

    sums, since, before = (torch.zeros(4), 0, 0.0) if resume is None else resume["pending"]
    sums = sums.to(c.device)
    model.train()
    learner = torch.compile(model, fullgraph=True) if c.compile else model
    started = clock = time.perf_counter()
    with interruptible() as stop:
        bar = dict(initial=start_step, total=c.steps, desc=folder.name, disable=True if rank else None)
        progress = tqdm(range(start_step, c.steps), **bar)
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c)
            sums += take_step(learner, optimizer, batches, c)
            done = step + 1
            stopping = of_all(torch.tensor([stop.is_set()])).any()
            evaluating = done % c.eval_every == 0 or done == c.steps
            if not (evaluating or stopping or done % CHECK_EVERY == 0):
                continue
            sums = of_all(sums[None]).mean(0)
            means = (sums / (done - since)).tolist()
            seconds = before + time.perf_counter() - started
            if not all(map(math.isfinite, means)):
                raise FloatingPointError(
                    f"the loss became {means[0]} between steps {max(since, done - CHECK_EVERY) + 1} and {done}: "
                    f"{folder / 'ckpt.pt'}, if there is one, is the last state saved; try a smaller --lr"
                )
            progress.set_postfix_str(f"loss {means[0]:.4f}")
            if evaluating:
                speed = batches.tokens / (time.perf_counter() - clock)
                sums, since, best = torch.zeros_like(sums), done, False
                if rank == 0:
                    returns = evaluate(model, test_tasks, c.eval_episodes)
                    last = returns[-1].mean(), normalised(returns, data)[-1].mean()
                    seconds = before + time.perf_counter() - started  # with the evaluation
                    rows.append([done, *(f"{x:.6g}" for x in (*means, *last)), round(speed), round(seconds)])
                    write_csv(folder / "log.csv", columns, rows)
                    scores = [float(row[columns.index("test_score")]) for row in rows]
                    best = scores[-1] == max(scores)
                    left = (time.perf_counter() - started) / (done - start_step) * (c.steps - done)
                    progress.write(
                        f"step {done}/{c.steps}: loss {means[0]:.4f} (action {means[1]:.4f}, balance {means[2]:.4f}, "
                        f"contrastive {means[3]:.4f}), test return {last[0]:.2f} (score {last[1]:.3f}), "
                        f"{speed:,.0f} tokens/s, {left:.0f} s left"
                    )
                if of_all(torch.tensor([best])).any():
                    save(folder / "best.pt", model, optimizer, batches, done, [sums, since, seconds])
            if evaluating or stopping:
                save(folder / "ckpt.pt", model, optimizer, batches, done, [sums, since, seconds])
            if stopping and done < c.steps:
                raise KeyboardInterrupt(f"stopped after step {done}, go on with: python t2mir.py --resume {folder}")
            if evaluating:
                clock, batches.tokens = time.perf_counter(), 0
    if rank == 0:
        report(folder, model, data, code)
    return folder


def commit():
    """The code's git commit, with a + where a file has changed since; empty where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def report(folder, model, data, code):
    """Acts in the test tasks, with its own context and with the two controls: prints, result.csv, incontext.png.

    `code` is the commit that the run began with, or went on with.
    result.csv is one row, for `figures`. A cell with several numbers, spaces between, has them by episode (return and
    scores), by test task (score_of_task, the mean of episodes 2 to last) or by evaluation while training (log_*).
    """
    c, tasks, log = model.config, data["tasks"][data["test"]], read_csv(folder / "log.csv")
    result = {k: evaluate(model, tasks, c.eval_episodes, seed=1, context=k) for k in ("own", "hidden", "other")}
    scores = {context: normalised(returns, data) for context, returns in result.items()}
    row = dict(env=c.env, mode=c.mode, variant=c.variant, seed=c.seed, steps=c.steps, commit=code)
    row |= dict(seconds=log[-1]["seconds"], command=c.command)
    row |= {k.split("_")[0]: f"{data[k][data['test']].mean():.6g}" for k in ("random_return", "expert_return")}
    lists = {"return": result["own"].mean(1), "score": scores["own"].mean(1)}
    lists |= {"score_hidden": scores["hidden"].mean(1), "score_other": scores["other"].mean(1)}
    lists |= {"score_of_task": scores["own"][1:].mean(0)}
    row |= {name: " ".join(f"{x:.4g}" for x in values) for name, values in lists.items()}
    row |= {f"log_{k}": " ".join(r[k] for r in log) for k in ("step", "test_return", "test_score")}
    write_csv(folder / "result.csv", list(row), [list(row.values())])
    plot_incontext(folder, result, data)
    print("episode in context: " + " ".join(f"{i + 1:7d}" for i in range(c.eval_episodes)))
    print("test return:        " + " ".join(f"{x:7.2f}" for x in result["own"].mean(1)))
    for context, name in (("own", "normalised score"), ("hidden", "  context hidden"), ("other", "  context other")):
        print(f"{name}:".ljust(20) + " ".join(f"{x:7.3f}" for x in scores[context].mean(1)))
    print(f"picture: {folder / 'incontext.png'}")


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def flops_of_step(c):
    """FLOPs that a training step of the dense baseline must spend in matrix products, counted from shapes."""
    n, d = 3 * len(c.context_steps[1]), c.d_model  # tokens of the context
    queries = c.queries if c.mode == "dpt" else 0
    read = queries if c.mode == "dpt" else n // 3  # tokens that an action is predicted from
    attention = (n + queries) * 4 * d * d + (n * n / 2 + queries * n / 2) * 2 * d  # projections; scores and mix
    # Multiply-adds of a sequence: a token sees half the context on average; the last block computes what is read.
    once = 0
    for i in range(c.n_layers):
        once += attention + (read if i == c.n_layers - 1 else n + queries) * (12 if i in c.moe_blocks else 8) * d * d
    return c.batch * once * 2 * 3  # two FLOPs each; backward costs twice as much as forward


def bench(c, num_tasks=15):
    """Prints how fast T2MIR and its dense baseline train and act at the sizes of `c`, on made-up data.

    Medians of steps taken in turn. Takes about half a minute.
    """
    T, obs_dim, act_dim = ENVS[c.env].horizon, ENVS[c.env].obs_dim, ENVS[c.env].act_dim
    tokens = 3 * len(c.context_steps[1])  # of a context
    memory, step_tokens = (max(1, tokens - 3 * T), 3) if c.mode == "ad" else (tokens, 1)
    tokens = c.batch * (tokens + (c.queries if c.mode == "dpt" else 0))
    widths = {"states": (obs_dim,), "actions": (act_dim,), "expert_actions": (act_dim,), "rewards": ()}
    data = {k: np.random.default_rng(0).normal(size=(45, 8, T, *w)).astype(np.float32) for k, w in widths.items()}
    batches = Batches(c, {**data, "test": np.zeros(45, bool), "guest": np.zeros(8, bool)})
    agents = {"T2MIR": T2MIR(c), "dense": T2MIR(dataclasses.replace(c, no_token_moe=True, no_task_moe=True))}
    seconds = {}  # of what each agent did, by (agent, what)

    def clock(what, work):
        start = time.perf_counter()
        work()
        if c.device != "cpu":
            torch.zeros(1, device=c.device).item()  # waits for the device
        seconds.setdefault(what, []).append(time.perf_counter() - start)

    for name, model in agents.items():
        optimizer = make_optimizer(model.to(c.device))
        learner = torch.compile(model, fullgraph=True) if c.compile else model
        agents[name] = model.train(), learner, optimizer, Cache(model, num_tasks, memory + 3 * T)
    past, now = (torch.randn(num_tasks, n, c.d_model, device=c.device) for n in (memory, step_tokens))
    a, b = (torch.randn(n, 4 * c.d_model, device=c.device, dtype=getattr(torch, c.dtype)) for n in (16_384, c.d_model))
    for _ in range(6):
        for name, (model, learner, optimizer, cache) in agents.items():
            clock((name, "train"), lambda: take_step(learner, optimizer, batches, c))
            with torch.no_grad():
                cache.clear()
                clock((name, "episode"), lambda: model.eval().step(cache, past))
                for _ in range(5):
                    clock((name, "act"), lambda: model.step(cache, now, keep=False))
            model.train()
        clock("product", lambda: a @ b.T)
    model, learner, optimizer, _ = agents["T2MIR"]
    kinds, spent = {"scaled_dot_product": "attention", "mm": "other products", "copy_": "copies and casts"}, {}
    with torch.profiler.profile() as profiler:
        take_step(learner, optimizer, batches, c)
    for event in profiler.key_averages():
        kind = next((kind for key, kind in kinds.items() if key in event.key), "the rest")
        took = event.self_cpu_time_total if c.device == "cpu" else event.self_device_time_total
        spent[kind] = spent.get(kind, 0) + took
    t = {what: statistics.median(times[1:]) for what, times in seconds.items()}
    rate = 2 * a.numel() * len(b) / t["product"]
    ratio = statistics.median(x / y for x, y in zip(seconds["T2MIR", "train"][1:], seconds["dense", "train"][1:]))
    print(f"{c.env} {c.mode}: width {c.d_model}, {c.n_layers} layers, {c.dtype}, {c.batch} sequences, {tokens} tokens")
    print(f"    floor: {flops_of_step(c) / 1e9:,.0f} GFLOP a step, and the machine makes {rate / 1e9:,.0f} GFLOP/s")
    for name in agents:
        train, episode, act = (t[name, what] for what in ("train", "episode", "act"))
        floor = flops_of_step(c) / rate / train
        print(
            f"    {name:5} trains {tokens / train:9,.0f} tokens/s ({1e3 * train:,.0f} ms a step, the floor is "
            f"{floor:.0%} of it); acts in {num_tasks} tasks in {1e3 * act:.1f} ms a step and "
            f"{1e3 * episode:.0f} ms to remember episodes"
        )
    shares = (f"{kind} {us / sum(spent.values()):.0%}" for kind, us in sorted(spent.items(), key=lambda x: -x[1]))
    print(f"    where the time of T2MIR's step goes: {', '.join(shares)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if c.device.startswith("cuda") else peak
    print(f"    T2MIR's step takes {ratio:.2f} times the dense one's; most memory so far {peak / 2**30:.1f} GiB")


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def write_csv(path, columns, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def save_figure(fig, path):
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))


def plot_incontext(folder, result, data):
    """Return against episode in context, mean and standard error over the test tasks, with random and oracle lines."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5, 3.4))
    ax = fig.subplots()
    labels = {"own": "own context", "hidden": "context hidden", "other": "context of another task"}
    for (context, returns), color in zip(result.items(), ("C0", "C7", "C3")):
        x, mean = np.arange(1, len(returns) + 1), returns.mean(1)
        error = returns.std(1, ddof=1) / returns.shape[1] ** 0.5
        ax.plot(x, mean, "o-", color=color, label=labels[context], ms=4)
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, lw=0)
    for key, style in (("expert_return", "--"), ("random_return", ":")):
        ax.axhline(data[key][data["test"]].mean(), color="k", ls=style, lw=1, label=key.split("_")[0])
    ax.set(xlabel="episode in context", ylabel="return on unseen tasks", title=folder.name)
    ax.legend(fontsize=7)
    save_figure(fig, folder / "incontext.png")


def read_csv(path):
    """Rows of a run's CSV file as dicts; raises BadInput where the run has none."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(line for line in file if not line.startswith("#")))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({error}): name folders of finished runs") from None


def mean_se(values):
    """'mean ± standard error' over runs (seeds); a single run has no error."""
    values = np.asarray(values, dtype=float)
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else "")


# The columns of result.csv that hold several numbers.
LISTS = "return score score_hidden score_other score_of_task log_step log_test_return log_test_score".split()


def figures(runs, out="figures"):
    """Compares finished runs, each with its last state: a Markdown table, results.csv and pictures in folder `out`.

    `runs` are runs' folders, or results.csv files that this wrote before. The table has mean ± standard error over the
    runs (seeds) of a variant; ablations are in it, but not in the pictures of returns. What the routers do and how
    gradients conflict is drawn of runs whose folders are given.
    """
    from matplotlib.figure import Figure

    unfinished = [run for run in runs if Path(run).is_dir() and not (Path(run) / "result.csv").exists()]
    runs, folders = [run for run in runs if run not in unfinished], []
    for run in unfinished:
        print(f"{run} holds no finished run: left out")
    if not runs:
        raise BadInput("no finished run among these: name others")
    rows, groups = [], {}
    for path in map(Path, runs):
        if path.suffix != ".csv":
            folders.append(path)
        new = read_csv(path if path.suffix == ".csv" else path / "result.csv")
        rows += [row for row in new if row not in rows]
    for row in rows:
        if not set(LISTS) <= set(row):
            raise BadInput(f"{' '.join(map(str, runs))}: not all are runs' folders or files that --figures wrote")
        row |= {k: np.array(row[k].split(), dtype=float) for k in LISTS}
        groups.setdefault((row["env"], row["variant"]), []).append(row)
    for members in groups.values():
        for row in members:
            a, b = (r["command"].replace(f" --seed {r['seed']}", "") for r in (members[0], row))
            if a != b:
                raise BadInput(f"no seeds of one agent, give them separately: {a!r} and {b!r}")
        if len({row["seed"] for row in members}) < len(members):
            raise BadInput(f"two runs of one seed, give one of them: {members[0]['command']!r}")
    lines = [
        "| environment | agent | seeds | episode 1 | episode 2 | episodes 2 to last | last episode | "
        "2 to last, context hidden | 2 to last, another task's context |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (env, variant), members in groups.items():
        own, hidden, other = (np.array([r[k] for r in members]) for k in ("score", "score_hidden", "score_other"))
        # each (runs, episodes)
        columns = own[:, 0], own[:, 1], own[:, 1:].mean(1), own[:, -1], hidden[:, 1:].mean(1), other[:, 1:].mean(1)
        lines.append(f"| {env} | {variant} | {len(members)} | " + " | ".join(map(mean_se, columns)) + " |")
    lines.append("")
    for (env, variant), members in groups.items():  # against the dense baseline, seed by seed
        agent, _, settings = variant.removeprefix("T2MIR-").rstrip(")").partition(" (")
        baseline = named(agent, settings.split(", "), dense=True)
        dense = {r["seed"]: r["score_of_task"] for r in groups.get((env, baseline), [])}
        pairs = [r["score_of_task"] - dense[r["seed"]] for r in members if r["seed"] in dense]
        if "T2MIR" in variant and pairs:
            of_seed, of_task = np.mean(pairs, axis=1), np.mean(pairs, axis=0)
            lines.append(
                f"{env}, {variant} minus its dense baseline, mean score of episodes 2 to last: {mean_se(of_seed)} over "
                f"{len(pairs)} seeds, {mean_se(of_task)} over {len(of_task)} tasks, better in {(of_task > 0).sum()}.\n"
            )
    print("\n".join(lines))
    out, text = Path(out), io.StringIO(f"# python t2mir.py --figures {' '.join(map(str, runs))}\n")
    text.seek(0, io.SEEK_END)
    cells = [[" ".join(f"{x:.6g}" for x in row[k]) if k in LISTS else row[k] for k in rows[0]] for row in rows]
    csv.writer(text, lineterminator="\n").writerows([list(rows[0]), *cells])
    write_atomically(out / "results.csv", lambda file: file.write(text.getvalue().encode()))
    write_atomically(out / "results.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))

    # Fig. 3 of the paper (test return against training step), and the same agents' returns against episode in context.
    for env in dict.fromkeys(env for env, _ in groups):
        fig, of_env = Figure(figsize=(9, 3.4)), [row for row in rows if row["env"] == env]
        left, right = fig.subplots(1, 2)
        here = {variant: members for (e, variant), members in groups.items() if e == env}
        shown = {variant: members for variant, members in here.items() if "(" not in variant} or here  # no ablations
        for color, (variant, members) in enumerate(shown.items()):
            log, returns = (np.array([row[k] for row in members]) for k in ("log_test_return", "return"))
            episodes = np.arange(1, returns.shape[1] + 1)
            for ax, x, y in ((left, members[0]["log_step"], log), (right, episodes, returns)):
                error = y.std(0, ddof=1) / len(y) ** 0.5 if len(y) > 1 else 0 * y[0]
                ax.plot(x, y.mean(0), "o-", ms=3, color=f"C{color}", label=f"{variant} ({len(y)} seeds)")
                ax.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=f"C{color}", alpha=0.2, lw=0)
        for ax in (left, right):
            for name, style in (("expert", "--"), ("random", ":")):
                ax.axhline(float(of_env[0][name]), color="k", ls=style, lw=1, label=name)
        left.set(xlabel="training step", ylabel="test return, last episode", title=env)
        right.set(xlabel="episode in context", ylabel="test return", title="unseen tasks, last checkpoint")
        right.legend(fontsize=7)
        save_figure(fig, out / f"{env}.png")

    # What the routers do (one run of each T2MIR variant), and whether tasks' gradients conflict.
    of = {}
    for folder in folders:
        row = read_csv(folder / "result.csv")[0]
        of.setdefault(row["env"], {}).setdefault(row["variant"], []).append(folder)
    for env, variants in of.items():
        data = open_dataset(restore(next(iter(variants.values()))[0] / "ckpt.pt")[0].config)
        for variant, members in variants.items():
            if variant.startswith("T2MIR"):
                plot_routing(members[0], data, out)
        if env == "point_robot":
            plot_gradients(variants, data, out)


@torch.no_grad()
def routing(model, data, tasks, episodes):
    """Logits of the last T2MIR layer's routers on stored episodes of `tasks` (bool mask), evenly spaced over the run.

    Each of n = tasks * episodes episodes is a context of its own of S steps: (n, 3 S, K1) and (n, 3 S, K2), None where
    a MoE is off. In DPT S queries follow, the states of the context, which see all of it: (n, 4 S, ...).
    """
    moe, seen = [b.moe for b in model.blocks if b.moe is not None][-1], {}
    hooks = [
        m.router.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y}))
        for name, m in (("token", moe.token_moe), ("task", moe.task_moe))
        if m is not None
    ]
    at = np.linspace(0, data["rewards"].shape[1] - 1, episodes).astype(int)
    device, times = model.state_mean.device, np.arange(0, model.horizon, model.config.stride)
    keys = ("states", "actions", "rewards")
    parts = (torch.as_tensor(data[k][tasks][:, at][:, :, times], device=device).flatten(0, 1) for k in keys)
    x = model.tokens(*parts, torch.as_tensor(times, device=device))
    if model.config.mode == "dpt":
        queries = x[:, ::3] + model.embed_time.weight[-1] - model.embed_time.weight[times]
        model.trunk(torch.cat([x, queries], dim=1), torch.full(queries.shape[:2], x.shape[1], device=device))
    else:
        model.trunk(x)
    for hook in hooks:
        hook.remove()
    return tuple(seen[name].cpu() if name in seen else None for name in ("token", "task"))


def plot_routing(folder, data, out, episodes=10):
    """Draws Fig. 1 of the paper, t-SNE of both routers' logits on unseen tasks, and two more pictures of what they do.

    One has the share of each kind of token that goes to each expert of the token-wise MoE; the other how soon the task
    router settles: the share of the full episode's top-k experts that are already chosen after each step.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    model, _ = restore(folder / "ckpt.pt")
    tasks, k = data["test"], model.config.top_k
    token, task = routing(model, data, tasks, episodes)
    if token is None or task is None:
        return
    S = len(range(0, model.horizon, model.config.stride))
    kind = torch.cat([torch.arange(3).repeat(S), torch.full((token.shape[1] - 3 * S,), 3)])  # of each token
    kinds = ["state", "action", "reward", "query"][: kind.max() + 1]
    fig = Figure(figsize=(17, 3.8))
    left, second, third, right = fig.subplots(1, 4)
    total = token.shape[0] * token.shape[1]
    pick = np.random.default_rng(0).choice(total, min(1500, total), replace=False)
    points = TSNE(random_state=0).fit_transform(token.flatten(0, 1)[pick].numpy())
    for i, label in enumerate(kinds):
        left.scatter(*points[kind.repeat(len(token))[pick] == i].T, s=4, label=label)
    left.legend(markerscale=3, fontsize=7)
    left.set(title="token-wise router", xticks=[], yticks=[])
    chosen = torch.zeros_like(token).scatter(2, token.topk(k, dim=2).indices, 1) / k  # (n, 3 S or 4 S, K1)
    shares = torch.stack([chosen[:, kind == i].mean((0, 1)) for i in range(len(kinds))])
    second.imshow(shares, vmin=0, vmax=1 / k, cmap="Blues", aspect="auto")
    for (i, j), share in np.ndenumerate(shares.numpy()):
        second.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8)
    second.set(title="share of the kind's choices", xlabel="expert", yticks=range(len(kinds)), yticklabels=kinds)
    task = task[:, : 3 * S]
    points = TSNE(random_state=0, perplexity=20).fit_transform(task[:, -1].numpy())
    x, y, env = data["tasks"][tasks, 0], data["tasks"][tasks, -1], model.config.env
    value, label = {
        "point_robot": (np.arctan2(y, x), "direction of the goal"),
        "cheetah_vel": (x, "target velocity"),
        "walker_param": (data["expert_return"][tasks], "expert's return"),
    }[env]
    cmap = "hsv" if env == "point_robot" else "viridis"
    colors = third.scatter(*points.T, c=np.repeat(value, episodes), cmap=cmap, s=10)
    fig.colorbar(colors, ax=third, label=label)
    third.set(title="task-wise router, after a whole episode", xticks=[], yticks=[])
    chosen = torch.zeros_like(task).scatter(2, task.topk(k, dim=2).indices, 1)  # (n, 3 S, K2)
    agreement = (chosen * chosen[:, -1:]).sum(2)[:, 2::3] / k  # (n, S), after each step
    error = agreement.std(0) / len(agreement) ** 0.5
    x = np.arange(1, model.horizon + 1, model.config.stride)
    right.plot(x, agreement.mean(0))
    right.fill_between(x, agreement.mean(0) - error, agreement.mean(0) + error, alpha=0.2, lw=0)
    right.set(xlabel="steps of the task seen", ylabel="share of the final experts", title="how the task router settles")
    save_figure(fig, out / f"{folder.name}-routing.png")


def gradient_cosines(folder, data, batches=20):
    """Cosine similarity, (4, 4), between the gradients of L_action of Point-Robot's four quadrants (I to IV), Fig. 8.

    A quadrant's gradient is that of its training tasks, with respect to the last T2MIR layer (or the dense one there).
    """
    model, _ = restore(folder / "ckpt.pt")
    c = model.config
    block = model.blocks[max(c.moe_blocks)]
    parameters = [p for p in (block.mlp if block.moe is None else block.moe).parameters() if p.requires_grad]
    x, y = data["tasks"].T
    rows = []
    for quadrant in ((x > 0) & (y > 0), (x < 0) & (y > 0), (x < 0) & (y < 0), (x > 0) & (y < 0)):
        members = quadrant & ~data["test"]
        some = Batches(dataclasses.replace(c, batch=2 * int(members.sum())), {**data, "test": ~members})
        loss = sum(model(some.next())["action"] for _ in range(batches))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])
        )
    g = F.normalize(torch.stack(rows), dim=1)
    return g @ g.T


def plot_gradients(runs, data, out):
    """Fig. 8: `gradient_cosines` averaged over the runs of each variant, side by side. runs: variant -> run folders."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(3.2 * len(runs), 3.2))
    for ax, (variant, folders) in zip(fig.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        cosines = torch.stack([gradient_cosines(f, data) for f in folders]).mean(0)
        ax.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        for i in range(4):
            for j in range(4):
                ax.text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", fontsize=8)
        between = cosines[~torch.eye(4, dtype=torch.bool)].mean()
        names = ["I", "II", "III", "IV"]
        ax.set(
            xticks=range(4), yticks=range(4), xticklabels=names, yticklabels=names, title=f"{variant}: {between:.2f}"
        )
    save_figure(fig, out / "gradients.png")


def act_in_fresh_tasks(run, num_tasks, **given):
    """Prints the returns, by episode in context, of a run's agent in `num_tasks` tasks that no dataset holds.

    `run` is a run's folder (its last state) or a checkpoint; `given` are fields of Config, `seed` that of the tasks.
    """
    if num_tasks < 2:
        raise BadInput(f"--tasks {num_tasks} is too small: the least is 2, for a standard error")
    path = Path(run) if Path(run).is_file() else Path(run) / "ckpt.pt"
    model, content = restore(path, given.get("device", "cpu"))
    c = model.config = make_config(**{**content["config"], "device": "cpu", **given})
    tasks = sample_tasks(c.env, num_tasks, [c.seed, 2])  # a stream of its own: a dataset's seed is one number
    returns = evaluate(model, tasks, c.eval_episodes, seed=c.seed)
    random = average_return(c.env, tasks, None, 1, c.seed, c.device)
    print(f"{path}: {c.env}, {c.variant}, {num_tasks} fresh tasks of --seed {c.seed}; mean return ± its standard error")
    for name, r in [("random", random), *((f"episode {i}", r) for i, r in enumerate(returns, 1))]:
        print(f"{name:12}{r.mean():9.2f} ± {r.std(ddof=1) / len(r) ** 0.5:.2f}")


# What --bench measures: the sizes that the paper's release trains at, AD on HalfCheetah with a smaller batch.
BENCH = {
    ("point_robot", "dpt"): dict(d_model=128, n_layers=3, n_heads=8, batch=32),
    ("point_robot", "ad"): dict(d_model=128, n_layers=3, n_heads=8, batch=32),
    ("cheetah_vel", "dpt"): dict(d_model=128, n_layers=4, n_heads=4, batch=32, stride=1),
    ("cheetah_vel", "ad"): dict(d_model=256, n_layers=3, n_heads=8, batch=4, stride=1),
}


def main(argv):
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():  # torchrun started this process and others
        if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # they wait while one evaluates
    given = parse_flags(
        Config,
        argv,
        "Trains T2MIR, or with both MoEs off its dense baseline, and evaluates it on unseen tasks. The defaults shown "
        "are those of point_robot in dpt mode; PRESETS in t2mir.py has what differs.",
        resume=dict(metavar="RUN", help="go on with the run in this folder from its checkpoint, with its own flags"),
        eval=dict(metavar="RUN", help="act in fresh tasks with this run's agent (a folder, or one of its .pt files)"),
        tasks=dict(type=int, metavar="INT", help="how many fresh tasks --eval draws, by --seed [100]"),
        figures=dict(metavar="RUN", nargs="+", help="compare finished runs: a table, results.csv and pictures"),
        out=dict(metavar="FOLDER", help="where --figures writes [figures]"),
        bench=dict(action="store_true", help="measure the speed at the sizes of the paper's release"),
    )
    # What may stand beside a flag that asks for something else than training.
    fields = {f.name for f in dataclasses.fields(Config)}
    jobs = {"figures": {"out"}, "resume": set(), "bench": fields}
    jobs["eval"] = {"tasks", "seed", "eval_episodes", "explore", "noise", "device"}
    job = next((name for name in jobs if name in given), None)
    run = given.pop(job, None)
    for name in given:
        if name not in jobs.get(job, fields):
            raise BadInput(f"--{name} does not go with {f'--{job}' if job else 'training'}: leave it out")
    if job == "figures":
        figures(run, **given)
    elif job == "eval":
        act_in_fresh_tasks(run, given.pop("tasks", 100), **given)
    elif job == "bench":
        for env in [given["env"]] if "env" in given else ["point_robot", "cheetah_vel"]:
            for mode in [given["mode"]] if "mode" in given else ["dpt", "ad"]:
                bench(make_config(**{"env": env, "mode": mode, **BENCH.get((env, mode), {}), **given}))
    elif job == "resume":
        _, content = restore(Path(run) / "ckpt.pt")
        folder = Path(run).resolve()
        train(make_config(**{**content["config"], "runs": str(folder.parent), "name": folder.name}), content)
    else:
        train(make_config(**given))


if __name__ == "__main__":
    command_line(main)

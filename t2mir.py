"""T2MIR: token- and task-wise mixture of experts for in-context reinforcement learning.

    python t2mir.py --env point_robot --mode dpt
    python t2mir.py --env point_robot --mode dpt --recipe paper  # see `PAPER`

Paper: Wu et al., "Mixture-of-Experts Meets In-Context Reinforcement Learning", NeurIPS 2025,
arXiv 2506.05426. Equations (1) to (6) are numbered where they are computed. "The release" is the
code of its authors.

An agent adapts to a new task from the interactions in its context, without any change of its
weights. The context is a row of steps, and each step is three tokens: state s, action a, reward r.
After the context come queries: states in which an action is predicted, all in parallel. A context
token sees the tokens before it and itself. A query sees a prefix of the context and itself. Nothing
else sees a query, so many predictions share one context. Two algorithms say what the context and
the queries are. First their published form, as the paper uses it:

Algorithm Distillation (AD). The context is K consecutive episodes of the learning history of one
agent, the learner. AD predicts an action in every state of the context. The last episode is called
the running one, those before it the finished ones. The picture shows the running one's queries.

    s a r s a r s a r | s a r s a r s a r | q1 q2 q3    Each query predicts the action that the
    -------------------                     ^           learner took there. q1, q2 and q3 are the
    -------------------------                  ^        three states of the running episode. Each
    -------------------------------               ^     sees the finished episode, and the earlier
                                                        steps of its own episode.

AD's queries repeat states of the context. No query sees the last step, which InfoNCE reads (4). If
the context holds every step, predicting at its state tokens gives the same result
(`test_ad_queries_equal_state_tokens` shows it). Queries also work after a context that holds only
every n-th step, which is one of the changes below (`--stride`).

Decision-Pretrained Transformer (DPT). The context is a prompt: K episodes of any quality.

    s a r s a r s a r s a r | q1 q2 q3                  Each query is a state of another episode,
    -----------               ^                         and predicts the action of the expert, which
    -----------------------      ^                      is a trained agent that is told the task. q1
                                    ^                   sees two steps of the prompt and itself,
                                                        q2 the whole prompt and itself, q3 only
                                                        itself.

This file changes both algorithms. The main changes have a switch each, marked "change" in `Config`,
and `--recipe paper` takes these back.

T2MIR changes the transformer: in some blocks the feed-forward layer becomes two mixtures of experts
(MoE) side by side. In each of them a router sends a token to k of M small networks, called experts
(not the expert of DPT). The token-wise router looks at the token itself, and a balance loss keeps
all of its experts in use. The task-wise router looks at the mean of all tokens that the token sees.
It is trained as a task encoder by a contrastive loss, InfoNCE, which pulls two sequences of the
same task together and pushes those of other tasks away.

    B  sequences in a batch            K  episodes in a context          d     width of a token
    L  tokens in a sequence            S  steps in a context             M     experts of an MoE
    T  steps in an episode (horizon)   Q  queries after a context       k     experts of a token
    N, E  in a dataset: number of tasks, and of episodes of each task
"""

import argparse
import copy
import dataclasses
import json
import math
import os
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from collect import (
    BadInput,
    check_end,
    check_environment,
    check_fields,
    checked,
    claim,
    collect,
    dataset_path,
    expand,
    has_score,
    keep_freed_memory,
    load,
    pick_device,
    pick_dtype,
    reading,
    require,
    run_command,
    statistics,
    warn_of_other_units,
    write_atomically,
)
from envs import ENVS, make_vec

# ---- Config --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Everything that a run depends on. Each field is a flag of the command line.

    The defaults are those of DPT on Point-Robot. `preset` and the command line change some of them:
    by mode, see MODES, and by task family, see `training` of its class in envs.py.
    """

    env: str = "point_robot"  # task family in envs.py, or the name of a dataset: data/ENV.npz
    mode: Literal["ad", "dpt"] = "dpt"  # Algorithm Distillation or Decision-Pretrained Transformer

    # What this file changes in the published AD and DPT; PAPER has the published values. What each
    # change is worth was measured: see experiments/RESULTS.md.
    late_episode: bool = True  # change, AD: only actions of a late running episode are predicted
    worse_episodes: bool = True  # change, AD: the finished episodes are mostly bad ones
    clean_targets: bool = True  # change, AD: the targets are the learner's actions without noise
    guests: bool = True  # change, AD: draws episodes in which the learner was told another task
    remember_best: bool = True  # change, acting: an agent remembers its best episodes
    grow_prompt: bool = True  # change, DPT acting: in the first episode the prompt is its own steps
    policy: Literal["gaussian", "squared"] = "gaussian"  # change: not a squared error
    sample: bool = True  # change, acting: actions are sampled, to explore
    optimizer: Literal["muon", "adamw"] = "muon"  # change: Muon for the hidden matrices
    stride: int = 1  # change: the context holds every n-th step of an episode, to save time

    d_model: int = 64  # model: width of a token (d)
    n_layers: int = 3  # model: transformer blocks
    n_heads: int = 4  # model: attention heads
    dropout: float = 0.0  # model: dropout of the embeddings and of each sublayer's output
    moe_layers: tuple[int, ...] = (-1,)  # MoE: blocks with a T2MIR layer, -1 is the last block
    token_experts: int = 6  # MoE: experts of the token-wise MoE (K1 in the paper)
    task_experts: int = 8  # MoE: experts of the task-wise MoE (K2 in the paper)
    top_k: int = 2  # MoE: experts per token (k); a single gate is always 1, without a gradient
    token_moe: bool = True  # MoE: use the token-wise MoE; without both MoEs, plain AD or DPT
    task_moe: bool = True  # MoE: use the task-wise MoE; an MoE that is alone has the full width
    w_imp: float = 0.01  # MoE: weight of the importance term in the balance loss
    w_load: float = 0.01  # MoE: weight of the load term in the balance loss
    w_con: float = 0.01  # MoE: weight of the InfoNCE loss
    momentum: float = 0.005  # MoE: how far the key router follows the task router in each step

    context: int = 1  # data: episodes in a context (K)
    queries: int = 40  # data: queries after a context (Q), AD: at most T; published AD has K T
    steps: int = 2_000  # training: steps
    batch: int = 32  # training: sequences in a batch (B), two of each task
    lr: float = 5e-3  # training: peak learning rate
    warmup: int = 100  # training: steps of linear warm-up, followed by a cosine to zero
    weight_decay: float = 1e-4  # training: weight decay
    clip: float = 1.0  # training: largest norm of the gradient, 0 for no limit

    eval_every: int = 500  # evaluation: training steps between evaluations and checkpoints
    eval_episodes: int = 10  # evaluation: episodes in which an agent acts in each task
    val_tasks: int = 0  # evaluation: hold out this many training tasks, instead of the test tasks

    seed: int = 0  # system: random seed of the training; the dataset has its own
    device: str = "auto"  # system: cpu, cuda, or auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # system: in training; bfloat16 on cuda
    compile: bool = False  # system: compile the training step, which pays on a GPU
    data: str = "data"  # system: folder of the datasets
    runs: str = "runs"  # system: folder of the runs
    name: str = ""  # system: name of the run's folder, by default ENV-MODE-seedSEED

    def __post_init__(self):
        check_fields(self)
        may_be_0 = ("dropout", "w_imp", "w_load", "w_con", "momentum", "warmup", "weight_decay")
        may_be_0 += ("clip", "val_tasks", "seed")
        for field in dataclasses.fields(self):
            if field.type in (int, float) and field.name not in may_be_0:
                flag = f"--{field.name.replace('_', '-')}"
                require(getattr(self, field.name) > 0, f"{flag} must be more than 0")
        require(self.seed < 2**63, "--seed must be less than 2^63")
        require(self.dropout < 1, "--dropout must be less than 1")
        require(self.momentum <= 1, "--momentum must be at most 1")

        experts = min(self.token_experts, self.task_experts)
        chooses = 2 <= self.top_k < experts
        require(
            chooses, f"--top-k must be at least 2 and less than the {experts} experts of an MoE"
        )
        n = self.n_layers
        self.moe_layers = tuple(np.atleast_1d(self.moe_layers).tolist())
        exist = len(self.moe_layers) > 0 and all(i in range(-n, n) for i in self.moe_layers)
        require(exist, f"--moe-layers must be from {-n} to {n - 1}, as there are {n} blocks")
        divisible = self.d_model % 16 == 0 and self.d_model % self.n_heads == 0  # 16 for grouped_mm
        require(divisible, "--d-model must be a multiple of 16 and of --n-heads")
        even = self.batch % 2 == 0 and self.batch > 2
        require(even, "--batch must be even and at least 4: it has two sequences of each task")
        env = Path(self.env)
        is_name = self.env == env.name != "" and env.suffix != ".npz"
        advice = "for the file data/robot.npz give --env robot --data data"
        require(is_name, f"--env {self.env!r} must be the name of a dataset: {advice}")
        inside = ".." not in Path(self.name).parts and not Path(self.name).is_absolute()
        require(inside, f"--name {self.name} must be the name of a folder inside of --runs")
        self.data = expand(self.data)
        self.runs = expand(self.runs)
        imitates_guests = self.mode == "ad" and self.guests and not self.clean_targets
        require(not imitates_guests, "--no-clean-targets needs --no-guests, or guests are imitated")


# `--recipe paper`: the published form of the fields marked "change". Learning rate, steps and sizes
# stay. The release trains for 100,000 steps (10,000 of them warm-up) with learning rate 3e-4; in a
# laptop's few thousand steps AdamW learns far more with 2e-3 to 5e-3. The release has d_model 128
# (AD on MuJoCo 256), 8 heads (DPT on MuJoCo 4), batch 32 (AD on MuJoCo 24) and dropout 0.05.
PAPER = {
    "late_episode": False,
    "worse_episodes": False,
    "clean_targets": False,
    "guests": False,
    "remember_best": False,
    "grow_prompt": False,
    "policy": "squared",
    "sample": False,
    "optimizer": "adamw",
    "stride": 1,
}

# What differs between the modes. The weights of the balance loss are those of the release.
MODES = {"dpt": {}, "ad": {"context": 4, "batch": 16, "w_imp": 0.1, "w_load": 0.1}}


def preset(env="point_robot", mode="dpt", recipe="ours", **given):
    """The Config for a task family, a mode and a recipe ("ours" or "paper"); `given` goes on top.

    The settings of a family are `training` in its class in envs.py.
    """
    require(mode in MODES, f"--mode must be one of {', '.join(MODES)}")
    require(recipe in ("ours", "paper"), "--recipe must be ours or paper")
    fields = {"env": env, "mode": mode} | MODES[mode]
    if env in ENVS:
        fields |= ENVS[env].training.get(mode, {})
    if recipe == "paper":
        fields |= PAPER
    return Config(**fields | given)


# ---- Who sees what -------------------------------------------------------------------------------


def who_sees_what(n, tokens_seen):
    """The matrix `sees`, (B, Q, n + Q) bool: True where the row's token sees the column's token.

    It has a row for each of the Q queries: query q sees the first tokens_seen[b, q] of the n
    context tokens, and itself. Context tokens have no row, because all of them are causal: each of
    them sees what is before it, and itself. Example: a context of two steps, n = 6, and two
    queries, the first of which sees one step: tokens_seen = (3, 6).

             s a r s a r q1 q2
        s    1
        a    1 1
        r    1 1 1                    causal, not in `sees`
        s    1 1 1 1
        a    1 1 1 1 1
        r    1 1 1 1 1 1
        q1   1 1 1       1            sees =  1 1 1 0 0 0 1 0
        q2   1 1 1 1 1 1    1                 1 1 1 1 1 1 0 1
    """
    token = torch.arange(n + tokens_seen.shape[1], device=tokens_seen.device)
    itself = token == token[n:, None]  # (Q, n + Q)
    return (token < tokens_seen[..., None]) | itself


def attend(q, k, v, sees):
    """Attention to what each token sees: q (B, heads, L, w), k and v (B, heads, past + L, w).

    The first n = L - (rows of `sees`) tokens are causal. There are none if there is a past.
    """
    n = q.shape[2] - sees.shape[1]
    y = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=sees[:, None])
    if n > 0:  # the kernel computes half of the scores if it knows that they are causal
        k, v = k[:, :, :n], v[:, :, :n]
        causal = F.scaled_dot_product_attention(q[:, :, :n], k, v, is_causal=True)
        y = torch.cat([causal, y], dim=2)
    return y


def mean_of_seen(h, sees, n):
    """The mean of h (B, past + L, d) over the tokens that each token sees: (B, L, d).

    The first n tokens have no row in `sees` and are causal, as in `attend`.
    """
    weights = sees.to(h.dtype)
    mean = (weights / weights.sum(-1, keepdim=True)) @ h
    if n > 0:
        count = torch.arange(1, n + 1, device=h.device)[:, None]
        mean = torch.cat([h[:, :n].cumsum(1) / count, mean], dim=1)
    return mean


class Cache:
    """What the layers have computed for the past tokens of an agent that acts.

    No later token changes any of it, so that acting with a cache equals the full forward pass, if
    the context only grows at its end.
    """

    def __init__(self, capacity):
        self.capacity = capacity  # tokens
        self.length = 0  # past tokens; what is stored after them is overwritten
        self.stored = {}

    def extend(self, key, new):
        """Puts new (..., L, w) after the past of `key` and returns both, (..., past + L, w)."""
        if key not in self.stored:
            self.stored[key] = new.new_empty(*new.shape[:-2], self.capacity, new.shape[-1])
        end = self.length + new.shape[-2]
        advice = "evaluate with use_cache=False"
        require(end <= self.capacity, f"the context has more than `context` episodes: {advice}")
        self.stored[key][..., self.length : end, :] = new
        return self.stored[key][..., :end, :]


class Attention(nn.Module):
    """Multi-head attention to the tokens that a token sees."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, sees, cache=None):
        """x (B, L, d) -> (B, L, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, L, 3, heads, d / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d / heads) each
        if cache is not None:
            k = cache.extend((self, "k"), k)  # (B, heads, past + L, d / heads)
            v = cache.extend((self, "v"), v)
        y = attend(q, k, v, sees)
        return self.out(y.transpose(1, 2).flatten(2))


# ---- Experts and routers -------------------------------------------------------------------------


def multiply_by_expert(x, weights, ends):
    """Each expert's rows of x times its weights: x (rows, d_in), weights (M, d_in, d_out).

    The rows up to ends[0] belong to expert 0, those from ends[0] to ends[1] to expert 1, and so on.
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (9, 0):
        # One kernel for all experts. It reads `ends` on the GPU, so the CPU need not wait for it.
        return F.grouped_mm(x, weights.to(x.dtype), offs=ends)
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([part @ w for part, w in zip(parts, weights)])


class Experts(nn.Module):
    """`num` networks of two layers without biases. Only the chosen ones compute a token."""

    def __init__(self, num, d_in, hidden, d_out):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num, d_in, hidden).uniform_(-1, 1) * d_in**-0.5)
        self.w2 = nn.Parameter(torch.empty(num, hidden, d_out).uniform_(-1, 1) * hidden**-0.5)

    def forward(self, h, gates, chosen):
        """sum_j gates[j] E_chosen[j](h): h (B, L, d_in), the others (B, L, k) -> (B, L, d_out).

        In two lines, where all experts compute all tokens, and most gates are 0:

            gate = torch.zeros(B, L, num).scatter(2, chosen, gates)
            y = sum(gate[..., i, None] * (F.gelu(h @ w1[i]) @ w2[i]) for i in range(num))

        What follows is the same without the products that a gate of 0 would cancel.
        """
        if torch.is_autocast_enabled(h.device.type):  # `grouped_mm` does not know autocast
            h = h.to(torch.get_autocast_dtype(h.device.type))
        rows = h.flatten(0, 1)  # (B * L, d_in)
        # The pairs of token and expert, sorted by expert. Example: chosen = (0, 2), (2, 1), (0, 1).
        expert, order = chosen.flatten().sort(stable=True)  # 0 0 1 1 2 2
        token = order // chosen.shape[-1]  # 0 2 1 2 0 1
        experts = torch.arange(len(self.w1), device=h.device)
        ends = torch.searchsorted(expert, experts, right=True).int()  # 2 4 6
        y = F.gelu(multiply_by_expert(rows[token], self.w1, ends))
        y = multiply_by_expert(y, self.w2, ends) * gates.flatten()[order, None]
        sums = y.new_zeros(len(rows), y.shape[1]).index_add(0, token, y)  # over a token's experts
        return sums.view(*h.shape[:2], -1)


class Routing(NamedTuple):
    """What the router of an MoE decides for each token."""

    moe: nn.Module
    inputs: torch.Tensor  # (B, L, d) what the router sees: the token, or the mean of what it sees
    logits: torch.Tensor  # (B, L, M) its logits, before noise
    gates: torch.Tensor  # (B, L, k) the weights of the chosen experts, which sum to 1
    chosen: torch.Tensor  # (B, L, k) the indices of these experts
    load: torch.Tensor | None = None  # (B, L, M) P(expert is chosen), where there is noise
    skipped: int = 0  # so many tokens at the start are routed only, and no expert computes them

    def importance(self, first=0):
        """Imp (M,): the gates of each expert, summed over the tokens from `first` on."""
        gates = torch.zeros_like(self.logits).scatter(-1, self.chosen, self.gates)  # (B, L, M)
        return gates[:, first:].sum((0, 1))

    def experts_used(self):
        """How many experts the tokens use: exp(entropy of the experts' shares), from 1 to M.

        Only tokens that reach the experts count, by default the queries. If the number is hardly
        more than k, nearly all tokens use the same experts: the router has collapsed.
        """
        computed = self.importance(self.skipped)
        share = computed / computed.sum()
        return torch.special.entr(share).sum().exp()


def top_k_gates(logits, k):
    """softmax(topk(logits)): the gates and the indices of the k best experts, (B, L, k) each."""
    top, chosen = logits.topk(k, dim=-1)
    return top.softmax(-1), chosen


class TokenMoE(nn.Module):
    """(1) Token-wise MoE: y_tok = sum_i w_tok(i; h) E_i(h), where w_tok = softmax(topk(G_tok(h))).

    While training, the router adds noise to its logits: G_tok(h) + eps softplus(h W_noise), with
    eps drawn from a standard normal distribution. A token then also tries experts that just miss
    the top k, and the probability that an expert is chosen has a gradient, which (2) needs.
    """

    def __init__(self, c, hidden, d_out):
        super().__init__()
        self.top_k = c.top_k
        self.router = nn.Linear(c.d_model, c.token_experts, bias=False)  # G_tok
        self.noise = nn.Linear(c.d_model, c.token_experts, bias=False)  # W_noise
        self.experts = Experts(c.token_experts, c.d_model, hidden, d_out)

    def route(self, h, sees, cache=None):
        """h (B, L, d) -> Routing. What the tokens see does not matter here."""
        clean = self.router(h)  # (B, L, M)
        if not self.training:
            return Routing(self, h, clean, *top_k_gates(clean, self.top_k))
        sigma = F.softplus(self.noise(h)) + 1e-2  # never 0, because the load divides by it
        noisy = clean + torch.randn_like(clean) * sigma
        load = load_probability(clean, noisy, sigma, self.top_k)
        return Routing(self, h, clean, *top_k_gates(noisy, self.top_k), load)


class TaskMoE(nn.Module):
    """(3) Task-wise MoE: y_task = sum_i w_task(i; m) E_i(h), w_task = softmax(topk(G_task(m))).

    The experts compute the token h (the paper's slides write E(m), its release computes E(h)). The
    task decides which of them do so: m is the mean of all tokens that h sees. A mean over the whole
    sequence would show the router the future, which AD has to predict. The router has no noise,
    because InfoNCE trains all of its logits, those of experts that are not chosen as well. Nothing
    balances its experts: `task_experts` in log.csv tells whether it collapses to a few of them.
    """

    def __init__(self, c, hidden, d_out):
        super().__init__()
        self.top_k = c.top_k
        self.momentum = c.momentum
        self.router = nn.Linear(c.d_model, c.task_experts, bias=False)  # G_task
        self.experts = Experts(c.task_experts, c.d_model, hidden, d_out)
        # A copy that follows the router slowly makes the keys, with which InfoNCE compares. It is
        # as in the paper; MoCo needs it for a queue of old keys, and here there is no queue.
        self.key_router = copy.deepcopy(self.router).requires_grad_(False)
        self.W = nn.Parameter(torch.eye(c.task_experts))  # the bilinear score of InfoNCE

    def route(self, h, sees, cache=None):
        """h (B, L, d) -> Routing."""
        tokens = h
        if cache is not None:
            tokens = cache.extend(self, h)  # (B, past + L, d)
        m = mean_of_seen(tokens, sees, h.shape[1] - sees.shape[1])  # (B, L, d)
        logits = self.router(m)  # (B, L, M)
        return Routing(self, m, logits, *top_k_gates(logits, self.top_k))

    def contrast(self, routing, position, task_ids):
        """InfoNCE (4) of the router's outputs at one position of the sequences in a batch.

        Its gradient trains W, the router, and through m all that is below: attention, embeddings
        and earlier blocks. The keys have no gradient, and the key router only follows the router.
        """
        keys = self.key_router(routing.inputs[:, position].detach())  # (B, M)
        return info_nce(routing.logits[:, position], keys, self.W, task_ids)

    @torch.no_grad()
    def update_key_router(self):
        """Moves the key router a little towards the router, as in MoCo (He et al. 2020)."""
        self.key_router.weight.lerp_(self.router.weight, self.momentum)


# ---- The terms of the objective ------------------------------------------------------------------


def cv_squared(x):
    """CV(x)^2 = variance / mean^2 of x (M,) in (2); it is 0 if all experts have the same share."""
    return x.var(correction=0) / (x.mean() ** 2 + 1e-10)


def load_probability(clean, noisy, sigma, k):
    """The probability that expert i is in the top k, (..., M); its sum over tokens is Load in (2).

    How often an expert is chosen could be counted, but a count has no gradient. So the noisy logits
    of the other experts are kept, and only i's own noise is drawn again. Expert i is then chosen if
    it is above the k-th largest of the others, the threshold (Shazeer et al. 2017, appendix A). If
    i is in the top k itself, the others below it move up by one without it, so that the threshold
    is the (k + 1)-th largest of all. Otherwise it is the k-th largest of all. The gradient of Imp
    moves weight between the chosen experts only, that of Load reaches the others, too.

    clean, noisy, sigma (..., M): logits without and with noise, and the deviation of the noise.
    Example: clean = noisy = (3, 2, 1), sigma = 1, k = 2. The thresholds are (1, 1, 2), the
    probabilities Phi(2), Phi(1), Phi(-1) = 0.98, 0.84, 0.16; a count would be 1, 1, 0.
    """
    top = noisy.topk(k + 1, dim=-1).values
    kth = top[..., k - 1 : k]
    next_best = top[..., k : k + 1]
    threshold = torch.where(noisy >= kth, next_best, kth)
    return torch.special.ndtr((clean - threshold) / sigma)


def info_nce(z, k, W, task_ids):
    """(4) InfoNCE: the mean over i of -log [P_i / (P_i + N_i)].

    P_i is the sum of exp(z_i W k_j) over the positives j of sequence i, N_i is that over its
    negatives. z (B, M) router outputs, k (B, M) outputs of the key router, W (M, M), task_ids (B,).
    Positives are the other sequences of i's task (one of them, with two sequences of each task),
    negatives are the B - 2 sequences of other tasks. If all outputs are the same, the loss is at
    the chance level log(B - 1): 3.43 in a batch of 32, 2.71 in one of 16.

    The paper's reason: two sequences of a task are drawn independently, so they share little but
    the task, and the information that the router's output has of it is at least log(B - 1) - loss
    (van den Oord et al. 2018). So to minimise the loss is to maximise this bound. It is proved for
    negatives from all tasks. Here, as in the release, they are from other tasks only, so it holds
    approximately.
    """
    similarity = z @ W @ k.T  # (B, B)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (task_ids[:, None] == task_ids) & ~itself
    positives_and_negatives = similarity.masked_fill(itself, -math.inf).logsumexp(1)
    positives = similarity.masked_fill(~positive, -math.inf).logsumexp(1)
    return (positives_and_negatives - positives).mean()


# ---- Policies: what is predicted at a query ------------------------------------------------------


class Policy(nn.Module):
    """A distribution over actions, computed from the output at a query, x (..., d)."""

    numbers = 1  # outputs of the head for each action dimension
    discrete = False

    def __init__(self, d_model, act_dim):
        super().__init__()
        self.act_dim = act_dim  # dimensions of an action, or the number of discrete actions
        self.head = nn.Linear(d_model, self.numbers * act_dim)

    def vectors(self, actions):
        """Actions as the transformer reads them, (..., act_dim)."""
        return actions.to(self.head.weight.dtype)

    def loss(self, x, actions):
        """L_action, a scalar."""
        return self.neg_log_prob(x, actions).mean()


class SquaredErrorPolicy(Policy):
    """The published policy: a single action in [-1, 1], trained by its squared error."""

    def neg_log_prob(self, x, actions):
        """(a - mean)^2: -log P of a normal distribution with variance 1/2, up to a constant."""
        return (actions - self.head(x).tanh()).square()

    def sample(self, x, greedy, rng):
        """Actions (..., act_dim). They are not random."""
        return self.head(x).tanh()


class GaussianPolicy(Policy):
    """A normal distribution for each action dimension, with a learned deviation from 0.05 to 1.

    Where the targets have no noise, the deviation says how little the agent knows of its task. An
    agent that samples its actions therefore explores a new task until it knows it.
    """

    numbers = 2

    def forward(self, x):
        """The mean and the log of the deviation, (..., act_dim) each."""
        mean, log_std = self.head(x).chunk(2, dim=-1)
        return mean.tanh(), -3 * log_std.sigmoid()

    def neg_log_prob(self, x, actions):
        """-log P of actions (..., act_dim) for each action dimension, up to a constant."""
        mean, log_std = self(x)
        return ((actions - mean) / log_std.exp()).square() / 2 + log_std

    def loss(self, x, actions):
        """L_action: -log P times the deviation (beta-NLL with beta 0.5, Seitzer et al. 2022).

        The gradient of -log P for the mean is (mean - a) / std^2, which is large where the agent is
        already sure. Times std^2 it would be mean - a, as with a squared error. Times std it is
        between the two.
        """
        _, log_std = self(x)
        return (self.neg_log_prob(x, actions) * log_std.detach().exp()).mean()

    def sample(self, x, greedy, rng):
        """Actions (..., act_dim); the means if `greedy`."""
        mean, log_std = self(x)
        if greedy:
            return mean
        noise = torch.randn(mean.shape, generator=rng, device=x.device)
        return (mean + log_std.exp() * noise).clamp(-1, 1)


class CategoricalPolicy(Policy):
    """Probabilities of discrete actions 0, 1, 2, ..., trained by cross-entropy."""

    discrete = True

    def vectors(self, actions):
        return F.one_hot(actions.long(), self.act_dim).to(self.head.weight.dtype)

    def neg_log_prob(self, x, actions):
        """-log P of actions (B, Q) int, the cross-entropy: (B, Q)."""
        return F.cross_entropy(self.head(x).movedim(-1, 1), actions.long(), reduction="none")

    def sample(self, x, greedy, rng):
        """Actions (...) int; the most probable ones if `greedy`."""
        logits = self.head(x)
        if greedy:
            return logits.argmax(-1)
        p = logits.softmax(-1).flatten(0, -2)
        return p.multinomial(1, generator=rng).view(logits.shape[:-1])


POLICIES = {"squared": SquaredErrorPolicy, "gaussian": GaussianPolicy}

# ---- Layer, block and model ----------------------------------------------------------------------


class T2MIRLayer(nn.Module):
    """(5) T2MIR layer: concat(y_tok, y_task), each d / 2 wide; an MoE that is alone is d wide.

    With top_k = 2 a token uses 12 d^2 weights, as in a dense layer of width 6 d. With both MoEs
    these are four experts (d -> 2 d -> d / 2) of 3 d^2 weights each, two in each MoE; all 6 + 8
    experts have 42 d^2 weights. With one MoE they are two experts (d -> 3 d -> d).
    """

    def __init__(self, c):
        super().__init__()
        d = c.d_model
        if c.token_moe and c.task_moe:
            hidden = 2 * d
            d_out = d // 2
        else:
            hidden = 3 * d
            d_out = d
        self.moes = nn.ModuleList()
        if c.token_moe:
            self.moes.append(TokenMoE(c, hidden, d_out))
        if c.task_moe:
            self.moes.append(TaskMoE(c, hidden, d_out))

    def forward(self, h, sees, cache, skipped):
        """h (B, L, d) -> the outputs of the tokens h[:, skipped:], and a Routing for each MoE.

        By default, and in the release, this layer is in the last block. There nothing reads its
        outputs at the context tokens, so in training its experts compute the queries only.

        Three losses train the routers: L_action both of them, through the gates at the queries; the
        balance loss (2) the token-wise one at all tokens, as in the release, whose experts compute
        all tokens; and InfoNCE (4) the task-wise one at the last context token.
        """
        outputs = []
        routings = []
        for moe in self.moes:
            # In float32, because rounding could change which experts are chosen.
            with torch.autocast(h.device.type, enabled=False):
                routing = moe.route(h, sees, cache)._replace(skipped=skipped)
            gates = routing.gates[:, skipped:]
            chosen = routing.chosen[:, skipped:]
            outputs.append(moe.experts(h[:, skipped:], gates, chosen))
            routings.append(routing)
        return torch.cat(outputs, dim=-1), routings


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a T2MIR layer or a dense layer."""

    def __init__(self, c, index):
        super().__init__()
        d = c.d_model
        listed = index in [i % c.n_layers for i in c.moe_layers]
        self.last = index == c.n_layers - 1
        self.norm1 = nn.LayerNorm(d)
        self.attention = Attention(d, c.n_heads)
        self.norm2 = nn.LayerNorm(d)
        self.moe = None
        if listed and (c.token_moe or c.task_moe):
            self.moe = T2MIRLayer(c)
        else:
            width = 4 * d
            if listed:  # plain AD or DPT: the weights that a token uses in a T2MIR layer of top_k 2
                width = 6 * d
            first = nn.Linear(d, width, bias=False)
            self.mlp = nn.Sequential(first, nn.GELU(), nn.Linear(width, d, bias=False))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, sees, cache=None):
        """x (B, L, d) -> outputs (B, L, d), in the last block (B, rows of `sees`, d); Routings."""
        x = x + self.dropout(self.attention(self.norm1(x), sees, cache))
        h = self.norm2(x)
        skipped = 0
        if self.last:  # nothing reads its outputs at tokens without a row
            skipped = x.shape[1] - sees.shape[1]
        routings = []
        if self.moe is not None:
            y, routings = self.moe(h, sees, cache, skipped)
        else:
            y = self.mlp(h[:, skipped:])
        return x[:, skipped:] + self.dropout(y), routings  # (5) the residual sum


class Steps(NamedTuple):
    """S steps of one or more episodes, one after the other, in each of B sequences."""

    states: torch.Tensor  # (B, S, obs_dim)
    actions: torch.Tensor  # (B, S, act_dim), or (B, S) int if actions are discrete
    rewards: torch.Tensor  # (B, S)
    times: torch.Tensor  # (1, S) the time of a step in its episode

    def part(self, start, stop):
        """The steps from `start` to `stop`."""
        return Steps(*(x[:, start:stop] for x in self))

    def to(self, device):
        return Steps(*(x.to(device) for x in self))


class Batch(NamedTuple):
    """B sequences: a context and Q queries after it."""

    context: Steps
    queries: torch.Tensor  # (B, Q, obs_dim) states in which an action is predicted
    query_times: torch.Tensor  # (B, Q) their times in the episode; T if they have none
    seen: torch.Tensor  # (B, Q) how many steps of the context each query sees
    targets: torch.Tensor  # (B, Q, act_dim) the actions to predict, or (B, Q) int
    task_ids: torch.Tensor  # (B,)

    def to(self, device):
        return Batch(*(x.to(device) for x in self))


class T2MIR(nn.Module):
    """The agent: a transformer over (state, action, reward) tokens that predicts actions."""

    def __init__(self, c, sizes):
        """sizes: a dict of obs_dim, act_dim, horizon and, if actions are discrete, `discrete`."""
        super().__init__()
        self.config = c
        self.sizes = sizes
        self.horizon = sizes["horizon"]
        obs_dim = sizes["obs_dim"]
        act_dim = sizes["act_dim"]
        d = c.d_model
        policy = POLICIES[c.policy]
        if sizes.get("discrete", False):
            policy = CategoricalPolicy
        # Mean, deviation, lowest and highest value of the training data, in float64 because
        # offsets may be large.
        nothing_known = torch.tensor([[0.0], [1.0], [-math.inf], [math.inf]], dtype=torch.float64)
        self.register_buffer("state_statistics", nothing_known.repeat(1, obs_dim))
        self.register_buffer("reward_statistics", nothing_known.clone())
        self.embed_state = nn.Linear(obs_dim, d)
        self.embed_action = nn.Linear(act_dim, d)
        self.embed_reward = nn.Linear(1, d)
        self.embed_time = nn.Embedding(self.horizon + 1, d)  # the last row is for DPT's queries
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = nn.LayerNorm(d)
        self.policy = policy(d, act_dim)

    def normalise(self, x, statistics):
        """(x - mean) / deviation, in the type of the model's weights."""
        mean, std, _, _ = statistics
        return ((x.double() - mean) / std).to(self.norm.weight.dtype)

    def embed_states(self, states, times):
        """States (B, S, obs_dim) at `times` -> tokens (B, S, d)."""
        states = self.normalise(states, self.state_statistics)
        return self.embed_state(states) + self.embed_time(times)

    def embed_steps(self, steps):
        """Steps -> tokens s a r s a r ..., (B, 3 S, d).

        The biases of the three embeddings tell s, a and r apart. The only position embedding is the
        time in the episode. A token knows its place among the episodes from how much it sees.
        """
        rewards = self.normalise(steps.rewards[..., None], self.reward_statistics)
        when = self.embed_time(steps.times)
        s = self.embed_states(steps.states, steps.times)
        a = self.embed_action(self.policy.vectors(steps.actions)) + when
        r = self.embed_reward(rewards) + when
        return torch.stack([s, a, r], dim=2).flatten(1, 2)

    def transform(self, x, sees, cache=None):
        """Tokens x (B, L, d) -> the outputs at the rows of `sees`, and the Routings of all MoEs."""
        dtype = self.config.dtype
        mixed = self.training and (dtype == "bfloat16" or dtype == "auto" and x.is_cuda)
        routings = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            x = self.dropout(x)
            for block in self.blocks:
                x, new = block(x, sees, cache)
                routings += new
        return self.norm(x), routings

    def predict(self, batch):
        """A Batch -> the outputs at its queries, (B, Q, d), for the policy to read; Routings."""
        context = self.embed_steps(batch.context)
        queries = self.embed_states(batch.queries, batch.query_times)
        sees = who_sees_what(context.shape[1], 3 * batch.seen)  # a step is three tokens
        return self.transform(torch.cat([context, queries], dim=1), sees)

    def forward(self, batch):
        """(6) L = L_action + L_balance + w_con L_InfoNCE of a Batch, and a dict of what is logged.

        L_balance and L_InfoNCE are summed over the T2MIR layers. The model must be in training
        mode: without noise there is no load.
        """
        c = self.config
        x, routings = self.predict(batch)
        of_token_moes = [r for r in routings if isinstance(r.moe, TokenMoE)]
        of_task_moes = [r for r in routings if isinstance(r.moe, TaskMoE)]
        end = 3 * batch.context.rewards.shape[1] - 1  # the last token, which sees the whole context

        action = self.policy.loss(x, batch.targets)
        importance = sum(cv_squared(r.importance()) for r in of_token_moes)
        load = sum(cv_squared(r.load.sum((0, 1))) for r in of_token_moes)
        balance = c.w_imp * importance + c.w_load * load  # (2)
        contrastive = sum(r.moe.contrast(r, end, batch.task_ids) for r in of_task_moes)  # (4)
        loss = action + balance + c.w_con * contrastive  # (6)

        log = {"loss": loss, "action": action}
        log["nll"] = self.policy.neg_log_prob(x, batch.targets).mean()  # as the held-out loss
        if of_token_moes:
            log |= {"importance": importance, "load": load}
            log["token_experts"] = of_token_moes[-1].experts_used()
        if of_task_moes:
            log["contrastive"] = contrastive
            log["task_experts"] = of_task_moes[-1].experts_used()
        return loss, {name: value.detach() for name, value in log.items()}

    def act(self, context, states, when, cache=None):
        """The output in `states` (B, obs_dim) at time `when`, after the Steps `context`: (B, d).

        Without a cache this is the full forward pass. With a cache only what is new is computed:
        the steps that the cache does not hold yet, and the states.
        """
        past = 0
        if cache is not None:
            past = cache.length
        new_steps = context.part(past // 3, None)
        query_time = torch.full((1, 1), when, device=states.device)
        query = self.embed_states(states[:, None], query_time)
        x = torch.cat([self.embed_steps(new_steps), query], dim=1)

        # Each token sees all tokens up to itself. In the first call only the query needs a row, as
        # the steps are causal. Later each new token has a row, because it sees the past as well.
        L = x.shape[1]
        rows = L
        if past == 0:
            rows = 1
        token = torch.arange(past + L, device=x.device)
        sees = token <= token[-rows:, None]  # (rows, past + L)
        x, _ = self.transform(x, sees[None], cache)
        if cache is not None:
            cache.length += L - 1  # all but the query
        return x[:, -1]


# ---- Data: what AD and DPT learn from ------------------------------------------------------------


def open_dataset(c, may_collect=False):
    """The dataset, and two masks (N,): training tasks and held-out tasks.

    If the dataset of a task family is missing and `may_collect`, it is collected first.
    Raises BadInput if the dataset does not fit the Config.
    """
    path = dataset_path(c.data, c.env)
    if may_collect and c.env in ENVS and not path.exists():
        print(f"{path} is missing. It is collected first, which takes half a minute to minutes")
        collect(c.env, out=c.data)
    data = load(path)
    test = data["test"]
    train_tasks = ~test
    held_out = test
    if c.val_tasks > 0:
        require(
            c.val_tasks < train_tasks.sum(), f"--val-tasks {c.val_tasks} leaves no training task"
        )
        held_out = np.zeros_like(test)
        held_out[np.flatnonzero(train_tasks)[-c.val_tasks :]] = True
        train_tasks = train_tasks & ~held_out

    require(c.mode == "ad" or "expert_actions" in data, f"{path}: DPT needs `expert_actions`")
    E = data["rewards"].shape[1]
    most = E - 1  # DPT: one episode is left for the queries
    if c.mode == "ad":
        most = E - int(data.get("guest", np.zeros(E)).sum())
    advice = "DPT needs two of each task, AD one without a guest"
    require(most > 0, f"{path} has too few episodes: {advice}")
    require(c.context <= most, f"--context must be at most {most} with the episodes of {path}")
    enough = c.batch // 2 <= train_tasks.sum()
    require(enough, f"--batch must be at most {2 * train_tasks.sum()}, twice the training tasks")
    return data, train_tasks, held_out


def to_tensors(data, tasks):
    """A dataset's arrays as tensors, without a copy, and what batches are drawn with.

    `tasks` (bool mask) become indices; `by_return` (N, E) has the episodes of each task, the best
    one last; `guest` (E,) marks the episodes in which a guest acts, `own` has the indices of the
    others.
    """
    names = ("states", "actions", "rewards", "expert_actions", "learner_actions")
    x = {name: torch.from_numpy(data[name]) for name in names if name in data}
    returns = data["rewards"].sum(-1, dtype=np.float64)
    x["tasks"] = torch.from_numpy(np.flatnonzero(tasks))
    x["by_return"] = torch.from_numpy(returns.argsort(axis=1, kind="stable"))
    x["guest"] = torch.from_numpy(data.get("guest", np.zeros(returns.shape[1], bool)))
    x["own"] = (~x["guest"]).nonzero()[:, 0]
    return x


def two_sequences_of_each_task(x, size):
    """Tasks for `size` sequences, (B, 1): random ones, each of them twice, as InfoNCE needs it."""
    tasks = x["tasks"][torch.rand(len(x["tasks"])).argsort()[: size // 2]]
    return tasks.repeat(2)[:, None]


def gather_steps(x, tasks, episodes, stride):
    """Every `stride`-th step of K episodes, one after the other: tasks (B, 1), episodes (B, K).

    The rewards of the steps between them are not part of it.
    """
    T = x["rewards"].shape[2]
    parts = [x[name][tasks, episodes, ::stride] for name in ("states", "actions", "rewards")]
    times = torch.arange(0, T, stride).repeat(1, episodes.shape[1])
    return Steps(*(part.flatten(1, 2) for part in parts), times)


def ad_batch(c, x, step, size):
    """Algorithm Distillation (Laskin et al. 2023): imitate an agent while it learns.

    As published, a context is K consecutive episodes of the learning history of one task. In each
    of their states the model predicts the action that the learner took there, from all that was
    before it. The learner becomes better along its history, so a model that predicts its next
    actions acts better than what is in the context.

    Changed:
    - `late_episode`: only actions of the running episode are predicted, and it is a late one;
    - `guests`: in half of the running episodes the learner acts for another task, see
      `draw_late_episodes`;
    - `worse_episodes`: the finished episodes are mostly bad ones;
    - `clean_targets`: the targets are the learner's actions without the noise by which it explores,
      which nobody can predict. They are `learner_actions`, if the dataset has them.
    The model then learns how a trained learner acts, more than how a learner improves.
    """
    T = x["rewards"].shape[2]
    K = c.context
    tasks = two_sequences_of_each_task(x, size)

    # The episodes of a context, (B, n + 1): n finished ones, and the running one.
    if not c.late_episode:
        n = K - 1
        running = x["own"][torch.randint(n, len(x["own"]), (size, 1))]
    else:
        # An agent that acts has no finished episodes at first, later up to K - 1. All sequences of
        # a batch have the same number, because they have one shape.
        n = step % K
        running = draw_late_episodes(c, x, size)
    if not c.worse_episodes:
        finished = previous_episodes(x, running, n)
    else:
        finished = draw_worse_episodes(c, x, tasks, running, n)
    episodes = torch.cat([finished, running], dim=1)

    # The queries, (B, Q): in which episode of the context they are, and at what time in it.
    if not c.late_episode:
        place = torch.arange(n + 1).repeat_interleave(T).expand(size, -1)
        times = torch.arange(T).repeat(size, n + 1)
    else:
        times = torch.rand(size, T).argsort(dim=1)[:, : c.queries]
        place = torch.full_like(times, n)
    query = (tasks, episodes.gather(1, place), times)

    actions = x["actions"]
    if c.clean_targets:
        actions = x.get("learner_actions", actions)
    steps_per_episode = len(range(0, T, c.stride))
    steps_before = (times + c.stride - 1) // c.stride  # in its own episode: times / stride, upward
    return Batch(
        context=gather_steps(x, tasks, episodes, c.stride),
        queries=x["states"][query],
        query_times=times,
        seen=place * steps_per_episode + steps_before,
        targets=actions[query],
        task_ids=tasks[:, 0],
    )


def previous_episodes(x, running, n):
    """The n episodes (B, n) of the learning history that are before the running one, (B, 1)."""
    index = torch.searchsorted(x["own"], running) + torch.arange(-n, 0)
    require((index >= 0).all(), "too few episodes before the late ones: use a smaller --context")
    return x["own"][index]


def draw_late_episodes(c, x, size):
    """A running episode of each sequence, (B, 1): one of the last min(40, E / 4).

    What is imitated there is good. But the actions of a good learner give its goal away, and the
    model could copy them without a look at the rewards. Now the learner of our datasets is one
    agent that is told the task, see collect.py. So half of these episodes are guests' (`guests`):
    in them it was told another task, for example a fast run in a slow one. Its actions mislead, and
    only the rewards tell the task. The target is what it would do in that state for the right task.
    """
    E = len(x["guest"])
    late = torch.arange(E) >= E - max(1, min(E // 4, 40))
    own = (late & ~x["guest"]).nonzero()  # (episodes, 1)
    require(len(own) > 0, "`guest` marks all late episodes: use --no-late-episode")
    running = own[torch.randint(len(own), (size,))]
    visited = (late & x["guest"]).nonzero()
    if c.guests and "learner_actions" in x and len(visited) > 0:
        with_guest = visited[torch.randint(len(visited), (size,))]
        running = torch.where(torch.rand(size, 1) < 0.5, with_guest, running)
    return running


def draw_worse_episodes(c, x, tasks, running, n):
    """n finished episodes of each sequence, (B, n), in the order of their returns.

    They are drawn from the r worst episodes of the task, with r random, and if r < n also from the
    others. So most of them are bad, and the agent has to find out by itself what would be better.
    With `guests`, episodes in which a guest acts are among them.
    """
    by_return = x["by_return"][tasks[:, 0]]  # (B, E)
    B, E = by_return.shape
    r = torch.rand(B, 1) * E
    tier = (torch.arange(E) >= r).float()  # 0: one of the r worst, 1: better, 2: not to be drawn
    tier[by_return == running] = 2
    if not c.guests or "learner_actions" not in x:
        tier[x["guest"][by_return]] = 2
    key = tier + torch.rand(B, E)  # the lowest tier comes first, in random order within a tier
    rank = key.topk(n, largest=False).indices.sort(dim=1).values
    return by_return.gather(1, rank)


def dpt_batch(c, x, step, size):
    """Decision-Pretrained Transformer (Lee et al. 2023) predicts the expert's action in any state.

    The context, here called the prompt, is K episodes of any quality, drawn at random. If K > 1,
    they are in the order of their returns. The queries are states of other episodes. Each sees a
    random number of the prompt's steps, so that the agent can act with little or much experience. A
    query has no time: the expert's action does not depend on it. Only AD reads `step`.
    """
    E, T = x["rewards"].shape[1:]
    tasks = two_sequences_of_each_task(x, size)
    by_return = x["by_return"][tasks[:, 0]]  # (B, E)
    rank = torch.randint(E, (size, c.context)).sort(dim=1).values
    context = gather_steps(x, tasks, by_return.gather(1, rank), c.stride)
    # No query is from the prompt, which would show the answer if an expert acts in it.
    others = torch.ones(size, E).scatter(1, rank, 0)
    other_rank = others.multinomial(c.queries, replacement=True)  # (B, Q)
    query = (tasks, by_return.gather(1, other_rank), torch.randint(T, (size, c.queries)))
    S = context.rewards.shape[1]
    return Batch(
        context=context,
        queries=x["states"][query],
        query_times=torch.full((size, c.queries), T),  # DPT's queries have no time
        seen=torch.randint(S + 1, (size, c.queries)),
        targets=x["expert_actions"][query],
        task_ids=tasks[:, 0],
    )


DRAW_BATCH = {"ad": ad_batch, "dpt": dpt_batch}

# ---- Acting in context ---------------------------------------------------------------------------


def remember(c, returns):
    """Which finished episodes an agent sees: returns (N, count), the newest one last -> (N, m).

    As published, they are the last K of them, in AD K - 1 beside the running one. Changed
    (`remember_best`): AD sees its newest episode and the best of the others, in the order of their
    returns, and DPT sees its best episodes, so that a bad last one does no harm.
    """
    N, count = returns.shape
    room = c.context
    if c.mode == "ad":
        room = c.context - 1
    m = min(count, room)
    if not c.remember_best or m == 0:
        return torch.arange(count - m, count).repeat(N, 1)
    priority = returns.clone()
    if c.mode == "ad":
        priority[:, -1] = math.inf
    best = priority.argsort(dim=1, stable=True)[:, -m:]  # of equal episodes the newest
    order = returns.gather(1, best).argsort(dim=1, stable=True)
    return best.gather(1, order)


def own_context(c, history, episode, t):
    """The Steps that an agent sees at time t of an episode: what it remembers, then what is new.

    AD always sees the earlier steps of the running episode. As published, DPT never does, so its
    prompt is empty in its first episode. Changed (`grow_prompt`): in its first episode it sees them
    too, and adapts in it already.
    """
    N, _, T = history["rewards"].shape
    tasks = torch.arange(N)[:, None]
    episodes = remember(c, history["rewards"][:, :episode].sum(-1))
    steps = episodes.shape[1] * len(range(0, T, c.stride))
    if c.mode == "ad" or (c.grow_prompt and episode == 0):
        episodes = torch.cat([episodes, torch.full_like(tasks, episode)], dim=1)
        steps += len(range(0, t, c.stride))
    return gather_steps(history, tasks, episodes, c.stride).part(0, steps)


@contextmanager
def evaluation_mode(model):
    """No dropout, noise or gradients, and float32; afterwards the model is as it was."""
    training = model.training
    device = model.state_statistics.device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        model.train(training)


def empty_history(model, N, episodes):
    """The arrays in which `evaluate` stores what happens."""
    shape = (N, episodes, model.horizon)
    history = {
        "states": torch.zeros(*shape, model.sizes["obs_dim"], dtype=torch.float64),
        "actions": torch.zeros(*shape, model.sizes["act_dim"]),
        "rewards": torch.zeros(shape, dtype=torch.float64),
    }
    if model.policy.discrete:
        history["actions"] = torch.zeros(shape, dtype=torch.long)
    return history


def evaluate(model, tasks, episodes, seed=0, context_of=own_context, use_cache=True):
    """Acts in `tasks` (N, task_dim), or in a Gymnasium vector environment with N environments.

    Returns the agent's history in the format of a dataset: `states` (N, episodes, T, obs_dim),
    `actions` (N, episodes, T, act_dim) or int, `rewards` (N, episodes, T). The returns are
    `evaluate(...)["rewards"].sum(-1)`, (N, episodes). Each call begins without experience, and each
    of the N environments may be another task. `seed` draws the start states and the actions.
    `context_of(c, history, episode, t)` gives the Steps that the agent sees of its history; within
    an episode, steps may only be added at their end. Without the cache each step is a full forward
    pass.

    Raises BadInput if observations are of another shape than in training, if actions are of another
    shape or not in [-1, 1], if an episode ends before T steps, and if a number is not finite,
    before the next action. Warns after an episode in which states or rewards were far from those of
    the training.
    """
    c = model.config
    T = model.horizon
    device = model.state_statistics.device
    whole = isinstance(episodes, (int, np.integer)) and episodes > 0
    require(whole, "`episodes` must be an integer, at least 1")
    require(callable(context_of), "`context_of` must be a function, such as t2mir.own_context")
    env = tasks
    if isinstance(tasks, np.ndarray):
        require(c.env in ENVS, f"{c.env} has no simulator: `evaluate` takes a vector environment")
        env = make_vec(c.env, tasks)
    check_environment(env, model.sizes)
    N = env.num_envs
    history = empty_history(model, N, episodes)
    seed = int(seed)
    rng = torch.Generator(device).manual_seed(seed)
    with evaluation_mode(model):
        for episode in tqdm(range(episodes), "acting", leave=False, disable=None):
            cache = None
            if use_cache:
                cache = Cache(3 * c.context * len(range(0, T, c.stride)) + 1)
            observations, _ = env.reset(seed=seed if episode == 0 else None)
            for t in range(T):
                states = checked(observations, (N, model.sizes["obs_dim"]), "observations")
                history["states"][:, episode, t] = states
                context = context_of(c, history, episode, t).to(device)
                when = t
                if c.mode == "dpt":
                    when = T  # DPT's queries have no time
                x = model.act(context, states.to(device), when, cache)
                actions = model.policy.sample(x, not c.sample, rng).cpu()
                require(actions.isfinite().all(), "the agent's actions are not finite")
                history["actions"][:, episode, t] = actions  # before a robot writes into the array
                observations, rewards, terminated, truncated, _ = env.step(actions.numpy())
                history["rewards"][:, episode, t] = checked(rewards, (N,), "rewards")
                check_end(np.logical_or(terminated, truncated), t + 1, T)
            states = history["states"][:, episode]
            rewards = history["rewards"][:, episode, :, None]
            warn_of_other_units("state dimension {}", states, model.state_statistics)
            warn_of_other_units("the reward", rewards, model.reward_statistics)
    if env is not tasks:
        env.close()
    return history


def held_out_loss(model, x, batches=20):
    """The mean -log P of the targets in `x`, made by `to_tensors`.

    The batches are the same in each call with the same Config. A constant is left out, which
    differs between the policies.
    """
    c = model.config
    size = min(c.batch, 2 * len(x["tasks"]))
    losses = []
    with evaluation_mode(model), torch.random.fork_rng(devices=[]):
        for i in range(batches):
            torch.manual_seed(i)
            batch = DRAW_BATCH[c.mode](c, x, i, size).to(model.state_statistics.device)
            outputs, _ = model.predict(batch)
            losses.append(model.policy.neg_log_prob(outputs, batch.targets).mean())
    return torch.stack(losses).mean().item()


def scores(returns, data, tasks):
    """(R - R_random) / (R_expert - R_random) of returns (N, ...) in `tasks`.

    It is NaN in tasks in which the expert hardly gains over random actions, see `has_score`.
    """
    low = data["random_return"]
    high = data["expert_return"]
    gain = np.where(has_score(low, high), high - low, np.nan)[tasks]
    return ((returns.T - low[tasks]) / gain).T


# ---- Training ------------------------------------------------------------------------------------


def sizes_of(data):
    """What T2MIR has to know of a dataset: a dict of obs_dim, act_dim, discrete and horizon."""
    actions = data["actions"]
    act_dim = actions.shape[-1]
    discrete = actions.ndim == 3  # (N, E, T) int
    if discrete:
        names = ("actions", "expert_actions", "learner_actions")
        act_dim = 1 + max(int(data[name].max()) for name in names if name in data)
    obs_dim = data["states"].shape[-1]
    return {
        "obs_dim": obs_dim,
        "act_dim": act_dim,
        "discrete": discrete,
        "horizon": actions.shape[2],
    }


def new_model(c, data, tasks):
    """A T2MIR for a dataset, with the statistics of states and rewards in `tasks`."""
    model = T2MIR(c, sizes_of(data))
    model.state_statistics = torch.from_numpy(statistics(data["states"], tasks))
    model.reward_statistics = torch.from_numpy(statistics(data["rewards"][..., None], tasks))
    return model


def orthogonalise(x):
    """Brings the singular values of the matrices x (M, rows, columns) to about 1.

    Five steps of a Newton-Schulz iteration: with x = U S V^T, a step makes U (a S + b S^3 + c S^5)
    V^T of it. With the constants of Jordan et al. (2024) all singular values but very small ones
    end between 0.7 and 1.2.
    """
    a = 3.4445
    b = -4.7750
    c = 2.0315
    wide = x
    if x.shape[1] > x.shape[2]:
        wide = x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    dtype = pick_dtype(x.device.type)  # bfloat16 where it is fast, as the result is a rough one
    wide = wide.to(getattr(torch, dtype))
    for _ in range(5):
        square = wide @ wide.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    if x.shape[1] > x.shape[2]:
        wide = wide.mT
    return wide.to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for weights (rows, columns) or (M, rows, columns).

    It equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw": the running mean of the
    gradients is made orthogonal, and scaled to the size of AdamW's updates. PyTorch's loops over
    the matrices. This one computes all matrices of a shape at once.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        params = group["params"]
        same_shape = defaultdict(list)
        for p in params:
            state = self.state[p]
            if not state:
                state["mean"] = torch.zeros_like(p)
            same_shape[p.shape[-2:]].append(p)
        means = [self.state[p]["mean"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        # Nesterov's momentum counts the newest gradient once more.
        updates = dict(zip(params, torch._foreach_lerp(grads, means, group["momentum"])))

        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for shape, of_shape in same_shape.items():
            matrices = [updates[p].reshape(-1, *shape) for p in of_shape]
            directions = orthogonalise(torch.cat(matrices)).split([len(m) for m in matrices])
            directions = [d.view_as(p) for d, p in zip(directions, of_shape)]
            step_size = group["lr"] * 0.2 * max(shape) ** 0.5  # entries of about 0.2, as AdamW's
            torch._foreach_add_(of_shape, directions, alpha=-step_size)


def new_optimizers(model):
    """Muon for the matrices of attention, experts and dense layers, AdamW for all the others."""
    c = model.config
    matrices = []
    others = []
    for name, p in model.named_parameters():
        if c.optimizer == "muon" and any(s in name for s in (".attention.", ".experts.", ".mlp.")):
            matrices.append(p)
        elif p.requires_grad:
            others.append(p)
    settings = {"lr": c.lr, "weight_decay": c.weight_decay}
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.95), fused=True, **settings)]
    if matrices:
        optimizers.append(Muon(matrices, **settings))
    return optimizers


def get_lr(c, step):
    """The learning rate: a linear warm-up, then a cosine to zero."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * 0.5 * (1 + math.cos(math.pi * progress))


def start_processes(c):
    """Rank, number of processes and device. torchrun starts several, one for each GPU.

    Each process draws its own batches, the gradients are averaged, and only rank 0 evaluates and
    writes. Without torchrun there is one process.
    """
    device = pick_device(c.device)
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return 0, 1, device
    advice = "start several processes with torchrun, or unset WORLD_SIZE"
    values = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        values[name] = os.environ.get(name, "")
        is_number = values[name].isdecimal()
        require(is_number, f"WORLD_SIZE is set, but {name} is {values[name]!r}: {advice}")
    complete = int(values["WORLD_SIZE"]) > 0 and os.environ.get("MASTER_ADDR")
    require(complete, f"WORLD_SIZE is 0, or MASTER_ADDR is not set: {advice}")
    processes = int(values["WORLD_SIZE"])
    rank = int(values["RANK"])
    backend = "gloo"
    if "cuda" in device:
        backend = "nccl"
        device = f"cuda:{values['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        print(f"process {rank} of {processes} waits for the others")
        long = timedelta(days=1)  # they wait as well while rank 0 evaluates
        dist.init_process_group(backend, timeout=long)
    return rank, processes, device


def train(c, resume=""):
    """Trains an agent, or goes on with the run in the folder `resume`; returns the run's folder.

    The folder has config.json, log.csv and ckpt.pt. Raises BadInput if the dataset does not fit,
    the folder is taken, or the loss is not finite.
    """
    c = dataclasses.replace(c)  # checks the Config again: its fields may have been changed
    rank, processes, device = start_processes(c)
    folder = Path(c.runs) / (c.name or f"{c.env}-{c.mode}-seed{c.seed}")
    if resume:
        folder = Path(expand(resume))
    claimed = nullcontext()
    if rank == 0:
        claimed = claim(folder.resolve())
    with claimed:
        saved = None
        if resume:
            saved = read_checkpoint(folder)
            check_settings(c, saved)
        else:
            taken = (folder / "ckpt.pt").exists()
            require(not taken, f"{folder} holds a run: --resume it, or --name another")
        fit(c, folder, saved, rank, processes, device)
    return folder


def fit(c, folder, saved, rank, processes, device):
    """The training loop of `train`, from the start or from the checkpoint `saved`."""
    # Data, model, optimizers.
    data, train_tasks, held_out = open_dataset(c, saved is None and processes == 1)
    x = to_tensors(data, train_tasks)
    x_held_out = to_tensors(data, held_out)
    torch.manual_seed(c.seed)
    model = new_model(c, data, train_tasks).to(device)
    optimizers = new_optimizers(model)
    run = new_run(c, model, data, processes)
    if saved is not None:
        restore(saved, run, model, optimizers)
    parallel = wrapped(model, processes)

    recent = []  # what was logged since the last evaluation
    started = perf_counter() - run["seconds"]
    bar = tqdm(total=c.steps, initial=run["step"], desc=folder.name, disable=rank > 0 or None)
    for step in range(run["step"], c.steps):
        # All random numbers of a step follow from seed, step and rank, so a run can be resumed.
        seed = np.random.SeedSequence([c.seed, step, rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        batch = DRAW_BATCH[c.mode](c, x, step, c.batch).to(device)

        # Forward, backward, update.
        loss, numbers = parallel.train()(batch)
        loss.backward()
        if c.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = get_lr(c, step)
            optimizer.step()
            optimizer.zero_grad()
        for module in model.modules():
            if isinstance(module, TaskMoE):
                module.update_key_router()

        # Log. Reading a loss means waiting for the GPU, so it is done seldom.
        bar.update()
        # A copy, because a compiled step writes its next outputs to the same place.
        recent.append({name: value.clone() for name, value in numbers.items()})
        done = step + 1
        evaluating = done % c.eval_every == 0 or done == c.steps
        if evaluating or done % 50 == 0:
            require(loss.isfinite(), f"the loss is not finite at step {done}: try a smaller --lr")
            bar.set_postfix_str(f"loss {loss.item():.4f}")

        # Evaluate and save.
        if evaluating and rank == 0:
            row = mean_of(recent) | measure(model, data, held_out, x_held_out)
            row = {name: float(f"{value:.6g}") for name, value in row.items()}
            run["step"] = done
            run["seconds"] = round(perf_counter() - started)
            run["log"].append({"step": done} | row | {"seconds": run["seconds"]})
            save(folder, run, model, optimizers)
            said = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
            bar.write(f"step {done} of {c.steps}: {said}")
        if evaluating:
            recent = []
    bar.close()


def wrapped(model, processes):
    """The model as it is called in training: in several processes, and compiled."""
    compiled = model.config.compile
    if processes > 1:
        model = nn.parallel.DistributedDataParallel(model)
    if compiled:
        model = torch.compile(model, mode="reduce-overhead", dynamic=False)  # with CUDA graphs
    return model


def mean_of(logs):
    """The mean of each number in a list of dicts of tensors, as a dict of floats."""
    return {name: torch.stack([log[name] for log in logs]).mean().item() for name in logs[0]}


def measure(model, data, tasks, x):
    """The held-out loss in `tasks`, and with a simulator the last episode's return and score.

    `x` is made of `tasks` by `to_tensors`.
    """
    numbers = {"heldout": held_out_loss(model, x)}
    finite = math.isfinite(numbers["heldout"])
    require(finite, "the last update has spoiled the weights: try a smaller --lr")
    if data["simulator"]:
        history = evaluate(model, data["tasks"][tasks], model.config.eval_episodes)
        returns = history["rewards"][:, -1].sum(-1).numpy()
        numbers["return"] = float(returns.mean())
        known = scores(returns, data, tasks)
        known = known[~np.isnan(known)]
        if len(known) > 0:
            numbers["score"] = float(known.mean())
    return numbers


def new_run(c, model, data, processes):
    """What a checkpoint holds beside the weights: a dict, which training brings up to date."""
    return {
        "config": dataclasses.asdict(c) | {"data": str(Path(c.data).resolve())},
        "sizes": model.sizes,
        "fingerprint": data["fingerprint"],
        "processes": processes,
        "step": 0,
        "seconds": 0,
        "log": [],
    }


def save(folder, run, model, optimizers):
    """Writes ckpt.pt, then config.json and log.csv: always whole files, the old or the new ones."""
    checkpoint = run | {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    columns = list(dict.fromkeys(name for row in run["log"] for name in row))
    lines = [",".join(columns)]
    for row in run["log"]:
        lines.append(",".join(str(row.get(name, "")) for name in columns))
    table = "\n".join(lines) + "\n"
    config = json.dumps(run["config"], indent=1)
    write_atomically(folder / "ckpt.pt", lambda file: torch.save(checkpoint, file))
    try:
        write_atomically(folder / "config.json", lambda file: file.write(config.encode()))
        write_atomically(folder / "log.csv", lambda file: file.write(table.encode()))
    except BadInput as error:  # on Windows if another program has the file open
        tqdm.write(f"{error}; the checkpoint has all of it, and the next one tries again")


def check_settings(c, saved):
    """Raises BadInput unless a run with the Config `c` can go on from the checkpoint `saved`."""
    changed = {name for name, value in saved["config"].items() if getattr(c, name) != value}
    kept = ", ".join(sorted(changed - {"steps", "device", "compile", "data"}))
    require(not kept, f"--resume keeps the settings of the run, so it does not take: {kept}")
    done = saved["step"]
    require(c.steps >= done, f"--steps must be at least the {done} steps that are done")
    if "steps" in changed or "device" in changed:
        print("with other steps or another device, the result is not that of one long run")


def restore(saved, run, model, optimizers):
    """Brings run, model and optimizers to where the checkpoint `saved` has them."""
    same = saved["fingerprint"] == run["fingerprint"]
    require(same, "the run to resume was trained on another dataset: name its folder with --data")
    if saved["processes"] != run["processes"]:
        print(f"the run had {saved['processes']} processes, so its batches had another size")
    load_weights(model, saved, "the run to resume")
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    run.update({name: saved[name] for name in ("step", "seconds", "log")})


def read_checkpoint(run):
    """The checkpoint of a run's folder, or a checkpoint file itself, as a dict on the CPU."""
    path = Path(expand(run))
    if not path.is_file():
        path = path / "ckpt.pt"
    require(path.exists(), f"{path} is missing: name the folder of a run that has a checkpoint")
    with reading(path, "is damaged or not a checkpoint"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        fields = saved["config"].keys()
    unknown = fields ^ {field.name for field in dataclasses.fields(Config)}
    names = ", ".join(sorted(unknown))
    advice = "use the commit that made it"
    require(not unknown, f"{path} is of a t2mir.py with other settings ({names}): {advice}")
    return saved


def load_weights(model, saved, where):
    """Gives the model the weights of a checkpoint; BadInput if its classes have changed."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:  # whose second line names the first weight that does not fit
        reason = " ".join(str(error).split("\n")[:2]).strip()
        raise BadInput(f"{where} is of another T2MIR than this t2mir.py has ({reason})") from None


def load_agent(run, device="cpu"):
    """The agent of a run's folder or of a checkpoint file, in evaluation mode."""
    device = pick_device(device)
    saved = read_checkpoint(run)
    model = T2MIR(Config(**saved["config"]), saved["sizes"]).to(device)
    load_weights(model, saved, run)
    return model.eval()


# ---- Command line --------------------------------------------------------------------------------


@dataclasses.dataclass
class Flags(Config):
    """The fields of a Config, and what else the command line takes."""

    recipe: Literal["ours", "paper"] = "ours"  # command: paper sets the fields marked "change"
    resume: str = ""  # command: go on with the run in this folder; with --steps, --device, --data


def main():
    """Trains as the flags say, on top of a preset or of the Config of the run to --resume."""
    # The values of these four flags decide the defaults of the others.
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env", "mode", "recipe", "resume"):
        peek.add_argument(f"--{name}", default=getattr(Flags, name))
    given, _ = peek.parse_known_args()
    if given.resume:
        is_file = Path(expand(given.resume)).is_file()
        resumable = given.recipe == Flags.recipe and not is_file
        require(resumable, "--resume takes the folder of a run, and no --recipe")
        defaults = read_checkpoint(given.resume)["config"]
    else:
        defaults = dataclasses.asdict(preset(given.env, given.mode, given.recipe))
    defaults = Flags(**defaults, recipe=given.recipe, resume=given.resume)
    flags = dataclasses.asdict(
        tyro.cli(Flags, default=defaults, description="Trains T2MIR, and shows what it has learned")
    )
    flags.pop("recipe")
    resume = flags.pop("resume")
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here
    try:
        from experiments.report import report  # here, because it imports this file
    except ModuleNotFoundError as error:
        raise BadInput(f"{error}: a run ends with a report of experiments/report.py") from None
    keep_freed_memory()
    folder = train(Config(**flags), resume)
    if not dist.is_initialized() or dist.get_rank() == 0:
        report(folder, flags["data"], flags["device"])


if __name__ == "__main__":
    run_command(main, "(a run goes on with --resume, a collection with the same command)")

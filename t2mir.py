"""T2MIR: token- and task-wise mixture of experts for in-context reinforcement learning, in one file.

    python t2mir.py --env point_robot --mode dpt

Paper: Wu et al., "Mixture-of-Experts Meets In-Context Reinforcement Learning", NeurIPS 2025, arXiv 2506.05426.
Equations (1) to (6) are numbered where they are computed. What this model does that a plain transformer does not:
- a step is three tokens (state, action, reward), embedded separately, plus an embedding of the time in the episode;
- in some blocks the feed-forward layer is two mixtures of experts (MoE). In each a router sends a token to k of E small
  networks, the experts: the token-wise router by the token itself, the task-wise one by the mean of all tokens so far;
- the task router is trained as a task encoder: InfoNCE pulls two sequences of one task together;
- the context is causal; behind it stand queries, states in which an action is predicted, all in parallel. Each query
  sees a prefix of the context and itself, and the context sees no query, so one context serves many predictions.

    AD: up to K - 1 finished episodes, the best one last, then the running one, whose states are the queries.

        s a r s a r s a r | s a r s a r s a r | q1 q2 q3      L_action: each query predicts what the learning agent
        -------------------                     ^             would have done. q1, q2, q3 are the three states of the
        -------------------------                  ^          second, running episode; each sees what was before it:
        -------------------------------               ^       the finished episode and the earlier steps of its own

    DPT: K episodes as the prompt, and as queries states of other episodes. The expert is the task's own RL agent.

        s a r s a r s a r s a r | q1 q2 q3      L_action: each query predicts the expert's action in its state
        -----------               ^             q1 sees two steps of the prompt and itself
        -----------------------      ^          q2 sees the whole prompt and itself
                                        ^       q3 sees itself only

    B sequences in a batch             K episodes in a context (config.context)     D, d  d_model, width of a token
    L tokens in a sequence             S steps in a context, three tokens each      E, k  experts; top_k compute a token
    T steps in an episode (horizon)    Q queries behind a context                   N, E  in a dataset: tasks, episodes
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import sys
import time
from collections import defaultdict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from collect import BadInput, claim, collect, load, pick_device, require, write_atomically
from envs import ENVS, make_vec

# ---- Config ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    """Everything that a run depends on; each field is a flag. BY_MODE and PRESETS change some of the defaults."""
    env: str = "point_robot"  # task family, or the name of a dataset of your own: data/ENV.npz
    mode: Literal["ad", "dpt"] = "dpt"  # backbone: Algorithm Distillation or Decision-Pretrained Transformer
    d_model: int = 64  # model: width of a token (d)
    n_layers: int = 3  # model: transformer blocks
    n_heads: int = 4  # model: attention heads
    dropout: float = 0.0  # model: dropout of the embeddings and of each sublayer's output
    moe_layers: str = "last"  # MoE: blocks with a T2MIR layer: last, all, or indices such as 0,2
    token_experts: int = 6  # MoE: experts of the token-wise MoE (the paper's K1)
    task_experts: int = 8  # MoE: experts of the task-wise MoE (the paper's K2)
    top_k: int = 2  # MoE: experts that compute a token, in each MoE; a single one would have a gate without a gradient
    token_moe: bool = True  # MoE: the token-wise MoE; with neither MoE the agent is plain AD or DPT
    task_moe: bool = True  # MoE: the task-wise MoE; an MoE that stands alone takes the full width
    w_imp: float = 0.01  # MoE: weight of the importance term of the balance loss
    w_load: float = 0.01  # MoE: weight of the load term of the balance loss, which keeps all token-wise experts in use
    w_con: float = 0.01  # MoE: weight of the InfoNCE loss
    momentum: float = 0.005  # MoE: fraction by which the key router follows the task router in each step
    context: int = 4  # context: episodes, with the running one in AD (K)
    stride: int = 1  # context: every n-th step of an episode is kept
    queries: int = 40  # context: queries trained behind each context (Q), in AD at most the horizon
    steps: int = 2_500  # training: steps
    batch: int = 32  # training: sequences in a batch of each process, two from each of batch / 2 tasks (B)
    lr: float = 5e-3  # training: peak learning rate of both optimizers, Muon and AdamW
    warmup: int = 100  # training: steps of linear warm-up, followed by a cosine to zero
    weight_decay: float = 1e-4  # training: weight decay of both optimizers
    clip: float = 1.0  # training: largest norm of the gradient
    eval_every: int = 500  # evaluation: training steps between evaluations, each of which saves a checkpoint
    eval_episodes: int = 10  # evaluation: episodes in which an agent acts in each task
    val_tasks: int = 0  # evaluation: evaluate on this many training tasks, held out, instead of on the test tasks
    noise: float = 1.0  # evaluation: factor of the policy's deviation, from an agent's second episode on
    seed: int = 0  # system: random seed of the training; the dataset has its own
    device: str = "auto"  # system: cpu, cuda, mps, or auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # system: auto is bfloat16 on cuda, else float32
    data: str = "data"  # system: folder of the datasets
    runs: str = "runs"  # system: folder of the runs
    name: str = ""  # system: name of the run's folder, by default ENV-MODE-seedSEED
    resume: str = ""  # system: folder of a run to continue; beside it only --device, --data and more --steps

    def __post_init__(self):
        self.device = pick_device(self.device)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if "cuda" in self.device else "float32"
        low, high = dict(seed=0, warmup=0, val_tasks=0, top_k=2, batch=2), dict(dropout=0.99, momentum=1)
        for f in dataclasses.fields(self):
            if f.type in (int, float):
                value, least, most = getattr(self, f.name), low.get(f.name, int(f.type is int)), high.get(f.name, 1e99)
                require(least <= value <= most, f"--{f.name} {value} must lie between {least} and {most:g}")
        require(self.mode in BACKBONES, f"--mode {self.mode} must be ad or dpt")
        every = [str(i) for i in range(self.n_layers)]
        named = {"last": every[-1:], "all": every}.get(self.moe_layers, self.moe_layers.split(","))
        require(set(named) <= set(every), f"--moe_layers {self.moe_layers} must be last, all, or blocks such as 0,2")
        self.moe_blocks = [int(i) for i in named]
        require(self.d_model % math.lcm(16, self.n_heads) == 0, "--d_model must be a multiple of 16 and of --n_heads")
        require(self.batch % 2 == 0, f"--batch {self.batch} must be even: each task in it has two sequences")
        require(self.top_k < min(self.token_experts, self.task_experts), "--top_k must be below the numbers of experts")
        # (6) The objective is the sum of these losses with these weights: L_action + L_balance + w_con L_InfoNCE.
        self.loss_weights = dict(action=1.0, importance=self.w_imp, load=self.w_load, contrastive=self.w_con)

# The sizes are those of a laptop. The paper's: d_model 128 (AD on MuJoCo 256), 8 heads (DPT on MuJoCo 4), stride 1,
# batch 32 (AD on MuJoCo 24), dropout 0.05, learning rate 3e-4, 10,000 steps of warm-up in 100,000 steps.
MUJOCO = dict(d_model=128, lr=4e-3, stride=8, noise=0.0, steps=1_000, eval_every=250)
BY_MODE = {"dpt": dict(context=1), "ad": dict(batch=16, w_imp=0.1, w_load=0.1)}
PRESETS = {("point_robot", "ad"): dict(steps=12_000, eval_every=4_000)}
for family in ("cheetah_vel", "walker_param"):
    PRESETS[family, "dpt"] = dict(MUJOCO, n_layers=4)
    PRESETS[family, "ad"] = dict(MUJOCO, steps=3_000, eval_every=1_000)

def preset(env="point_robot", mode="dpt", **given):
    """The Config of `env` and `mode`, with the fields in `given` on top; own data has the defaults of its mode."""
    return Config(env=env, mode=mode, **(BY_MODE.get(mode, {}) | PRESETS.get((env, mode), {}) | given))

# ---- Attention, experts and routers ----------------------------------------------------------------------------------
def attention_mask(length, prefix=None, past=0, device=None):
    """Which token sees which: a bool mask, True where the row's token sees the column's.

    Without `prefix`: `length` causal tokens behind `past` cached ones, (L, past + L). With `prefix` (B, Q): the rows of
    the Q queries that end the sequence, (B, 1, Q, L). Query q sees the first prefix[:, q] context tokens and itself.
    """
    if prefix is None:
        return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    Q = prefix.shape[1]
    context = torch.arange(length - Q, device=device) < prefix[..., None]  # (B, Q, L - Q)
    itself = torch.eye(Q, dtype=torch.bool, device=device).expand(len(prefix), Q, Q)
    return torch.cat([context, itself], dim=2)[:, None]

class Attention(nn.Module):
    """Multi-head attention. The last tokens, one for each row of `mask`, see what it says; all others are causal."""
    def __init__(self, d_model, n_heads, index):
        super().__init__()
        self.n_heads, self.index = n_heads, index
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, mask=None, cache=None):
        """x (B, L, D), the tokens behind those in `cache` -> (B, L, D)."""
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, heads, past + L, D / heads)
        n, parts = L if mask is None else L - mask.shape[-2], []  # n causal tokens, which come first
        if n > 0:  # is_causal lets the kernel skip half of the work, a mask does not
            parts.append(F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True))
        if n < L:
            parts.append(F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask))
        return self.out(torch.cat(parts, dim=2).transpose(1, 2).reshape(B, L, D))

def multiply_by_expert(x, weights, ends):
    """Rows ends[i - 1] to ends[i] of x (N, d_in) times weights[i] (d_in, d_out), for all experts i: (N, d_out)."""
    on_cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if on_cpu or (x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0)):
        return F.grouped_mm(x, weights, offs=ends)
    return torch.cat([rows @ w for rows, w in zip(x.tensor_split(ends[:-1].tolist()), weights)])

class Experts(nn.Module):
    """`num` two-layer networks without biases; each token is computed by the experts chosen for it and no others."""
    def __init__(self, num, d_in, hidden, d_out):  # the weights are lists, because Muon takes matrices only
        super().__init__()
        self.w1 = nn.ParameterList(torch.empty(d_in, hidden).uniform_(-1, 1) * d_in**-0.5 for _ in range(num))
        self.w2 = nn.ParameterList(torch.empty(hidden, d_out).uniform_(-1, 1) * hidden**-0.5 for _ in range(num))

    def forward(self, h, gates, chosen):
        """sum_j gates[j] E_chosen[j](h): h (..., d_in), gates and chosen (..., k) -> (..., d_out)."""
        if torch.is_autocast_enabled(h.device.type):  # autocast does not cover grouped_mm
            h = h.to(torch.get_autocast_dtype(h.device.type))
        rows = h.flatten(0, -2)  # (N, d_in)
        # The N * k pairs of token and expert, sorted by expert. Example: chosen is (0, 2), (2, 1), (0, 1).
        expert, order = chosen.flatten().sort(stable=True)  # 0 0 1 1 2 2
        token = order // chosen.shape[-1]  # 0 2 1 2 0 1
        ends = torch.searchsorted(expert, torch.arange(len(self.w1), device=h.device), right=True).int()  # 2 4 6
        w1, w2 = (torch.stack(list(w)).to(h.dtype) for w in (self.w1, self.w2))
        y = F.gelu(multiply_by_expert(rows[token], w1, ends))
        y = multiply_by_expert(y, w2, ends) * gates.flatten()[order, None]
        return y.new_zeros(len(rows), y.shape[1]).index_add(0, token, y).view(*h.shape[:-1], -1)

class Routing(NamedTuple):
    """What a router decided for each row of its input."""
    logits: torch.Tensor  # (..., E) before noise
    gates: torch.Tensor  # (..., k) weights of the chosen experts, which sum to 1
    chosen: torch.Tensor  # (..., k) their indices
    importance: torch.Tensor  # (..., E) the gates by expert; their sum over tokens is Imp
    load: torch.Tensor | None  # (..., E) P(expert is among the top k), whose sum is Load; None where there is no noise

class MoE(nn.Module):
    """A router, which chooses `config.top_k` of `num_experts` experts for each token, and these experts.

    A `noisy` router adds noise to its logits while training. So a token also tries experts that just miss the top k,
    and the probability that it chooses an expert has a gradient; over all tokens its sum is the expert's load (2).
    """
    def __init__(self, c, num_experts, hidden, d_out, noisy):
        super().__init__()
        self.top_k = c.top_k
        self.router = nn.Linear(c.d_model, num_experts, bias=False)  # G
        self.noise = nn.Linear(c.d_model, num_experts, bias=False) if noisy else None  # W_noise
        self.experts = Experts(num_experts, c.d_model, hidden, d_out)

    def route(self, h):
        """softmax(topk(G(h))): h (..., d_model) -> Routing, in float32, because small differences decide."""
        with torch.autocast(h.device.type, enabled=False):
            clean = noisy = self.router(h)  # (..., E)
            load = None
            if self.noise is not None and self.training:
                sigma = F.softplus(self.noise(h)) + 1e-2  # the constant keeps the division in the load finite
                noisy = clean + torch.randn_like(clean) * sigma
                load = load_probability(clean, noisy, sigma, self.top_k)
            top, chosen = noisy.topk(self.top_k, dim=-1)
            gates = top.softmax(-1)
            return Routing(clean, gates, chosen, torch.zeros_like(clean).scatter(-1, chosen, gates), load)

    def forward(self, h, routed_by, select=slice(None)):
        """h, routed_by (B, L, d_model) -> y (B, l, d_out) of the tokens h[:, select], and the Routing of all tokens."""
        routing = self.route(routed_by)  # of all tokens: the losses and the log also count those that skip the experts
        return self.experts(h[:, select], routing.gates[:, select], routing.chosen[:, select]), routing

class TokenMoE(MoE):
    """(1) Token-wise MoE: y_tok = sum_i w_tok(i; h) E_i(h) with w_tok = softmax(topk(G_tok(h))), routed by h itself."""
    def __init__(self, c, hidden, d_out):
        super().__init__(c, c.token_experts, hidden, d_out, noisy=True)

class TaskMoE(MoE):
    """(3) Task-wise MoE: y_task = sum_i w_task(i; h_mean) E_i(h) with w_task = softmax(topk(G_task(h_mean))).

    The experts act on the token, and the task decides which of them do. The router needs no noise: there is no load
    to differentiate, and InfoNCE trains all of its logits whichever experts are chosen.
    """
    def __init__(self, c, hidden, d_out):
        super().__init__(c, c.task_experts, hidden, d_out, noisy=False)
        self.momentum = c.momentum
        self.key_router = copy.deepcopy(self.router).requires_grad_(False)  # it lags, so the keys are steadier
        self.W = nn.Parameter(torch.eye(len(self.router.weight)))  # bilinear score of InfoNCE

    def contrast(self, z, h_mean, task_ids):
        """InfoNCE (4) of the logits z (B, E) with keys, which the key router makes of h_mean (B, d_model), detached."""
        with torch.autocast(z.device.type, enabled=False):
            return info_nce(z, self.key_router(h_mean.detach()), self.W, task_ids)

    @torch.no_grad()
    def update_key_router(self):
        """Moves the key router a little towards the router after each training step (1 - momentum is the m of MoCo)."""
        self.key_router.weight.lerp_(self.router.weight, self.momentum)

def prefix_mean(h, prefix=None, past_sum=0.0, past=0):  # past_sum (B, 1, d_model), the sum over the `past` tokens
    """Mean of the layer's inputs over the tokens that each token may attend to, itself included: (B, L, d_model).

    A mean over the whole sequence would show AD's router the future. `prefix` and `past`: as in `attention_mask`.
    """
    n = h.shape[1] if prefix is None else h.shape[1] - prefix.shape[1]  # context tokens, which come first
    sums = h[:, :n].cumsum(1) + past_sum
    means = sums / (past + torch.arange(1, n + 1, device=h.device))[:, None]
    if prefix is None:
        return means
    before = F.pad(sums, (0, 0, 1, 0)).take_along_dim(prefix[..., None], dim=1)  # (B, Q, d_model), sum of the prefix
    return torch.cat([means, (before + h[:, n:]) / (prefix[..., None] + 1)], dim=1)

# ---- Losses ----------------------------------------------------------------------------------------------------------
def cv_squared(x):
    """Squared coefficient of variation, variance / mean^2, of a vector (E,): 0 if all experts have the same share."""
    return x.var(correction=0) / (x.mean() ** 2 + 1e-10)

def load_probability(clean, noisy, sigma, k):
    """P(expert i is among the top k if only its own noise were drawn again), (..., E) (Shazeer et al. 2017, app. A).

    clean, noisy, sigma (..., E): logits without and with noise, deviation of the noise. The threshold is the k-th
    largest noisy logit of the others. Example: clean = noisy = (3, 2, 1), sigma 1, k = 2. The thresholds are (1, 1, 2),
    the loads Phi(2), Phi(1), Phi(-1) = 0.98, 0.84, 0.16. Counting the choices gives 1, 1, 0, without a gradient.
    """
    top = noisy.topk(k + 1, dim=-1).values
    kth, next_best = top[..., k - 1 : k], top[..., k : k + 1]
    threshold = torch.where(noisy >= kth, next_best, kth)  # those of the top k are not their own rivals
    return torch.special.ndtr((clean - threshold) / sigma)

def info_nce(z, k, W, task_ids):
    """(4) InfoNCE: mean over i of -log [sum_pos exp(z_i W k_p) / (sum_pos exp(z_i W k_p) + sum_neg exp(z_i W k_n))].

    z (B, E) router outputs, k (B, E) those of the key router, W (E, E), task_ids (B,) int. Positives are the other
    sequences of i's task (one, with two sequences per task), negatives the B - 2 of other tasks; i itself is neither.
    """
    scores = z @ W @ k.T  # (B, B)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (task_ids[:, None] == task_ids) & ~itself
    all_others = scores.masked_fill(itself, -math.inf).logsumexp(1)
    return (all_others - scores.masked_fill(~positive, -math.inf).logsumexp(1)).mean()

def neg_log_prob(actions, mean, log_std):
    """-log P of actions under a Gaussian policy, up to a constant, for each action dimension: (..., act_dim).

    Where targets have no noise, the deviation says how little the agent knows of its task; sampling then explores.
    """
    return ((actions - mean) * (-log_std).exp()).square() / 2 + log_std

def experts_used(routing):
    """Experts that a router uses over all tokens: exp of the entropy of mean gates, from 1 to E; near k: a collapse."""
    return torch.special.entr(routing.importance.detach().flatten(0, -2).mean(0)).sum().exp()

# ---- Layer, block and model ------------------------------------------------------------------------------------------
class T2MIRLayer(nn.Module):
    """(5) T2MIR layer: concat(y_tok, y_task), each d / 2 wide; an MoE that stands alone is d wide.

    With top_k 2 a token meets 12 d^2 weights, as in a dense layer of width 6 d: with both MoEs four experts of
    (d -> 2 d -> d / 2), with one MoE two experts of (d -> 3 d -> d).
    """
    def __init__(self, c, index):
        super().__init__()
        self.index, d = index, c.d_model
        hidden, d_out = (2 * d, d // 2) if c.token_moe and c.task_moe else (3 * d, d)
        self.token_moe = TokenMoE(c, hidden, d_out) if c.token_moe else None
        self.task_moe = TaskMoE(c, hidden, d_out) if c.task_moe else None

    def forward(self, h, prefix=None, cache=None, select=slice(None)):
        """h (B, L, d) -> outputs (B, l, d) of the tokens h[:, select], and what was routed: a dict, see `T2MIR.act`."""
        outputs, routed = [], {"layer": self}
        if self.token_moe is not None:
            y, routed["token"] = self.token_moe(h, h, select)
            outputs.append(y)
        if self.task_moe is not None:
            h_mean = routed["h_mean"] = prefix_mean(h, prefix) if cache is None else cache.prefix_mean(self.index, h)
            y, routed["task"] = self.task_moe(h, h_mean, select)
            outputs.append(y)
        return torch.cat(outputs, dim=-1), routed

class Block(nn.Module):
    """Pre-norm transformer block: attention, then a T2MIR layer if `moe_layers` names the block, else a dense layer."""
    def __init__(self, c, index):
        super().__init__()
        d, named = c.d_model, index in c.moe_blocks
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, c.n_heads, index)
        self.dropout = nn.Dropout(c.dropout)
        self.moe = T2MIRLayer(c, index) if named and (c.token_moe or c.task_moe) else None
        if self.moe is None:
            width = 6 * d if named else 4 * d  # a baseline spends 6 d where the T2MIR layer would be
            self.mlp = nn.Sequential(nn.Linear(d, width, bias=False), nn.GELU(), nn.Linear(width, d, bias=False))

    def forward(self, x, mask=None, prefix=None, cache=None, select=slice(None)):
        """x (B, L, d) -> outputs (B, l, d) of the tokens x[:, select], and what the T2MIR layer routed, or None."""
        x = x + self.dropout(self.attention(self.norm1(x), mask, cache))
        h = self.norm2(x)
        y, routed = (self.mlp(h[:, select]), None) if self.moe is None else self.moe(h, prefix, cache, select)
        return x[:, select] + self.dropout(y), routed  # (5) the residual sum

class T2MIR(nn.Module):
    """The agent: a transformer over (state, action, reward) tokens that predicts actions, for both backbones."""
    def __init__(self, c, sizes):  # a Config, and a dict of obs_dim, act_dim, horizon and num_tasks
        super().__init__()
        self.config, self.sizes, self.horizon = c, sizes, sizes["horizon"]
        self.register_buffer("state_mean", torch.zeros(sizes["obs_dim"]))
        self.register_buffer("state_std", torch.ones(sizes["obs_dim"]))
        self.embed_state = nn.Linear(sizes["obs_dim"], c.d_model)
        self.embed_action = nn.Linear(sizes["act_dim"], c.d_model)
        self.embed_reward = nn.Linear(1, c.d_model)
        self.embed_time = nn.Embedding(self.horizon + 1, c.d_model)  # the last row is for DPT's queries
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = nn.LayerNorm(c.d_model)
        self.head = nn.Linear(c.d_model, 2 * sizes["act_dim"])  # mean and log deviation of a Gaussian

    def state_tokens(self, states, times):
        """States (B, S, obs_dim) at `times` (S,), (B, S) or one for all -> tokens (B, S, D)."""
        return self.embed_state((states - self.state_mean) / self.state_std) + self.embed_time.weight[times]

    def tokens(self, states, actions, rewards, times):
        """Steps as interleaved tokens: (B, S, obs_dim), (B, S, act_dim), (B, S), times as above -> (B, 3 S, D)."""
        s, time = self.state_tokens(states, times), self.embed_time.weight[times]
        a, r = self.embed_action(actions) + time, self.embed_reward(rewards[..., None]) + time
        return torch.stack([s, a, r], dim=2).flatten(1, 2)

    def act(self, x, prefix=None, cache=None, select=slice(None)):
        """Tokens x (B, L, D) -> the policy at the tokens x[:, select], and what was routed.

        The policy is a Gaussian: mean in [-1, 1] and log of the deviation, (B, l, act_dim) each. What was routed is a
        list of dicts, one per T2MIR layer: `layer`, the Routings `token` and `task`, and `h_mean` (B, L, D).
        """
        past = 0 if cache is None else cache.length
        mask = None if prefix is None and past == 0 else attention_mask(x.shape[1], prefix, past, x.device)
        x, routed = self.dropout(x), []
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1  # nothing reads its other tokens, so its experts skip them
            x, r = block(x, mask, prefix, cache, select if last else slice(None))
            routed += [r] if r else []
        mean, log_std = self.head(self.norm(x)).chunk(2, dim=-1)
        return mean.tanh(), -3 * log_std.sigmoid(), routed  # deviations from 0.05 to 1

    def predict(self, batch):
        """The policy at the queries of a batch, which stand behind the context, and what was routed: as `act`."""
        context = self.tokens(batch["states"], batch["actions"], batch["rewards"], batch["times"])
        x = torch.cat([context, self.state_tokens(batch["queries"], batch["query_times"])], dim=1)
        return self.act(x, 3 * batch["seen"], select=slice(context.shape[1], None))

    def forward(self, batch):
        """A batch -> dict of losses (scalars) named as in `Config.loss_weights` and of numbers that are only logged."""
        mean, log_std, routed = self.predict(batch)  # (B, Q, act_dim)
        # Beta-NLL with beta 0.5 (Seitzer et al. 2022): the weight is the deviation, without a gradient. Unweighted, the
        # mean learns most where the agent is sure already; weighted by the variance, it learns as from squared errors.
        nll = neg_log_prob(batch["targets"], mean, log_std)  # its mean is logged, to be compared with `heldout`
        losses = defaultdict(float, action=(nll * log_std.detach().exp()).mean(), nll=nll.mean())
        end = 3 * batch["states"].shape[1] - 1  # the last token of the context
        for r in routed if self.training else ():
            if "token" in r:  # (2) balance loss: w_imp CV(Imp)^2 + w_load CV(Load)^2
                losses["importance"] += cv_squared(r["token"].importance.flatten(0, -2).sum(0))
                losses["load"] += cv_squared(r["token"].load.flatten(0, -2).sum(0))
                losses["token_experts"] += experts_used(r["token"]) / len(routed)
            if "task" in r:  # (4) the task of each sequence as the router sees it at the end of the context
                z, h_mean = r["task"].logits[:, end], r["h_mean"][:, end]  # (B, E), (B, D)
                losses["contrastive"] += r["layer"].task_moe.contrast(z, h_mean, batch["task_ids"])
                losses["task_experts"] += experts_used(r["task"]) / len(routed)
        return dict(losses)

# ---- The cache, and the two backbones: how they draw a batch and how they act ----------------------------------------
class Cache:
    """What past tokens leave behind in each block: keys, values, and the sum of the task-wise MoE's inputs.

    No later token changes any of it, so acting with the cache equals the full forward pass.
    """
    def __init__(self, model, batch):
        c, zeros = model.config, model.state_mean.new_zeros
        capacity = 3 * c.context * len(range(0, model.horizon, c.stride)) + 1  # tokens: steps and a query
        self.kv = zeros(c.n_layers, 2, batch, c.n_heads, capacity, c.d_model // c.n_heads)
        self.sums = zeros(c.n_layers, batch, c.d_model)
        self.added, self.length = torch.zeros_like(self.sums), 0  # what the newest tokens add; number of past tokens

    def append(self, block, k, v):
        """Puts k and v (B, heads, L, D / heads) of a block behind its past; returns both with their past."""
        end = self.length + k.shape[2]
        self.kv[block, :, :, :, self.length : end] = torch.stack([k, v])
        return self.kv[block, :, :, :, :end]

    def prefix_mean(self, block, h):
        """`prefix_mean` of h (B, L, D) behind the block's past."""
        self.added[block] = h.sum(1)
        return prefix_mean(h, None, self.sums[block][:, None], self.length)

    def step(self, model, x, keep=True):
        """Mean and deviation (B, act_dim) of the policy at the last token of x (B, L, D); `keep`: remember x."""
        mean, log_std, _ = model.act(x, cache=self, select=slice(-1, None))
        if keep:  # otherwise the next tokens take the place of x
            self.length += x.shape[1]
            self.sums += self.added
        return mean[:, 0], log_std[:, 0].exp()

    def fill(self, model, memory, keep, newest=False):
        """Replaces the past by the best `keep` episodes of `memory`, the best last; with `newest`, one is the newest.

        An episode is (states, actions, rewards), each (N, T, ...), of which every `stride`-th step is kept.
        """
        self.length, keep = 0, min(keep, len(memory))
        self.sums.zero_()
        if keep:
            returns = torch.stack([rewards.sum(1) for _, _, rewards in memory], dim=1)  # (N, n)
            priority = returns.clone()
            priority[:, -1] += math.inf if newest else 0.0
            best = priority.topk(keep).indices  # (N, keep)
            order = returns.gather(1, best).argsort(dim=1, stable=True)  # by return, the best one last
            row, stride = torch.arange(len(best), device=best.device)[:, None], model.config.stride
            parts = [torch.stack(part, 1)[row, best.gather(1, order), ::stride].flatten(1, 2) for part in zip(*memory)]
            times = torch.arange(0, model.horizon, stride, device=best.device).repeat(keep)
            self.step(model, model.tokens(*parts, times))

def tensors(data, tasks, device):
    """The arrays of `tasks` (bool mask) as tensors on `device`, and indices of episodes: `by_return`, `own`, `guests`.

    AD's targets are what the learner would have done without noise, or else the actions taken; DPT's are the expert's.
    """
    keys = [k for k in ("states", "actions", "rewards", "expert_actions", "learner_actions") if k in data]
    x = {k: torch.as_tensor(data[k][tasks], device=device) for k in keys}
    x.setdefault("learner_actions", x["actions"])
    x["by_return"] = x["rewards"].sum(-1).argsort(dim=1, stable=True)  # (tasks, E), the best one last
    guest = torch.as_tensor(data.get("guest", np.zeros(x["rewards"].shape[1], bool)), device=device)
    last = torch.arange(len(guest), device=device) >= len(guest) - max(1, min(len(guest) // 4, 40))
    own, guests = last & ~guest, last & guest
    x["own"] = (own if own.any() else last).nonzero()[:, 0]
    x["guests"] = guests.nonzero()[:, 0] if "learner_actions" in data and guests.any() else x["own"]
    return x

class AD:
    """Algorithm Distillation (Laskin et al. 2023) imitates a learning agent and continues the improvement it sees.

    The context is 0 to K - 1 finished episodes of a task's learning history, mostly bad ones, and a running one, whose
    states are the queries, out of its last 40 (at most its last quarter). In half of the running ones a guest acted,
    another task's agent, if `learner_actions` say what the learner, the task's own agent, would have done there. Why
    guests: from a learner's own past actions its next one can be guessed without a look at the finished episodes.
    """
    @staticmethod
    def batch(c, x, step, size, remembered=None):
        """`size` sequences of the arrays x of `tensors`, as a dict.

        Of the context: states, actions (B, S, .), rewards (B, S), times (S,), task_ids (B,). Of the queries: queries
        (B, Q, obs_dim), query_times (B, Q) or one for all, targets (B, Q, act_dim), and seen (B, Q), the steps of
        context that each sees. The finished episodes, DPT's prompt, are from the arrays `remembered`, by default x.
        """
        N, E, T = x["rewards"].shape
        device, remembered = x["rewards"].device, remembered or x
        task = torch.rand(N, device=device).argsort()[: size // 2].repeat(2)  # two sequences of each task
        n = step % c.context  # 0 to K - 1 finished episodes
        own = x["own"][torch.randint(len(x["own"]), (size, 1), device=device)]
        guest = x["guests"][torch.randint(len(x["guests"]), (size, 1), device=device)]
        running = torch.where(torch.rand(size, 1, device=device) < 0.5, guest, own)  # (B, 1)
        # Draws n of the r worst, r random; if r < n, better ones too (rank + 1); never the running one (rank + 2).
        too_good = torch.arange(E, device=device) >= torch.rand(size, 1, device=device) * E  # (B, E), by return
        rank = torch.rand(size, E, device=device) + too_good + 2 * (x["by_return"][task] == running)
        place = rank.topk(n, largest=False).indices.sort(dim=1).values
        row, kept = task[:, None], torch.arange(0, T, c.stride, device=device)
        finished = remembered["by_return"][row, place]  # (B, n), the best one last
        past = {k: remembered[k][row, finished, :: c.stride].flatten(1, 2) for k in ("states", "actions", "rewards")}
        batch = {k: torch.cat([past[k], x[k][row, running, kept]], dim=1) for k in past}
        time = torch.rand(size, T, device=device).argsort(dim=1)[:, : c.queries]  # (B, Q), each at most once
        seen = n * len(kept) + (kept < time[..., None]).sum(-1)
        batch |= {"times": kept.repeat(n + 1), "task_ids": task, "query_times": time, "seen": seen}
        return batch | {"queries": x["states"][row, running, time], "targets": x["learner_actions"][row, running, time]}

    def __init__(self, model, num_tasks):
        self.model, self.cache = model, Cache(model, num_tasks)

    def begin_episode(self, memory):
        """Remembers K - 1 of the finished episodes in the list `memory`: the newest and the best of the others."""
        self.cache.fill(self.model, memory, self.model.config.context - 1, newest=True)

    def act(self, states, t):
        """Mean and deviation (N, act_dim) of the action, with states (N, obs_dim) at time t as queries."""
        return self.cache.step(self.model, self.model.state_tokens(states[:, None], t), keep=False)

    def observe(self, states, actions, rewards, t):
        """Adds the step at time t to the context: (N, obs_dim), (N, act_dim), (N,)."""
        if t % self.model.config.stride == 0:
            self.cache.step(self.model, self.model.tokens(states[:, None], actions[:, None], rewards[:, None], t))

class DPT(AD):
    """Decision-Pretrained Transformer (Lee et al. 2023) predicts the expert's action in any state of the task.

    The context, here called the prompt, is K episodes of any quality, and the queries are states of other episodes. A
    trained agent's prompt is its best episodes so far (its last ones make it drift), at first the running one.
    """
    @staticmethod
    def batch(c, x, step, size, remembered=None):
        """As for AD. The steps of the prompt that a query sees, `seen` (B, Q), are drawn at random."""
        N, E, T = x["rewards"].shape
        device, remembered = x["rewards"].device, remembered or x
        task = torch.rand(N, device=device).argsort()[: size // 2].repeat(2)  # two sequences of each task
        row, times = task[:, None], torch.arange(0, T, c.stride, device=device).repeat(c.context)  # (B, 1), (S,)
        place = torch.randint(E, (size, c.context), device=device).sort(dim=1).values
        prompt = remembered["by_return"][row, place]  # (B, K), the best one last
        batch = {k: remembered[k][row, prompt, :: c.stride].flatten(1, 2) for k in ("states", "actions", "rewards")}
        other = torch.ones(size, E, device=device).scatter(1, place, 0)  # no queries from the prompt
        episode = x["by_return"][row, other.multinomial(c.queries, replacement=True)]  # (B, Q)
        time = torch.randint(T, (size, c.queries), device=device)
        seen = torch.randint(len(times) + 1, (size, c.queries), device=device)
        batch |= {"times": times, "task_ids": task, "query_times": torch.tensor(T, device=device), "seen": seen}
        return batch | {"queries": x["states"][row, episode, time], "targets": x["expert_actions"][row, episode, time]}

    def begin_episode(self, memory):
        """Takes the best K of the finished episodes in the list `memory` as the prompt."""
        self.cache.fill(self.model, memory, self.model.config.context)
        self.first = not memory

    def act(self, states, t):
        """Mean and deviation (N, act_dim) of the action, with states (N, obs_dim) as queries, which have no time."""
        return super().act(states, self.model.horizon)

    def observe(self, states, actions, rewards, t):
        """In the first episode, adds the step at time t to the prompt: (N, obs_dim), (N, act_dim), (N,)."""
        if self.first:
            super().observe(states, actions, rewards, t)

BACKBONES = {"ad": AD, "dpt": DPT}
CONTROLS = {"own": "own context", "hidden": "context hidden", "other": "context of another task"}

# ---- Acting in context -----------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, tasks, episodes, seed=0, context="own", memory=None):
    """Acts in `tasks` (N, task_dim) or a Gymnasium vector environment, without weight updates -> returns (episodes, N).

    Controls: "other" gives each task the episodes of the one before, "hidden" empties the context before each action.
    The list `memory` holds finished episodes, (states, actions, rewards), each (N, T, ...); the agent adds its own.
    """
    c, device, was_training = model.config, model.state_mean.device, model.training
    env = make_vec(c.env, tasks) if isinstance(tasks, np.ndarray) else tasks
    memory = [] if memory is None else memory
    agent = BACKBONES[c.mode](model.eval(), env.num_envs)
    rng = torch.Generator(device).manual_seed(seed)
    for episode in range(episodes):
        agent.begin_episode([[part.roll(1, 0) for part in e] for e in memory] if context == "other" else memory)
        observations, _ = env.reset(seed=seed if episode == 0 else None)
        steps = []
        for t in range(model.horizon):
            states = torch.as_tensor(observations, dtype=torch.float32, device=device)
            if context == "hidden":
                agent.begin_episode([])
            mean, std = agent.act(states, t)
            std = std * (c.noise if memory else 1.0)
            actions = (mean + std * torch.randn(mean.shape, generator=rng, device=device)).clamp(-1, 1)
            observations, rewards, *_ = env.step(actions.float().cpu().numpy())
            steps.append((states, actions, torch.as_tensor(rewards, dtype=torch.float32, device=device)))
            agent.observe(*steps[-1], t)
        memory.append([torch.stack(part, dim=1) for part in zip(*steps)])  # (N, T, ...)
    model.train(was_training)
    return torch.stack([rewards.sum(1) for _, _, rewards in memory[-episodes:]]).cpu().numpy()

@torch.no_grad()
def held_out_loss(model, x, context="own", batches=20):
    """For each of n predictions in the arrays `x`, the steps of context that it sees, (n,), and its -log P, (n,).

    The agent is in evaluation mode, the random stream is fixed. `context`: as in `evaluate`; "hidden" hides the steps.
    """
    c, was_training, seen, losses = model.config, model.training, [], []
    backbone, size = BACKBONES[c.mode], min(max(4, c.batch), 2 * len(x["rewards"]))
    remembered = {k: x[k].roll(int(context == "other"), 0) for k in ("states", "actions", "rewards", "by_return")}
    for i in range(batches):
        torch.manual_seed(i)
        batch = backbone.batch(c, x, i, size, remembered)
        seen.append(batch["seen"].flatten())
        if context == "hidden":  # each query sees itself only
            batch["seen"] = torch.zeros_like(batch["seen"])
        mean, log_std, _ = model.eval().predict(batch)
        losses.append(neg_log_prob(batch["targets"], mean, log_std).mean(-1).flatten())
    model.train(was_training)
    return torch.cat(seen).cpu().numpy(), torch.cat(losses).cpu().numpy()

def normalised(returns, data, tasks):
    """Scores (R - R_random) / (R_expert - R_random) of returns (..., N) in `tasks`; NaN if the expert is no better."""
    low, high = data["random_return"][tasks], data["expert_return"][tasks]
    return (returns - low) / np.where(high > low, high - low, np.nan)

def measure(model, data, tasks, x):
    """The mean -log P on the held-out `tasks` (bool mask; arrays `x`), the last episode's return and score: a dict."""
    numbers = {"heldout": float(held_out_loss(model, x)[1].mean())}
    if data["simulator"]:
        returns = evaluate(model, data["tasks"][tasks], model.config.eval_episodes)[-1]
        numbers |= {"return": float(returns.mean()), "score": float(np.nanmean(normalised(returns, data, tasks)))}
    return numbers

# ---- Training and report ---------------------------------------------------------------------------------------------
def open_dataset(c):
    """The dataset data/ENV.npz, collected if it is missing, and two masks (N,): tasks to train on, held-out tasks."""
    path = Path(c.data) / f"{c.env}.npz"
    if not path.exists() and c.env in ENVS and not c.resume and "RANK" not in os.environ:
        print(f"{path} is missing: collecting it, in one or two minutes for point_robot, far longer for the others")
        collect(c.env, out=c.data)
    data = load(path)
    train, held_out = ~data["test"], data["test"]
    if c.val_tasks:
        held_out = np.isin(np.arange(len(train)), np.flatnonzero(train)[-c.val_tasks :])  # the last training tasks
        train = train & ~held_out
    require(c.mode == "ad" or "expert_actions" in data, f"{path}: DPT needs `expert_actions`; --mode ad does without")
    E = data["rewards"].shape[1] - (c.mode == "dpt")  # one is left for DPT's queries
    require(c.context <= E, f"--context {c.context} is more than the {E} episodes that it can have")
    require(c.batch // 2 <= train.sum(), f"--batch {c.batch} is more than twice the {train.sum()} training tasks")
    return data, train, held_out

def new_model(c, data, train):
    """A T2MIR whose sizes and state normalisation are those of the tasks in `train` (bool mask)."""
    sizes = {"obs_dim": data["states"].shape[-1], "act_dim": data["actions"].shape[-1],
             "horizon": data["rewards"].shape[2], "num_tasks": int(train.sum())}
    states = data["states"][train].reshape(-1, sizes["obs_dim"])
    mean, std = states.mean(0, dtype=np.float64), states.std(0, dtype=np.float64)
    scale = abs(states).max(0)  # a dimension that hardly moves is divided by its size, so that it is not blown up
    std = np.where(std > 1e-5 * scale, std, scale)
    std[std == 0] = 1  # a dimension that is always 0
    model = T2MIR(c, sizes)
    model.state_mean, model.state_std = torch.tensor(np.stack([mean, std]), dtype=torch.float32)
    return model.to(c.device)

def new_optimizers(model):
    """Muon (Jordan et al. 2024), orthogonal updates of the size of AdamW's, for hidden matrices; AdamW for the rest."""
    c, hidden = model.config, (Attention, Experts, nn.Sequential)
    matrices = {p: None for m in model.modules() if isinstance(m, hidden) for p in m.parameters()}  # an ordered set
    others = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    muon = torch.optim.Muon(matrices, c.lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay, fused=c.device != "mps")
    return [muon, adamw]

def read_checkpoint(run, device="cpu"):
    """The checkpoint of a run's folder, or a checkpoint file itself, as a dict."""
    path = Path(run) if Path(run).suffix == ".pt" else Path(run) / "ckpt.pt"
    require(path.exists(), f"{path} is missing: name the folder of a run that has saved a checkpoint")
    saved = {}
    with suppress(Exception):  # a damaged file can raise almost anything
        saved = torch.load(path, map_location=device, weights_only=True)
    fits = "fingerprint" in saved and saved["config"].keys() == {f.name for f in dataclasses.fields(Config)}
    require(fits, f"{path} is damaged, or of a Config with other fields")
    return saved

def load_agent(run, device="cpu"):
    """The agent of a run's folder or checkpoint, in evaluation mode."""
    saved = read_checkpoint(run, device)
    model = T2MIR(Config(**saved["config"] | {"device": device}), saved["sizes"]).to(device)
    model.load_state_dict(saved["model"])
    return model.eval()

def train(c):
    """Trains, evaluates, and returns the run's folder: config.json, log.csv, ckpt.pt, result.npz and incontext.png.

    Raises BadInput if the dataset does not fit, the folder is taken, or the loss becomes non-finite.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if "cuda" in c.device else "gloo")
        if "cuda" in c.device:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    folder = Path(c.resume).resolve() if c.resume else Path(c.runs) / (c.name or f"{c.env}-{c.mode}-seed{c.seed}")
    with claim(folder) if rank == 0 else nullcontext():  # only the first process writes and evaluates
        saved = read_checkpoint(folder, c.device) if c.resume else None
        require(c.resume or not (folder / "ckpt.pt").exists(), f"{folder} holds a run: --resume it or --name another")
        data, train_tasks, held_out = open_dataset(c)
        torch.manual_seed(c.seed)
        model = new_model(c, data, train_tasks)
        x, x_held = (tensors(data, tasks, c.device) for tasks in (train_tasks, held_out))
        optimizers = new_optimizers(model)
        config = dataclasses.asdict(c) | {"resume": "", "data": str(Path(c.data).resolve())}
        state = {"config": config, "sizes": model.sizes, "fingerprint": data["fingerprint"], "step": 0, "log": []}
        if saved is not None:
            require(saved["fingerprint"] == data["fingerprint"], f"{folder} has been trained on another dataset")
            model.load_state_dict(saved["model"])
            for optimizer, of_run in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(of_run)
            state |= {"step": saved["step"], "log": saved["log"]}
        if rank == 0:
            write_atomically(folder / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode()))
        learner = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
        fit(model, learner, optimizers, x, state, folder, rank, lambda: measure(model, data, held_out, x_held))
        if rank == 0:
            report(folder, model, data, held_out, x_held)
    return folder

def fit(model, learner, optimizers, x, state, folder, rank, evaluation):
    """The training loop, from state["step"] to config.steps; `evaluation` returns more numbers for the log."""
    c, first, log = model.config, state["step"], state["log"]
    task_moes = [module for module in model.modules() if isinstance(module, TaskMoE)]
    sums, started, before = defaultdict(float), time.perf_counter(), log[-1]["seconds"] if log else 0
    bar = tqdm(range(first, c.steps), folder.name, c.steps, initial=first, disable=True if rank else None)
    model.train()
    for step in bar:
        # All random numbers of a step follow from seed, step and process, so a resumed run needs no generator's state.
        torch.manual_seed(int(np.random.SeedSequence([c.seed, step, rank]).generate_state(1)[0]))
        batch = BACKBONES[c.mode].batch(c, x, step, c.batch)
        falling = 0.5 * (1 + math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup)))
        for optimizer in optimizers:  # linear warm-up, then a cosine to zero
            optimizer.param_groups[0]["lr"] = c.lr * ((step + 1) / c.warmup if step < c.warmup else falling)
            optimizer.zero_grad()
        with torch.autocast(torch.device(c.device).type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            losses = learner(batch)
        losses["loss"] = sum(w * losses[name] for name, w in c.loss_weights.items() if name in losses)  # (6)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        for optimizer in optimizers:
            optimizer.step()
        for moe in task_moes:
            moe.update_key_router()
        for name, value in losses.items():
            sums[name] += value.detach()
        done = step + 1
        evaluating = done % c.eval_every == 0 or done == c.steps
        if not evaluating and done % 50:  # to read a loss is to wait for the GPU
            continue
        means = {name: float(total) / (done - state["step"]) for name, total in sums.items()}
        require(math.isfinite(means["loss"]), f"the loss became non-finite before step {done}: try a smaller --lr")
        bar.set_postfix_str(f"loss {means['loss']:.4f}")
        if evaluating:
            sums, state["step"] = defaultdict(float), done
        if evaluating and rank == 0:
            numbers = {name: float(f"{value:.6g}") for name, value in (means | evaluation()).items()}
            seconds = time.perf_counter() - started
            log.append({"step": done, **numbers, "seconds": round(before + seconds)})
            state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            table = [log[0].keys(), *(row.values() for row in log)]
            text = "\n".join(",".join(map(str, cells)) for cells in table)
            write_atomically(folder / "log.csv", lambda file: file.write(text.encode() + b"\n"))
            write_atomically(folder / "ckpt.pt", lambda file: torch.save(state, file))
            said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            bar.write(f"step {done}/{c.steps}: {said}; {seconds / (done - first) * (c.steps - done):.0f} s left")

def report(folder, model, data, tasks, x):
    """Compares the agent's own context with the two controls: prints a table, writes result.npz and incontext.png.

    With a simulator: returns by episode in context and held-out task. Without one: held-out loss by steps of context.
    """
    c, more = model.config, {}
    contexts = list(CONTROLS) if tasks.sum() > 1 else ["own", "hidden"]  # with one task there is no other
    if data["simulator"]:
        result = {k: evaluate(model, data["tasks"][tasks], c.eval_episodes, seed=1, context=k) for k in contexts}
        amount, labels = np.arange(1, c.eval_episodes + 1), ("episode in context", "return in held-out tasks")
        more = {k: data[k][tasks] for k in ("tasks", "random_return", "expert_return")}
    else:
        losses = {k: held_out_loss(model, x, context=k, batches=60) for k in contexts}
        seen, labels = losses["own"][0], ("steps of context", "held-out loss, -log P of the actions")
        part = np.searchsorted(np.quantile(seen, np.linspace(0, 1, 9)[1:-1]), seen)  # at most eight groups
        groups = [part == i for i in np.unique(part)]
        result = {k: np.array([[loss[group].mean()] for group in groups]) for k, (_, loss) in losses.items()}
        amount = np.array([seen[group].mean() for group in groups])
    write_atomically(folder / "result.npz", lambda file: np.savez(file, amount=amount, **result, **more))
    from matplotlib.figure import Figure  # here, because it is slow to import
    fig = Figure(figsize=(5, 3.4), layout="tight")
    ax = fig.subplots()
    title = "mean score: 0 is a random agent, 1 the expert" if more else labels[1]
    print(f"{title}\n{labels[0] + ':':25}" + "".join(f"{n:7.0f}" for n in amount))
    for (context, y), color in zip(result.items(), ("C0", "C7", "C3")):  # (amounts, tasks)
        row = np.nanmean(normalised(y, data, tasks), axis=1) if more else y[:, 0]
        print(f"{CONTROLS[context] + ':':25}" + "".join(f"{value:7.3f}" for value in row))
        ax.plot(amount, y, color=color, lw=0.5, alpha=0.2)  # the single tasks, thin behind their mean
        ax.plot(amount, y.mean(1), "o-", color=color, label=CONTROLS[context], ms=4)
    for key, style in (("expert_return", "--"), ("random_return", ":")) if more else ():
        ax.axhline(more[key].mean(), color="k", ls=style, lw=1, label=key.split("_")[0])
    ax.set(xlabel=labels[0], ylabel=labels[1], title=folder.name)
    ax.legend(fontsize=7)
    write_atomically(folder / "incontext.png", lambda file: fig.savefig(file, dpi=150, format="png"))
    watch = f", moving pictures: python experiments/watch.py {folder}" if more else ""
    print(f"picture: {folder / 'incontext.png'}{watch}")

def main():
    first = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    if any(flag.startswith("--resume") for flag in sys.argv):
        for flag, kind in (("--resume", str), ("--device", str), ("--data", str), ("--steps", int)):
            first.add_argument(flag, type=kind)
        given = {name: value for name, value in vars(first.parse_args()).items() if value is not None}
        require(not given["resume"].endswith(".pt"), "--resume takes the folder of a run, not its checkpoint")
        saved = read_checkpoint(given["resume"])["config"]
        c = Config(**saved | given)
        require(c.steps >= saved["steps"], f"--steps {c.steps} is less than the {saved['steps']} steps of {c.resume}")
        if (c.steps, c.device) != (saved["steps"], saved["device"]):
            print("with more steps or another device, the result is not that of an uninterrupted run")
    else:  # these three decide the defaults of the other flags
        for flag, value in (("--env", "point_robot"), ("--mode", "dpt"), ("--device", "auto")):
            first.add_argument(flag, default=value)
        given = vars(first.parse_known_args()[0])
        c = tyro.cli(Config, default=preset(**given), description=__doc__.split("\n\n")[0])
    train(c)

if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: a run goes on with --resume and its folder, a collection with the same command")

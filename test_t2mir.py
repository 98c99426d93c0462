"""The tests: a slow T2MIR in plain loops, the properties of the fast one, runs, data, environments.

    python -m pytest -q
    T2MIR_DEVICE=cuda python -m pytest -q test_t2mir.py  # models and training on a GPU

The slow T2MIR follows the equations of the paper in order; the fast one is held against it. Then
come AD and DPT as published, the switch of each change, training, files and the command line, and
at the end envs.py and collect.py.
"""

import copy
import csv
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from torch import distributions

import collect as collect_module
import t2mir
from collect import (
    SAC,
    BadInput,
    Collection,
    Settings,
    claim,
    collect,
    dataset_path,
    load,
    pick_device,
    select,
    settings_of,
    statistics,
    write_atomically,
)
from envs import ENVS, PointRobot, TaskEnv, TaskVec, make_vec, sample_tasks
from experiments.report import report
from t2mir import PAPER, T2MIR, Config, TaskMoE, TokenMoE, evaluate

torch.set_num_threads(1)  # the sizes are so small that a second thread would only wait
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Box observation space"),  # observations are unbounded
    pytest.mark.filterwarnings("ignore:state dimension"),  # the states of `numbered_data`
]

HERE = Path(t2mir.__file__).parent
DEVICE = os.environ.get("T2MIR_DEVICE", "cpu")
MODES = list(t2mir.DRAW_BATCH)
ACTIONS = ("actions", "expert_actions", "learner_actions")
double = torch.float64


class Slider(TaskVec):
    """A point in two dimensions that walks to a goal. Its third dimension stays where it starts."""

    id = "t2mir/Slider-v0"
    obs_dim = 3
    act_dim = 2
    task_dim = 2
    horizon = 4

    @staticmethod
    def draw_tasks(rng, num_tasks):
        return rng.uniform(-1, 1, (num_tasks, 2))

    def initial_state(self, rng):
        return rng.normal(size=(self.num_envs, 3))

    def observe(self):
        return self.state

    def advance(self, actions):
        self.state = self.state + 0.5 * np.pad(actions, ((0, 0), (0, 1)))
        return -np.linalg.norm(self.state[:, :2] - self.tasks, axis=1)


TASKS = np.array([[0.9, 0.1], [-0.4, -0.8]])


def numbered_data(N=6, E=9, T=4, **changed):
    """A dataset whose states say where they stand: (task, episode, time).

    Guests act in the episodes 1, 4 and 7. Actions have the default type of new tensors.
    """
    rng = np.random.default_rng(0)
    kind = torch.zeros(0).numpy().dtype
    data = {name: rng.uniform(-1, 1, (N, E, T, 2)).astype(kind) for name in ACTIONS}
    data["states"] = np.moveaxis(np.indices((N, E, T)), 0, -1).astype(np.float64)
    data["rewards"] = rng.normal(size=(N, E, T))
    data["test"] = np.arange(N) >= N - 2
    data["guest"] = np.arange(E) % 3 == 1
    return data | changed


def with_discrete_actions(data):
    """The dataset with actions 0 to 4."""
    rng = np.random.default_rng(0)
    return data | {name: rng.integers(0, 5, data["rewards"].shape) for name in ACTIONS}


def tiny(mode, recipe="ours", env="slider", **given):
    """A Config small enough for a test, with a T2MIR layer in every block."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "moe_layers": (0, 1), "device": DEVICE}
    sizes |= {"token_experts": 4, "task_experts": 5, "context": 3, "queries": 3, "batch": 4}
    sizes["dtype"] = "float32"
    return t2mir.preset(env, mode, recipe, **sizes | given)


def model_for(c, data):
    """A fresh model in evaluation mode, none of whose weights is at a special value."""
    torch.manual_seed(0)
    model = t2mir.new_model(c, data, ~data["test"]).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(DEVICE)


def draw(c, data, step=0, seed=0):
    """A batch of the data's training tasks."""
    torch.manual_seed(seed)
    return t2mir.DRAW_BATCH[c.mode](c, t2mir.to_tensors(data, ~data["test"]), step, c.batch)


def tiny_model(mode, data=None, **given):
    return model_for(tiny(mode, **given), data or numbered_data())


def batch_for(model, data=None):
    """A batch, which has two finished episodes if the mode is AD."""
    return draw(model.config, data or numbered_data(), step=2).to(DEVICE)


def moes_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def near(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def in_double():
    """New tensors have 64 bits."""
    torch.set_default_dtype(double)
    yield
    torch.set_default_dtype(torch.float32)


# ---- A slow T2MIR --------------------------------------------------------------------------------


def softmax_of_top_k(logits, k):
    """The k best experts and their weights, as a dict."""
    best = sorted(range(len(logits)), key=lambda i: logits[i].item())[-k:]
    return dict(zip(best, logits[best].softmax(0)))


def squared_cv(numbers):
    """CV^2: variance over squared mean."""
    mean = sum(numbers) / len(numbers)
    return sum((x - mean) ** 2 for x in numbers) / len(numbers) / mean**2


class SlowT2MIR:
    """T2MIR by its equations: one sequence, one token, one expert at a time.

    It has the weights of `model`. `noise` is eps of (1) while training: (B, L, E) for each
    token-wise MoE. `routed` keeps what the routers say: MoE -> (sequence, token) -> values.
    """

    def __init__(self, model, noise=()):
        self.model = model
        self.noise = dict(zip(moes_of(model, TokenMoE), noise))
        self.routed = defaultdict(dict)

    def token_router(self, moe, h, place):
        """(1) softmax(topk(G_tok(h) + eps softplus(h W_noise)))."""
        token = SimpleNamespace(clean=moe.router.weight @ h)
        token.noisy = token.clean
        if moe in self.noise:
            token.sigma = F.softplus(moe.noise.weight @ h) + 0.01
            token.noisy = token.clean + self.noise[moe][place] * token.sigma
        token.gates = softmax_of_top_k(token.noisy, moe.top_k)
        return token

    def balance(self, moe):
        """(2) CV(Imp)^2 and CV(Load)^2 of all tokens."""
        experts = range(len(moe.experts.w1))
        importance = [0.0 for i in experts]
        load = [0.0 for i in experts]
        for token in self.routed[moe].values():
            for i in experts:
                others = [token.noisy[j] for j in experts if j != i]
                kth_excluding_i = sorted(others)[-moe.top_k]
                z = (token.clean[i] - kth_excluding_i) / token.sigma[i]
                load[i] = load[i] + (1 + torch.erf(z / math.sqrt(2))) / 2
                importance[i] = importance[i] + token.gates.get(i, 0)
        return squared_cv(importance), squared_cv(load)

    def task_router(self, moe, seen):
        """(3) softmax(topk(G_task(mean of the tokens that are seen)))."""
        mean = sum(seen) / len(seen)
        token = SimpleNamespace(z=moe.router.weight @ mean)
        token.key = moe.key_router.weight @ mean.detach()
        token.gates = softmax_of_top_k(token.z, moe.top_k)
        return token

    def layer(self, layer, h, sees, b, i):
        """(5) concat(y_tok, y_task) at token i of sequence b."""
        outputs = []
        for moe in layer.moes:
            if isinstance(moe, TokenMoE):
                token = self.token_router(moe, h[i], (b, i))
            else:
                token = self.task_router(moe, [h[j] for j in sees[i]])
            self.routed[moe][b, i] = token
            y = 0
            for e, weight in token.gates.items():
                y = y + weight * (F.gelu(h[i] @ moe.experts.w1[e]) @ moe.experts.w2[e])
            outputs.append(y)
        return torch.cat(outputs)

    def attend(self, attention, h, sees):
        q, k, v = attention.qkv(h).chunk(3, dim=1)
        y = torch.zeros_like(q)
        for i, seen in enumerate(sees):
            for head in torch.arange(h.shape[1]).chunk(attention.n_heads):  # its columns
                scores = k[seen][:, head] @ q[i, head] / math.sqrt(len(head))
                y[i, head] = scores.softmax(0) @ v[seen][:, head]
        return attention.out(y)

    def transform(self, tokens, sees, b=0):
        """Each token's output, where token i sees the tokens sees[i]: (L, D)."""
        x = torch.stack(tokens)
        for block in self.model.blocks:
            x = x + self.attend(block.attention, block.norm1(x), sees)
            h = block.norm2(x)
            if block.moe is None:
                x = x + block.mlp(h)
            else:
                y = [self.layer(block.moe, h, sees, b, i) for i in range(len(h))]
                x = x + torch.stack(y)
        return self.model.norm(x)

    def state_token(self, state, time):
        mean, std, _, _ = self.model.state_statistics
        x = (state.to(DEVICE) - mean) / std
        return self.model.embed_state(x) + self.model.embed_time.weight[time]

    def step_tokens(self, state, action, reward, time):
        """The tokens s, a and r of one step."""
        m = self.model
        if m.policy.discrete:
            action = torch.eye(m.policy.act_dim)[action]
        action = action.to(DEVICE)
        reward = reward.to(DEVICE)
        a = m.embed_action(action) + m.embed_time.weight[time]
        mean, std, _, _ = m.reward_statistics
        r = m.embed_reward((reward - mean) / std) + m.embed_time.weight[time]
        return [self.state_token(state, time), a, r]

    def sequence(self, batch, b):
        """The outputs at the queries of sequence b: (Q, D)."""
        tokens = []
        for s, time in enumerate(batch.context.times[0]):
            step = [part[b, s] for part in batch.context[:3]]
            tokens += self.step_tokens(*step, time)
        n = len(tokens)
        sees = causal(n)
        for q, steps in enumerate(batch.seen[b]):
            tokens.append(self.state_token(batch.queries[b, q], batch.query_times[b, q]))
            sees.append([*range(3 * steps), n + q])
        return self.transform(tokens, sees, b)[n:]

    def outputs(self, batch):
        """The outputs at all queries: (B, Q, D)."""
        return torch.stack([self.sequence(batch, b) for b in range(len(batch.task_ids))])

    def terms(self, batch):
        """The terms of (6), each summed over the layers."""
        x = self.outputs(batch)
        terms = {"action": slow_action_loss(self.model.policy, x, batch.targets)}
        terms |= {"importance": 0.0, "load": 0.0, "contrastive": 0.0}
        end = 3 * batch.context.rewards.shape[1] - 1  # the context's last token
        for moe, routed in self.routed.items():
            if isinstance(moe, TokenMoE):
                importance, load = self.balance(moe)
                terms["importance"] += importance
                terms["load"] += load
            else:
                ends = [routed[b, end] for b in range(len(x))]
                terms["contrastive"] += slow_info_nce(
                    [token.z for token in ends],
                    [token.key for token in ends],
                    moe.W,
                    batch.task_ids,
                )
        return terms


def slow_info_nce(z, keys, W, task_ids):
    """(4) InfoNCE, pair by pair."""
    losses = []
    for i in range(len(z)):
        positives = 0.0
        negatives = 0.0
        for j in range(len(z)):
            score = (z[i] @ W @ keys[j]).exp()
            if task_ids[i] != task_ids[j]:
                negatives = negatives + score
            elif i != j:
                positives = positives + score
        losses.append(-torch.log(positives / (positives + negatives)))
    return sum(losses) / len(losses)


def causal(n):
    """For each of n tokens, the tokens before it and itself."""
    return [[*range(i + 1)] for i in range(n)]


def distribution(policy, x):
    """What a policy says of the actions, and the constant that its -log P leaves out."""
    numbers = policy.head(x)
    if isinstance(policy, t2mir.CategoricalPolicy):
        return distributions.Categorical(logits=numbers), 0
    if isinstance(policy, t2mir.SquaredErrorPolicy):
        return distributions.Normal(numbers.tanh(), math.sqrt(0.5)), math.log(math.pi) / 2
    mean, deviation = numbers.chunk(2, dim=-1)
    normal = distributions.Normal(mean.tanh(), torch.exp(-3 * deviation.sigmoid()))
    return normal, math.log(2 * math.pi) / 2


def slow_neg_log_prob(policy, x, actions):
    said, constant = distribution(policy, x)
    return -said.log_prob(actions) - constant


def slow_action_loss(policy, x, actions):
    """L_action: -log P, which the Gaussian policy weights with its deviation."""
    loss = slow_neg_log_prob(policy, x, actions)
    if isinstance(policy, t2mir.GaussianPolicy):
        loss = loss * distribution(policy, x)[0].stddev.detach()
    return loss.mean()


# ---- The fast T2MIR is the slow one --------------------------------------------------------------

VARIANTS = {
    "both": {},
    "last block": {"moe_layers": (-1,)},
    "first block": {"moe_layers": (0,)},
    "token": {"task_moe": False},
    "task": {"token_moe": False},
    "dense": {"token_moe": False, "task_moe": False},
    "stride": {"stride": 3},
    "squared": {"policy": "squared"},
    "discrete": {},
}


def variant_of(mode, variant, **given):
    """A model and the dataset that it is for."""
    data = numbered_data()
    if variant == "discrete":
        data = with_discrete_actions(data)
    return tiny_model(mode, data, **VARIANTS[variant] | given), data


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_predictions_are_those_of_the_slow_model(mode, variant, in_double):
    """Each query's output follows from its own prefix of the context and from itself."""
    model, data = variant_of(mode, variant)
    batch = batch_for(model, data)
    near(model.predict(batch)[0], SlowT2MIR(model).outputs(batch))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_the_slow_model(mode, variant, in_double, monkeypatch):
    """The terms of (6) with the routers' noise, their sum, and its gradient to every weight."""
    model, data = variant_of(mode, variant, w_imp=2.0, w_load=3.0, w_con=5.0)
    batch = batch_for(model, data)
    noise = []
    randn_like = torch.randn_like

    def recording(x):
        noise.append(randn_like(x))
        return noise[-1]

    monkeypatch.setattr(torch, "randn_like", recording)
    loss, log = model.train()(batch)
    slow = SlowT2MIR(model, noise)
    terms = slow.terms(batch)
    expected = terms["action"] + 2 * terms["importance"] + 3 * terms["load"]
    expected = expected + 5 * terms["contrastive"]
    near(loss, expected)
    for name in terms.keys() & log.keys():
        near(log[name], terms[name].detach())
    near(log["loss"], loss.detach())
    assert ("importance" in log) == ("load" in log) == model.config.token_moe
    assert ("contrastive" in log) == model.config.task_moe

    weights = [p for p in model.parameters() if p.requires_grad]
    fast = torch.autograd.grad(loss, weights, materialize_grads=True)
    near(fast, torch.autograd.grad(expected, weights, materialize_grads=True), 1e-8)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["stride", "squared", "discrete"])
@pytest.mark.parametrize("mode", MODES)
def test_the_held_out_loss_is_that_of_the_slow_model(mode, variant, in_double):
    """It is the mean -log P without dropout and noise, in the batches of the seeds 0, 1, 2, ..."""
    model, data = variant_of(mode, variant, dropout=0.5)
    x = t2mir.to_tensors(data, ~data["test"])
    fast = t2mir.held_out_loss(model.train(), x, batches=3)
    losses = []
    for i in range(3):
        batch = draw(model.config, data, step=i, seed=i).to(DEVICE)
        x = SlowT2MIR(model).outputs(batch)
        losses.append(slow_neg_log_prob(model.policy, x, batch.targets).mean())
    assert fast == pytest.approx(sum(losses).item() / 3, rel=1e-9)
    assert model.training


def slow_memory(c, returns):
    """Which finished episodes an agent sees, in which order; `returns` is a list, oldest first."""
    episodes = list(range(len(returns)))
    room = c.context
    if c.mode == "ad":
        room = c.context - 1
    if not c.remember_best:
        return [e for e in episodes if e >= len(returns) - room]
    wanted = sorted(episodes, key=lambda e: (-returns[e], -e))  # of equal ones the newest first
    if c.mode == "ad" and episodes:  # the newest one comes first
        wanted.remove(episodes[-1])
        wanted.insert(0, episodes[-1])
    return sorted(wanted[:room], key=lambda e: (returns[e], e))


def slow_outputs(model, history, episode):
    """What the slow agent's transformer says at each step of an episode: (N, T, D)."""
    c = model.config
    N, _, T = history["rewards"].shape
    slow = SlowT2MIR(model)
    outputs = []
    for i, t in np.ndindex(N, T):
        shown = slow_memory(c, history["rewards"][i, :episode].sum(-1).tolist())
        steps = [(e, time) for e in shown for time in range(0, T, c.stride)]
        if c.mode == "ad" or (c.grow_prompt and episode == 0):
            steps += [(episode, time) for time in range(0, t, c.stride)]
        tokens = []
        for e, time in steps:
            parts = [history[name][i, e, time] for name in ("states", "actions", "rewards")]
            tokens += slow.step_tokens(*parts, time)
        time_of_query = {"ad": t, "dpt": T}[c.mode]
        tokens.append(slow.state_token(history["states"][i, episode, t], time_of_query))
        outputs.append(slow.transform(tokens, causal(len(tokens)))[-1])
    return torch.stack(outputs).view(N, T, -1)


ACTING = [  # mode, recipe, stride, episodes in a context, and whether actions are sampled
    *itertools.product(MODES, ["ours"], [1, 3], [1, 2, 3], [True]),
    *itertools.product(MODES, ["ours"], [1], [2], [False]),
    *itertools.product(MODES, ["paper"], [1], [1, 2], [False]),
]


@torch.no_grad()
@pytest.mark.parametrize("mode, recipe, stride, K, sample", ACTING)
def test_acting_is_that_of_the_slow_agent(mode, recipe, stride, K, sample, in_double):
    """With and without the cache, each action is drawn from the policy of one slow pass.

    As published, DPT's prompt is empty in its first episode and then its last K episodes, AD sees
    its last K - 1 episodes and the running one, and no action is random.
    """
    given = {"stride": stride, "context": K}
    if recipe == "ours":
        given["sample"] = sample
    model = tiny_model(mode, recipe=recipe, **given)
    history = evaluate(model, Slider(TASKS), 4, seed=4)
    plain = evaluate(model, Slider(TASKS), 4, seed=4, use_cache=False)
    for name in history:
        near(history[name], plain[name])

    rng = torch.Generator(DEVICE).manual_seed(4)
    for episode in range(4):
        said, _ = distribution(model.policy, slow_outputs(model, history, episode))
        expected = said.mean
        if sample:
            noise = [torch.randn(2, 2, generator=rng, device=DEVICE) for t in range(4)]
            expected = (said.mean + said.stddev * torch.stack(noise, dim=1)).clamp(-1, 1)
        near(history["actions"][:, episode], expected.cpu(), 1e-8)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_discrete_acting_is_that_of_the_slow_agent(mode, in_double):
    """The environment is given integers, the most probable ones where none is sampled."""

    class Buttons(Slider):
        def __init__(self, tasks):
            super().__init__(tasks)
            self.single_action_space = gymnasium.spaces.Discrete(5)

        def step(self, actions):
            assert actions.dtype == np.int64
            moves = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
            return super().step(moves[actions])

    model, _ = variant_of(mode, "discrete", sample=False)
    history = evaluate(model, Buttons(TASKS), 3)
    for episode in range(3):
        logits = model.policy.head(slow_outputs(model, history, episode))
        assert torch.equal(history["actions"][:, episode], logits.argmax(-1).cpu())
    assert len(history["actions"].unique()) > 1


def test_the_history_is_what_the_environment_returned():
    """States and rewards are those of the actions, from the start that belongs to the seed."""
    model = tiny_model("ad")
    history = evaluate(model, Slider(TASKS), 2, seed=7)
    env = Slider(TASKS)
    for episode, seed in enumerate((7, None)):
        states, _ = env.reset(seed=seed)
        for t in range(4):
            np.testing.assert_array_equal(history["states"][:, episode, t], states)
            states, rewards, *_ = env.step(history["actions"][:, episode, t].numpy())
            np.testing.assert_array_equal(history["rewards"][:, episode, t], rewards)


# ---- AD and DPT as published ---------------------------------------------------------------------


def stored_tokens(slow, data, place):
    """The tokens of the stored step `place`: (task, episode, time)."""
    parts = [torch.tensor(data[name][place]) for name in ("states", "actions", "rewards")]
    return slow.step_tokens(*parts, place[2])


@torch.no_grad()
def test_ad_queries_equal_state_tokens(in_double):
    """Published AD reads a causal pass over K consecutive own episodes at each of its state tokens.

    The squared error to the actions taken is the loss that the queries have.
    """
    data = numbered_data()
    own = [0, 2, 3, 5, 6, 8]
    model = tiny_model("ad", recipe="paper")
    batch = batch_for(model)
    errors = []
    for b, task in enumerate(batch.task_ids):
        first = own.index(batch.context.states[b, 0, 1])
        slow = SlowT2MIR(model)
        tokens = []
        actions = []
        for episode, time in itertools.product(own[first : first + 3], range(4)):
            tokens += stored_tokens(slow, data, (task, episode, time))
            actions.append(torch.tensor(data["actions"][task, episode, time], device=DEVICE))
        at_states = slow.transform(tokens, causal(len(tokens)))[::3]
        errors.append((model.policy.head(at_states).tanh() - torch.stack(actions)) ** 2)
    x, _ = model.predict(batch)
    near(model.policy.loss(x, batch.targets), torch.stack(errors).mean())


def test_published_ad_draws_each_row_of_own_episodes_equally_often():
    """K consecutive ones, where those of guests are skipped."""
    data = numbered_data()
    c = tiny("ad", "paper")
    rows = Counter()
    for seed in range(500):
        rows.update(map(tuple, episodes_of(c, draw(c, data, seed, seed)).tolist()))
    assert rows.keys() == {(0, 2, 3), (2, 3, 5), (3, 5, 6), (5, 6, 8)}
    assert all(abs(count - 500) < 100 for count in rows.values())  # five standard deviations


@torch.no_grad()
def test_published_dpt_is_one_pass_for_each_query(in_double):
    """Behind its prefix of the prompt, with the squared error to the expert's action."""
    data = numbered_data()
    model = tiny_model("dpt", recipe="paper")
    batch = batch_for(model)
    errors = []
    for b, q in np.ndindex(4, 3):
        slow = SlowT2MIR(model)
        tokens = []
        for place in batch.context.states[b, : batch.seen[b, q]].long().tolist():
            tokens += stored_tokens(slow, data, tuple(place))
        tokens.append(slow.state_token(batch.queries[b, q], 4))  # a query has no time
        x = slow.transform(tokens, causal(len(tokens)))[-1]
        expert = data["expert_actions"][tuple(batch.queries[b, q].long().tolist())]
        errors.append((model.policy.head(x).tanh() - torch.tensor(expert, device=DEVICE)) ** 2)
    x, _ = model.predict(batch)
    near(model.policy.loss(x, batch.targets), torch.stack(errors).mean())


# ---- One switch, one change ----------------------------------------------------------------------


def episodes_of(c, batch):
    """The numbers of the episodes in each context of `numbered_data`, (B, n)."""
    steps_per_episode = len(range(0, 4, c.stride))
    return batch.context.states[:, ::steps_per_episode, 1].long()


def aspects(c, data):
    """What a run does, as lists of tensors."""
    torch.manual_seed(0)
    model = t2mir.new_model(c, data, ~data["test"])
    batch = draw(c, data, step=2)
    groups = [optimizer.param_groups[0]["params"] for optimizer in t2mir.new_optimizers(model)]
    return {
        "batch": [*batch.context, *batch[1:]],
        "weights": [p for name, p in model.named_parameters() if "policy" not in name],
        "policy": list(model.policy.parameters()),
        "acting": list(evaluate(model, Slider(TASKS), 4).values()),
        "optimizers": [torch.tensor(len(params)) for params in groups],
    }


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


NEEDS = {  # what a switch needs to have an effect
    "clean_targets": {"guests": False},
    "guests": {"late_episode": True, "clean_targets": True},
    "sample": {"policy": "gaussian"},
}
SWITCHES = [  # field, its published value, another one, and what differs in AD and in DPT
    ("late_episode", False, True, {"batch"}, set()),
    ("worse_episodes", False, True, {"batch"}, set()),
    ("clean_targets", False, True, {"batch"}, set()),
    ("guests", False, True, {"batch"}, set()),
    ("remember_best", False, True, {"acting"}, {"acting"}),
    ("grow_prompt", False, True, set(), {"acting"}),
    ("policy", "squared", "gaussian", {"policy", "acting"}, {"policy", "acting"}),
    ("sample", False, True, {"acting"}, {"acting"}),
    ("optimizer", "adamw", "muon", {"optimizers"}, {"optimizers"}),
    ("stride", 1, 2, {"batch", "acting"}, {"batch", "acting"}),
]


@pytest.mark.parametrize("recipe", ["paper", "ours"])
@pytest.mark.parametrize("field, published, other, in_ad, in_dpt", SWITCHES)
def test_a_switch_changes_its_own_thing(field, published, other, in_ad, in_dpt, recipe):
    """All else is the same bit for bit, from the same random numbers."""
    data = numbered_data()
    assert PAPER[field] == published
    for mode, expected in (("ad", in_ad), ("dpt", in_dpt)):
        runs = []
        for value in (published, other):
            c = tiny(mode, recipe, **NEEDS.get(field, {}) | {field: value})
            runs.append(aspects(c, data))
        assert {name for name in runs[0] if not equal(runs[0][name], runs[1][name])} == expected


def test_every_change_of_the_paper_has_its_switch():
    """The fields of PAPER are those with the comment "change", and all of them are tested here."""
    source = Path(t2mir.__file__).read_text()
    assert set(re.findall(r"^    (\w+): .*  # change", source, re.MULTILINE)) == PAPER.keys()
    assert {field for field, *_ in SWITCHES} == PAPER.keys()


def switched(recipe, field, data=None, **given):
    """AD's batches without and with a switch, from the same random numbers, as pairs."""
    data = data or numbered_data()
    off = tiny("ad", recipe, **given | {field: False})
    on = tiny("ad", recipe, **given | {field: True})
    return [(draw(off, data, seed, seed), draw(on, data, seed, seed)) for seed in range(20)]


def test_late_episode_predicts_a_late_running_episode_only():
    """Behind 0 to K - 1 finished ones in turn, which still are those that came before it."""
    c = tiny("ad")
    for step, (off, on) in enumerate(switched("paper", "late_episode", queries=4)):
        assert torch.equal(off.task_ids, on.task_ids)
        assert off.queries.shape == (4, 12, 3)
        expected = [5, 6, 8][2 - step % 3 :]  # 7, which is late as well, is a guest's
        assert episodes_of(c, on).tolist() == [expected] * 4
        assert (on.queries[..., 1] == 8).all()
        assert on.query_times.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_worse_episodes_changes_the_finished_ones(recipe):
    """Tasks and running episodes stay, the finished ones stand in the order of their returns."""
    returns = numbered_data()["rewards"].sum(-1)
    c = tiny("ad", recipe)
    different = 0
    for off, on in switched(recipe, "worse_episodes"):
        before = episodes_of(c, off)
        after = episodes_of(c, on)
        assert torch.equal(off.task_ids, on.task_ids)
        assert torch.equal(before[:, -1], after[:, -1])
        for task, row in zip(on.task_ids, after[:, :-1].tolist()):
            assert row == sorted(row, key=lambda e: returns[task, e])
        different += int((before != after).sum())
    assert different > 20


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_clean_targets_changes_the_targets(recipe):
    """They are the learner's actions without noise instead of the actions taken; the rest stays."""
    data = numbered_data()
    for off, on in switched(recipe, "clean_targets", guests=False):
        place = tuple(on.queries.long().movedim(-1, 0))
        np.testing.assert_array_equal(off.targets, data["actions"][place])
        np.testing.assert_array_equal(on.targets, data["learner_actions"][place])
        assert equal(off.context, on.context)
        assert equal(off[1:4] + off[5:], on[1:4] + on[5:])


def test_guests_take_the_place_of_some_running_episodes():
    """Where no guest acts, the running episode is the one that would have run without guests."""
    data = numbered_data(E=12, guest=np.isin(np.arange(12), (5, 7, 9)))
    c = tiny("ad")
    for off, on in switched("ours", "guests", data):
        without = episodes_of(c, off)[:, -1]
        running = episodes_of(c, on)[:, -1]
        assert torch.equal(running[running != 9], without[running != 9])
        assert (without != 9).all()


@pytest.mark.parametrize("missing", ["learner_actions", "guest"])
def test_guests_need_their_arrays(missing):
    """Without learner's actions, or without guests in the data, the switch changes nothing."""
    data = numbered_data()
    del data[missing]
    for off, on in switched("ours", "guests", data):
        assert equal([*off.context, *off[1:]], [*on.context, *on[1:]])


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_without_guests_their_episodes_are_never_drawn(recipe):
    """Neither as the running episode nor as a finished one."""
    for late, worse in itertools.product((False, True), repeat=2):
        given = {"guests": False, "late_episode": late, "worse_episodes": worse}
        c = tiny("ad", recipe, **given)
        for seed in range(20):
            episodes = episodes_of(c, draw(c, numbered_data(), seed, seed))
            assert set(episodes.flatten().tolist()) <= {0, 2, 3, 5, 6, 8}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 9])
def test_remembered_episodes_are_those_of_a_loop(mode, best, K):
    """The last ones, or the best ones in the order of their returns, and in AD always the newest.

    Where returns are equal, as before the first reward, newer episodes count as better.
    """
    c = tiny(mode, remember_best=best, context=K)
    for M in range(7):
        returns = torch.randint(4, (20, M), generator=torch.Generator().manual_seed(M)).double()
        expected = [slow_memory(c, row) for row in returns.tolist()]
        assert t2mir.remember(c, returns).tolist() == expected


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("moe", [True, False])
def test_muon_has_the_matrices_of_the_blocks(moe, optimizer):
    """Attention, experts and dense layers, if it is used; each other weight is AdamW's.

    No weight is left out or named twice, and the key router is not trained.
    """
    given = {"moe_layers": (-1,), "token_moe": moe, "task_moe": moe, "optimizer": optimizer}
    model = tiny_model("dpt", **given)
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for o in t2mir.new_optimizers(model):
        found += [(type(o).__name__, names[id(p)]) for p in o.param_groups[0]["params"]]
    expected = []
    for name, p in model.named_parameters():
        inner = any(part in name for part in (".attention.", ".experts.", ".mlp."))
        if inner and optimizer == "muon":
            expected.append(("Muon", name))
        elif "key_router" not in name:
            expected.append(("AdamW", name))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("rows, columns", [(6, 6), (4, 12), (12, 4)])
def test_the_batched_muon_is_torchs(rows, columns):
    """Several steps of a stack of matrices and of single ones are those of torch.optim.Muon.

    That one computes the directions in bfloat16, so that they differ by a few percent.
    """
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, rows, columns, device=DEVICE))
    single = torch.nn.Parameter(torch.randn(rows, columns, device=DEVICE))
    alone = [torch.nn.Parameter(m.detach().clone()) for m in (*stack, single)]
    before = [m.detach().clone() for m in alone]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    ours = t2mir.Muon([stack, single], **settings)
    theirs = torch.optim.Muon(alone, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        stack.grad = torch.randn_like(stack)
        single.grad = torch.randn_like(single)
        for m, grad in zip(alone, (*stack.grad, single.grad)):
            m.grad = grad.clone()
        ours.step()
        theirs.step()
    for one, other, start in zip((*stack, single), alone, before):
        assert (one - other).norm() < 0.05 * (other - start).norm()


# ---- What batches are drawn ----------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("recipe", ["paper", "ours"])
@pytest.mark.parametrize("mode", MODES)
def test_a_context_is_every_nth_step_of_whole_episodes(mode, recipe, stride):
    """Each step has the stored action, reward and time, and its sequence's task."""
    data = numbered_data()
    c = tiny(mode, recipe, stride=stride)
    batch = draw(c, data, step=2)
    times = [*range(0, 4, stride)] * 3
    task, episode, time = batch.context.states.long().movedim(-1, 0)
    assert (task == batch.task_ids[:, None]).all()
    assert (episode.unflatten(1, (3, -1)) == episodes_of(c, batch)[..., None]).all()
    assert time.tolist() == [times] * 4
    assert batch.context.times.tolist() == [times]
    np.testing.assert_array_equal(batch.context.actions, data["actions"][task, episode, time])
    np.testing.assert_array_equal(batch.context.rewards, data["rewards"][task, episode, time])


@pytest.mark.parametrize("recipe", ["paper", "ours"])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_has_two_sequences_of_each_task(mode, recipe):
    """They are of B / 2 different training tasks, each of which is as frequent as any other."""
    data = numbered_data(test=np.array([0, 1, 0, 0, 1, 0], bool))
    drawn = Counter()
    for seed in range(400):
        counts = Counter(draw(tiny(mode, recipe), data, seed, seed).task_ids.tolist())
        assert list(counts.values()) == [2, 2]
        drawn.update(counts.keys())
    assert drawn.keys() == {0, 2, 3, 5}
    assert all(abs(count - 200) < 50 for count in drawn.values())  # five standard deviations


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_ad_queries_stand_behind_what_was_before_them(recipe, stride):
    """A query sees the steps of earlier episodes and the earlier steps of its own: no future."""
    data = numbered_data()
    c = tiny("ad", recipe, stride=stride, queries=4)
    for step in range(3):
        batch = draw(c, data, step)
        for b, q in np.ndindex(*batch.seen.shape):
            order = episodes_of(c, batch)[b].tolist()
            _, episode, time = batch.queries[b, q].tolist()
            places = [(order.index(e), t) for _, e, t in batch.context.states[b].tolist()]
            before = [place for place in places if place < (order.index(episode), time)]
            assert batch.seen[b, q] == len(before)
            assert batch.query_times[b, q] == time


def test_ad_asks_at_different_times_of_an_episode():
    """There are at most T queries, and each time is as frequent as any other."""
    data = numbered_data()
    assert draw(tiny("ad", queries=40), data).query_times.shape == (4, 4)
    counts = Counter()
    for seed in range(200):
        times = draw(tiny("ad", queries=2), data, seed, seed).query_times
        assert (times[:, 0] != times[:, 1]).all()
        counts.update(times.flatten().tolist())
    assert all(abs(counts[t] - 400) < 100 for t in range(4))  # five standard deviations


@pytest.mark.parametrize("E, first", [(1, 0), (3, 2), (80, 60), (400, 360)])
def test_late_episodes_are_of_the_last_quarter(E, first):
    """They are at most the last 40."""
    data = numbered_data(N=3, E=E, T=1, guest=np.zeros(E, bool))
    torch.manual_seed(0)
    running = t2mir.draw_late_episodes(tiny("ad"), t2mir.to_tensors(data, ~data["test"]), 2000)
    assert running.shape == (2000, 1)
    assert set(running.flatten().tolist()) == set(range(first, E))


def test_half_of_the_running_episodes_are_guests():
    """Own ones are as frequent as each other, and so are those of guests."""
    data = numbered_data(E=12, guest=np.isin(np.arange(12), (1, 5, 9, 11)))
    torch.manual_seed(0)
    running = t2mir.draw_late_episodes(tiny("ad"), t2mir.to_tensors(data, ~data["test"]), 8000)
    counts = Counter(running.flatten().tolist())
    expected = {9: 2000, 10: 4000, 11: 2000}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[e] - n) < 5 * math.sqrt(n) for e, n in expected.items())


def test_how_often_worse_episodes_are_drawn():
    """Two finished episodes are from the worst r, with r uniform, and never the running one.

    How often each pair is drawn is what a loop of the same draws counts.
    """
    rng = np.random.default_rng(0)
    by_return = [3, 1, 5, 0, 4, 2]  # from the worst to the best
    rewards = np.argsort(by_return)[None, :, None].repeat(3, axis=0)
    data = numbered_data(N=3, E=6, rewards=rewards, guest=np.zeros(6, bool))
    x = t2mir.to_tensors(data, ~data["test"])
    draws = 20_000
    tasks = torch.zeros(draws, 1, dtype=torch.long)
    torch.manual_seed(0)
    fast = t2mir.draw_worse_episodes(tiny("ad"), x, tasks, torch.full_like(tasks, 4), 2)
    fast = Counter(map(tuple, fast.tolist()))
    slow = Counter()
    for _ in range(draws):
        r = rng.uniform(0, 6)
        places = [place for place in rng.permutation(6) if by_return[place] != 4]
        worst = [place for place in places if place < r] + [p for p in places if p >= r]
        slow[tuple(by_return[place] for place in sorted(worst[:2]))] += 1
    assert fast.keys() == slow.keys()
    for pair, count in slow.items():
        assert abs(fast[pair] - count) < 5 * math.sqrt(2 * count), pair


@pytest.mark.parametrize("worse", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_context_may_have_all_episodes_of_a_task(late, worse):
    """Each of them once."""
    data = numbered_data(E=3, guest=np.zeros(3, bool))
    for step in range(3):
        c = tiny("ad", late_episode=late, worse_episodes=worse)
        rows = episodes_of(c, draw(c, data, step)).tolist()
        assert all(len(set(row)) == len(row) for row in rows)


@pytest.mark.parametrize("guests, said", [([7, 8], "--no-late-episode"), ([5, 6], "--context")])
def test_data_without_the_episodes_that_are_needed_is_named(guests, said):
    """All late episodes are of guests, or too few own ones are before the late ones."""
    data = numbered_data(guest=np.isin(np.arange(9), [*range(1, 5), *guests]))
    with pytest.raises(BadInput, match=said):
        draw(tiny("ad", worse_episodes=False, context=4), data, step=3)


def test_dpt_asks_in_other_episodes_than_the_prompts():
    """The prompt could hold the answer. Episodes, times and prefixes are all equally frequent."""
    data = numbered_data()
    returns = torch.tensor(data["rewards"]).sum(-1)
    c = tiny("dpt", context=2, queries=5)
    drawn = defaultdict(Counter)
    for seed in range(300):
        batch = draw(c, data, seed, seed)
        task, episode, time = batch.queries.long().movedim(-1, 0)
        prompt = episodes_of(c, batch)
        assert (task == batch.task_ids[:, None]).all()
        assert (episode[:, :, None] != prompt[:, None]).all()
        assert (batch.query_times == 4).all()
        np.testing.assert_array_equal(batch.targets, data["expert_actions"][task, episode, time])
        assert (returns[batch.task_ids].gather(1, prompt).diff() >= 0).all()
        for name, x in (("prompt", prompt), ("episode", episode), ("time", time)):
            drawn[name].update(x.flatten().tolist())
        drawn["seen"].update(batch.seen.flatten().tolist())
    for name, values in (("prompt", 9), ("episode", 9), ("time", 4), ("seen", 9)):
        counts = drawn[name]
        expected = counts.total() / values
        assert counts.keys() == set(range(values))
        assert all(abs(n - expected) < 6 * math.sqrt(expected) for n in counts.values()), name


def test_tensors_share_the_memory_of_the_data():
    """No array is copied, as it may be larger than the memory, and tasks are indices."""
    data = numbered_data()
    x = t2mir.to_tensors(data, ~data["test"])
    for name in ("states", "rewards", *ACTIONS):
        assert np.shares_memory(x[name].numpy(), data[name])
    assert x["tasks"].tolist() == [0, 1, 2, 3]


# ---- Experts and routers -------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    is_cuda = True


def test_one_product_for_all_experts_equals_the_loop(monkeypatch):
    """Values and gradients of grouped_mm, where some experts have no rows."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 5, 6, 6, 13, 13], dtype=torch.int32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    x = torch.randn(13, 16).bfloat16().requires_grad_()
    weights = torch.randn(6, 16, 8).bfloat16().requires_grad_()
    results = []
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k))
    for kind in (torch.Tensor, OnGpu):
        y = t2mir.multiply_by_expert(x.as_subclass(kind), weights, ends)
        grads = torch.autograd.grad(y.square().sum(), [x, weights])
        results.append([y, *grads])
    for one, other in zip(*results):
        assert (one - other).abs().max() <= 0.02 * (1 + one.abs().max())
    assert calls == [1]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_experts_compute_what_all_experts_would_with_gates_of_zero(dtype, tolerance):
    """Values and gradients, also where an expert is not chosen, and in the type of the GPU."""
    torch.manual_seed(0)
    experts = t2mir.Experts(5, 16, 32, 8).to(DEVICE)
    h = torch.randn(3, 7, 16, device=DEVICE, requires_grad=True)
    chosen = torch.rand(3, 7, 4, device=DEVICE).topk(2).indices  # expert 4 is never chosen
    gates = torch.rand(3, 7, 2, device=DEVICE, requires_grad=True)
    wanted = torch.randn(3, 7, 8, device=DEVICE)

    every = torch.zeros(3, 7, 5, device=DEVICE).scatter(2, chosen, gates)
    slow = 0
    for i in range(5):
        slow = slow + every[..., i, None] * (F.gelu(h @ experts.w1[i]) @ experts.w2[i])
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        fast = experts(h, gates, chosen)
    results = []
    for y in (slow, fast):
        inputs = [h, gates, *experts.parameters()]
        grads = torch.autograd.grad((y * wanted).sum(), inputs, materialize_grads=True)
        results.append([y, *grads])
    for one, other in zip(*results):
        assert (one - other).abs().max() <= tolerance * (1 + one.abs().max())


def moe_config():
    """What the two MoEs read of a Config: five experts, two of which compute a token."""
    sizes = {"d_model": 8, "token_experts": 5, "task_experts": 5, "top_k": 2, "momentum": 0.1}
    return SimpleNamespace(**sizes)


def causal_rows(B, L):
    """The matrix `sees` of B causal rows of L tokens."""
    return torch.ones(B, L, L, dtype=torch.bool).tril()


def test_load_is_a_probability():
    """It is the share of fresh draws of one expert's noise that lift this expert into the top k."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(4, 5))
    sigma = rng.uniform(0.5, 1.5, (4, 5))
    noisy = clean + sigma * rng.normal(size=(4, 5))
    for k in (1, 2, 3):
        p = t2mir.load_probability(*map(torch.tensor, (clean, noisy, sigma)), k).numpy()
        for n, i in np.ndindex(4, 5):
            fresh = clean[n, i] + sigma[n, i] * rng.normal(size=50_000)
            better = (np.delete(noisy[n], i)[:, None] > fresh).sum(0)
            assert p[n, i] == pytest.approx((better < k).mean(), abs=0.012)  # five deviations
        assert ((0.1 < p) & (p < 0.9)).sum() > 5


@pytest.mark.parametrize("term", ["importance", "load"])
def test_each_balance_term_alone_trains_the_router_and_its_noise(term):
    """The experts have no part in it."""
    torch.manual_seed(0)
    moe = TokenMoE(moe_config(), 16, 8)
    routing = moe.route(torch.randn(3, 10, 8), None)
    totals = {"importance": routing.importance(), "load": routing.load.sum((0, 1))}
    t2mir.cv_squared(totals[term]).backward()
    taught = {name for name, p in moe.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught == {"router.weight", "noise.weight"}


def test_equal_shares_are_balanced():
    """Their CV^2 is 0, and shares of 0 do no harm."""
    assert t2mir.cv_squared(torch.full((4,), 3.0)) == 0
    assert t2mir.cv_squared(torch.zeros(4)) == 0


def test_info_nce_of_several_sequences_of_a_task():
    """With any number of sequences of a task, in any order, it equals a double loop."""
    torch.manual_seed(0)
    ids = torch.arange(3).repeat(4)[torch.randperm(12)]
    z, keys = torch.randn(2, 12, 5, dtype=double)
    W = torch.randn(5, 5, dtype=double)
    near(t2mir.info_nce(z, keys, W, ids), slow_info_nce(z, keys, W, ids))


def test_info_nce_at_chance_is_log_of_the_others():
    """A router that says the same of all 32 sequences has log(31)."""
    z = torch.ones(32, 5)
    loss = t2mir.info_nce(z, z, torch.eye(5), torch.arange(16).repeat(2))
    assert loss.item() == pytest.approx(math.log(31), rel=1e-5)


def test_the_key_router_is_a_moving_average():
    """It starts as the router, and each update moves it a fraction `momentum` of the way."""
    moe = TaskMoE(moe_config(), 16, 8).double()
    key = moe.router.weight.detach().clone()
    for _ in range(4):
        near(moe.key_router.weight, key)
        torch.nn.init.normal_(moe.router.weight)
        moe.update_key_router()
        key = key + 0.1 * (moe.router.weight.detach() - key)
    assert not moe.key_router.weight.requires_grad


@pytest.mark.parametrize("used", [1, 2, 6])
def test_experts_used_counts_from_one_to_all(used):
    """Equal use of some experts counts as their number."""
    first = torch.arange(60)[None] % used
    chosen = torch.stack([first, (first + 1) % 6], dim=-1)
    gates = torch.tensor([1.0, 0.0]).expand(1, 60, 2)
    routing = t2mir.Routing(None, None, torch.zeros(1, 60, 6), gates, chosen)
    assert routing.experts_used().item() == pytest.approx(used)


@pytest.mark.parametrize("mode", MODES)
def test_the_log_counts_the_experts_of_the_queries(mode):
    """With the layer in the last block these are the tokens whose outputs are read."""
    model = tiny_model(mode, moe_layers=(-1,)).train()
    batch = batch_for(model)
    torch.manual_seed(1)
    _, log = model(batch)
    torch.manual_seed(1)
    _, routings = model.predict(batch)
    for name, r in zip(("token_experts", "task_experts"), routings, strict=True):
        at_queries = [part[:, -3:] for part in (r.logits, r.gates, r.chosen)]
        near(log[name], t2mir.Routing(None, None, *at_queries).experts_used(), 1e-6)


@pytest.mark.parametrize("layers, dense", [((-1,), 12 + 8 + 8), ((0, 1, 2), 36)])
def test_variants_have_equal_active_parameters(layers, dense):
    """Weights that a token meets outside of attention: both MoEs, either alone, and neither.

    Routers, their noise and W are left out.
    """
    for token, task in itertools.product((False, True), repeat=2):
        given = {"moe_layers": layers, "n_layers": 3, "token_moe": token, "task_moe": task}
        model = tiny_model("ad", **given)
        moes = moes_of(model, (TokenMoE, TaskMoE))
        assert len(moes) == (token + task) * len(layers)
        active = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
        for moe in moes:
            active += moe.top_k * (moe.experts.w1[0].numel() + moe.experts.w2[0].numel())
        assert active == dense * 16**2


# ---- Who sees what -------------------------------------------------------------------------------


def test_who_sees_what_equals_a_double_loop():
    """A query sees its prefix of the context and itself."""
    seen = [[0, 3, 6], [6, 1, 2]]
    expected = [
        [[j < p or j == 6 + q for j in range(9)] for q, p in enumerate(row)] for row in seen
    ]
    assert t2mir.who_sees_what(6, torch.tensor(seen)).tolist() == expected


@pytest.mark.parametrize("n, rows, columns", [(9, 4, 13), (0, 5, 12)])
def test_the_mean_of_what_is_seen_equals_a_loop(n, rows, columns, in_double):
    """Behind n causal tokens, and behind a past."""
    torch.manual_seed(0)
    sees = torch.rand(2, rows, columns) < 0.5
    sees[..., -1] = True
    h = torch.randn(2, columns, 4)
    fast = t2mir.mean_of_seen(h, sees, n)
    for b in range(2):
        lists = causal(n) + [row.nonzero()[:, 0] for row in sees[b]]
        near(fast[b], torch.stack([h[b, seen].mean(0) for seen in lists]))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_queries_see_their_prefix_and_themselves(mode, in_double):
    """A change of one step or query changes those queries that see it and no others."""
    model = tiny_model(mode)
    batch = batch_for(model)
    before, _ = model.predict(batch)

    def moved(**changed):
        after, _ = model.predict(batch._replace(**changed))
        return (after - before).abs().amax(-1) > 1e-9

    for s in range(12):
        rewards = batch.context.rewards.clone()
        rewards[:, s] += 1
        changed = batch.context._replace(rewards=rewards)
        assert torch.equal(moved(context=changed), batch.seen > s)
    for q in range(3):
        queries = batch.queries.clone()
        queries[:, q] += 1
        assert moved(queries=queries).tolist() == [[i == q for i in range(3)]] * 4


# ---- Policies ------------------------------------------------------------------------------------


def policy_and_inputs(kind, *shape):
    torch.manual_seed(0)
    return kind(8, 3).double(), torch.randn(*shape, 8, dtype=double)


@torch.no_grad()
@pytest.mark.parametrize("kind", [t2mir.GaussianPolicy, t2mir.SquaredErrorPolicy])
def test_actions_stay_within_bounds(kind):
    """However large the weights are; a Gaussian's deviation lies between 0.05 and 1."""
    policy, x = policy_and_inputs(kind, 500)
    policy.head.weight *= 1000
    for greedy in (False, True):
        actions = policy.sample(x, greedy, torch.Generator())
        assert -1 <= actions.min() < -0.99
        assert 0.99 < actions.max() <= 1
    if kind is t2mir.GaussianPolicy:
        deviation = policy(x)[1].exp()
        assert deviation.min() == pytest.approx(math.exp(-3))
        assert deviation.max() == 1


@torch.no_grad()
def test_gaussian_samples_spread_as_the_policy_says():
    """Mean and deviation of many draws; greedy actions are the mean."""
    policy, x = policy_and_inputs(t2mir.GaussianPolicy)
    policy.head.bias[3:] = 1  # small deviations, so that few draws are clipped
    policy.head.weight *= 0.2
    mean, log_std = policy(x)
    draws = policy.sample(x.expand(20_000, 8), False, torch.Generator().manual_seed(0))
    near(draws.std(0), log_std.exp(), 0.03)
    near(draws.mean(0), mean, 0.01)
    assert torch.equal(policy.sample(x, True, None), mean)


@torch.no_grad()
def test_discrete_samples_are_as_frequent_as_the_policy_says():
    """Of all actions; the greedy one is the most probable one."""
    policy, x = policy_and_inputs(t2mir.CategoricalPolicy, 2)
    draws = policy.sample(x.expand(20_000, 2, 8), False, torch.Generator().manual_seed(0))
    p = policy.head(x).softmax(-1)
    near(F.one_hot(draws).double().mean(0), p, 0.02)
    assert torch.equal(policy.sample(x, True, None), p.argmax(-1))


# ---- The model and its data ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset, scale, plus", [(4.5e6, 1, 0), (0, 1000, 0), (0, 1, 100)])
def test_offsets_and_units_of_the_data_do_not_matter(offset, scale, plus, mode):
    """Normalised by their own data, moved states and scaled rewards give the same outputs."""
    data = numbered_data()
    moved = data | {"states": data["states"] / 100 + offset}
    moved["rewards"] = scale * data["rewards"] + plus
    outputs = []
    for each in (data, moved):
        model = tiny_model(mode, each)
        batch = batch_for(model, each)
        outputs.append(model.predict(batch)[0])
    near(*outputs, 1e-4)


@pytest.mark.parametrize("kind, noise", [(np.float32, 1e-7), (np.float64, 1e-16)])
def test_a_dimension_that_only_rounds_is_divided_by_its_size(kind, noise):
    """A constant and its rounding errors are not blown up, and zeros are divided by 1.

    A dimension with a large offset is normalised as any other.
    """
    x = np.random.default_rng(0).normal(size=(4, 5, 7, 4))
    x = (x * [0, noise, 0, 0.5] + [7, 0.5, 0, 1000]).astype(kind)
    mean, std, low, high = statistics(x, np.ones(4, bool))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [7, 0.5, 1, exact[..., 3].std()], rtol=1e-6)
    np.testing.assert_array_equal(low, exact.min((0, 1, 2)))
    np.testing.assert_array_equal(high, exact.max((0, 1, 2)))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_changes_little(mode):
    """The routers keep float32, and the losses stay within a few percent."""
    auto = "float32"
    if DEVICE == "cuda":
        auto = "bfloat16"
    kinds = set()
    losses = {}
    for dtype in ("float32", "bfloat16", "auto"):
        model = tiny_model(mode, dtype=dtype)
        batch = batch_for(model)
        for moe in moes_of(model, (TokenMoE, TaskMoE)):
            moe.router.register_forward_hook(lambda m, x, y: kinds.add(y.dtype))
        losses[dtype] = model.train()(batch)[1]
    assert kinds == {torch.float32}
    for name in ("action", "contrastive"):
        exact = losses["float32"][name].item()
        assert losses["auto"][name].item() == losses[auto][name].item()
        assert losses["bfloat16"][name].item() != exact
        assert losses["bfloat16"][name].item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_an_agent_acts_in_float32(mode):
    """Whatever it was trained in."""
    acts = []
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(mode, dtype=dtype)
        acts.append(evaluate(model, Slider(TASKS), 2)["actions"])
    assert torch.equal(*acts)


TERMS = {"w_imp": "importance", "w_load": "load", "w_con": "contrastive"}


@pytest.mark.parametrize("weight", TERMS)
def test_a_changed_weight_changes_the_loss(weight):
    """No value that follows from the Config is stored elsewhere."""
    model = tiny_model("ad")
    batch = batch_for(model)
    losses = []
    for value in (1.0, 3.0):
        setattr(model.config, weight, value)
        torch.manual_seed(0)
        loss, log = model.train()(batch)
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(2 * log[TERMS[weight]].item(), rel=1e-3)


# ---- Acting and its measures ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_leaves_the_model_as_it_was(mode):
    """Evaluating twice gives the same history, without dropout, and the model keeps its mode."""
    model = tiny_model(mode, dropout=0.5)
    model.train()
    first = evaluate(model, Slider(TASKS), 3, seed=1)["actions"]
    torch.rand(5)
    assert torch.equal(evaluate(model, Slider(TASKS), 3, seed=1)["actions"], first)
    assert not torch.equal(evaluate(model, Slider(TASKS), 3, seed=2)["actions"], first)
    assert model.training
    evaluate(model.eval(), Slider(TASKS), 1)
    assert not model.training


def test_an_interrupted_evaluation_leaves_the_model_as_it_was():
    """Also after an error the model is in training mode, and gradients are on."""

    class Broken(Slider):
        def advance(self, actions):
            raise RuntimeError("broken")

    model = tiny_model("dpt")
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model.train(), Broken(TASKS), 1)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", MODES)
def test_a_robot_is_an_environment_of_its_own(mode, monkeypatch):
    """A Gymnasium vector environment gives the history of the task's array, and stays open.

    Its states may be float64, and it is given actions in [-1, 1].
    """

    class Robot(gymnasium.Wrapper):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)

        def reset(self, **given):
            state, info = super().reset(**given)
            return state.astype(np.float64), info

        def step(self, action):
            assert action.shape == (2,)
            assert abs(action).max() <= 1
            state, *rest = super().step(action)
            return state.astype(np.float64), *rest

    monkeypatch.setitem(ENVS, "slider", Slider)
    model = tiny_model(mode)
    robots = gymnasium.vector.SyncVectorEnv([lambda: Robot(TaskEnv("slider", TASKS[0]))])
    one = evaluate(model, robots, 3, seed=1)
    other = evaluate(model, TASKS[:1], 3, seed=1)
    for name in one:
        near(one[name], other[name], 1e-6)
    assert not robots.closed


class Cart(gymnasium.Env):
    """A robot of somebody's own with states (3,), actions (2,) and episodes of `ends` steps.

    The state counts the steps. `odd` are values that it returns instead at a time, as a dict of
    (what, time) -> value. `acted` counts the actions that it was sent, `resets` its episodes.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, ends=4, terminates=False, **spaces):
        self.ends = ends
        self.terminates = terminates
        self.odd = {}
        self.acted = 0
        self.resets = 0
        for name, space in spaces.items():
            setattr(self, name, space)

    def state(self):
        usual = np.full(self.observation_space.shape, self.t, np.float32)
        return self.odd.get(("state", self.t), usual)

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        self.t = 0
        return self.state(), {}

    def step(self, action):
        self.acted += 1
        self.t += 1
        reward = self.odd.get(("reward", self.t), 0.5)
        ended = self.t == self.ends
        return self.state(), reward, ended and self.terminates, ended and not self.terminates, {}


def robots(*carts, **given):
    return gymnasium.vector.SyncVectorEnv([lambda cart=cart: cart for cart in carts], **given)


def test_observations_are_copied():
    """An environment may write its next observations into the same memory."""
    model = tiny_model("dpt")
    one = evaluate(model, robots(Cart(), Cart(), copy=True), 2)
    other = evaluate(model, robots(Cart(), Cart(), copy=False), 2)
    assert one["states"][:, :, :, 0].tolist() == [[[0, 1, 2, 3]] * 2] * 2
    for name in one:
        assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("terminates", [False, True])
def test_an_episode_that_ends_early_is_refused(terminates):
    """And one that ends after T steps, or goes on, is not."""
    model = tiny_model("ad")
    carts = robots(Cart(), Cart(ends=3, terminates=terminates))
    with pytest.raises(BadInput, match="ended after 3 of 4 steps: let a wrapper go on"):
        evaluate(model, carts, 2)
    for ends in (4, 5, 100):
        assert evaluate(model, robots(Cart(ends, terminates)), 2)["rewards"].sum() == 4


BOX = gymnasium.spaces.Box
OTHER_SPACES = [  # what a robot has, whether the agent's actions are discrete, what is said
    ({"observation_space": BOX(-1, 1, (1,))}, False, r"of shape \(3,\), as in training, not Box"),
    ({"observation_space": BOX(-1, 1, (1, 3))}, False, "FlattenObservation"),
    ({"observation_space": gymnasium.spaces.Dict(a=BOX(-1, 1, (3,)))}, False, "not Dict.*Flatten"),
    ({"action_space": BOX(-1, 1, (6,))}, False, r"of shape \(2,\), as in training, not Box"),
    ({"action_space": BOX(-1, 1, ())}, False, r"of shape \(2,\), as in training, not Box"),
    ({"action_space": BOX(-1, 1, (2,), np.int8)}, False, "actions must be floats"),
    ({"action_space": BOX(-np.inf, np.inf, (2,))}, False, "leave out.*ClipAction"),
    ({"action_space": BOX(-2, 2, (2,))}, False, "RescaleAction"),
    ({"action_space": BOX(0, 1, (2,))}, False, "RescaleAction"),
    ({"action_space": BOX(np.array([-1, -3]), np.array([1, 1]), dtype=float)}, False, "Rescale"),
    ({"action_space": gymnasium.spaces.Discrete(2)}, False, r"of shape \(2,\).*not Discrete"),
    ({}, True, r"must be Discrete\(5\), as in training, not Box"),
    ({"action_space": gymnasium.spaces.Discrete(4)}, True, r"Discrete\(5\).*not Discrete\(4\)"),
    ({"action_space": gymnasium.spaces.Discrete(5, start=1)}, True, "start=1"),
]


@pytest.mark.parametrize("spaces, discrete, said", OTHER_SPACES)
def test_other_spaces_than_in_training_are_refused(spaces, discrete, said):
    """Before anything is done, in one line that says what to do."""
    data = numbered_data()
    if discrete:
        data = with_discrete_actions(data)
    cart = Cart(**spaces)
    with pytest.raises(BadInput, match=said) as caught:
        evaluate(tiny_model("dpt", data), robots(cart), 1)
    assert "\n" not in str(caught.value)
    assert cart.acted == 0


def test_wrappers_make_other_spaces_fit():
    """The wrappers that the messages name."""
    space = gymnasium.spaces.Dict(a=BOX(-1, 1, (1,)), b=BOX(-1, 1, (2,)))

    class Parts(Cart):
        def state(self):
            return {"a": np.zeros(1, np.float32), "b": np.ones(2, np.float32)}

    class Strong(Parts):
        def step(self, action):
            assert (action >= 10).all() and (action <= 30).all()
            return super().step(action)

    cart = Strong(action_space=BOX(10, 30, (2,)), observation_space=space)
    cart = gymnasium.wrappers.RescaleAction(cart, -1, 1)
    history = evaluate(tiny_model("dpt"), robots(gymnasium.wrappers.FlattenObservation(cart)), 2)
    assert history["states"][0, 0, 0].tolist() == [0, 1, 1]


def test_an_episode_begins_once():
    """An automatic reset in the last step would begin it twice, with another task if it draws one."""
    for mode in gymnasium.vector.AutoresetMode:
        carts = robots(Cart(), autoreset_mode=mode)
        if mode == gymnasium.vector.AutoresetMode.SAME_STEP:
            with pytest.raises(BadInput, match="would begin twice.*NEXT_STEP"):
                evaluate(tiny_model("dpt"), carts, 2)
        else:
            evaluate(tiny_model("dpt"), carts, 2)
            assert carts.envs[0].resets == 2


def test_a_robot_may_change_the_actions_that_it_is_sent():
    """The agent remembers what it did, and is not told of another action."""

    class Weak(Cart):
        def step(self, action):
            action *= 0
            return super().step(action)

    model = tiny_model("ad")
    one = evaluate(model, robots(Cart()), 3)
    other = evaluate(model, robots(Weak()), 3)
    assert torch.equal(one["actions"], other["actions"])


def test_observations_may_be_of_any_type_and_layout():
    class Mirrored(Odd):
        def changed_states(self, states):
            return states.astype(kind)[:, ::-1]

    model = tiny_model("dpt")
    expected = evaluate(model, robots(Cart()), np.int64(2), seed=np.int64(1))
    for kind in (">f4", "f8", "i8", object):
        history = evaluate(model, Mirrored(robots(Cart())), 2, seed=1)
        near(history["actions"], expected["actions"], 1e-5)


def test_acting_is_in_float32_within_anothers_autocast():
    model = tiny_model("dpt")
    expected = evaluate(model, Slider(TASKS), 2)
    with torch.autocast("cpu", torch.bfloat16):
        history = evaluate(model, Slider(TASKS), 2)
    assert torch.equal(history["actions"], expected["actions"])


def test_a_context_that_is_too_long_for_the_cache_is_named():
    """A rule of one's own may show more than `context` episodes, without the cache."""

    def everything(c, history, episode, t):
        c = dataclasses.replace(c, context=episode + 1)
        return t2mir.own_context(c, history, episode, t)

    model = tiny_model("dpt", context=1)
    with pytest.raises(BadInput, match="use_cache=False"):
        evaluate(model, Slider(TASKS), 4, context_of=everything)
    evaluate(model, Slider(TASKS), 4, context_of=everything, use_cache=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["state", "reward"])
@pytest.mark.parametrize("time", [1, 3])
def test_no_action_follows_a_number_that_is_not_finite(value, what, time):
    """The agent stops, and says why."""
    cart = Cart()
    cart.odd = {("reward", time): value}
    if what == "state":
        cart.odd = {("state", time): np.array([0, value, 0], np.float32)}
    with pytest.raises(BadInput, match="are not finite, so the agent stops"):
        evaluate(tiny_model("ad"), robots(cart), 3)
    assert cart.acted == time


def test_an_action_that_is_not_finite_is_not_sent():
    """The weights may have been spoiled, or a state may be too large for a float32."""
    cart = Cart()
    cart.odd = {("state", 2): np.array([0, 3e38, 0], np.float32)}
    model = tiny_model("dpt")
    model.state_statistics[1] = 1e-3
    with pytest.raises(BadInput, match="actions are not finite"):
        evaluate(model, robots(cart), 1)
    assert cart.acted == 2


class Odd(gymnasium.vector.VectorWrapper):
    """A vector environment whose observations or rewards have another shape than they should."""

    def reset(self, **given):
        states, info = self.env.reset(**given)
        return self.changed_states(states), info

    def step(self, actions):
        states, rewards, *others = self.env.step(actions)
        return self.changed_states(states), self.changed_rewards(rewards), *others

    def changed_states(self, states):
        return states

    def changed_rewards(self, rewards):
        return rewards


def test_returned_shapes_are_checked():
    """Nothing is broadcast: neither a column of rewards nor fewer states than the space says."""

    class Column(Odd):
        def changed_rewards(self, rewards):
            return rewards[:, None]

    class Short(Odd):
        def changed_states(self, states):
            return states[:, :1]

    model = tiny_model("dpt")
    with pytest.raises(BadInput, match=r"rewards have shape \(2, 1\) instead of \(2,\)"):
        evaluate(model, Column(robots(Cart(), Cart())), 1)
    with pytest.raises(BadInput, match=r"observations have shape \(2, 1\) instead of \(2, 3\)"):
        evaluate(model, Short(robots(Cart(), Cart())), 1)


@pytest.mark.parametrize("factor, offset, warns", [(1, 0, False), (1000, 0, True), (1, 50, True)])
@pytest.mark.parametrize("which", ["state", "reward"])
def test_another_unit_is_said(which, factor, offset, warns, recwarn):
    """States and rewards that leave the range of the training data by far."""
    data = numbered_data()
    data["states"] = np.random.default_rng(0).normal(size=(6, 9, 4, 3))
    data["rewards"][0, 0] = [0.5, -0.5, 0.5, -0.5]

    class Other(Odd):
        def changed_states(self, states):
            states = 0.3 * states
            if which == "state":
                states[:, 1] = factor * states[:, 1] + offset
            return states

        def changed_rewards(self, rewards):
            if which == "reward":
                rewards = factor * rewards + offset
            return rewards

    evaluate(tiny_model("ad", data), Other(robots(Cart())), 3)
    name = {"state": "state dimension 1", "reward": "the reward"}[which]
    said = [str(w.message) for w in recwarn if "unit" in str(w.message)]
    assert bool(said) == warns
    assert all(message.startswith(f"{name} is from") for message in said)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"tasks": Cart()}, r"SyncVectorEnv\(\[make_robot\]\), not Cart"),
        ({"tasks": [[0.5, 0.5]]}, "an array of tasks or a vector environment.*not list"),
        ({"tasks": None}, "not NoneType"),
        ({"tasks": TASKS}, "slider has no simulator"),
        ({"episodes": 0}, "`episodes` must be an integer, at least 1"),
        ({"episodes": 1.5}, "`episodes` must be an integer, at least 1"),
        ({"context_of": "hiden"}, "`context_of` must be a function"),
    ],
)
def test_other_arguments_of_evaluate_are_named(given, said):
    """A single environment, a list, no episode, a word in the place of a function."""
    arguments = {"tasks": robots(Cart()), "episodes": 1} | given
    with pytest.raises(BadInput, match=said):
        evaluate(tiny_model("dpt"), **arguments)


def test_scores_are_0_at_random_and_1_at_the_expert():
    """They are NaN where the expert is hardly better than random, and other tasks are not."""
    data = {"random_return": np.array([0, -10.0, -9, -8, -7, -5])}
    data["expert_return"] = np.array([0, -8.0, -9, -9, -3, -4.999])
    returns = np.array([[-10.0, -8], [-9, -8], [-8, -9], [-5, -3], [-8, -5]])
    scores = t2mir.scores(returns, data, np.arange(6) > 0)
    nothing = [np.nan] * 2
    np.testing.assert_allclose(scores, [[0, 1], nothing, nothing, [0.5, 1], nothing])


def test_tasks_without_a_score_are_named(data_folder, capsys):
    """In the report. If no task has one, the log has none, and the report prints returns."""
    path = data_folder / "slider.npz"
    arrays = dict(np.load(path))
    arrays["expert_return"][5] = -8.999
    np.savez(path, **arrays)
    run = short_run("dpt", data_folder, name="one")
    report(run)
    assert "no scores in tasks whose expert hardly gains over random actions: 5\n" in (
        capsys.readouterr().out
    )
    assert abs(float(rows(run / "log.csv")[-1]["score"])) < 3

    arrays["expert_return"][:] = -9
    np.savez(path, **arrays)
    run = short_run("dpt", data_folder, name="none")
    report(run)
    assert "score" not in rows(run / "log.csv")[-1]
    out = capsys.readouterr().out
    with np.load(run / "result.npz") as result:
        returns = result["own"].mean(1)
    assert f"own context:              {returns[0]:7.3f}" in out


def test_the_log_has_return_and_score_of_the_last_episode(data_folder):
    """In the held-out tasks; the mean score leaves out those without one."""
    data = load(data_folder / "slider.npz")
    data["expert_return"][5] = -20  # worse than random
    model = tiny_model("dpt", data, eval_episodes=2)
    numbers = t2mir.measure(model, data, data["test"], t2mir.to_tensors(data, data["test"]))
    last = evaluate(model, data["tasks"][4:], 2)["rewards"][:, 1].sum(-1)
    assert numbers["return"] == pytest.approx(last.mean().item())
    assert numbers["score"] == pytest.approx((last[0].item() + 9) / 8)


# ---- Training ------------------------------------------------------------------------------------


def write(folder, name, data):
    """Writes a dataset and returns the folder; an array that is None is left out."""
    folder.mkdir()
    np.savez(folder / f"{name}.npz", **{key: x for key, x in data.items() if x is not None})
    return folder


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A folder with a dataset of the family `slider`, which exists while the test runs."""
    monkeypatch.setitem(ENVS, "slider", Slider)
    data = numbered_data(tasks=Slider.draw_tasks(np.random.default_rng(0), 6))
    data |= {"random_return": np.full(6, -9.0), "expert_return": np.full(6, -1.0)}
    return write(tmp_path / "data", "slider", data)


def short(mode, folder, **given):
    """The Config of a run of six steps, with two evaluations and with dropout."""
    sizes = {"n_layers": 1, "moe_layers": (0,), "steps": 6, "eval_every": 3, "warmup": 2}
    sizes |= {"eval_episodes": 2, "dropout": 0.1, "name": "run"}
    sizes |= {"data": str(folder), "runs": str(folder.parent)}
    return tiny(mode, **sizes | given)


def short_run(mode, folder, **given):
    """The folder of such a run."""
    return t2mir.train(short(mode, folder, **given))


def rows(path):
    """The rows of a log without what depends on the clock."""
    with open(path) as file:
        return [row | {"seconds": None} for row in csv.DictReader(file)]


def steps_of(run):
    return [int(row["step"]) for row in rows(run / "log.csv")]


def call_main(monkeypatch, *argv):
    """t2mir.py as at the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["t2mir.py", *map(str, argv)])
    t2mir.main()


def contents(folder):
    """The bytes of all files in a folder, but for locks."""
    files = [path for path in folder.iterdir() if path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_model_learns_a_batch_by_heart(mode):
    """With all its losses, the squared error falls below 2% of the targets' variance."""
    model = tiny_model(mode, context=1)
    batch = batch_for(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss, _ = model.train()(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    outputs, _ = model.eval().predict(batch)
    error = (model.policy(outputs)[0] - batch.targets).square().mean()
    assert error < 0.02 * batch.targets.var()


def test_the_learning_rate_rises_and_falls(data_folder, monkeypatch):
    """Both optimizers have a linear warm-up to the peak, and from there half a cosine to zero."""
    rates = defaultdict(list)
    for kind in (torch.optim.AdamW, t2mir.Muon):

        def recording(optimizer, *args, step=kind.step):
            rates[type(optimizer)].append(optimizer.param_groups[0]["lr"])
            return step(optimizer, *args)

        monkeypatch.setattr(kind, "step", recording)
    short_run("dpt", data_folder, lr=0.008, warmup=4, steps=12)
    assert len(rates) == 2
    for found in rates.values():
        assert found[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008])
        assert found[4:] == pytest.approx(
            [0.004 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_run_repeats_and_leaves_its_folder(mode, data_folder):
    """The same seed gives the same log and weights bit for bit, another seed gives others."""
    one = short_run(mode, data_folder, seed=5, name="one")
    again = short_run(mode, data_folder, seed=5, name="again")
    other = short_run(mode, data_folder, seed=6, name="other")
    assert contents(one).keys() == {"config.json", "log.csv", "ckpt.pt"}
    assert json.loads((one / "config.json").read_text())["seed"] == 5
    log = rows(one / "log.csv")
    assert [row["step"] for row in log] == ["3", "6"]
    assert log == rows(again / "log.csv") != rows(other / "log.csv")
    model = t2mir.load_agent(one, DEVICE)
    weights = model.state_dict()
    same_weights = t2mir.load_agent(again / "ckpt.pt", DEVICE).state_dict()
    assert all(torch.equal(p, same_weights[name]) for name, p in weights.items())
    assert not model.training

    data = load(data_folder / "slider.npz")
    x = t2mir.to_tensors(data, data["test"])
    measured = t2mir.measure(model, data, data["test"], x)
    for name in ("heldout", "return", "score"):
        assert float(log[1][name]) == pytest.approx(measured[name], rel=1e-5)
    terms = {"loss", "action", "nll", "importance", "load", "contrastive"}
    assert terms | {"token_experts", "task_experts"} < log[0].keys()


@pytest.mark.skipif(DEVICE == "cpu", reason="it takes a minute there, and does not pay")
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_run_has_the_same_losses(mode, data_folder):
    """Up to the noise of its routers, in contexts of all lengths."""
    logs = []
    for compiled in (False, True):
        given = {"dropout": 0.0, "compile": compiled, "name": str(compiled), "dtype": "auto"}
        run = short_run(mode, data_folder, lr=1e-4, w_imp=0.0, w_load=0.0, **given)
        logs.append(rows(run / "log.csv"))
    for one, other in zip(*logs):
        for name in ("action", "contrastive", "heldout"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=0.1)


def test_the_log_has_the_columns_of_all_its_rows(tmp_path):
    """A number that a row lacks is empty there."""
    model = tiny_model("dpt")
    run = t2mir.new_run(model.config, model, {"fingerprint": ""}, 1)
    run["log"] = [{"step": 1, "loss": 2.0}, {"step": 2, "score": 0.5}]
    t2mir.save(tmp_path, run, model, [])
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert log == ["step,loss,score", "1,2.0,", "2,,0.5"]


def test_logged_losses_are_means_since_the_last_row(data_folder, monkeypatch):
    """Of all steps, and not of the last one."""
    losses = []
    forward = T2MIR.forward

    def recording(model, batch):
        loss, log = forward(model, batch)
        losses.append(loss.item())
        return loss, log

    monkeypatch.setattr(T2MIR, "forward", recording)
    log = rows(short_run("ad", data_folder) / "log.csv")
    for row, part in zip(log, (losses[:3], losses[3:])):
        assert float(row["loss"]) == pytest.approx(np.mean(part), rel=1e-5)


def test_the_report_compares_three_contexts(data_folder, capsys):
    """Returns by episode of the agent itself, without a context, and with another task's."""
    run = short_run("dpt", data_folder)
    report(run)
    tasks = load(data_folder / "slider.npz")["tasks"][4:]
    history = evaluate(t2mir.load_agent(run, DEVICE), tasks, 2, seed=1)
    with np.load(run / "result.npz") as result:
        np.testing.assert_allclose(result["own"], history["rewards"].sum(-1).T, rtol=1e-6)
        first, second = (result["own"] == result["other"]).all(1)
        assert first  # nothing is finished yet
        assert not second
        assert not (result["own"] == result["hidden"]).any()
        np.testing.assert_array_equal(result["tasks"], tasks)
    assert (run / "incontext.png").read_bytes()[:4] == b"\x89PNG"
    assert "context of another task" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["point_robot", "cheetah_vel", "walker_param"])
def test_every_family_trains_and_acts(name, mode, tmp_path):
    """With the family's own sizes, its agents act in the simulator."""
    family = ENVS[name]
    rng = np.random.default_rng(0)
    shape = (4, 3, family.horizon)
    data = {"states": rng.normal(size=(*shape, family.obs_dim)), "rewards": rng.normal(size=shape)}
    data["actions"] = data["expert_actions"] = rng.uniform(-1, 1, (*shape, family.act_dim))
    data |= {"random_return": np.zeros(4), "expert_return": np.ones(4)}
    data |= {"tasks": sample_tasks(name, 4, 0), "test": np.arange(4) > 1}
    write(tmp_path / "data", name, data)
    run = short_run(mode, tmp_path / "data", env=name, stride=10, steps=1, context=1)
    (row,) = rows(run / "log.csv")
    assert all(math.isfinite(float(row[key])) for key in ("loss", "heldout", "return", "score"))


def test_val_tasks_are_training_tasks(data_folder):
    """They are held out instead of the test tasks, and the agent is not trained on them."""
    c = short("dpt", data_folder, val_tasks=2)
    data, train_tasks, held_out = t2mir.open_dataset(c)
    assert train_tasks.tolist() == [True, True, False, False, False, False]
    assert held_out.tolist() == [False, False, True, True, False, False]
    model = t2mir.load_agent(t2mir.train(c))
    near(model.state_statistics[0], torch.tensor(data["states"][:2].mean((0, 1, 2))))


def own_data(folder, discrete=False, **changed):
    """Writes the data of a robot without a simulator."""
    data = numbered_data(**{"E": 6} | changed)
    if discrete:
        data = with_discrete_actions(data)
    return write(folder, "my_robot", data)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_own_data_without_a_simulator(mode, discrete, tmp_path, capsys):
    """The log has no returns, and the report has the held-out loss by steps of context."""
    run = short_run(mode, own_data(tmp_path / "data", discrete), env="my_robot")
    report(run)
    assert not {"return", "score"} & rows(run / "log.csv")[0].keys()
    with np.load(run / "result.npz") as result:
        assert (np.diff(result["amount"]) > 0).all()
        if mode == "ad":  # finished episodes
            assert result["amount"].tolist() == [0, 1, 2]
        said = re.search("own context: (.*)\n", capsys.readouterr().out)[1]
        printed = [float(number) for number in said.split()]
        np.testing.assert_allclose(printed, result["own"][:, 0], atol=6e-4)
        assert np.isfinite(result["hidden"]).all()
    assert (run / "incontext.png").exists()


def test_the_report_tells_whether_the_context_helps(tmp_path):
    """Where all actions of a task are one constant, the own context has the lowest loss."""
    sign = np.where(np.arange(12) % 2, 0.8, -0.8)[:, None, None, None]
    actions = np.broadcast_to(sign, (12, 5, 4, 2))
    changed = {"actions": actions, "learner_actions": actions, "guest": None}
    folder = own_data(tmp_path / "data", N=12, E=5, **changed)
    sizes = {"steps": 120, "eval_every": 120, "warmup": 10, "batch": 8, "dropout": 0.0}
    run = short_run("ad", folder, env="my_robot", **sizes)
    report(run)
    with np.load(run / "result.npz") as result:
        own, hidden, other = (result[name].mean() for name in ("own", "hidden", "other"))
    assert own < hidden - 0.5
    assert own < other - 0.5


# ---- Stopping, resuming and sharing --------------------------------------------------------------


def stop_at(monkeypatch, mode, step, tasks=4):
    """Ends the training, on `tasks` tasks, with ctrl-C when it draws the batch of `step`."""
    draw_batch = t2mir.DRAW_BATCH[mode]

    def stopping(c, x, now, size):
        if now == step and len(x["tasks"]) == tasks:
            raise KeyboardInterrupt
        return draw_batch(c, x, now, size)

    monkeypatch.setitem(t2mir.DRAW_BATCH, mode, stopping)


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(mode, data_folder, monkeypatch):
    """Resumed in another directory, its log, weights and optimizers are the same bit for bit."""
    monkeypatch.chdir(data_folder.parent)
    given = {"steps": 13, "eval_every": 5, "runs": str(data_folder.parent)}
    whole = short_run(mode, Path("data"), name="whole", **given)
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_at(stopping, mode, 8)
        short_run(mode, Path("data"), name="broken", **given)
    broken = whole.with_name("broken")
    assert steps_of(broken) == [5]
    monkeypatch.chdir(data_folder)
    call_main(monkeypatch, "--resume", "../broken")
    assert rows(whole / "log.csv") == rows(broken / "log.csv")
    assert steps_of(whole) == [5, 10, 13]
    one, two = (torch.load(run / "ckpt.pt", weights_only=True) for run in (whole, broken))
    for name, p in one["model"].items():
        assert torch.equal(p, two["model"][name]), name
    for first, second in zip(one["optimizers"], two["optimizers"], strict=True):
        for i, moments in first["state"].items():
            assert all(torch.equal(x, second["state"][i][name]) for name, x in moments.items())
    assert one["config"] | {"name": "broken"} == two["config"]
    assert (broken / "result.npz").exists()


def test_resuming_from_within_the_folder(data_folder, monkeypatch):
    """`--resume .` goes on with the run in this folder, here for one more step."""
    run = short_run("dpt", data_folder)
    monkeypatch.chdir(run)
    call_main(monkeypatch, "--resume", ".", "--steps", "7")
    assert steps_of(run) == [3, 6, 7]
    assert json.loads((run / "config.json").read_text())["steps"] == 7


@pytest.mark.parametrize("flags", ["--lr 1", "--seed 3", "--name other", "--mode ad", "--steps 5"])
def test_resume_refuses_other_settings(flags, data_folder, monkeypatch):
    """Other settings and fewer steps are named in one line, and the run stays as it was."""
    run = short_run("dpt", data_folder)
    before = contents(run)
    word = flags.split()[0].strip("-")
    with pytest.raises(BadInput, match=f"--.*{word}"):
        call_main(monkeypatch, "--resume", run, *flags.split())
    assert contents(run) == before


def test_resume_needs_the_same_data(data_folder, monkeypatch):
    """Another dataset is refused; the same arrays in another place and form will do."""
    run = short_run("dpt", data_folder)
    before = contents(run)
    with np.load(data_folder / "slider.npz") as file:
        data = dict(file)
    elsewhere = data_folder.parent / "elsewhere"
    (elsewhere / "slider").mkdir(parents=True)
    for name, x in data.items():
        np.save(elsewhere / "slider" / f"{name}.npy", x)
    data["rewards"][0, 0, 0] += 1
    np.savez(data_folder / "slider.npz", **data)
    with pytest.raises(BadInput, match="another dataset"):
        call_main(monkeypatch, "--resume", run, "--steps", "7")
    assert contents(run) == before
    call_main(monkeypatch, f"--resume={run}", "--steps", "7", "--data", elsewhere)
    assert steps_of(run) == [3, 6, 7]


@pytest.mark.parametrize("flags", ["--steps 7", "--env point_robot"])
def test_resume_never_collects(flags, data_folder, monkeypatch):
    """Missing data is named, also that of another family."""
    run = short_run("dpt", data_folder)
    (data_folder / "slider.npz").unlink()

    def never(*args, **given):
        raise AssertionError("a dataset is collected")

    monkeypatch.setattr(t2mir, "collect", never)
    with pytest.raises(BadInput):
        call_main(monkeypatch, "--resume", run, *flags.split())


def test_a_run_of_another_machine_goes_on_here(data_folder, monkeypatch, capsys):
    """On the device that is named, and another number of processes is said."""
    run = short_run("dpt", data_folder)
    saved = torch.load(run / "ckpt.pt", weights_only=True)
    saved["config"]["device"] = "cuda:99"
    saved["processes"] = 4
    torch.save(saved, run / "ckpt.pt")
    t2mir.load_agent(run)
    call_main(monkeypatch, "--resume", run, "--device", "cpu", "--steps", "7")
    assert steps_of(run) == [3, 6, 7]
    assert "the run had 4 processes" in capsys.readouterr().out


def test_missing_data_is_collected_once(tmp_path, monkeypatch):
    """A new family needs a class and no settings. Data of one's own is never collected."""
    monkeypatch.setitem(ENVS, "slider", Slider)
    calls = []

    def collect_little(name, out):
        calls.append(name)
        sizes = {"steps": 40, "random_steps": 20, "hidden": 8, "batch": 8}
        collect(name, out=out, train_tasks=4, test_tasks=1, **sizes)

    monkeypatch.setattr(t2mir, "collect", collect_little)
    for mode in MODES:
        run = short_run(mode, tmp_path / "data", name=mode)
        assert math.isfinite(float(rows(run / "log.csv")[-1]["return"]))
    assert calls == ["slider"]
    with pytest.raises(BadInput, match="my_robot.npz is missing"):
        short_run("dpt", tmp_path / "data", env="my_robot")
    assert calls == ["slider"]


def test_a_folder_belongs_to_one_run(data_folder, monkeypatch):
    """One that another process uses and one that holds a run are refused and stay as they are.

    One whose run was stopped before its first checkpoint may be taken.
    """
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_at(stopping, "dpt", 2)
        short_run("dpt", data_folder)
    run = short_run("dpt", data_folder)
    before = contents(run)
    with pytest.raises(BadInput, match="--resume.*--name"):
        short_run("dpt", data_folder, seed=9)
    with claim(run):
        for resume in ("", run):
            with pytest.raises(BadInput, match="in use by another process"):
                t2mir.train(short("dpt", data_folder), resume)
    assert contents(run) == before


def test_a_stray_rank_is_ignored(data_folder, monkeypatch):
    """Only WORLD_SIZE says that there are several processes: the run is written and reported."""
    monkeypatch.setenv("RANK", "1")
    assert steps_of(short_run("dpt", data_folder)) == [3, 6]
    reported = []
    monkeypatch.setattr("experiments.report.report", lambda run, *where: reported.append(run))
    monkeypatch.setattr(t2mir, "train", lambda c, resume: "runs/name")
    call_main(monkeypatch)
    assert reported == ["runs/name"]


SEVERAL = """
import os, sys
import torch
import t2mir

torch.set_num_threads(1)
torch.randn_like = torch.zeros_like  # no noise in the routers, so that the test can repeat the run
rank = os.environ["RANK"]
fit = t2mir.fit
new_model = t2mir.new_model
write_atomically = t2mir.write_atomically
kept = {"batches": []}


def kept_model(*args):
    kept["model"] = new_model(*args)
    kept["start"] = {name: p.clone() for name, p in kept["model"].state_dict().items()}
    return kept["model"]


def kept_batch(c, x, step, size):
    batch = draw_batch(c, x, step, size)
    kept["batches"].append(batch)
    return batch


def write(path, content):
    assert rank == "0", f"process {rank} writes {path}"
    write_atomically(path, content)


t2mir.new_model = kept_model
t2mir.write_atomically = write
for mode, draw_batch in list(t2mir.DRAW_BATCH.items()):
    kept["batches"].clear()
    t2mir.DRAW_BATCH[mode] = kept_batch
    c = t2mir.Config(**torch.load(f"{mode}.pt"))
    t2mir.train(c)
    batches = [(tuple(b.context), *b[1:]) for b in kept["batches"][: c.steps]]
    content = {"start": kept["start"], "end": kept["model"].state_dict(), "batches": batches}
    torch.save(content, f"{mode}-{rank}.pt")
"""


def test_two_processes_train_one_model(tmp_path, monkeypatch):
    """torchrun with two processes: each its own batches, one model, and only the first one writes.

    Both end with the weights of a plain loop that takes the mean of both losses in each step.
    """
    given = {"env": "my_robot", "steps": 8, "eval_every": 8, "lr": 1e-3, "momentum": 0.5}
    folder = own_data(tmp_path / "data")
    configs = {}
    for mode in MODES:
        configs[mode] = short(mode, folder, dropout=0.0, name=mode, device="cpu", **given)
        torch.save(dataclasses.asdict(configs[mode]), tmp_path / f"{mode}.pt")
    (tmp_path / "several.py").write_text(SEVERAL)
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append("several.py")
    ended = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]

    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for mode, c in configs.items():
        ranks = [torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in (0, 1)]
        for name, p in t2mir.load_agent(tmp_path / mode).state_dict().items():
            assert torch.equal(p, ranks[0]["end"][name]), name
            assert torch.equal(p, ranks[1]["end"][name]), name
        queries = {str(batch[1]) for rank in ranks for batch in rank["batches"]}
        assert len(queries) == 16  # no two batches are the same
        slow = T2MIR(c, t2mir.sizes_of(load(folder / "my_robot.npz"))).train()
        slow.load_state_dict(ranks[0]["start"])
        optimizers = t2mir.new_optimizers(slow)
        for step in range(8):
            for rank in ranks:
                context, *others = rank["batches"][step]
                loss, _ = slow(t2mir.Batch(t2mir.Steps(*context), *others))
                (loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = t2mir.get_lr(c, step)
                optimizer.step()
                optimizer.zero_grad()
            moe = slow.blocks[0].moe.moes[1]
            moe.key_router.weight += 0.5 * (moe.router.weight.detach() - moe.key_router.weight)
        moved = 0.0
        for name, p in slow.state_dict().items():
            near(ranks[0]["end"][name], p, 2e-4)
            moved = max(moved, (p - ranks[0]["start"][name]).abs().max())
        assert moved > 2e-3


# ---- Bad input and the command line --------------------------------------------------------------


def test_unreadable_checkpoints_are_named_in_one_line(data_folder):
    """Missing, cut, foreign and outdated files, each by the name of the file."""
    folder = data_folder.parent
    run = short_run("dpt", data_folder, steps=1)
    saved = torch.load(run / "ckpt.pt", weights_only=True)
    (folder / "cut.pt").write_bytes((run / "ckpt.pt").read_bytes()[:5000])
    (folder / "text.pt").write_text("no checkpoint")
    torch.save([1, 2], folder / "foreign.pt")
    torch.save({"model": saved["model"]}, folder / "weights.pt")
    torch.save(saved | {"config": saved["config"] | {"old": 1}}, folder / "outdated.pt")
    for name in (
        "cut.pt",
        "text.pt",
        "foreign.pt",
        "weights.pt",
        "outdated.pt",
        "missing.pt",
        "no_run",
    ):
        with pytest.raises(BadInput, match=name) as caught:
            t2mir.load_agent(folder / name)
        assert "\n" not in str(caught.value)


def test_unreadable_and_changed_agents_are_told_apart_from_damaged_ones(data_folder, monkeypatch):
    """Nobody should delete a good run because of a message."""
    run = short_run("dpt", data_folder)
    (data_folder / "ckpt.pt").mkdir()
    with pytest.raises(BadInput, match="cannot be read") as caught:
        t2mir.load_agent(data_folder)
    assert "damaged" not in str(caught.value)

    class Larger(t2mir.GaussianPolicy):
        numbers = 3

    monkeypatch.setitem(t2mir.POLICIES, "gaussian", Larger)
    with pytest.raises(BadInput, match="of another T2MIR.*policy.head.weight") as caught:
        t2mir.load_agent(run)
    assert "\n" not in str(caught.value)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.pt", r"a$\x$b", "käse", "a/b", "~", "a b"])
def test_a_run_may_have_any_name(name, data_folder):
    """It is found again, and its picture has the name as a title."""
    run = short_run("dpt", data_folder, name=name)
    report(run)
    assert (run / "incontext.png").exists()
    assert t2mir.load_agent(run).config.name == name
    assert t2mir.load_agent(run / "ckpt.pt").config.name == name


def test_the_home_directory_may_be_named(data_folder, monkeypatch):
    """As ~, in all paths."""
    monkeypatch.setenv("HOME", str(data_folder.parent))
    run = short_run("dpt", data_folder, data="~/data", runs="~/runs")
    assert run == data_folder.parent / "runs" / "run"
    assert t2mir.load_agent("~/runs/run").config.data == str(data_folder)
    assert len(load("~/data/slider.npz")["states"]) == 6
    call_main(monkeypatch, "--resume", "~/runs/run", "--steps", "7")
    assert steps_of(run) == [3, 6, 7]
    assert Settings(out="~/data").out == str(data_folder)


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float16"},
        {"steps": "100"},
        {"steps": 100.0},
        {"steps": True},
        {"token_moe": "False"},
        {"token_moe": 1},
        {"lr": "1e-3"},
        {"lr": math.nan},
        {"lr": math.inf},
        {"name": None},
        {"data": Path("data")},
        {"moe_layers": ()},
        {"moe_layers": (0.5,)},
        {"moe_layers": "0"},
        {"moe_layers": None},
        {"env": ""},
    ],
)
def test_wrong_types_from_python_are_named(given):
    """A string is true even if it says False, and would be trained with."""
    (name,) = given
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')} .*must be"):
        t2mir.preset(**given)


def test_numbers_of_numpy_and_lists_become_pythons(data_folder):
    """A checkpoint holds plain numbers only, and a Config is compared with one from a JSON file."""
    given = {"lr": np.float64(1e-3), "steps": np.int64(6), "dropout": np.float32(0.5)}
    given |= {"name": np.str_("run"), "moe_layers": [np.int64(0)]}
    run = short_run("dpt", data_folder, **given)
    c = t2mir.load_agent(run).config
    assert (type(c.lr), type(c.steps), type(c.name), c.moe_layers) == (float, int, str, (0,))
    again = Config(**json.loads((run / "config.json").read_text()))
    t2mir.train(dataclasses.replace(again, steps=7), run)
    assert type(Settings(lr=np.float64(1e-3)).lr) is float


def test_a_finished_run_reports_where_its_data_is_now(data_folder, monkeypatch, capsys):
    """With --resume and --data, or in the folder `data` if the whole project has moved."""
    run = short_run("dpt", data_folder)
    data_folder.rename(data_folder.parent / "elsewhere")
    with pytest.raises(BadInput, match="name its folder with --data"):
        report(run)
    monkeypatch.chdir(data_folder.parent)
    call_main(monkeypatch, "--resume", "run", "--data", "elsewhere", "--device", "cpu")
    assert "own context" in capsys.readouterr().out
    Path("elsewhere").rename("moved")
    Path("moved").mkdir(exist_ok=True)
    Path("moved").rename("project")
    Path("project/data").mkdir()
    Path("project/slider.npz").rename("project/data/slider.npz")
    monkeypatch.chdir("project")
    report("../run")
    assert "own context" in capsys.readouterr().out


def test_a_report_says_that_a_run_is_not_finished(data_folder, monkeypatch, capsys):
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_at(stopping, "dpt", 4)
        short_run("dpt", data_folder)
    run = data_folder.parent / "run"
    report(run)
    assert "not finished: this is the agent after 3 of 6 steps" in capsys.readouterr().out
    with np.load(run / "result.npz") as result:
        assert result["step"] == 3
    with pytest.raises(BadInput, match="must be the folder of a run"):
        report(run / "ckpt.pt")


def test_a_spoiled_checkpoint_is_not_written(data_folder, monkeypatch):
    """If the update of an evaluating step spoils the weights, the last good checkpoint stays."""
    get_lr = t2mir.get_lr
    monkeypatch.setattr(t2mir, "get_lr", lambda c, step: 1e30 if step == 5 else get_lr(c, step))
    with pytest.raises(BadInput, match="spoiled the weights: try a smaller --lr"):
        short_run("dpt", data_folder)
    assert steps_of(data_folder.parent / "run") == [3]
    weights = t2mir.load_agent(data_folder.parent / "run").parameters()
    assert all(p.isfinite().all() for p in weights)


def test_the_held_out_loss_leaves_random_numbers_alone():
    """Batches that a loop of one's own draws next do not repeat after each evaluation."""
    model = tiny_model("dpt")
    x = t2mir.to_tensors(numbered_data(), ~numbered_data()["test"])
    drawn = []
    torch.manual_seed(0)
    for _ in range(2):
        t2mir.held_out_loss(model, x, batches=1)
        drawn.append(torch.rand(()).item())
    assert drawn[0] != drawn[1]


def test_one_episode_of_each_task_is_too_few_for_dpt(tmp_path):
    changed = {"E": 1, "guest": None}
    with pytest.raises(BadInput, match="DPT needs two of each task"):
        short_run("dpt", own_data(tmp_path / "data", **changed), env="my_robot", context=1)


@pytest.mark.parametrize("given", [{"steps": "9"}, {"lr": True}, {"env": 3}])
def test_wrong_types_of_a_collections_settings_are_named(given):
    with pytest.raises(BadInput, match=f"--{next(iter(given)).replace('_', '-')} .* must be|--env"):
        Settings(**given)


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": "one", "LOCAL_RANK": "0"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_PORT is ''"),
        (dict.fromkeys(("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"), "0"), "is 0, or"),
    ],
)
def test_half_an_environment_of_torchrun_is_named(environment, said, data_folder, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=f"{said}.*: start several processes with torchrun"):
        short_run("dpt", data_folder)


def test_a_table_that_cannot_be_written_stops_no_run(data_folder, capsys):
    """On Windows a program that has log.csv open locks it; here a folder has its name."""
    (data_folder.parent / "run" / "log.csv").mkdir(parents=True)
    run = short_run("dpt", data_folder)
    said = capsys.readouterr().out
    assert said.count("log.csv cannot be written") == 2
    assert [row["step"] for row in t2mir.read_checkpoint(run)["log"]] == [3, 6]
    (run / "log.csv").rmdir()
    t2mir.train(short("dpt", data_folder, steps=7), run)
    assert steps_of(run) == [3, 6, 7]


def test_a_closed_terminal_costs_no_interval(data_folder, monkeypatch):
    """The checkpoint is written before the numbers are printed, which may fail."""

    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(t2mir.tqdm, "write", closed)
    with pytest.raises(BrokenPipeError):
        short_run("dpt", data_folder)
    assert steps_of(data_folder.parent / "run") == [3]


def test_scripts_run_without_docstrings():
    """With -OO Python removes them."""
    code = """
import sys
import collect, t2mir
import experiments.report
assert t2mir.__doc__ is None
sys.argv = ["script", "--help"]
for main in (collect.main, t2mir.main):
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0
"""
    command = [sys.executable, "-OO", "-c", code]
    ended = subprocess.run(command, check=False, cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("--env") >= 2


def test_foreign_letters_can_be_printed_everywhere():
    """Where the terminal has only ASCII they are shown by their numbers."""
    code = "import collect; collect.run_command(lambda: print('k\u00e4se'))"
    ended = run_python(code, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, "k\\xe4se\n")


def test_the_backend_of_a_notebook_does_no_harm():
    """A notebook sets MPLBACKEND for all processes that it starts, also where it is not installed."""
    environment = os.environ | {"MPLBACKEND": "module://of.a_notebook"}
    for flags in (["t2mir.py", "--resume", "none"], ["experiments/report.py", "none"]):
        ended = subprocess.run(
            [sys.executable, *flags],
            check=False,
            cwd=HERE,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ended.stderr.startswith("error: none"), ended.stderr
    for script in (HERE / "experiments").glob("*.py"):
        source = script.read_text()
        draws = "matplotlib" in source or "experiments.report" in source
        assert not draws or "MPLBACKEND" in source or script.name.startswith("test"), script


def test_another_envs_py_is_named(tmp_path):
    """A project that imports t2mir.py may have a file of this name."""
    (tmp_path / "envs.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import t2mir"
    ended = run_python(code)
    last = ended.stderr.splitlines()[-1]
    assert str(tmp_path / "envs.py") in last
    assert "give your own envs.py another name" in last


def test_a_missing_report_is_named_before_the_training(tmp_path):
    """Three files alone can train, but a run ends with a report."""
    for name in ("t2mir.py", "collect.py", "envs.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    command = [sys.executable, "t2mir.py"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch("error: No module named 'experiments'.*report.py\n", ended.stderr)
    assert not (tmp_path / "data").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data_folder):
    """Within 50 steps, long before the next evaluation, and no checkpoint is written."""
    with pytest.raises(BadInput, match="not finite at step 50: .*--lr"):
        short_run("dpt", data_folder, lr=1e22, steps=500, eval_every=500)
    assert not (data_folder.parent / "run" / "ckpt.pt").exists()


@pytest.mark.parametrize("mode, most, why", [("ad", 4, "guest"), ("ad", 6, ""), ("dpt", 5, "")])
def test_a_context_needs_its_episodes(mode, most, why, tmp_path):
    """AD has at most all own episodes of a task, DPT leaves one for the queries."""
    guest = None
    if why == "guest":
        guest = np.array([1, 0, 0, 1, 0, 0])
    given = {"env": "my_robot", "steps": 1}
    folder = own_data(tmp_path / "data", guest=guest)
    short_run(mode, folder, context=most, **given)
    with pytest.raises(BadInput, match=f"--context must be at most {most} "):
        short_run(mode, folder, context=most + 1, name="more", **given)


BAD_DATA = {
    "no experts": ({"expert_actions": None}, {}, "expert_actions"),
    "too few tasks": ({}, {"batch": 10}, "--batch must be at most 8"),
    "no tasks left": ({}, {"val_tasks": 4}, "--val-tasks 4 leaves no training task"),
    "few tasks left": ({}, {"val_tasks": 3}, "--batch must be at most 2"),
    "no arrays": ({"states": None}, {}, "states"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_does_not_fit_is_named(case, tmp_path):
    """In one line, and no run is left."""
    changed, given, message = BAD_DATA[case]
    folder = own_data(tmp_path / "data", **changed)
    with pytest.raises(BadInput, match=message) as caught:
        short_run("dpt", folder, env="my_robot", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


BAD_FLAGS = """
--env nope | nope.npz
--mode nope | --mode
--recipe nope | --recipe
--stepz 9 | --steps
--lr abc | 'abc'
--lr nan | --lr
--lr -1 | --lr
--lr inf | --lr
--steps 0 | --steps
--steps 1.5 | '1.5'
--steps | --steps
--warmup -1 | --warmup
--d-model 24 | --d-model
--n-heads 3 | --n-heads
--moe-layers 9 | --moe-layers
--moe-layers x | --moe-layers
--batch 7 | --batch
--batch 2 | --batch
--batch 10 | --batch
--top-k 1 | --top-k
--top-k 6 | --top-k
--dropout 1 | --dropout
--momentum 2 | --momentum
--stride 0 | --stride
--context 0 | --context
--queries 0 | --queries
--eval-episodes 0 | --eval-episodes
--dtype nope | nope
--device nope | --device
--seed 1180591620717411303424 | --seed
--seed -1 | --seed
--name .. | --name
--name a/../../b | --name
--name /tmp/b | --name
--env data/slider.npz | --env robot --data data
--env slider.npz | --env robot --data data
--env . | must be the name of a dataset
--mode ad --no-clean-targets | --no-guests
--val-tasks 9 | --val-tasks
word | word
--runs FILE --batch 8 | FILE
--resume none | none/ckpt.pt
--resume FOLDER | FOLDER/ckpt.pt
--resume none --lr 1 | none/ckpt.pt
--resume | --resume
"""


@pytest.mark.parametrize("case", BAD_FLAGS.strip().split("\n"))
def test_bad_flags_are_named_and_leave_no_run(case, data_folder, monkeypatch, capsys):
    """In one line of an error, or by the parser with exit code 2."""
    flags, said = case.split(" | ")
    monkeypatch.chdir(data_folder.parent)
    Path("FILE").write_bytes(b"no folder")
    Path("FOLDER").mkdir()
    with pytest.raises((BadInput, OSError, SystemExit)) as ended:
        call_main(monkeypatch, "--env", "slider", *flags.split())
    text = str(ended.value)
    if ended.type is SystemExit:
        assert ended.value.code == 2
        text = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    else:
        assert "\n" not in text
    assert said in text
    assert not list(Path().rglob("*.json"))


@pytest.mark.parametrize("flags, code", [("--data .", 1), ("--stepz 9", 2)])
def test_the_command_ends_with_its_code(flags, code, tmp_path):
    """Bad input is one line on stderr and code 1, a bad flag is code 2, and neither a traceback."""
    (tmp_path / "point_robot.npz").write_bytes(b"no dataset")
    command = [sys.executable, HERE / "t2mir.py", *flags.split()]
    ended = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    if code == 1:
        assert re.fullmatch(r"error: .*point_robot.npz.*\n", ended.stderr)


def text_of_help(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit):
        call_main(monkeypatch, *argv, "--help")
    return re.sub(r"[\s│']", "", capsys.readouterr().out)


@pytest.mark.parametrize("mode", MODES)
def test_help_has_every_flag_with_its_default(mode, monkeypatch, capsys):
    """And with its comment; the defaults are those of the chosen task family and mode."""
    monkeypatch.setenv("COLUMNS", "120")
    text = text_of_help(monkeypatch, capsys, "--mode", mode)
    c = t2mir.preset("point_robot", mode)
    source = Path(t2mir.__file__).read_text()
    for field in dataclasses.fields(t2mir.Flags):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)[1]
        assert f"--{field.name.replace('_', '-')}" in text
        value = getattr(c, field.name, field.default)
        if isinstance(value, tuple):
            value = " ".join(map(str, value))
        default = re.sub(r"[\s']", "", f"{comment} (default: {value})")
        assert default in text, field.name


def configs_of(monkeypatch, *argv):
    """The Config that the command line makes."""
    configs = []
    monkeypatch.setattr(t2mir, "train", lambda c, resume: configs.append(c))
    monkeypatch.setattr("experiments.report.report", lambda *where: None)
    call_main(monkeypatch, *argv)
    return configs[0]


@pytest.mark.parametrize("env, mode", list(itertools.product([*ENVS, "my_robot"], MODES)))
def test_flags_stand_on_top_of_the_presets(env, mode, monkeypatch):
    """First the mode's, then the family's `training`, then the flags, in any order."""
    flags = "--seed 3 --lr 1.5e-4 --no-token-moe --moe-layers 0 1"
    c = configs_of(monkeypatch, *flags.split(), "--env", env, "--mode", mode)
    expected = dataclasses.asdict(Config()) | t2mir.MODES[mode]
    expected |= ENVS.get(env, TaskVec).training[mode]
    expected |= {"env": env, "mode": mode, "seed": 3, "lr": 1.5e-4, "token_moe": False}
    assert dataclasses.asdict(c) == expected | {"moe_layers": (0, 1)}


@pytest.mark.parametrize(
    "env, mode", list(itertools.product(["point_robot", "cheetah_vel"], MODES))
)
def test_recipe_paper_sets_the_published_values(env, mode, monkeypatch):
    """All of PAPER, also where a family sets another one; a flag wins over it."""
    ours = dataclasses.asdict(configs_of(monkeypatch, "--env", env, "--mode", mode))
    argv = ["--env", env, "--mode", mode, "--recipe=paper", "--stride", "4", "--guests"]
    c = configs_of(monkeypatch, *argv, "--clean-targets")
    flags = {"stride": 4, "guests": True, "clean_targets": True}
    assert dataclasses.asdict(c) == ours | PAPER | flags


def test_imports_need_nothing_that_windows_lacks():
    """Without CDLL(None), sched_getaffinity and the module `resource` all is imported and runs."""
    code = """
import ctypes, os, sys, filelock, gymnasium, mujoco.rollout, torch, tqdm, tyro
sys.platform, ctypes.CDLL, sys.modules["resource"] = "win32", None, None
del os.sched_getaffinity
import envs, t2mir
print(envs.make_vec("point_robot", [[0.5, 0.5]]).reset(seed=0)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=HERE, check=True)
    assert done.stdout == b"(1, 2)\n"


# ---- Data and environments ------------------------------------------------------------------------

GYMNASIUM = {"cheetah_vel": "HalfCheetah-v5", "walker_param": "Walker2d-v5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny dataset of each family: mostly random actions, poor experts."""
    out = str(tmp_path_factory.mktemp("data"))
    small = {"out": out, "hidden": 16, "batch": 16, "copies": 2, "seed": 3, "history": 1.0}
    small["device"] = DEVICE
    tasks = {"train_tasks": 5, "test_tasks": 2}
    collect("point_robot", steps=200, random_steps=130, episodes=8, **tasks, **small)
    tasks = {"train_tasks": 2, "test_tasks": 1}
    for name in GYMNASIUM:
        collect(name, steps=400, random_steps=385, episodes=3, **tasks, **small)
    return out


def test_the_readmes_robot_acts():
    """Its example runs as it stands in a clone, and the stored agent finds the robot's goal."""
    chapter = (HERE / "README.md").read_text().split("## Act with your robot")[1]
    example = re.search("```python\n(.*?)```", chapter, re.DOTALL)[1]
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", example],
        check=False,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    returns = [float(x) for x in re.findall(r"-\d+\.\d+", ended.stdout)]
    assert len(returns) == 5
    assert -6 < min(returns[1:])  # a robot that stays where it is earns -18


class Robot(gymnasium.Env):
    """It moves like Point-Robot, but its motors take up to 5 volts."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-5.0, 5.0, (2,))

    def reset(self, seed=None, options=None):
        self.position = np.zeros(2, np.float32)
        return self.position, {}

    def step(self, volts):
        self.position += volts / 50
        return self.position, -np.linalg.norm(self.position - [0.6, 0.7]), False, False, {}


def test_a_robot_of_other_units_acts():
    """Wrapped as the README says, it finds its goal."""
    robots = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.wrappers.RescaleAction(Robot(), -1, 1)]
    )
    agent = t2mir.load_agent(HERE / "experiments" / "agents" / "point_robot-dpt")
    returns = evaluate(agent, robots, episodes=5)["rewards"].sum(-1)
    assert -6 < returns[0, 1:].min()


# ---- Environments --------------------------------------------------------------------------------


def plain_model(name, multipliers=()):
    """The model of Gymnasium's own environment, with its entries multiplied one by one."""
    model = gymnasium.make(GYMNASIUM[name]).unwrapped.model
    if len(multipliers) == 0:
        return model
    places = []
    for array in (model.body_mass, model.body_inertia, model.geom_friction, model.dof_damping):
        places += [(array, index) for index in np.ndindex(array.shape)]
    for (array, index), multiplier in zip(places, multipliers, strict=True):
        array[index] *= multiplier
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def plain_step(name, model, task, state, action):
    """One environment step as a loop over mj_step: data, observation, reward without penalty."""
    data = mujoco.MjData(model)
    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    data.ctrl[:] = action
    data.qacc_warmstart[:] = 0
    x = data.qpos[0]
    effort = sum(a**2 for a in action)
    if name == "cheetah_vel":
        for _ in range(5):
            mujoco.mj_step(model, data)
        mujoco.mj_kinematics(model, data)
        seen = [*data.qpos[1:], *data.qvel, *data.body("torso").xpos]
        return data, seen, -abs((data.qpos[0] - x) / 0.05 - task[0]) - 0.05 * effort
    for _ in range(4):
        mujoco.mj_step(model, data)
    seen = [*data.qpos[1:], *(min(max(v, -10), 10) for v in data.qvel)]
    return data, seen, (data.qpos[0] - x) / 0.008 + 1 - 0.001 * effort


def test_the_same_seed_draws_the_same_tasks():
    """A longer draw begins with the shorter one, and another seed draws other tasks."""
    for name, family in ENVS.items():
        tasks = sample_tasks(name, 20, seed=5)
        assert tasks.shape == (20, family.task_dim) and tasks.dtype == np.float64
        np.testing.assert_array_equal(sample_tasks(name, 7, seed=5), tasks[:7])
        assert not np.isin(sample_tasks(name, 7, seed=6), tasks).any()


def test_tasks_fill_their_ranges():
    """Goals, target velocities and logarithms of multipliers are uniform."""
    multipliers = sample_tasks("walker_param", 2000, seed=5)
    exponents = np.log(multipliers) / np.log([1.5] * 56 + [1.3] * 9)
    goals = sample_tasks("point_robot", 2000, seed=5)
    velocities = sample_tasks("cheetah_vel", 2000, seed=5)
    for tasks, low, high in ((goals, -1, 1), (velocities, 0, 3), (exponents, -3, 3)):
        assert low <= tasks.min() and tasks.max() <= high
        for column in tasks.T:
            quarters, _ = np.histogram(column, bins=4, range=(low, high))
            assert abs(quarters - 500).max() < 100  # five standard deviations


@pytest.mark.parametrize("name", ENVS)
def test_a_single_environment_equals_its_place_in_the_batch(name):
    """With the same actions, some outside the box, a whole episode is the same to the bit."""
    rng = np.random.default_rng(0)
    tasks = sample_tasks(name, 3, seed=1)
    vec = make_vec(name, tasks)
    first, _ = vec.reset(seed=1)
    assert len(np.unique(first[:, 0])) == 3  # the starts differ
    singles = [gymnasium.make(vec.id, task=task) for task in tasks]
    for i, env in enumerate(singles):
        env.reset(seed=0)
        env.unwrapped.vec.state = vec.state[i : i + 1].copy()
    for _ in range(vec.horizon):
        actions = rng.uniform(-1.3, 1.3, vec.action_space.shape)
        observations, rewards, _, truncated, _ = vec.step(actions)
        for i, env in enumerate(singles):
            observation, reward, _, cut, _ = env.step(np.clip(actions[i], -1, 1))
            np.testing.assert_array_equal(observation, observations[i])
            assert (reward, cut) == (rewards[i], truncated[i])


@pytest.mark.parametrize("name", GYMNASIUM)
def test_a_mujoco_step_equals_a_plain_loop(name, tmp_path, monkeypatch):
    """States, observations and rewards are those of mj_step, for walker on a scaled model too."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file about a deprecated attribute
    rng = np.random.default_rng(0)
    walker = name == "walker_param"
    tasks = np.array([[0.5], [2.5]])
    models = [plain_model(name), plain_model(name)]
    if walker:
        tasks = np.stack([np.ones(65), sample_tasks(name, 1, seed=2)[0]])
        models = [plain_model(name), plain_model(name, tasks[1])]
    vec = make_vec(name, tasks)
    vec.reset(seed=0)
    penalties = []
    for t in range(vec.horizon):
        if walker and t % 4 == 0:  # height and pitch are set to around the healthy bounds
            vec.state[:, 2] = rng.choice([0.75, 0.85, 1.5, 1.95, 2.05], 2)
            vec.state[:, 3] = rng.choice([-1.05, -0.95, 0, 0.95, 1.05], 2)
        before = vec.state.copy()
        actions = rng.uniform(-1, 1, vec.action_space.shape)
        observations, rewards, *_ = vec.step(actions)
        for i, model in enumerate(models):
            data, seen, reward = plain_step(name, model, tasks[i], before[i], actions[i])
            if walker:
                healthy = 0.8 < data.qpos[1] < 2 and -1 < data.qpos[2] < 1
                penalties.append(0 if healthy else 1)
                reward -= penalties[-1]
            np.testing.assert_array_equal(vec.state[i], [data.time, *data.qpos, *data.qvel])
            np.testing.assert_allclose(observations[i], seen, rtol=1e-6, atol=1e-6)
            assert rewards[i] == pytest.approx(reward, abs=1e-9)
    assert not walker or 0 < sum(penalties) < len(penalties)  # both cases occurred


def test_each_walker_has_its_own_multipliers():
    """The entries of the models are scaled by hand too; no multiplier reaches another task."""
    row = sample_tasks("walker_param", 1, seed=2)[0]
    vec = make_vec("walker_param", [np.ones(65), row, np.ones(65)])
    plain = plain_model("walker_param")
    expected = [plain, plain_model("walker_param", row), plain]
    derived = ("body_invweight0", "dof_invweight0")
    for own, model in zip(vec.models, expected, strict=True):
        for field in ("body_mass", "body_inertia", "geom_friction", "dof_damping", *derived):
            np.testing.assert_allclose(getattr(own, field), getattr(model, field), rtol=1e-12)


@pytest.mark.parametrize("name", GYMNASIUM)
def test_mujoco_steps_stay_close_to_gymnasiums(name, tmp_path, monkeypatch):
    """The solver's cold start makes no visible difference to Gymnasium's warm one in 20 steps."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    plain = gymnasium.make(GYMNASIUM[name]).unwrapped
    vec = make_vec(name, np.ones((1, ENVS[name].task_dim)))
    vec.reset(seed=0)
    plain.reset(seed=0)
    plain.set_state(vec.qpos[0], vec.qvel[0])
    for _ in range(20):
        action = rng.uniform(-1, 1, 6)
        observations, rewards, *_ = vec.step(action[None])
        observation, reward, _, _, info = plain.step(action)
        np.testing.assert_allclose(observations[0, : len(observation)], observation, atol=1e-3)
        if name == "cheetah_vel":
            reward = -abs(info["x_velocity"] - 1) - 0.05 * sum(action**2)
        assert rewards[0] == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize("name", ENVS)
def test_gymnasiums_checker_accepts_the_environment(name):
    check_env(gymnasium.make(ENVS[name].id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", ENVS)
def test_an_episode_ends_at_the_horizon_only(name):
    """A step before the first reset or after the last step is refused."""
    vec = make_vec(name, sample_tasks(name, 2, seed=0))
    actions = np.zeros(vec.action_space.shape)
    for _ in range(2):
        with pytest.raises(gymnasium.error.ResetNeeded):
            vec.step(actions)
        vec.reset()
        for t in range(1, vec.horizon + 1):
            _, _, terminated, truncated, _ = vec.step(actions)
            assert not terminated.any()
            assert truncated.tolist() == [t == vec.horizon] * 2


@pytest.mark.parametrize("name", ENVS)
def test_tasks_of_another_shape_are_refused(name):
    dim = ENVS[name].task_dim
    for wrong in (np.ones(dim), np.ones((2, dim + 1)), np.ones((0, dim))):
        with pytest.raises(ValueError, match="tasks must have shape"):
            make_vec(name, wrong)


def test_a_family_with_wrong_shapes_is_refused():
    """NumPy would repeat an observation or a reward of the wrong shape; both are named instead."""

    class Sees(PointRobot):
        def observe(self):
            return self.state[:, :1]

    class Advances(PointRobot):
        def advance(self, actions):
            return np.zeros((len(actions), 1))

    with pytest.raises(ValueError, match="observe must return shape"):
        Sees([[0.0, 1.0], [1.0, 0.0]]).reset(seed=1)
    vec = Advances([[0.0, 1.0], [1.0, 0.0]])
    vec.reset(seed=1)
    with pytest.raises(ValueError, match="advance must return shape"):
        vec.step(np.zeros((2, 2)))


def test_the_picture_of_point_robot_shows_goal_and_point():
    """The red spot lies where the goal is, and the blue spot where the point is."""
    env = gymnasium.make("t2mir/PointRobot-v0", task=[0.8, -0.5], render_mode="rgb_array")
    env.reset(seed=0)
    env.unwrapped.vec.state = np.array([[-0.3, 0.6]])
    image = env.render()
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8
    for channel, place in ((0, (0.8, -0.5)), (2, (-0.3, 0.6))):
        spot = (image.argmax(-1) == channel) & (image.min(-1) < 100)
        rows, columns = np.nonzero(spot)
        x = 3 * columns.mean() / 255 - 1.5
        y = 1.5 - 3 * rows.mean() / 255
        assert (x, y) == pytest.approx(place, abs=0.02)


def test_mujoco_pictures():
    """Both families draw a picture that changes in 20 steps; skipped where OpenGL is missing."""
    code = """
import sys, gymnasium, mujoco, numpy as np, envs
try:
    mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
except Exception:
    sys.exit(77)
for name in ("t2mir/CheetahVel-v0", "t2mir/WalkerParam-v0"):
    env = gymnasium.make(name, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    for _ in range(20):
        env.step(env.action_space.sample())
    assert first.shape == (256, 256, 3) and first.dtype == np.uint8 and first.std() > 5
    assert np.mean(env.render() != first) > 0.01
    env.close()
"""
    ended = run_python(code, MUJOCO_GL=os.environ.get("MUJOCO_GL", "egl"))
    if ended.returncode == 77:
        pytest.skip("no OpenGL")
    assert ended.returncode == 0, ended.stderr


def run_python(code, **environment):
    """Runs `code` in a process of its own."""
    command = [sys.executable, "-c", code]
    given = {"env": {**os.environ, **environment}, "cwd": HERE}
    return subprocess.run(command, check=False, capture_output=True, text=True, **given)


# ---- The agent -----------------------------------------------------------------------------------


def small_agent(obs_dim=3, act_dim=2, num=4, **given):
    """A SAC agent in float64 for `num` random tasks with rows of two numbers."""
    torch.manual_seed(0)
    given = {"hidden": 8, "dtype": "float64", "device": "cpu", **given}
    tasks = np.random.default_rng(0).normal(size=(num, 2)) * [1, 5] + [0, 3]
    return SAC(tasks, obs_dim, act_dim, settings_of("point_robot", **given)).double()


def slow_mlp(net, i, x):
    """Network i of a BatchedMLP for a single input, layer by layer."""
    last = len(net.weights) - 1
    for layer in range(last + 1):
        x = x @ net.weights[layer][i] + net.biases[layer][i, 0]
        if layer < last and net.norm:
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        if layer < last:
            x = x.relu()
    return x


def slow_policy(agent, state, task, noise):
    """An action and its log-density by torch's own distributions, for one state."""
    x = torch.cat([(state - agent.mean) / agent.std, agent.told[task]])
    mean, log_std = slow_mlp(agent.actor, 0, x).chunk(2)
    std = log_std.clamp(-5, 2).exp()
    squash = distributions.TanhTransform(cache_size=1)
    action = squash(mean + std * noise)
    density = distributions.TransformedDistribution(distributions.Normal(mean, std), squash)
    return action, density.log_prob(action).sum()


def slow_value(agent, net, state, task, action):
    """The lower value of the two critics in `net`, and both of them, for one state and action."""
    x = torch.cat([(state - agent.mean) / agent.std, agent.told[task], action])
    both = [slow_mlp(net, i, x)[0] for i in range(2)]
    return min(both), both


def slow_update(agent, optimizers, batch, policy):
    """SAC as in the paper by Haarnoja et al., one transition after the other."""
    s = agent.s
    weight = (1 - s.gamma) * s.temperature
    critic_loss = 0
    rows = zip(*batch[:-1], batch[-1][0], strict=True)
    for state, task, action, reward, discount, later, noise in rows:
        with torch.no_grad():
            next_action, log_prob = slow_policy(agent, later, task, noise)
            value, _ = slow_value(agent, agent.targets, later, task, next_action)
            target = (1 - s.gamma) * reward + discount * (value - weight * log_prob)
        for prediction in slow_value(agent, agent.critics, state, task, action)[1]:
            critic_loss += (prediction - target) ** 2 / len(batch[0])
    optimizers[0].zero_grad()
    critic_loss.backward()
    optimizers[0].step()

    if policy:
        actor_loss = 0
        for state, task, noise in zip(batch[0], batch[1], batch[-1][1], strict=True):
            action, log_prob = slow_policy(agent, state, task, noise)
            value, _ = slow_value(agent, agent.critics, state, task, action)
            actor_loss += (weight * log_prob - value) / len(batch[0])
        optimizers[1].zero_grad()
        actor_loss.backward()
        optimizers[1].step()

    for p, q in zip(agent.targets.parameters(), agent.critics.parameters(), strict=True):
        p.data = (1 - s.tau) * p.data + s.tau * q.data


@pytest.mark.parametrize("critic_norm", [False, True])
def test_an_update_is_that_of_soft_actor_critic(critic_norm):
    """Six updates of the batch and of its transitions one by one end at the same weights."""
    agent = small_agent(temperature=0.1, critic_norm=critic_norm)
    agent.update_normalisation(torch.randn(20, 3, dtype=double) * 3 + 1)
    slow = copy.deepcopy(agent)
    before = copy.deepcopy(agent)
    nets = (slow.critics, slow.actor)
    optimizers = [torch.optim.Adam(net.parameters(), lr=agent.s.lr) for net in nets]
    for step in range(6):
        states, later = torch.randn(2, 10, 3, dtype=double)
        rewards = torch.randn(10, dtype=double)
        actions = torch.rand(10, 2, dtype=double) * 2 - 1
        noise = torch.randn(2, 10, 2, dtype=double)
        discounts = torch.rand(10, dtype=double)
        batch = (states, torch.randint(4, (10,)), actions, rewards, discounts, later, noise)
        agent.update(*batch, policy=step % 2 == 0)
        slow_update(slow, optimizers, batch, policy=step % 2 == 0)
    moved = 0
    for p, q, old in zip(agent.parameters(), slow.parameters(), before.parameters(), strict=True):
        near(p.data, q.data, 1e-8)
        moved += (p.data - old.data).abs().max() > 1e-6
    assert (
        moved == 18
    )  # weights and biases of three layers: the actor's, the critics', the targets'


def test_the_density_of_the_policy_is_that_of_a_squashed_gaussian():
    """Actions and log-densities are those of torch's Normal behind a TanhTransform."""
    agent = small_agent()
    agent.actor.weights[-1].data *= 40
    states = torch.randn(5, 10, 3, dtype=double)
    noise = torch.randn(5, 10, 2, dtype=double)
    task = torch.randint(4, (5, 10))
    actions, log_prob = agent.act(states, task, noise)
    without_noise, _ = agent.act(states, task)
    for i, j in itertools.product(range(5), range(10)):
        action, density = slow_policy(agent, states[i, j], task[i, j], noise[i, j])
        near(actions[i, j], action, 1e-9)
        near(log_prob[i, j], density, 1e-6)
        mean, _ = slow_policy(agent, states[i, j], task[i, j], torch.zeros(2, dtype=double))
        near(without_noise[i, j], mean, 1e-9)
    _, log_std = agent.actor(agent.inputs(states, task).flatten(0, 1)).chunk(2, dim=-1)
    assert log_std.max() > 2 and log_std.min() < -5  # both bounds are met


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("n", [1, 3])
def test_values_are_those_of_the_discounted_sum(n, gamma):
    """Critics that are fitted to a constant reward of 2 value it at 2, with every n and gamma."""
    given = {"hidden": 32, "temperature": 0.0, "tau": 0.5, "lr": 1e-2}
    agent = small_agent(gamma=gamma, **given)
    states = torch.randn(40, 3, dtype=double)
    task = torch.randint(4, (40,))
    actions = torch.rand(40, 2, dtype=double) * 2 - 1
    rewards = torch.full((40,), 2.0 * sum(gamma**k for k in range(n)), dtype=double)
    discounts = torch.full((40,), gamma**n, dtype=double)
    for _ in range(300):
        noise = torch.randn(2, 40, 2, dtype=double)
        agent.update(states, task, actions, rewards, discounts, states, noise, policy=False)
    value = agent.value(agent.critics, states, task, actions).detach()
    near(value.mean(1), torch.full((2,), 2.0, dtype=double), 0.05)


def test_networks_see_normalised_states_and_tasks():
    """The statistics are the mean and deviation of all states, in whatever portions they came."""
    agent = small_agent(obs_dim=4, num=50)
    near(agent.told.mean(0), torch.zeros(2, dtype=double), 1e-6)
    near(agent.told.square().sum(1).mean(), torch.ones(1, dtype=double)[0], 1e-6)
    near(agent.told[:, 0].std(), agent.told[:, 1].std(), 1e-6)
    scale = torch.tensor([0.1, 1, 10, 0])
    stored = torch.randn(3, 5, 40, 4) * scale + torch.tensor([0.0, 1, -20, 0.7])
    for part in stored.double().split(2, dim=1):
        agent.update_normalisation(part)
    every = stored.double().flatten(0, 2)
    near(agent.mean, every.mean(0), 1e-4)
    near(agent.std, every.std(0, correction=0) + 0.01, 1e-3)
    x = agent.inputs(every[:2], torch.tensor([7, 9]))
    near(x[:, :4], (every[:2] - agent.mean) / agent.std, 1e-9)
    near(x[:, 4:], agent.told[[7, 9]], 1e-9)


def test_a_task_that_does_not_vary_tells_nothing():
    """A column that is the same in all tasks is 0, also with a single task."""
    s = settings_of("point_robot", hidden=4, device="cpu")
    assert (SAC(np.full((5, 2), 0.1), 2, 2, s).told == 0).all()
    assert (SAC(np.full((1, 1), 3.0), 2, 2, s).told == 0).all()
    one = np.array([[1e-9, 5.0], [3e-9, 5.0]])
    assert SAC(one, 2, 2, s).told.tolist() == [[-1, 0], [1, 0]]


def test_a_small_deviation_of_large_states_is_found():
    """In float32 the difference of two large sums of squares would be rounded."""
    agent = SAC(np.ones((2, 1)), 1, 1, settings_of("point_robot", hidden=4, device="cpu"))
    agent.update_normalisation(torch.randn(2, 50_000, 1) + 1000)
    near(agent.std, torch.full((1,), 1.01), 0.02)


def test_expert_and_returns_are_those_of_the_own_task(monkeypatch):
    """An agent that walks to the goal that it is told earns more than one that is told another."""
    run = tiny_run(5, steps=60, random_steps=40, copies=2, batch=4, train_tasks=3)
    for _ in range(3):
        run.run_round()
    goals = torch.from_numpy(run.tasks).float()

    def act(states, task, noise=None):
        return ((goals[task] - states) * 10).clamp(-1, 1), None

    monkeypatch.setattr(run.agent, "act", act)
    arrays = select(run)
    states = torch.from_numpy(arrays["states"])
    wanted = ((goals[:, None, None] - states) * 10).clamp(-1, 1)
    near(torch.from_numpy(arrays["expert_actions"]), wanted, 1e-6)
    steps = abs(run.tasks).max(1) * 10  # of 0.1 in each direction, until it is there
    assert (arrays["expert_return"] > -(steps + 2) * np.linalg.norm(run.tasks, axis=1)).all()
    assert (arrays["expert_return"] > arrays["random_return"] + 3).all()


def test_the_learning_rate_falls_to_zero_over_the_last_quarter():
    run = tiny_run(2, steps=160, random_steps=20, copies=1, batch=4)
    rates = []
    for _ in range(8):
        run.run_round()
        rates.append(run.agent.lr.item() / run.s.lr)
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 1, 1, 1, 0.5], atol=1e-6)


def test_a_spoiled_agent_writes_no_dataset(tmp_path, monkeypatch):
    """The last updates are not followed by a step whose states would show it."""
    run_round = Collection.run_round

    def spoiling(run):
        returns = run_round(run)
        if run.round == run.rounds:
            run.agent.actor.weights[0].data[:] = math.nan
        return returns

    monkeypatch.setattr(Collection, "run_round", spoiling)
    given = {"steps": 40, "random_steps": 20, "train_tasks": 2, "test_tasks": 1, "hidden": 4}
    with pytest.raises(BadInput, match="spoiled the agent"):
        collect("point_robot", out=tmp_path, device="cpu", **given)
    assert not list(tmp_path.glob("*.npz"))


def test_a_part_without_a_setting_is_not_continued(tmp_path):
    """It is of a version that had other settings."""
    run = tiny_run(2, steps=40, random_steps=20, copies=1, batch=4)
    run.run_round()
    run.save(tmp_path / "x.part")
    saved = torch.load(tmp_path / "x.part", weights_only=True)
    del saved["settings"]["recency"]
    torch.save(saved, tmp_path / "x.part")
    with pytest.raises(BadInput, match="another recency"):
        run.restore(tmp_path / "x.part")


# ---- Collection ----------------------------------------------------------------------------------


def tiny_run(num, **given):
    """A Collection in `num` tasks of Point-Robot, whose episodes have 20 steps."""
    return Collection(settings_of("point_robot", hidden=4, episodes=1, device="cpu", **given), num)


def settings_behind(path):
    """The settings that a dataset was collected with."""
    with np.load(path) as file:
        return json.loads(str(file["info"]))["settings"]


@pytest.mark.parametrize("name", ENVS)
def test_stored_transitions_are_the_simulators(name, folder):
    """From a stored state and action the simulator reaches the stored reward and next state."""
    data = load(f"{folder}/{name}.npz")
    N, E, T = data["rewards"].shape
    vec = make_vec(name, np.repeat(data["tasks"], E, axis=0))
    vec.reset(seed=0)
    compared = 0
    for t in range(T - 1):
        seen = data["states"][:, :, t].reshape(N * E, -1).astype(float)
        known = np.ones(N * E, bool)
        vec.state = seen
        if name in GYMNASIUM:  # (time, qpos, qvel); only cheetah shows the first of qpos, its x
            zero = np.zeros((N * E, 1))
            x = seen[:, 17:18] if name == "cheetah_vel" else zero
            vec.state = np.hstack([zero, x, seen[:, :17]])
        if name == "walker_param":  # velocities that are clipped are not known
            known = (abs(seen[:, 8:]) < 10).all(1)
        observations, rewards, *_ = vec.step(data["actions"][:, :, t])
        stored = data["rewards"][:, :, t].reshape(-1)
        later = data["states"][:, :, t + 1].reshape(N * E, -1)
        np.testing.assert_allclose(rewards[known], stored[known], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(observations[known], later[known], rtol=1e-2, atol=1e-2)
        compared += known.mean()
    assert compared > 0.2 * T


def test_stored_point_robots_move_by_a_tenth_of_their_actions(folder):
    data = load(f"{folder}/point_robot.npz")
    later = data["states"][:, :, :-1] + 0.1 * data["actions"][:, :, :-1]
    np.testing.assert_allclose(later, data["states"][:, :, 1:], atol=1e-6)
    distance = np.sqrt(((later - data["tasks"][:, None, None]) ** 2).sum(-1))
    np.testing.assert_allclose(-distance, data["rewards"][:, :, :-1], atol=1e-6)


@pytest.mark.parametrize("name", ENVS)
def test_a_dataset_has_the_listed_arrays(name, folder):
    family = ENVS[name]
    N, E = (7, 8) if name == "point_robot" else (3, 3)
    steps = (N, E, family.horizon)
    actions = ((*steps, family.act_dim), "float32")
    expected = {
        "states": ((*steps, family.obs_dim), "float32"),
        "actions": actions,
        "learner_actions": actions,
        "expert_actions": actions,
        "rewards": (steps, "float32"),
        "test": ((N,), "bool"),
        "guest": ((E,), "bool"),
        "tasks": ((N, family.task_dim), "float64"),
        "random_return": ((N,), "float64"),
        "expert_return": ((N,), "float64"),
    }
    data = load(f"{folder}/{name}.npz")
    assert data.pop("simulator") is True
    assert len(data.pop("fingerprint")) == 64
    assert {key: (x.shape, str(x.dtype)) for key, x in data.items()} == expected
    assert all(np.isfinite(x).all() for x in data.values())


@pytest.mark.parametrize("name", ENVS)
def test_tasks_and_settings_are_stored(name, folder):
    """The tasks are those of the seed, none of them is on both sides of the split."""
    data = load(f"{folder}/{name}.npz")
    train, test = (5, 2) if name == "point_robot" else (2, 1)
    assert data["test"].tolist() == [False] * train + [True] * test
    np.testing.assert_array_equal(data["tasks"], sample_tasks(name, train + test, seed=3))
    assert len(np.unique(data["tasks"], axis=0)) == train + test
    stored = settings_behind(f"{folder}/{name}.npz")
    gamma = {"point_robot": 0.9}.get(name, 0.98)
    assert (stored["env"], stored["seed"], stored["gamma"]) == (name, 3, gamma)


@pytest.mark.parametrize("name", ENVS)
def test_the_first_episode_is_uniformly_random(name, folder):
    data = load(f"{folder}/{name}.npz")
    random = data["actions"][:, 0]
    assert abs(random).max() <= 1 and abs(random.mean()) < 0.1
    assert random.var() == pytest.approx(1 / 3, abs=0.05)
    expert = data["expert_actions"][:, 0]
    assert abs(expert).max() <= 1 and expert.std() > 0
    assert abs(random - expert).mean() > 0.1


def test_stored_episodes_are_evenly_spaced_over_the_run(folder, tmp_path):
    """The episodes are found, in order, in the same run with all of its episodes stored."""
    few = load(f"{folder}/point_robot.npz")
    given = settings_behind(f"{folder}/point_robot.npz") | {"out": str(tmp_path), "episodes": 20}
    every = load(collect(given.pop("env"), **given))
    same = (few["actions"][:, :, None] == every["actions"][:, None]).all((0, 3, 4))  # (few, all)
    assert (same.sum(1) == 1).all()
    places = same.argmax(1)
    rounds = places // 2
    assert (np.diff(rounds) >= 0).all() and rounds[0] == 0 and rounds[-1] >= 8
    assert max(np.bincount(rounds)) == 1
    assert np.bincount(places % 2).tolist() == [4, 4]  # the two copies take turns
    for name in ("expert_actions", "learner_actions", "rewards", "states"):
        np.testing.assert_array_equal(few[name], every[name][:, places])
    np.testing.assert_array_equal(few["guest"], every["guest"][places])


def test_a_stopped_collection_goes_on_as_if_it_had_not_stopped(folder, tmp_path, monkeypatch):
    """It is stopped twice, once between two saves and once right after a save."""
    given = settings_behind(f"{folder}/point_robot.npz") | {"out": str(tmp_path)}
    name = given.pop("env")
    run_round = Collection.run_round
    rounds = []

    def stopping(run):
        if len(rounds) in (5, 9):
            rounds.append("stop")
            raise KeyboardInterrupt
        returns = run_round(run)
        rounds.append(run.round)
        monkeypatch.setattr("collect.SAVE_EVERY", -1 if run.round in (2, 4, 7) else 1000)
        return returns

    monkeypatch.setattr(Collection, "run_round", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(name, **given)
        assert not (tmp_path / "point_robot.npz").exists()
    with pytest.raises(BadInput, match="another lr and gamma"):
        collect(name, **given | {"lr": 1.0, "gamma": 0.5})
    again = load(collect(name, **given))
    assert rounds == [1, 2, 3, 4, 5, "stop", 5, 6, 7, "stop", 8, 9, 10]
    assert not (tmp_path / "point_robot.part").exists()
    whole = load(f"{folder}/point_robot.npz")
    assert again["guest"].sum() == 2  # one of them comes from the saved part
    for key, array in whole.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


def test_a_finished_dataset_is_not_collected_over(folder, tmp_path):
    with pytest.raises(BadInput, match="point_robot.npz exists"):
        collect("point_robot", out=folder)
    (tmp_path / "point_robot").mkdir()
    with pytest.raises(BadInput, match="point_robot exists"):
        collect("point_robot", out=tmp_path)


def who_acts(run, monkeypatch):
    """The agent, told task i, answers i + 2, which no random action is, and does not learn."""

    def act(states, task, noise=None):
        return (task[..., None] + 2.0).expand(*states.shape[:-1], 2), None

    monkeypatch.setattr(run.agent, "act", act)
    monkeypatch.setattr(run.agent, "update", lambda *batch, policy: None)


def test_guests_visit_tasks_of_their_own_split(monkeypatch):
    """In the last copy the agent acts for another task of the same split, else for its own."""
    run = tiny_run(9, steps=100, random_steps=20, copies=3, batch=4, train_tasks=5)
    who_acts(run, monkeypatch)
    train_visits = set()
    test_visits = set()
    for _ in range(5):
        run.run_round()
    for r in range(1, 5):
        actor = run.actions[:, 3 * r : 3 * r + 3] - 2  # (9, 3, 20, 2)
        assert (actor == actor[:, :, :1, :1]).all()
        own = torch.arange(9.0)
        learner = run.learner_actions[:, 3 * r : 3 * r + 3]
        assert (learner == own[:, None, None, None] + 2).all()
        assert (actor[:, :2, 0, 0] == own[:, None]).all()
        guests = actor[:, 2, 0, 0].tolist()
        assert sorted(guests[:5]) == [0, 1, 2, 3, 4]
        assert sorted(guests[5:]) == [5, 6, 7, 8]
        train_visits.add(tuple(guests[:5]))
        test_visits.add(tuple(guests[5:]))
    assert len(train_visits) > 2 and len(test_visits) > 2  # the rounds differ


@pytest.mark.parametrize("copies", [2, 3])
def test_the_first_of_three_copies_acts_without_noise(copies, monkeypatch):
    """Of two copies none does: the second one has a guest, so the first one must explore."""
    run = tiny_run(2, steps=40, random_steps=20, copies=copies, batch=4)

    def act(states, task, noise=None):
        return torch.zeros(*states.shape[:2], 2) if noise is None else noise, None

    monkeypatch.setattr(run.agent, "act", act)
    monkeypatch.setattr(run.agent, "update", lambda *batch, policy: None)
    for _ in range(2):
        run.run_round()
    silent = (run.actions[:, copies:] == 0).flatten(2).all(2).all(0)
    assert silent.tolist() == [copies == 3] + [False] * (copies - 1)


def test_a_copy_repeats_its_random_actions():
    """Copy c draws a random action in every 2^c-th step."""
    run = tiny_run(2, steps=40, random_steps=20, copies=4, batch=4)
    run.run_round()
    for c, t in itertools.product(range(4), range(1, 20)):
        repeated = (run.actions[:, c, t] == run.actions[:, c, t - 1]).all()
        assert repeated == (t % 2**c != 0)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_episodes_with_guests_are_recorded(copies, monkeypatch):
    """A guest acts in the last of several copies, in each episode with an action of the agent."""
    run = tiny_run(4, steps=100, random_steps=30, copies=copies, batch=4, train_tasks=2)
    who_acts(run, monkeypatch)
    for _ in range(5):
        run.run_round()
    expected = []
    for episode in range(5 * copies):
        agent_acts = bool((run.actions[:, episode] >= 2).any())
        last_copy = episode % copies == copies - 1
        expected.append(copies > 1 and last_copy and agent_acts)
    assert run.guest.tolist() == expected
    assert copies == 1 or expected.count(True) == 4  # the second round is random in part


def test_the_dataset_says_what_was_recorded_of_guests():
    """Any record is stored, so that nobody works it out a second time."""
    given = {"steps": 100, "random_steps": 99, "hidden": 4, "episodes": 20, "history": 1.0}
    given["device"] = DEVICE
    run = Collection(settings_of("point_robot", **given), 3)
    run.guest[:] = torch.tensor([True, True, False, True, False] * 4)
    assert select(run)["guest"].tolist() == run.guest.tolist()


def numbered_run(num, **given):
    """A Collection that is filled by hand: a state tells its episode and step, and its task."""
    run = tiny_run(num, **given)
    episode = torch.arange(run.states.shape[1])[:, None]
    run.states[..., 0] = episode * 21 + torch.arange(21)
    run.states[..., 1] = torch.arange(num)[:, None, None]
    run.actions.uniform_(-1, 1)
    run.rewards.normal_()
    return run


@pytest.mark.parametrize("n", [1, 3])
def test_updates_draw_stored_steps_of_all_tasks(n):
    """All steps before the given one are drawn about equally often, with what follows them."""
    run = numbered_run(2, steps=100, copies=3, batch=6000, random_steps=99, n_step=n)
    # Step 7 of round 1 comes next.
    states, task, actions, rewards, discounts, next_states, noise = run.sample(27)
    drawn = Counter()
    for b in range(6000):
        number, owner = states[b].int().tolist()
        episode, t = divmod(number, 21)
        drawn[owner, episode, t] += 1
        assert owner == task[b]
        if b > 600:
            continue
        stored = 20 if episode < 3 else 7  # steps of its episode
        end = min(t + n, stored)
        total = sum(run.s.gamma ** (k - t) * run.rewards[owner, episode, k] for k in range(t, end))
        assert next_states[b].tolist() == [episode * 21 + end, owner]
        assert (actions[b] == run.actions[owner, episode, t]).all()
        near(rewards[b], total, 1e-5)
        assert discounts[b].item() == pytest.approx(run.s.gamma ** (end - t), rel=1e-5)
    first = itertools.product(range(2), range(3), range(20))
    second = itertools.product(range(2), range(3, 6), range(7))
    assert drawn.keys() == {*first, *second}
    assert min(drawn.values()) > 15 and max(drawn.values()) < 70  # 37 are expected
    assert noise.shape == (2, 6000, 2)


@pytest.mark.parametrize("recency", [1.0, 4.0])
def test_ages_of_draws_follow_the_recency(recency):
    """An age is below a fraction x of the run so far with probability x^(1 / recency)."""
    run = numbered_run(1, steps=8000, copies=1, batch=20_000, random_steps=1, recency=recency)
    number = run.sample(7990)[0][:, 0]
    step = number // 21 * 20 + number % 21
    age = (7990 - step) / 7990
    assert age.min() > 0 and age.max() <= 1
    for x in (0.001, 0.01, 0.1, 0.3, 0.6, 0.9):
        near((age <= x).float().mean(), torch.tensor(x ** (1 / recency)), 0.015)


def test_the_agent_learns_as_often_as_the_settings_say(monkeypatch):
    """`updates` times after each step that is not random; in every second one the actor learns."""
    run = tiny_run(2, steps=40, random_steps=27, copies=1, batch=4, updates=3)
    policies = []
    monkeypatch.setattr(run.agent, "update", lambda *batch, policy: policies.append(policy))
    for _ in range(2):
        run.run_round()
    assert policies == [i % 2 == 0 for i in range(27 * 3, 40 * 3)]


def test_a_diverging_collection_writes_no_dataset(tmp_path, monkeypatch):
    """It is found in the states and, where these do not depend on the actions, in the actions."""

    class Idle(PointRobot):
        def advance(self, actions):
            return np.zeros(len(actions))

    monkeypatch.setitem(ENVS, "idle", Idle)
    given = {"steps": 100, "random_steps": 20, "train_tasks": 2, "test_tasks": 1}
    given["device"] = DEVICE
    for name in ("point_robot", "idle"):
        with pytest.raises(BadInput, match="non-finite.*--lr"):
            collect(name, lr=1e10, out=tmp_path, **given)
    assert not list(tmp_path.glob("*.npz"))


# ---- Settings ------------------------------------------------------------------------------------


def test_settings_are_the_defaults_then_the_familys_then_the_given_ones(monkeypatch):
    class Changed(PointRobot):
        collecting = TaskVec.collecting | {"lr": 0.5, "batch": 7}

    monkeypatch.setitem(ENVS, "changed", Changed)
    s = settings_of("changed", batch=9, device="cpu", dtype="float32")
    expected = Settings(env="changed", device="cpu", dtype="float32")
    assert (expected.lr, expected.batch) == (2e-3, 256)
    assert s == dataclasses.replace(expected, lr=0.5, batch=9)


def test_what_a_family_changes_are_fields():
    """Every family has settings for both modes, and none of them has a misspelt name."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    for name, family in ENVS.items():
        assert family.collecting.keys() <= fields - {"env"}
        assert family.training.keys() == {"ad", "dpt"}
        settings_of(name)  # and together they make sense


@pytest.mark.parametrize(
    "given",
    [
        {"steps": -5},
        {"steps": math.nan},
        {"copies": 0},
        {"copies": 63},
        {"hidden": 0},
        {"batch": -1},
        {"updates": 0},
        {"n_step": 0},
        {"random_steps": 0},
        {"random_steps": 3300},
        {"train_tasks": 0},
        {"test_tasks": 0},
        {"episodes": 0},
        {"lr": math.nan},
        {"lr": -1},
        {"lr": math.inf},
        {"recency": 0},
        {"gamma": 1},
        {"gamma": 1.5},
        {"tau": 2},
        {"history": 1.1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"seed": -1},
        {"seed": 10**13},
        {"env": "nope"},
        {"device": "nope"},
        {"device": "mps"},
        {"device": "meta"},
        {"device": "cuda:x"},
        {"device": "cuda:99"},
    ],
    ids=str,
)
def test_settings_without_sense_are_named_in_one_line(given):
    with pytest.raises(BadInput, match=f"--{next(iter(given))} ") as caught:
        Settings(**given)
    assert "\n" not in str(caught.value)


def test_bounds_of_the_settings_are_allowed():
    Settings(
        temperature=0, tau=1, history=1, gamma=0.9999, copies=62, seed=10**12, updates=1, n_step=1
    )


def test_the_folder_may_be_a_path():
    """The settings are written as JSON, where a Path would only fail at the end."""
    assert Settings(out=Path("data")) == Settings(out="data")


def test_auto_is_a_device_that_works():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto") == expected
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "flags, device, dtype",
    [
        ("", "cuda", "bfloat16"),
        ("--device cpu", "cpu", "float32"),
        ("--device cpu --dtype bfloat16", "cpu", "bfloat16"),
        ("--dtype float32", "cuda", "float32"),
    ],
)
def test_the_type_follows_the_device_that_is_asked_for(flags, device, dtype, monkeypatch):
    """On a machine with a GPU and a CPU without instructions for bfloat16."""
    collected = []
    for name, fake in (
        ("collect", lambda name, **settings: collected.append(settings)),
        ("pick_device", lambda name: "cuda" if name == "auto" else name),
    ):
        monkeypatch.setattr(collect_module, name, fake)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(sys, "argv", ["collect.py", *flags.split()])
    collect_module.main()
    assert (collected[0]["device"], collected[0]["dtype"]) == (device, dtype)


def test_flags_stand_on_top_of_the_familys_settings(monkeypatch):
    collected = []
    monkeypatch.setattr(collect_module, "collect", lambda name, **s: collected.append((name, s)))
    flags = "--lr 0.25 --env walker_param --out x --device cpu"
    monkeypatch.setattr(sys, "argv", ["collect.py", *flags.split()])
    collect_module.main()
    given = {"lr": 0.25, "out": "x", "device": "cpu"}
    expected = dataclasses.asdict(settings_of("walker_param", **given))
    assert collected == [(expected.pop("env"), expected)]
    assert expected["gamma"] == 0.98


def test_importing_changes_nothing_in_the_process():
    """Neither the allocator's settings nor a closed stderr matter before `collect` is called."""
    code = """
import ctypes, sys
asked = []
class Spy(ctypes.CDLL):
    def __getattr__(self, name):
        asked.append(name)
        return super().__getattr__(name)
ctypes.CDLL = Spy
sys.stderr.close()
import collect
print("mallopt" in asked)
collect.keep_freed_memory()
print("mallopt" in asked)
"""
    ended = run_python(code)
    assert ended.returncode == 0
    assert ended.stdout.split() == ["False", str(sys.platform == "linux")]


# ---- Files ---------------------------------------------------------------------------------------


def test_a_claimed_path_is_refused(tmp_path):
    """The claim ends with its block."""
    with (
        claim(tmp_path / "point_robot.npz"),
        pytest.raises(BadInput, match="in use by another process"),
    ):
        collect("point_robot", out=tmp_path)
    with claim(tmp_path / "point_robot.npz"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_said_and_used(code, tmp_path, monkeypatch):
    """Some network drives have none. Other errors are errors."""

    def no_locks(lock):
        raise OSError(code, "no locks")

    monkeypatch.setattr(collect_module.FileLock, "acquire", no_locks)
    with pytest.warns(UserWarning, match="no locks here.*path"), claim(tmp_path / "path"):
        (tmp_path / "path").write_text("written")
    code = errno.EACCES
    with pytest.raises(OSError, match="no locks"), claim(tmp_path / "path"):
        pass


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(error, tmp_path, monkeypatch):
    """Nobody should delete a good file because of a message."""

    def fails(*args, **kwargs):
        raise error

    (tmp_path / "point_robot.part").write_bytes(b"good")
    (tmp_path / "robot.npz").write_bytes(b"good")
    (tmp_path / "ckpt.pt").write_bytes(b"good")
    monkeypatch.setattr(np, "load", fails)
    monkeypatch.setattr(torch, "load", fails)
    sizes = {"train_tasks": 2, "test_tasks": 1, "hidden": 4, "device": "cpu"}
    for read in (
        lambda: load(tmp_path / "robot.npz"),
        lambda: t2mir.read_checkpoint(tmp_path),
        lambda: collect("point_robot", out=tmp_path, **sizes),
    ):
        with pytest.raises(BadInput, match="cannot be read") as caught:
            read()
        assert "damaged" not in str(caught.value)
        assert "delete" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a checkpoint", b"x" * 1000])
def test_a_damaged_part_of_a_collection_is_named(content, tmp_path):
    (tmp_path / "point_robot.part").write_bytes(content)
    with pytest.raises(BadInput, match="point_robot.part is damaged.*delete it") as caught:
        collect("point_robot", out=tmp_path, train_tasks=2, test_tasks=1, hidden=4, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """With a limit of 50,000 bytes per file a larger write fails in one line."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(BadInput, match=r"file cannot be written \(.*File too large") as caught:
            write_atomically(path, lambda file: torch.save(torch.zeros(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert "unexpected pos" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- Reading a dataset ---------------------------------------------------------------------------


RNG = np.random.default_rng(0)
OWN = {  # a robot of one's own: 4 tasks, 3 episodes of 7 steps
    "states": RNG.normal(size=(4, 3, 7, 37)).astype(np.float32),
    "actions": RNG.uniform(-1, 1, (4, 3, 7, 5)).astype(np.float32),
    "rewards": RNG.normal(size=(4, 3, 7)).astype(np.float32),
    "test": np.array([False, False, False, True]),
    "expert_actions": RNG.uniform(-1, 1, (4, 3, 7, 5)).astype(np.float32),
    "guest": np.array([False, True, False]),
}
MOVES = RNG.integers(0, 4, (4, 3, 7)).astype(np.int8)
DISCRETE = OWN | {"actions": MOVES, "expert_actions": MOVES[:, :, ::-1]}


def write_folder(path, arrays):
    path.mkdir()
    for name, x in arrays.items():
        np.save(path / f"{name}.npy", x)


def reload(path, arrays, **changed):
    """What `load` returns of `arrays`, with some of them changed, or left out if they are None."""
    np.savez(path / "robot.npz", **{k: x for k, x in (arrays | changed).items() if x is not None})
    return load(path / "robot.npz")


def test_loaded_arrays_are_the_written_ones(tmp_path):
    data = reload(tmp_path, OWN)
    assert data.pop("simulator") is False
    assert data.keys() - {"fingerprint"} == OWN.keys()  # nothing is added
    for name, x in OWN.items():
        np.testing.assert_array_equal(data[name], x)
        assert data[name].dtype == x.dtype


def test_four_arrays_are_enough(tmp_path):
    data = reload(tmp_path, OWN, expert_actions=None, guest=None)
    assert data.keys() == {"rewards", "states", "actions", "test", "fingerprint", "simulator"}


def test_the_familys_data_needs_its_tasks_for_a_simulator(folder, tmp_path):
    with np.load(f"{folder}/point_robot.npz") as file:
        arrays = dict(file)
    del arrays["random_return"]
    np.savez(tmp_path / "point_robot.npz", **arrays)
    assert load(tmp_path / "point_robot.npz")["simulator"] is False


@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize("arrays", [OWN, DISCRETE], ids=["box", "discrete"])
def test_a_folder_equals_the_file(suffix, arrays, tmp_path):
    """It is found under its own name and, where there is no such file, under the file's name."""
    file = reload(tmp_path, arrays)
    (tmp_path / "robot.npz").unlink()
    write_folder(tmp_path / "robot", arrays)
    mapped = load(f"{tmp_path}/robot{suffix}")
    assert mapped.keys() == file.keys()
    for name, x in file.items():
        np.testing.assert_array_equal(mapped[name], x)


def test_a_familys_folder_has_a_simulator(folder, tmp_path):
    with np.load(f"{folder}/point_robot.npz") as file:
        write_folder(tmp_path / "point_robot", file)
    whole = load(f"{folder}/point_robot.npz")
    mapped = load(tmp_path / "point_robot")
    assert mapped["simulator"] is True
    assert mapped["fingerprint"] == whole["fingerprint"]


def test_the_path_of_a_dataset(tmp_path):
    """The folder if it exists, else the file. Which one is meant is unknown if both exist."""
    file = tmp_path / "robot.npz"
    assert dataset_path(tmp_path, "robot") == file
    write_folder(tmp_path / "robot", {})
    assert dataset_path(str(tmp_path), "robot") == tmp_path / "robot"
    file.touch()
    for name in ("robot", "robot.npz"):
        with pytest.raises(BadInput, match="there are both"):
            load(tmp_path / name)


def big_arrays():
    """Arrays of 20 tasks and about 13 MB."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(20, 10, 200, 60)).astype(np.float32)
    return {
        "states": states,
        "actions": np.clip(states[..., :10], -1, 1),
        "rewards": states[..., 0],
        "test": np.arange(20) > 15,
    }


def peak_of_load(path):
    """The most memory that `load` allocates, in bytes."""
    tracemalloc.start()
    try:
        load(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_file_is_in_memory_once(tmp_path):
    """At its peak `load` allocates less than 1.3 times the size of a float32 file."""
    arrays = big_arrays()
    size = sum(x.nbytes for x in arrays.values())
    np.savez(tmp_path / "robot.npz", **arrays)
    assert size < peak_of_load(tmp_path / "robot.npz") < 1.3 * size


def test_a_folder_is_mapped_and_not_read(tmp_path):
    arrays = big_arrays()
    size = sum(x.nbytes for x in arrays.values())
    write_folder(tmp_path / "robot", arrays)
    assert peak_of_load(tmp_path / "robot") < 0.1 * size
    data = load(tmp_path / "robot")
    assert all(isinstance(data[name], np.memmap) for name in arrays)


def test_a_mapped_file_is_never_written_to(tmp_path, recwarn):
    """torch takes a mapped array without a warning, and what is written stays in memory."""
    write_folder(tmp_path / "robot", OWN)
    torch.from_numpy(load(tmp_path / "robot")["states"]).fill_(0)
    np.testing.assert_array_equal(load(tmp_path / "robot")["states"], OWN["states"])
    assert len(recwarn) == 0


def test_the_same_arrays_have_the_same_fingerprint(tmp_path):
    """Compression, order in the file, memory order, byte order and `info` do not matter."""
    arrays = OWN
    expected = reload(tmp_path, arrays)["fingerprint"]
    with open(tmp_path / "robot.npz", "wb") as file:
        np.savez_compressed(file, **dict(reversed(arrays.items())))
    assert load(tmp_path / "robot.npz")["fingerprint"] == expected
    for x in (np.asfortranarray(arrays["states"]), arrays["states"].astype(">f4")):
        assert reload(tmp_path, arrays, states=x)["fingerprint"] == expected
    assert reload(tmp_path, arrays, info="of another day")["fingerprint"] == expected


def test_other_arrays_have_another_fingerprint(tmp_path):
    """One changed value, another type, name or shape and swapped tasks are other data."""
    arrays = {name: x for name, x in OWN.items() if name != "guest"}
    seen = {reload(tmp_path, arrays)["fingerprint"]}
    for name, x in arrays.items():
        other = x.copy()
        other.flat[-2] = not other.flat[-2] if x.dtype == bool else other.flat[-2] / 2
        seen.add(reload(tmp_path, arrays, **{name: other})["fingerprint"])
    expert = arrays["expert_actions"]
    renamed = {"expert_actions": None, "learner_actions": expert}
    swapped = {"states": arrays["states"][[1, 0, 2, 3]]}
    wider = {"rewards": arrays["rewards"].astype(np.float64)}
    longer = {name: x.reshape(4, 7, 3, *x.shape[3:]) for name, x in arrays.items() if x.ndim > 1}
    for changed in (renamed, swapped, wider, longer, {"expert_actions": None}):
        seen.add(reload(tmp_path, arrays, **changed)["fingerprint"])
    assert len(seen) == 1 + len(arrays) + 5


def test_float64_is_kept_in_states_and_rewards(tmp_path):
    """Positions of 4.5e6 that differ by 1 / 16 stay apart, which float32 cannot tell."""
    far = OWN["states"].astype(np.float64)
    far[..., 0] = 4.5e6 + np.arange(7) / 16
    data = reload(tmp_path, OWN, states=far, rewards=far[..., 0])
    assert np.unique(far[..., 0].astype(np.float32)).size < 7
    np.testing.assert_array_equal(data["states"], far)
    np.testing.assert_array_equal(data["rewards"], far[..., 0])


@pytest.mark.parametrize("dtype", ["float16", "int8", "int64", ">i2", "longdouble", "<u4"])
def test_other_types_become_float32_or_float64(dtype, tmp_path):
    """States and rewards float64 if float32 cannot hold the type, as with the counts of an encoder.

    Integers with an axis of actions are values in the box, and not discrete.
    """
    whole = {name: abs(x).round().astype(dtype) for name, x in OWN.items() if x.ndim > 2}
    for name in ("states", "rewards"):
        if np.dtype(dtype).kind in "iu":
            whole[name][..., 0] = np.iinfo(dtype).max
    data = reload(tmp_path, OWN, **whole)
    for name, x in whole.items():
        wanted = np.float32
        if name in ("states", "rewards") and dtype in ("int64", "longdouble", "<u4"):
            wanted = np.float64
        assert data[name].dtype == wanted
        np.testing.assert_array_equal(data[name], x.astype(np.float64))


def test_float64_actions_become_float32(tmp_path):
    actions = OWN["actions"].astype(np.float64)
    assert reload(tmp_path, OWN, actions=actions)["actions"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", ">i4"])
def test_discrete_actions_keep_their_type(dtype, tmp_path):
    arrays = DISCRETE
    actions = arrays["actions"].astype(dtype)
    data = reload(tmp_path, arrays, actions=actions, learner_actions=actions)
    for name in ("actions", "learner_actions"):
        np.testing.assert_array_equal(data[name], actions)
        assert data[name].dtype == np.dtype(dtype).newbyteorder("=")
    assert data["expert_actions"].dtype == np.int8


@pytest.mark.parametrize("name", ["test", "guest"])
def test_flags_may_be_0_and_1(name, tmp_path):
    """They become bool; other numbers are refused."""
    flags = OWN[name]
    for dtype in (np.int64, np.float32, np.uint8):
        data = reload(tmp_path, OWN, **{name: flags.astype(dtype)})
        assert data[name].dtype == bool
        np.testing.assert_array_equal(data[name], flags)
    for wrong in (flags * 2, flags - 1.0, flags * np.nan):
        with pytest.raises(BadInput, match=f"`{name}` must be bool, or hold only 0 and 1"):
            reload(tmp_path, OWN, **{name: wrong})


def test_arrays_that_are_not_used_are_not_read(tmp_path):
    """Objects that NumPy refuses to read do no harm, not even as the names of one's own tasks.

    They are named, because the name of an array may be misspelt, or need an exercise's patch.
    """
    words = np.array([{}, "left", None, 4], dtype=object)
    with pytest.warns(UserWarning, match="arrays that are not used: lengths, notes$"):
        data = reload(tmp_path, OWN, notes=words, lengths=words, info=words, tasks=words)
    write_folder(tmp_path / "folder", OWN | {"lengths": np.ones(3)})
    with pytest.warns(UserWarning, match="arrays that are not used: lengths$"):
        load(tmp_path / "folder")
    assert data.keys() - {"fingerprint", "simulator"} == OWN.keys()


STATES = OWN["states"]
ACTED = OWN["actions"]
REWARDS = OWN["rewards"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"test": None}, "has no array `test`"),
        ({"states": None}, "has no array `states`"),
        ({"rewards": np.zeros((4, 3))}, r"`rewards` must have shape \(N E T\)"),
        ({"rewards": np.zeros((4, 0, 7))}, "`rewards` must have shape .* at least 1"),
        ({"states": np.array(1.0)}, r"`states` must have shape \(N E T obs\)"),
        ({"states": np.zeros((4, 3, 8, 37))}, r"\(N E T obs\) = \(4, 3, 7, 37\), not \(4, 3, 8"),
        ({"expert_actions": STATES}, "`expert_actions` must have shape"),
        ({"guest": np.zeros(4)}, "`guest` must have shape"),
        ({"states": STATES * np.nan}, "`states` has non-finite values"),
        ({"states": np.full(STATES.shape, 1e39)}, "`states` has non-finite values in float32"),
        ({"rewards": REWARDS - np.inf}, "`rewards` has non-finite values"),
        ({"actions": ACTED + 1.1}, r"`actions` must lie in \[-1, 1\]"),
        ({"actions": ACTED - 1.1}, r"`actions` must lie in \[-1, 1\]"),
        ({"actions": ACTED * np.nan}, "`actions` has non-finite values"),
        ({"expert_actions": ACTED * 2}, "`expert_actions` must lie in"),
        ({"actions": REWARDS}, "`actions` must have shape .* integers"),
        ({"rewards": REWARDS * 1j}, "`rewards` must hold real numbers"),
        ({"rewards": REWARDS.astype(str)}, "`rewards` must hold real numbers"),
        ({"rewards": REWARDS.astype(object)}, "damaged or not a dataset"),
        ({"test": np.zeros(4)}, "`test` must mark some of the tasks"),
        ({"test": np.ones(4)}, "`test` must mark some of the tasks"),
        ({"test": np.arange(5) > 3}, r"`test` must have shape \(N\) = \(4,\)"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_broken_array_is_named_in_one_line(form, changed, message, tmp_path, recwarn):
    arrays = {k: x for k, x in (OWN | changed).items() if x is not None}
    with pytest.raises(BadInput, match=message) as caught:
        if form == "file":
            reload(tmp_path, arrays)
        else:
            write_folder(tmp_path / "robot", arrays)
            load(tmp_path / "robot")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"actions": MOVES - 1}, "`actions` must hold integers from 0"),
        ({"expert_actions": MOVES * 1.0}, "`expert_actions` must hold integers"),
        ({"expert_actions": MOVES[..., None]}, "`expert_actions` must have shape"),
        ({"learner_actions": MOVES - 1}, "`learner_actions` must hold integers"),
    ],
)
def test_discrete_actions_are_checked(changed, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        reload(tmp_path, DISCRETE, **changed)


@pytest.mark.parametrize("dtype", [int, np.uint8])
def test_integers_that_may_be_discrete_are_not_taken_for_continuous(dtype, tmp_path):
    """Buttons 0 and 1 of shape (N, E, T, 1) would pass as forces; floats are no buttons."""
    for largest in (1, 4):
        buttons = (MOVES % (largest + 1))[..., None].astype(dtype)
        changed = {name: buttons for name in ACTIONS if name in OWN}
        with pytest.raises(BadInput, match=r"shape \(N, E, T\) if they are discrete"):
            reload(tmp_path, OWN, **changed)
    forces = {name: np.clip(MOVES[..., None], 0, 1) * 1.0 for name in ACTIONS if name in OWN}
    assert reload(tmp_path, OWN, **forces)["actions"].dtype == np.float32


def test_actions_in_another_unit_are_said(tmp_path):
    """An agent samples with a deviation of at least 0.05, which would drown them."""
    small = {name: OWN[name] / 100 for name in ACTIONS if name in OWN}
    with pytest.warns(UserWarning, match="`actions` is at most.*scale them with the bounds"):
        reload(tmp_path, OWN, **small)


def test_a_familys_dimensions_are_checked(folder, tmp_path):
    """Data under a family's name has its horizon, observations, actions and tasks."""
    np.savez(tmp_path / "cheetah_vel.npz", **OWN)
    with pytest.raises(BadInput, match="200"):
        load(tmp_path / "cheetah_vel.npz")
    with np.load(f"{folder}/cheetah_vel.npz") as file:
        arrays = dict(file)
    for name, wrong in (
        ("tasks", np.zeros((3, 2))),
        ("states", arrays["states"][..., 1:]),
        ("actions", np.zeros((3, 3, 200), int)),
    ):
        np.savez(tmp_path / "cheetah_vel.npz", **arrays | {name: wrong})
        with pytest.raises(BadInput, match=f"`{name}` must have shape"):
            load(tmp_path / "cheetah_vel.npz")


def bytes_of(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


@pytest.mark.parametrize(
    "case", ["empty", "text", "cut", "overwritten", "array", "foreign", "none"]
)
def test_an_unreadable_dataset_is_named_in_one_line(case, folder, tmp_path):
    path = tmp_path / "point_robot.npz"
    whole = Path(f"{folder}/point_robot.npz").read_bytes()
    contents = {
        "empty": b"",
        "text": b"step,loss\n1,0.5\n",
        "cut": whole[: len(whole) // 2],
        "overwritten": whole[:2000] + b"\x07" * 2000 + whole[4000:],
        "array": bytes_of(np.save, np.ones(3)),
        "foreign": bytes_of(np.savez, x=np.ones(3)),
    }
    if case in contents:
        path.write_bytes(contents[case])
    with pytest.raises(BadInput) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_file_of_a_folder_is_named(tmp_path):
    write_folder(tmp_path / "robot", OWN)
    path = tmp_path / "robot" / "states.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="robot is damaged"):
        load(tmp_path / "robot")

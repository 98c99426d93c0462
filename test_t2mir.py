"""The tests: each fast piece against a slow, obvious version of itself, and properties that must hold.

    pytest -q test_t2mir.py

In the order of the files: environments, data collection, experts and losses, the model, acting, training, bad input.
"""

import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import distributions
from torch.utils.flop_counter import FlopCounterMode

import collect as collect_module
import t2mir
from collect import PRESETS, BadInput, BatchedSAC, Collection, Settings, claim, collect, load, write_atomically
from envs import ENVS, PointRobot, TaskVec, make_vec, sample_tasks
from experiments import compare, draw_pairs, figures, fresh_tasks, routing, subset, watch
from experiments.bench_collect import flops_of_update
from t2mir import BACKBONES, T2MIR, Config, TaskMoE, TokenMoE, evaluate, prefix_mean

torch.set_num_threads(1)  # the sizes are so small that a second thread would only wait for the first
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Box observation space"),  # unbounded observations are meant
    pytest.mark.filterwarnings("ignore:Mean of empty slice"),  # the tiny experts may all be worse than random
]

HERE = Path(__file__).parent
GYMNASIUM = {"cheetah_vel": "HalfCheetah-v5", "walker_param": "Walker2d-v5"}  # where the models come from
RANGES = {"point_robot": (-1, 1), "cheetah_vel": (0, 3), "walker_param": (-3, 3)}  # of each entry of a task
MODES = list(BACKBONES)
double = torch.float64


def resolve(name, **given):
    """Settings of a collection: those of the environment's preset, with what is given on top."""
    return Settings(**{"env": name, **PRESETS.get(name, {}), **given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a tiny dataset of each family; most of its actions are random, all its experts are poor."""
    out = str(tmp_path_factory.mktemp("data"))
    tiny = dict(out=out, hidden=16, batch=16, copies=2, seed=3, history=1.0)
    collect("point_robot", steps=200, random_steps=130, episodes=8, train_tasks=5, test_tasks=2, **tiny)
    for name in (name for name in ENVS if name != "point_robot"):
        T = ENVS[name].horizon
        given = dict(steps=2 * T, random_steps=max(T, 2 * T - 15), episodes=3)
        collect(name, **given, train_tasks=2, test_tasks=1, **tiny)
    return out


def tiny(mode, env="point_robot", **given):
    """A config small enough for a test, with a T2MIR layer in every block and no dropout."""
    sizes = dict(d_model=16, n_layers=2, n_heads=2, dropout=0.0, moe_layers="all", token_experts=4, task_experts=5)
    sizes |= dict(context=3, queries=6, batch=8, device="cpu", stride=1, dtype="float32")
    return t2mir.preset(env, mode, **{**sizes, **given})


def sizes_of(name):
    """What T2MIR must know of a family and its dataset."""
    family = ENVS[name]
    return dict(obs_dim=family.obs_dim, act_dim=family.act_dim, horizon=family.horizon, num_tasks=5)


def tiny_model(mode, **given):
    """A fresh model in evaluation mode whose policy differs clearly from token to token."""
    torch.manual_seed(0)
    model = T2MIR(tiny(mode, **given), sizes_of("point_robot")).eval()
    model.state_mean, model.state_std = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 0.7])
    model.head.bias.data[2:] = -1.2  # so that the deviation is seldom at one of its bounds
    model.head.weight.data[:2] *= 2
    return model


def training_arrays(folder, name="point_robot"):
    """The arrays of a dataset's training tasks, as a backbone draws from them."""
    data = load(f"{folder}/{name}.npz")
    return t2mir.tensors(data, ~data["test"], "cpu")


def draw(c, x, step=0, seed=0):
    """A batch of the backbone of `c`."""
    torch.manual_seed(seed)
    return BACKBONES[c.mode].batch(c, x, step, c.batch)


def in_double(batch):
    return {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}


def near(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Environments


def plain_model(name, multipliers=()):
    """The model of gymnasium's own environment, with its entries multiplied one by one in the order that a task has."""
    model = gymnasium.make(GYMNASIUM[name]).unwrapped.model
    if len(multipliers):
        entries = [model.body_mass, model.body_inertia, model.geom_friction, model.dof_damping]
        places = [(array, index) for array in entries for index in np.ndindex(array.shape)]
        for (array, index), multiplier in zip(places, multipliers, strict=True):
            array[index] *= multiplier
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def test_sampled_tasks_repeat_and_fill_their_ranges():
    """Same seed, same rows; a longer draw starts with the shorter one; goals, velocities, log-multipliers uniform."""
    for name, family in ENVS.items():
        tasks = sample_tasks(name, 2000, seed=5)
        assert tasks.shape == (2000, family.task_dim) and tasks.dtype == np.float64
        np.testing.assert_array_equal(sample_tasks(name, 7, seed=5), tasks[:7])
        assert not np.isin(sample_tasks(name, 7, seed=6), tasks).any()
        if name not in RANGES:
            continue
        low, high = RANGES[name]
        if name == "walker_param":
            tasks = np.log(tasks) / np.log([1.5] * 56 + [1.3] * 9)
        assert (low <= tasks).all() and (tasks <= high).all()
        quarters = np.array([np.histogram(column, bins=4, range=(low, high))[0] for column in tasks.T])
        assert (abs(quarters - 500) < 100).all()  # five standard deviations


@pytest.mark.parametrize("name", ENVS)
def test_single_environment_equals_its_place_in_the_batch(name):
    """From the same state and with the same actions, some outside the box, a whole episode is the same to the bit."""
    tasks, rng = sample_tasks(name, 3, seed=1), np.random.default_rng(0)
    vec = make_vec(name, tasks)
    singles = [gymnasium.make(vec.id, task=task) for task in tasks]
    first, _ = vec.reset(seed=1)
    assert len(np.unique(first[:, 0])) == 3  # the starts differ
    for i, env in enumerate(singles):
        env.reset(seed=0)
        env.unwrapped.vec.state = vec.state[i : i + 1].copy()
    for t in range(vec.horizon):
        actions = rng.uniform(-1.3, 1.3, vec.action_space.shape)
        observations, rewards, _, truncated, _ = vec.step(actions)
        for i, env in enumerate(singles):
            observation, reward, _, cut, _ = env.step(np.clip(actions[i], -1, 1))
            np.testing.assert_array_equal(observation, observations[i])
            assert (reward, cut) == (rewards[i], truncated[i])


@pytest.mark.parametrize("name", GYMNASIUM)
def test_mujoco_step_equals_a_plain_loop(name, tmp_path, monkeypatch):
    """States, observations and rewards are those of mj_step on gymnasium's model, in walker also on a scaled one.

    The scaled models' fields are equal too, so that one task's multipliers do not reach into another task's model.
    """
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a log file of a deprecated attribute
    if name == "cheetah_vel":
        tasks, models = [[0.5], [2.5]], [plain_model(name)] * 2
    else:
        row = sample_tasks(name, 1, seed=2)[0]
        tasks, models = [np.ones(65), row, np.ones(65)], [plain_model(name), plain_model(name, row), plain_model(name)]
    vec, rng, healthy = make_vec(name, tasks), np.random.default_rng(0), []
    for model, own in zip(models, vec.models):
        for field in ("body_mass", "body_inertia", "geom_friction", "dof_damping", "body_invweight0", "dof_invweight0"):
            np.testing.assert_allclose(getattr(own, field), getattr(model, field), rtol=1e-12)
    vec.reset(seed=0)
    for t in range(vec.horizon):
        if name == "walker_param" and t % 4 == 0:  # lifted, dropped and tipped to around the bounds of what is healthy
            vec.state[:, 2] = rng.choice([0.75, 0.85, 1.5, 1.95, 2.05], 3)
            vec.state[:, 3] = rng.choice([-1.05, -0.95, 0, 0.95, 1.05], 3)
        before, actions = vec.state.copy(), rng.uniform(-1, 1, vec.action_space.shape)
        observations, rewards, *_ = vec.step(actions)
        for i, model in enumerate(models):
            data = mujoco.MjData(model)
            mujoco.mj_setState(model, data, before[i], mujoco.mjtState.mjSTATE_FULLPHYSICS)
            x, data.ctrl[:], data.qacc_warmstart[:] = data.qpos[0], actions[i], 0
            for _ in range(5 if name == "cheetah_vel" else 4):
                mujoco.mj_step(model, data)
            np.testing.assert_array_equal(vec.state[i], [data.time, *data.qpos, *data.qvel])
            if name == "cheetah_vel":
                mujoco.mj_kinematics(model, data)
                seen = np.concatenate([data.qpos[1:], data.qvel, data.body("torso").xpos])
                reward = -abs((data.qpos[0] - x) / 0.05 - tasks[i][0]) - 0.05 * sum(a**2 for a in actions[i])
            else:
                seen = np.concatenate([data.qpos[1:], [min(max(v, -10), 10) for v in data.qvel]])
                healthy.append(0.8 < data.qpos[1] < 2 and -1 < data.qpos[2] < 1)
                penalty = 0 if healthy[-1] else 1
                reward = (data.qpos[0] - x) / 0.008 + 1 - 0.001 * sum(a**2 for a in actions[i]) - penalty
            np.testing.assert_allclose(observations[i], seen, rtol=1e-6, atol=1e-6)
            assert rewards[i] == pytest.approx(reward, abs=1e-9)
    assert name == "cheetah_vel" or 0 < sum(healthy) < len(healthy)  # the penalty was seen at work, and its absence


@pytest.mark.parametrize("name", GYMNASIUM)
def test_mujoco_steps_stay_close_to_gymnasiums_environment(name, tmp_path, monkeypatch):
    """Twenty steps on from one state, the solver's cold start makes no visible difference to gymnasium's warm one."""
    monkeypatch.chdir(tmp_path)
    plain, rng = gymnasium.make(GYMNASIUM[name]).unwrapped, np.random.default_rng(0)
    vec = make_vec(name, np.ones((1, ENVS[name].task_dim)))
    vec.reset(seed=0)
    plain.reset(seed=0)
    plain.set_state(vec.state[0, 1 : 1 + plain.model.nq], vec.state[0, 1 + plain.model.nq :])
    for t in range(20):
        action = rng.uniform(-1, 1, 6)
        observations, rewards, *_ = vec.step(action[None])
        observation, reward, _, _, info = plain.step(action)
        np.testing.assert_allclose(observations[0, : len(observation)], observation, atol=1e-3)
        if name == "cheetah_vel":
            reward = -abs(info["x_velocity"] - 1) - 0.05 * sum(action**2)
        assert rewards[0] == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize("name", ENVS)
def test_horizon_and_interface(name):
    """gymnasium's own checker passes; an episode is cut at the horizon and nowhere else, and a step after it raises."""
    check_env(gymnasium.make(ENVS[name].id).unwrapped, skip_render_check=True)
    vec = make_vec(name, sample_tasks(name, 2, seed=0))
    actions = np.zeros(vec.action_space.shape)
    for _ in range(2):  # before the first reset too
        with pytest.raises(gymnasium.error.ResetNeeded):
            vec.step(actions)
        vec.reset()
        ends = [vec.step(actions)[2:4] for _ in range(vec.horizon)]
        assert not np.any([terminated for terminated, _ in ends])
        assert [truncated.tolist() for _, truncated in ends] == [[False] * 2] * (vec.horizon - 1) + [[True] * 2]
    for wrong in (np.ones(vec.task_dim), np.ones((2, vec.task_dim + 1)), np.ones((0, vec.task_dim))):
        with pytest.raises(ValueError, match="tasks must have shape"):
            make_vec(name, wrong)


def test_a_family_with_wrong_shapes_is_refused():
    """Numpy would repeat an observation or a reward of the wrong shape; both are named instead."""
    for name, method, wrong in (("observe", "reset", lambda self: self.state[:, :1]),
                                ("advance", "step", lambda self, actions: np.zeros((len(actions), 1)))):  # fmt: skip
        vec = type("Mistaken", (PointRobot,), {name: wrong})([[0.0, 1.0], [1.0, 0.0]])
        with pytest.raises(ValueError, match=f"{name} must return shape"):
            vec.reset(seed=1)
            assert method == "step"
            vec.step(np.zeros((2, 2)))


def test_point_robot_picture_shows_goal_and_point():
    """The red and the blue spot of the picture stand where the goal and the point are."""
    env = gymnasium.make("t2mir/PointRobot-v0", task=[0.8, -0.5], render_mode="rgb_array")
    env.reset(seed=0)
    env.unwrapped.vec.state = np.array([[-0.3, 0.6]])
    image = env.render()
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8
    for channel, (x, y) in ((0, (0.8, -0.5)), (2, (-0.3, 0.6))):
        spot = (image.argmax(-1) == channel) & (image.min(-1) < 100)
        rows, columns = np.nonzero(spot)
        assert (3 * columns.mean() / 255 - 1.5, 1.5 - 3 * rows.mean() / 255) == pytest.approx((x, y), abs=0.02)


def test_mujoco_pictures():
    """Both MuJoCo families draw something, and something else after some steps; skipped where OpenGL is missing."""
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
    environment = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=HERE, capture_output=True, text=True)
    if ended.returncode == 77:
        pytest.skip("no OpenGL")
    assert ended.returncode == 0, ended.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Data collection


def test_an_agent_learns_in_the_batch_what_it_learns_alone():
    """Three agents updated together and one by one, on the same batches and noise, end with the same parameters."""
    s, num, B = resolve("point_robot", hidden=8, temperature=0.1, dtype="float64"), 3, 10
    torch.manual_seed(0)
    agents, *alone = [BatchedSAC(n, 2, 2, s).double() for n in (num, 1, 1, 1)]
    stored = torch.randn(num, 20, 2, dtype=double) * 3 + 1
    agents.update_normalisation(stored)
    pairs = []  # parameters: of the batch, agent i's rows in it (first critics, then second ones), of agent i alone
    for net, (i, one) in itertools.product(("actor", "critic", "target"), enumerate(alone)):
        of_batch, of_one = getattr(agents, net).parameters(), getattr(one, net).parameters()
        pairs += [(p, [i] if net == "actor" else [i, num + i], q) for p, q in zip(of_batch, of_one)]
    for p, rows, q in pairs:
        q.data.copy_(p.data[rows])
    for i, one in enumerate(alone):
        one.update_normalisation(stored[i : i + 1])
    start = [q.data.clone() for _, _, q in pairs]
    for step in range(6):
        batch = [torch.randn(num, B, *size, dtype=double) for size in ((2,), (2,), (), (), (2,))]
        noise = torch.randn(2, num, B, 2, dtype=double)
        agents.update(*batch, noise, policy=step % 2 == 0)
        for i, one in enumerate(alone):
            one.update(*(x[i : i + 1] for x in batch), noise[:, i : i + 1], policy=step % 2 == 0)
    for (p, rows, q), first in zip(pairs, start):
        near(p.data[rows], q.data, 1e-8)
        assert (q.data - first).abs().max() > 1e-6  # it did learn


def test_policy_density_is_that_of_a_squashed_gaussian():
    """Actions and log-densities equal torch.distributions' Normal behind a TanhTransform, log std clamped or not."""
    torch.manual_seed(0)
    agents = BatchedSAC(2, 3, 4, resolve("point_robot", hidden=8, dtype="float64")).double()
    agents.actor.weights[-1].data *= 20
    states, noise = torch.randn(2, 50, 3, dtype=double), torch.randn(2, 50, 4, dtype=double)
    mean, log_std = agents.actor(states).chunk(2, dim=-1)
    assert log_std.max() > 2 and log_std.min() < -5
    std = log_std.clamp(-5, 2).exp()
    squash = distributions.TanhTransform(cache_size=1)
    action = squash(mean + std * noise)
    density = distributions.TransformedDistribution(distributions.Normal(mean, std), squash).log_prob(action).sum(-1)
    near(agents.act(states, noise), (action, density))
    near(agents.act(states)[0], mean.tanh())


@pytest.mark.parametrize("name", ENVS)
def test_stored_transitions_are_the_simulators(name, folder):
    """Put back into the simulator, a stored state and action give the stored reward and the next stored state."""
    data = load(f"{folder}/{name}.npz")
    N, E, T = data["rewards"].shape
    vec = make_vec(name, np.repeat(data["tasks"], E, axis=0))
    vec.reset(seed=0)
    compared = 0
    for t in range(T):
        s = data["states"][:, :, t].reshape(N * E, -1).astype(float)
        vec.state = s
        if name in GYMNASIUM:  # (time, qpos, qvel): cheetah shows its x, walker hides it
            x = s[:, 17:18] if name == "cheetah_vel" else np.zeros((N * E, 1))
            vec.state = np.concatenate([np.zeros((N * E, 1)), x, s[:, :17]], axis=1)
        inside = np.ones(N * E, bool) if name != "walker_param" else (abs(s[:, 8:]) < 10).all(1)
        observations, rewards, *_ = vec.step(data["actions"][:, :, t].reshape(N * E, -1))
        np.testing.assert_allclose(rewards[inside], data["rewards"][:, :, t].reshape(-1)[inside], rtol=1e-3, atol=1e-3)
        if t + 1 < T:
            later = data["states"][:, :, t + 1].reshape(N * E, -1)
            np.testing.assert_allclose(observations[inside], later[inside], rtol=1e-2, atol=1e-2)
        compared += inside.sum()
    assert compared > (0.2 if name == "walker_param" else 0.99) * N * E * T
    if name == "point_robot":  # the same by hand
        later = data["states"][:, :, :-1] + 0.1 * data["actions"][:, :, :-1]
        np.testing.assert_allclose(later, data["states"][:, :, 1:], atol=1e-6)
        distance = np.sqrt(((later - data["tasks"][:, None, None]) ** 2).sum(-1))
        np.testing.assert_allclose(-distance, data["rewards"][:, :, :-1], atol=1e-6)


@pytest.mark.parametrize("name", ENVS)
def test_dataset_holds_what_it_says(name, folder):
    """Shapes, types, split and settings; the first episode is uniformly random and not the expert's."""
    data, family = load(f"{folder}/{name}.npz"), ENVS[name]
    (train, test), E = ((5, 2), 8) if name == "point_robot" else ((2, 1), 3)
    N, T, o, a = train + test, family.horizon, family.obs_dim, family.act_dim
    f4, f8 = np.float32, np.float64
    expected = {
        "tasks": ((N, family.task_dim), f8), "test": ((N,), np.bool_), "states": ((N, E, T, o), f4),
        "actions": ((N, E, T, a), f4), "learner_actions": ((N, E, T, a), f4), "rewards": ((N, E, T), f4),
        "expert_actions": ((N, E, T, a), f4),
        "guest": ((E,), np.bool_),
        "random_return": ((N,), f8), "expert_return": ((N,), f8),
    }  # fmt: skip
    info, fingerprint = json.loads(str(data.pop("info"))), data.pop("fingerprint")
    assert data.pop("simulator") is True
    assert len(fingerprint) == 64
    assert {key: (array.shape, array.dtype.type) for key, array in data.items()} == expected
    assert all(np.isfinite(array).all() for array in data.values())
    assert (
        data["guest"].tolist() == [False] * 5 + [True, False, True]
        if name == "point_robot"
        else not data["guest"].any()
    )
    assert data["test"].sum() == test and len(np.unique(data["tasks"], axis=0)) == N  # no task on both sides
    np.testing.assert_array_equal(data["tasks"], sample_tasks(name, N, seed=3))
    assert info["settings"]["env"] == name and info["settings"]["seed"] == 3 and info["versions"]["torch"]
    assert abs(data["expert_actions"]).max() <= 1 and data["expert_actions"].std() > 0
    random = data["actions"][:, 0]
    assert abs(random).max() <= 1 and abs(random.mean()) < 0.1 and random.var() == pytest.approx(1 / 3, abs=0.05)
    assert abs(random - data["expert_actions"][:, 0]).mean() > 0.1


def test_stored_episodes_are_evenly_spaced_over_the_run(folder, tmp_path):
    """The same run with all its episodes stored: the few are among them, in their order, from the first to the last."""
    few = load(f"{folder}/point_robot.npz")
    given = {**json.loads(str(few["info"]))["settings"], "out": str(tmp_path), "episodes": 20}
    every = load(collect(given.pop("env"), **given))
    matches = (few["actions"][:, :, None] == every["actions"][:, None]).all((0, 3, 4))  # (few, all)
    assert (matches.sum(1) == 1).all()
    places = matches.argmax(1)
    rounds, copies = places // 2, places % 2  # every copy lives one episode a round
    assert (np.diff(rounds) >= 0).all() and rounds[0] == 0 and rounds[-1] >= 8
    assert set(np.bincount(rounds, minlength=10)) <= {0, 1} and (np.bincount(copies) == 4).all()
    np.testing.assert_array_equal(few["expert_actions"], every["expert_actions"][:, places])


def test_a_stopped_collection_goes_on_as_if_it_had_not_stopped(folder, tmp_path, monkeypatch):
    """Stopped twice, between two saves and right after one, a collection ends with the uninterrupted run's arrays."""
    whole = load(f"{folder}/point_robot.npz")
    given = {**json.loads(str(whole["info"]))["settings"], "out": str(tmp_path)}
    name = given.pop("env")
    run_round, rounds = Collection.run_round, []

    def stopping(run):
        if len(rounds) in (5, 8):
            rounds.append("stop")
            raise KeyboardInterrupt
        returns = run_round(run)
        rounds.append(run.round)
        monkeypatch.setattr("collect.SAVE_EVERY", -1 if run.round in (2, 4, 6) else 1000)
        return returns

    monkeypatch.setattr(Collection, "run_round", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(name, **given)
        assert not (tmp_path / "point_robot.npz").exists()
    part = tmp_path / "point_robot.part"
    with pytest.raises(BadInput, match="another lr"):
        collect(name, **{**given, "gamma": 0.5, "lr": 1.0})
    again = load(collect(name, **given))
    assert rounds == [1, 2, 3, 4, 5, "stop", 5, 6, "stop", 7, 8, 9, 10] and not part.exists()
    for key, array in whole.items():
        if key not in ("info", "fingerprint", "simulator"):
            np.testing.assert_array_equal(again[key], array, err_msg=key)
    with pytest.raises(BadInput, match="exists"):  # a finished dataset is not collected over
        collect(name, **given)


def test_guests_visit_tasks_of_their_own_split(monkeypatch):
    """After the random steps the last copy is acted in by another agent of the same split, the others by their own."""
    run = Collection(
        resolve("point_robot", steps=100, random_steps=20, copies=3, batch=4, hidden=4, train_tasks=5, episodes=1), 9
    )
    monkeypatch.setattr(run.agents, "act", lambda s, n=None: (torch.arange(9.0)[:, None, None].expand(9, 3, 2), None))
    monkeypatch.setattr(run.agents, "update", lambda *batch, policy: None)
    seen = set()
    for round in range(5):
        run.run_round()
        who = run.actions[:, 3 * round : 3 * round + 3]  # (9, 3, 20, 2): who acted
        if round > 0:
            assert (who == who[:, :, :1, :1]).all()
            assert (who[:, :2, 0, 0] == torch.arange(9.0)[:, None]).all()
            guests = who[:, 2, 0, 0].tolist()
            assert sorted(guests[:5]) == [0, 1, 2, 3, 4] and sorted(guests[5:]) == [5, 6, 7, 8]
            seen.add(tuple(guests))
    assert len(seen) == 4  # others in each round


@pytest.mark.parametrize("n", [1, 3])
def test_updates_draw_stored_steps_of_the_own_task(n):
    """Batches hold stored steps of the agent's own task from before the given step, all about equally often, each with
    the rewards of the next n steps, or of fewer at the end of an episode and at the newest step."""
    given = dict(steps=100, copies=3, batch=3000, hidden=4, random_steps=99, episodes=1, n_step=n)
    run = Collection(resolve("point_robot", **given), 2)
    for _ in range(2):
        run.run_round()
    states, actions, rewards, discounts, next_states, _ = run.sample(27)  # in the second round, after its 7th step
    stored = torch.cat([run.states[:, :3, :20], run.states[:, 3:6, :7]], dim=2).flatten(1, 2)  # (2, 81, 2)
    same = (states[:, :, None] == stored[:, None]).all(-1)  # (2, 3000, 81)
    assert (same.sum(2) == 1).all()
    counts = same.sum(1)
    assert counts.min() > 15 and counts.max() < 70  # 37 expected
    place = same.int().argmax(2)
    for agent, b in itertools.product(range(2), range(300)):
        copy, t = divmod(place[agent, b].item(), 27)
        episode, t, end = (copy, t, 20) if t < 20 else (3 + copy, t - 20, 7)
        end, total = min(end, t + n), 0.0
        for k in range(t, end):
            total += run.s.gamma ** (k - t) * run.rewards[agent, episode, k].item()
        near(actions[agent, b], run.actions[agent, episode, t])
        near(next_states[agent, b], run.states[agent, episode, end])
        assert rewards[agent, b].item() == pytest.approx(total, rel=1e-5)
        assert discounts[agent, b].item() == pytest.approx(run.s.gamma ** (end - t), rel=1e-5)


@pytest.mark.parametrize("recency", [1.0, 4.0])
def test_ages_of_draws_follow_the_recency(recency):
    """The age of a drawn step is below a fraction x of the run so far with probability x^(1 / recency)."""
    given = dict(steps=8_000, copies=1, batch=20_000, hidden=4, random_steps=1, episodes=1, recency=recency)
    run = Collection(resolve("point_robot", **given), 1)
    run.states[..., 0] = torch.arange(400.0)[:, None] * 20 + torch.arange(21.0)  # a state tells its step
    age = (7_990 - run.sample(7_990)[0][0, :, 0]) / 7_990
    assert age.min() > 0 and age.max() <= 1
    for x in (0.001, 0.01, 0.1, 0.3, 0.6, 0.9):
        near((age <= x).float().mean(), torch.tensor(x ** (1 / recency)), 0.015)


def test_values_are_those_of_the_discounted_sum():
    """Critics fitted to a constant reward of 2 value it at 2 a step, one step or three ahead, whatever gamma is."""
    for n, gamma in itertools.product((1, 3), (0.5, 0.9)):
        torch.manual_seed(0)
        s = resolve("point_robot", hidden=16, gamma=gamma, temperature=0.0, tau=0.5, lr=1e-2, dtype="float32")
        agents = BatchedSAC(2, 2, 2, s)
        states, actions = torch.randn(2, 40, 2), torch.rand(2, 40, 2) * 2 - 1
        rewards = torch.full((2, 40), 2.0 * sum(gamma**k for k in range(n)))
        for _ in range(300):
            noise = torch.randn(2, 2, 40, 2)
            agents.update(states, actions, rewards, torch.full((2, 40), gamma**n), states, noise, policy=False)
        near(agents.value(agents.critic, states, actions).detach(), torch.full((2, 2, 40), 2.0), 0.1)


def test_flops_are_those_that_torch_counts():
    """The matrix products of two updates, one with a policy step, as torch's own counter sees them."""
    for name in ENVS:
        s, family = resolve(name, hidden=24, batch=10), ENVS[name]
        agents = BatchedSAC(3, family.obs_dim, family.act_dim, s)
        states, actions = torch.randn(3, 10, family.obs_dim), torch.rand(3, 10, family.act_dim)
        noise = torch.randn(2, 3, 10, family.act_dim)
        with FlopCounterMode(display=False) as counter:
            for policy in (True, False):
                agents.update(states, actions, torch.randn(3, 10), torch.rand(3, 10), states, noise, policy=policy)
        assert counter.get_total_flops() == 2 * 3 * flops_of_update(family, s)


def test_networks_see_normalised_states():
    """The normalisation is the mean and deviation of all states shown, in whatever portions they came."""
    torch.manual_seed(0)
    agents = BatchedSAC(3, 4, 2, resolve("point_robot", hidden=8))
    stored = torch.randn(3, 5, 40, 4) * torch.tensor([0.1, 1, 10, 0]) + torch.tensor([0.0, 1, -20, 0.7])
    for part in stored.split(2, dim=1):
        agents.update_normalisation(part)
    near(agents.mean, stored.flatten(1, 2).mean(1, keepdim=True), 1e-4)
    near(agents.std, stored.flatten(1, 2).std(1, keepdim=True, correction=0) + 0.01, 1e-3)


def test_unreadable_datasets_are_named_in_one_line(folder, tmp_path):
    """Missing, cut, overwritten, foreign and outdated files all raise BadInput with one line that names the file."""

    def written(save, *arrays, **named):
        file = io.BytesIO()
        save(file, *arrays, **named)
        return file.getvalue()

    whole, path = Path(f"{folder}/point_robot.npz").read_bytes(), tmp_path / "point_robot.npz"
    data = load(f"{folder}/point_robot.npz")
    cases = {
        "empty": b"",
        "text": b"step,loss\n1,0.5\n",
        "cut": whole[: len(whole) // 2],
        "overwritten": whole[:2000] + b"\x07" * 2000 + whole[4000:],
        "one array": written(np.save, np.ones(3)),
        "another program's": written(np.savez, x=np.ones(3)),
        "missing": None,
    }
    got = {}
    for case, content in cases.items():
        path.unlink() if content is None else path.write_bytes(content)
        try:
            load(path)
        except Exception as error:
            got[case] = (
                isinstance(error, BadInput) and str(path) in str(error) and "\n" not in str(error) or repr(error)
            )
    assert got == dict.fromkeys(cases, True)


# ----------------------------------------------------------------------------------------------------------------------
# Experts, routers and their losses


def slow_gates(logits, k):
    """For each token, the k largest logits' experts and their softmax among themselves: a list of dicts."""
    gates = []
    for row in logits:
        best = sorted(range(len(row)), key=lambda i: -row[i].item())[:k]
        gates.append({i: row[i].exp() / sum(row[j].exp() for j in best) for i in best})
    return gates


def slow_experts(experts, h, gates):
    """Token by token, the gated sum of its experts' outputs."""

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    w1, w2 = experts.w1, experts.w2
    return torch.stack([sum(g * (gelu(x @ w1[i]) @ w2[i]) for i, g in gate.items()) for x, gate in zip(h, gates)])


def slow_cv_squared(numbers):
    x = torch.stack(numbers)
    return ((x - x.mean()) ** 2).mean() / x.mean() ** 2


def slow_balance(k, gates, clean, noisy, sigma):
    """CV(Imp)^2 and CV(Load)^2, token by token and expert by expert."""
    num = clean.shape[1]
    zero = torch.zeros((), dtype=clean.dtype)
    importance = [sum((gate[i] for gate in gates if i in gate), zero) for i in range(num)]
    load = [zero] * num
    for c, x, s in zip(clean, noisy, sigma):
        for i in range(num):
            threshold = sorted((x[j] for j in range(num) if j != i), reverse=True)[k - 1]
            load[i] = load[i] + (1 + torch.erf((c[i] - threshold) / s[i] / math.sqrt(2))) / 2
    return slow_cv_squared(importance), slow_cv_squared(load)


def moe_config(d_model):
    """What the two MoEs read from a Config: five experts, two of which compute a token."""
    return SimpleNamespace(d_model=d_model, token_experts=5, task_experts=5, top_k=2, momentum=0.1)


def slow_info_nce(z, keys, W, ids):
    """InfoNCE, pair by pair."""
    losses = []
    for i in range(len(ids)):
        positive = negative = 0.0
        for j in range(len(ids)):
            score = (z[i] @ W @ keys[j]).exp()
            if ids[j] != ids[i]:
                negative = negative + score
            elif j != i:
                positive = positive + score
        losses.append(-(positive / (positive + negative)).log())
    return sum(losses) / len(ids)


def balance(routing):
    """CV(Imp)^2 and CV(Load)^2 of a Routing, as the model computes them."""
    return tuple(t2mir.cv_squared(part.flatten(0, -2).sum(0)) for part in (routing.importance, routing.load))


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_grouped_products_equal_one_product_for_each_row(kind, tolerance):
    """Values and gradients of multiply_by_expert are those of a loop over rows, for every type and thus both paths.

    A float64 product takes the loop over experts, the other types torch's grouped_mm. Some experts have no rows.
    """
    torch.manual_seed(0)
    expert = torch.tensor([1] * 5 + [2] + [4] * 7)  # experts 0, 3 and 5 have none
    ends = torch.tensor([int((expert <= i).sum()) for i in range(6)], dtype=torch.int32)
    x, weights, grad = (torch.randn(size).to(kind) for size in ((13, 16), (6, 16, 8), (13, 8)))
    results = []
    for exact in (False, True):
        a, w = ((z.double() if exact else z).clone().requires_grad_() for z in (x, weights))
        y = torch.stack([a[n] @ w[i] for n, i in enumerate(expert)]) if exact else t2mir.multiply_by_expert(a, w, ends)
        results.append([z.double() for z in (y, *torch.autograd.grad(y, (a, w), grad.to(y.dtype)))])
    for fast, slow in zip(*results):
        assert (fast - slow).abs().max() <= tolerance * slow.abs().max()


@pytest.mark.parametrize("kind", ["token", "token, training", "task"])
def test_moe_equals_a_loop_over_tokens(kind):
    """Outputs, balance loss and all gradients (inputs, routers, experts) equal those of the loops above, in float64."""
    torch.manual_seed(0)
    shape, k = (3, 10), 2
    h, h_mean, weight = (torch.randn(*shape, d, dtype=double) for d in (8, 8, 8))
    if kind == "task":
        moe = TaskMoE(moe_config(8), 16, 8).double()  # it has no noise, in training mode neither
        inputs = [h, h_mean]
    else:
        moe = TokenMoE(moe_config(8), 16, 8).double().train(kind != "token")
        inputs = [h, h]
    router = moe.router.weight
    expected = [x.requires_grad_() for x in dict.fromkeys(inputs)] + [router, *moe.experts.w1, *moe.experts.w2]
    expected += [moe.noise.weight] if kind == "token, training" else []
    torch.manual_seed(1)
    y, routing = moe(*inputs)
    fast = (y * weight).sum()
    if kind == "token, training":
        importance, load = balance(routing)
        fast = fast + 3 * importance + 7 * load
    got = torch.autograd.grad(fast, expected)

    rows = [x.flatten(0, 1) for x in inputs]
    clean = noisy = rows[-1] @ router.T
    if kind == "token, training":
        torch.manual_seed(1)
        sigma = torch.log(1 + torch.exp(rows[0] @ moe.noise.weight.T)) + 1e-2
        noisy = clean + torch.randn(*shape, 5, dtype=double).flatten(0, 1) * sigma
    gates = slow_gates(noisy, k)
    slow_y = slow_experts(moe.experts, rows[0], gates)
    slow = (slow_y * weight.flatten(0, 1)).sum()
    if kind == "token, training":
        importance, load = slow_balance(k, gates, clean, noisy, sigma)
        assert importance > 1e-3 and load > 1e-3
        slow = slow + 3 * importance + 7 * load
    else:
        assert routing.load is None
    near(y.flatten(0, 1), slow_y, 1e-8)
    near(routing.logits.flatten(0, 1), clean, 1e-12)
    places = [torch.stack([g.get(i, torch.zeros(()).double()) for i in range(5)]) for g in gates]
    near(routing.importance.flatten(0, 1), torch.stack(places), 1e-8)
    near(fast, slow, 1e-8)
    near(got, torch.autograd.grad(slow, expected), 1e-8)

    moe.eval()
    gates = slow_gates(clean, k)
    for n in range(5):  # a token leaves no gradient in the experts that it was not sent to
        of_experts = torch.autograd.grad(moe(*inputs)[0].flatten(0, 1)[n].sum(), list(moe.experts.w1))
        assert {i for i, g in enumerate(of_experts) if g.any()} == set(gates[n])
    y, routing = moe(*inputs, slice(1, None, 3))  # selected tokens are computed as before, and all tokens are routed
    near(y, moe(*inputs)[0][:, 1::3])
    near(routing.importance, moe(*inputs)[1].importance)

    in_float32 = moe.float()(*(x.float() for x in inputs))[0].flatten(0, 1)
    near(in_float32.double(), slow_experts(moe.experts, rows[0].float(), slow_gates(clean.float(), k)).double(), 1e-5)


def test_load_is_a_probability():
    """load_probability equals the share of 200,000 fresh draws of one expert's noise that lift it into the top k."""
    rng = np.random.default_rng(0)
    clean, sigma = rng.normal(size=(4, 5)), rng.uniform(0.5, 1.5, (4, 5))
    noisy = clean + sigma * rng.normal(size=(4, 5))
    for k in (1, 2, 3):
        p = t2mir.load_probability(*map(torch.tensor, (clean, noisy, sigma)), k).numpy()
        for n, i in np.ndindex(4, 5):
            fresh = clean[n, i] + sigma[n, i] * rng.normal(size=200_000)
            better = (np.delete(noisy[n], i)[:, None] > fresh).sum(0)
            assert p[n, i] == pytest.approx((better < k).mean(), abs=0.006)  # five standard deviations
        assert ((0.1 < p) & (p < 0.9)).sum() > 5  # and not all are near certain


def test_balance_terms_reach_the_router_each_alone():
    """CV^2 is variance over squared mean; importance alone and load alone give the router and its noise a gradient."""
    x = np.random.default_rng(0).uniform(1, 5, 7)
    assert t2mir.cv_squared(torch.tensor(x)).item() == pytest.approx(x.var() / x.mean() ** 2, rel=1e-8)
    assert t2mir.cv_squared(torch.full((4,), 3.0)).item() == 0
    torch.manual_seed(0)
    for term in (0, 1):
        moe = TokenMoE(moe_config(8), 16, 8)
        balance(moe.route(torch.randn(3, 10, 8)))[term].backward()
        assert moe.router.weight.grad.abs().max() > 1e-3 and moe.noise.weight.grad.abs().max() > 1e-4
        assert all(p.grad is None for p in moe.experts.parameters())


@pytest.mark.parametrize("sequences", [2, 4])
def test_info_nce_equals_a_double_loop(sequences):
    """Value and gradients are those of a loop over pairs, whatever the number of sequences of a task."""
    torch.manual_seed(0)
    ids = torch.arange(3).repeat(sequences)[torch.randperm(3 * sequences)]
    z, keys = (torch.randn(len(ids), 5, dtype=double, requires_grad=True) for _ in range(2))
    W = torch.randn(5, 5, dtype=double, requires_grad=True)
    slow, fast = slow_info_nce(z, keys, W, ids), t2mir.info_nce(z, keys, W, ids)
    near(fast, slow)
    near(torch.autograd.grad(fast, [z, keys, W]), torch.autograd.grad(slow, [z, keys, W]))


@pytest.mark.parametrize("mode", MODES)
def test_the_keys_of_info_nce_teach_nothing(mode, folder):
    """The contrastive loss reaches the task router and W; the key router has no gradient, the keys pass none on."""
    model = tiny_model(mode, moe_layers="0").train()
    moe, batch = model.blocks[0].moe.task_moe, draw(model.config, training_arrays(folder))
    seen = []
    model.blocks[0].norm2.register_forward_hook(lambda m, x, y: seen.append(y))
    torch.nn.init.normal_(moe.key_router.weight)
    contrastive = model(batch)["contrastive"]
    got = torch.autograd.grad(contrastive, [seen[0], moe.router.weight, moe.W], retain_graph=True)
    last = 3 * batch["states"].shape[1]
    mean = seen[0][:, :last].mean(1)  # the last token of the context has seen all of them
    keys = (mean @ moe.key_router.weight.T).detach()
    slow = slow_info_nce(mean @ moe.router.weight.T, keys, moe.W, batch["task_ids"])
    for one, other in zip(got, torch.autograd.grad(slow, [seen[0], moe.router.weight, moe.W], retain_graph=True)):
        near(one, other, 1e-4)
        assert one.abs().max() > 1e-5
    contrastive.backward()
    assert moe.key_router.weight.grad is None and not moe.key_router.weight.requires_grad


def test_key_router_is_a_moving_average():
    """It starts as the router and then moves the fraction `momentum` of the way to it in each update."""
    torch.manual_seed(0)
    moe = TaskMoE(moe_config(6), 16, 7).double()
    router = moe.router.weight
    key = router.detach().numpy().copy()
    for _ in range(4):
        np.testing.assert_allclose(moe.key_router.weight.numpy(), key, rtol=1e-12)
        torch.nn.init.normal_(router)
        moe.update_key_router()
        key = key + 0.1 * (router.detach().numpy() - key)


def test_experts_used_counts_from_one_to_all():
    """Uniform usage of six experts counts as six, a pair that shares all tokens as two, a collapse as one."""
    N, E = 60, 6
    place = torch.arange(N)
    pairs = torch.stack([place % E, (place + 1) % E], dim=1)
    for chosen, gates, number in [
        (pairs, torch.full((N, 2), 0.5), E),
        (torch.tensor([[1, 4]]).repeat(N, 1), torch.full((N, 2), 0.5), 2),
        (torch.tensor([[3, 0]]).repeat(N, 1), torch.tensor([[1.0, 0.0]]).repeat(N, 1), 1),
    ]:
        importance = torch.zeros(N, E)
        for row, (experts, shares) in enumerate(zip(chosen, gates)):
            importance[row, experts] = shares
        routing = t2mir.Routing(torch.randn(N, E), gates, chosen, importance, None)
        assert float(t2mir.experts_used(routing)) == pytest.approx(number, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_training_losses_are_those_of_the_routers(mode, folder):
    """The routing losses are sums over the T2MIR layers of slow losses, which are computed from what the routers saw.

    InfoNCE compares the task router's logits at the last token of each context. The logged numbers of experts are
    means over the layers. In evaluation mode there are the action loss and nll alone.
    """
    model, seen = tiny_model(mode, w_imp=2.0, w_load=3.0, w_con=5.0).train(), {"token": [], "task": []}
    batch = draw(model.config, training_arrays(folder))
    for block in model.blocks:
        torch.nn.init.normal_(block.moe.task_moe.key_router.weight)
        for name, moe in (("token", block.moe.token_moe), ("task", block.moe.task_moe)):
            moe.register_forward_hook(lambda m, x, y, name=name: seen[name].append((m, x[1], y[1])))
    losses = model(batch)
    importance = load = contrastive = 0.0
    used = {"token": [], "task": []}
    for moe, h, routing in seen["token"]:
        gates = [dict(zip(i.tolist(), g)) for i, g in zip(routing.chosen.flatten(0, 1), routing.gates.flatten(0, 1))]
        usage = [sum(gate.get(i, 0.0) for gate in gates) for i in range(4)]
        importance += slow_cv_squared([torch.as_tensor(u) for u in usage])
        load += slow_cv_squared([sum(row[i] for row in routing.load.flatten(0, 1)) for i in range(4)])
    for moe, h, routing in seen["task"]:
        last = h[:, 3 * batch["states"].shape[1] - 1]
        z, keys = last @ moe.router.weight.T, last @ moe.key_router.weight.T
        contrastive += slow_info_nce(z, keys, moe.W, batch["task_ids"])
    for name in used:
        for _, _, routing in seen[name]:
            usage = torch.zeros(routing.logits.shape[-1], dtype=double)
            for i, g in zip(routing.chosen.flatten(), routing.gates.flatten()):
                usage[i] += g.detach()
            share = [float(u / usage.sum()) for u in usage]
            used[name].append(math.exp(-sum(p * math.log(p) for p in share if p > 0)))
    assert len(seen["token"]) == len(seen["task"]) == 2
    near(losses["importance"], importance, 1e-4)
    near(losses["load"], load, 1e-4)
    near(losses["contrastive"], contrastive, 1e-4)
    for name in used:
        assert float(losses[f"{name}_experts"]) == pytest.approx(np.mean(used[name]), rel=1e-5)
    weights = {"action": 1, "importance": 2, "load": 3, "contrastive": 5}
    assert model.config.loss_weights == weights and set(weights) < set(losses)
    assert set(model.eval()(batch)) == {"action", "nll"}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_what_the_task_router_sees(mode, folder):
    """At each token, the mean of the layer's inputs over the token's own prefix, itself included."""
    batch = draw(tiny(mode), training_arrays(folder))
    n = 3 * batch["states"].shape[1]
    model, seen = tiny_model(mode, moe_layers="0").train(), []
    model.blocks[0].norm2.register_forward_hook(lambda module, x, y: seen.append(y))
    model.blocks[0].moe.task_moe.router.register_forward_hook(lambda module, x, y: seen.append(x[0]))
    model(batch)
    h, given = seen[:2]
    assert h.shape == given.shape and h.shape[1] > n
    for b, t in np.ndindex(*h.shape[:2]):
        if t < n:
            expected = h[b, : t + 1].mean(0)
        else:
            p = 3 * batch["seen"][b, t - n]
            expected = (h[b, :p].sum(0) + h[b, t]) / (p + 1)
        near(given[b, t], expected, 1e-4)


@pytest.mark.parametrize("moe_layers", ["last", "all"])
def test_variants_spend_equal_active_parameters(moe_layers):
    """Feed-forward weights that a token is multiplied with: both MoEs, either alone and the dense baseline agree.

    Counted from the shapes, top_k experts of each MoE; the routers, their noise and W (some 20 d numbers) are left out.
    """
    counts = []
    for token, task in itertools.product((False, True), repeat=2):
        c = tiny("ad", moe_layers=moe_layers, n_layers=3, token_moe=token, task_moe=task)
        model = T2MIR(c, sizes_of("point_robot"))
        moes = [m for m in model.modules() if isinstance(m, (TokenMoE, TaskMoE))]
        assert len(moes) == (token + task) * (3 if moe_layers == "all" else 1)
        routed = sum(c.top_k * (m.experts.w1[0].numel() + m.experts.w2[0].numel()) for m in moes)
        counts.append(routed + sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name))
    dense = 12 * c.d_model**2 * 3 if moe_layers == "all" else (12 + 8 + 8) * c.d_model**2
    assert counts == [dense] * 4


# ----------------------------------------------------------------------------------------------------------------------
# The model sees what it may


def test_attention_mask_equals_a_double_loop():
    """A row sees itself and what is to its left, behind a past too; a query sees its prefix and itself."""
    for length, past in ((1, 0), (5, 0), (3, 4)):
        expected = [[column <= past + row for column in range(past + length)] for row in range(length)]
        assert t2mir.attention_mask(length, past=past).tolist() == expected
    prefix, P, Q = [[0, 3, 6], [6, 1, 2]], 6, 3
    expected = [[[j < prefix[b][q] or j == P + q for j in range(P + Q)] for q in range(Q)] for b in range(2)]
    assert t2mir.attention_mask(P + Q, torch.tensor(prefix)).squeeze(1).tolist() == expected


def test_prefix_mean_equals_a_loop():
    """Each token's mean runs over the tokens up to itself; a query's over its prefix and itself; also behind a past."""
    rng = np.random.default_rng(0)
    h, prefix = rng.normal(size=(2, 13, 4)), np.array([[0, 3, 9, 6], [9, 0, 1, 9]])
    P = 9
    slow = np.array([[row[: j + 1].mean(0) for j in range(P)] for row in h])
    queries = [[np.array([*h[b, : prefix[b, q]], h[b, P + q]]).mean(0) for q in range(4)] for b in range(2)]
    prompt = torch.tensor(h[:, :P])
    near(prefix_mean(prompt), torch.tensor(slow))
    near(prefix_mean(torch.tensor(h), torch.tensor(prefix)), torch.tensor(np.concatenate([slow, queries], axis=1)))
    near(prefix_mean(prompt[:, 5:], None, prompt[:, :5].sum(1, keepdim=True), 5), torch.tensor(slow[:, 5:]))


def changed(new, old):
    """Which outputs (B, L) moved, (L,) bool; it must be the same ones in all sequences."""
    moved = (new - old).abs().amax(-1) > 1e-9
    assert (moved == moved[0]).all()
    return moved[0].tolist()


@torch.no_grad()
def test_ad_sees_no_future():
    """Another token at place j changes the outputs from j on and none before, through attention and the task router."""
    model = tiny_model("ad").double()
    x = torch.randn(2, 30, 16, dtype=double)

    def policy(x):
        return torch.cat(model.act(x)[:2], dim=-1)

    y = policy(x)
    for j in range(30):
        other = x.clone()
        other[:, j] = torch.randn(16, dtype=double)
        assert changed(policy(other), y) == [i >= j for i in range(30)]


@torch.no_grad()
def test_dpt_queries_see_their_prefix_and_themselves():
    """The prompt is as if there were no queries; a query hears of its prefix and itself, of no other token or query."""
    model = tiny_model("dpt").double()
    P, prefix = 15, torch.tensor([0, 3, 7, 15, 15])
    x = torch.randn(2, P + 5, 16, dtype=double)

    def policy(x, *given, **more):
        return torch.cat(model.act(x, *given, **more)[:2], dim=-1)

    y = policy(x, prefix.repeat(2, 1))
    near(y[:, :P], policy(x[:, :P]))
    near(policy(x, prefix.repeat(2, 1), select=slice(P, None)), y[:, P:])
    for j in range(P + 5):
        other = x.clone()
        other[:, j] = torch.randn(16, dtype=double)
        prompt = [i >= j for i in range(P)]
        queries = [j < n or j == P + q for q, n in enumerate(prefix)]
        assert changed(policy(other, prefix.repeat(2, 1)), y) == prompt + queries


@torch.no_grad()
def test_the_cache_forgets_what_it_is_told_not_to_keep():
    """A token that is not kept leaves the next actions as they are, kept ones equal one pass, and clear empties it."""
    model = tiny_model("ad").double()
    x = torch.randn(2, 12, 16, dtype=double)
    cache = t2mir.Cache(model, 2)
    for _ in range(2):
        cache.step(model, x[:, :4])
        for i in range(4, 11):
            for got, tokens in (
                (cache.step(model, x[:, -1:], keep=False), x[:, [*range(i), 11]]),
                (cache.step(model, x[:, i : i + 1]), x[:, : i + 1]),
            ):
                mean, log_std, _ = model.act(tokens)
                near(got, (mean[:, -1], log_std[:, -1].exp()))
        cache.fill(model, [], 1)


@torch.no_grad()
def test_the_policy_stays_within_bounds():
    """However large the head's weights are, the mean is an action and the deviation lies between a hundredth and 1."""
    model = tiny_model("ad")
    model.head.weight.mul_(1000)
    mean, log_std, _ = model.act(torch.randn(4, 30, 16))
    assert mean.shape == log_std.shape == (4, 30, 2)
    assert mean.abs().max() <= 1 and mean.min() < -0.9 and mean.max() > 0.9
    assert log_std.max() == 0 and 0.01 < log_std.exp().min() < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Batches and the action loss


BATCHES = [("ad", 1, False), ("ad", 3, True), ("dpt", 1, True), ("dpt", 3, True)]


@pytest.mark.parametrize("mode, stride, learner", BATCHES)
def test_batches(mode, stride, learner, folder):
    """Two sequences of each of batch / 2 distinct training tasks, with contexts and targets as the data has them.

    AD: none, one and two finished episodes in turn, then an episode of the last quarter, every stride-th step of each.
    The queries are the states of the last episode, each behind the steps before it. Their targets are the learner's
    actions where the data has them, the last episode then being a guest's too, or else the actions taken. DPT: a prompt
    of three episodes, every stride-th step of each, and queries from any other episodes. Finished episodes are sorted
    by return.
    """
    data = load(f"{folder}/point_robot.npz")
    if not learner:
        del data["learner_actions"]
    train = ~data["test"]
    parts = [data[key][train] for key in ("states", "actions", "rewards", "expert_actions")]
    targets = (data["learner_actions"] if learner else data["actions"])[train]
    x, c = t2mir.tensors(data, train, "cpu"), tiny(mode, queries=40, stride=stride)
    torch.manual_seed(0)
    seen, tasks_seen, finished_seen, running_seen, asked = set(), set(), set(), set(), set()
    for i in range(60):
        keep, n = slice(0, None, stride), i % 3  # in AD, n finished episodes and the running one
        batch = {key: value.numpy() for key, value in BACKBONES[mode].batch(c, x, i, 8).items()}
        ids, counts = np.unique(batch["task_ids"], return_counts=True)
        assert len(ids) == 4 and (counts == 2).all()
        tasks_seen |= set(ids)
        for b, task in enumerate(batch["task_ids"]):
            states, actions, rewards, labels = (part[task] for part in parts)
            places, start = [], 0
            for _ in range(3 if mode == "dpt" else n + 1):
                own = slice(start, start + len(range(20)[keep]))
                (place,) = np.flatnonzero((states[:, keep] == batch["states"][b, own]).all((1, 2)))
                np.testing.assert_array_equal(actions[place, keep], batch["actions"][b, own])
                np.testing.assert_array_equal(rewards[place, keep], batch["rewards"][b, own])
                np.testing.assert_array_equal(range(20)[keep], batch["times"][own])
                places.append(place)
                start = own.stop
            assert start == batch["states"].shape[1]
            if mode == "ad":
                running = places.pop()
                running_seen.add(running)
                times = batch["query_times"][b]
                assert sorted(times) == list(range(20))
                np.testing.assert_array_equal(targets[task, running, times], batch["targets"][b])
                np.testing.assert_array_equal(states[running, times], batch["queries"][b])
                before = [n * len(range(20)[keep]) + sum(kept < t for kept in range(20)[keep]) for t in times]
                np.testing.assert_array_equal(before, batch["seen"][b])
            else:
                assert batch["query_times"] == 20
                for query, label in zip(batch["queries"][b], batch["targets"][b], strict=True):
                    e, t = np.argwhere((states == query).all(-1))[0]
                    np.testing.assert_array_equal(labels[e, t], label)
                    assert e not in places
                    asked.add((e, t))
            assert places == sorted(places, key=lambda p: rewards[p].sum())
            finished_seen |= set(places)
        seen |= set(batch["seen"].flatten().tolist())
    E, length = parts[0].shape[1], len(range(0, 20, stride))
    assert tasks_seen == set(range(5))
    assert finished_seen == set(range(E)) - (running_seen if len(running_seen) == 1 else set())  # never its own context
    if mode == "ad":
        assert seen == {n * length + -(-t // stride) for n in range(3) for t in range(20)}
        last_quarter = range(E * 3 // 4, E)
        assert running_seen == {e for e in last_quarter if learner or not data["guest"][e]}
        assert data["guest"][last_quarter].any() and not data["guest"][last_quarter].all()
    else:
        assert seen == set(range(3 * length + 1)) and asked == set(np.ndindex(E, 20))


def numbered_data(N, E, T, **more):
    """Data whose states say where they stand, (task, episode, time); its returns are a permutation in each task."""
    rng = np.random.default_rng(0)
    states = np.stack(np.meshgrid(*map(np.arange, (N, E, T)), indexing="ij"), axis=-1).astype(np.float32)
    rewards = np.stack([rng.permutation(E) for _ in range(N)])[:, :, None].repeat(T, 2).astype(np.float32)
    actions = rng.uniform(-1, 1, (N, E, T, 2)).astype(np.float32)
    return dict(states=states, actions=actions, rewards=rewards, test=np.zeros(N, bool), **more)


@pytest.mark.parametrize("guests", [False, True])
@pytest.mark.parametrize("learner", [False, True])
def test_places_of_episodes(learner, guests):
    """Episodes by return, the best one last, the own ones of the last quarter, and the guests' if they can be used."""
    data = numbered_data(6, 9, 4)
    guest = np.array([1, 0, 1, 0, 1, 0, 1, 1, 0], bool)
    data |= {"learner_actions": -data["actions"]} if learner else {}
    data |= {"guest": guest} if guests else {}
    tasks = np.array([1, 0, 1, 1, 0, 1], bool)
    x = t2mir.tensors(data, tasks, "cpu")
    for key in ("states", "actions", "rewards"):
        np.testing.assert_array_equal(x[key], data[key][tasks])
    np.testing.assert_array_equal(x["learner_actions"], (-1 if learner else 1) * data["actions"][tasks])
    for returns, order in zip(data["rewards"][tasks].sum(-1), x["by_return"]):
        assert order.tolist() == sorted(range(9), key=lambda e: returns[e])
    last = range(7, 9)
    own = [e for e in last if not (guests and guest[e])]
    assert x["own"].tolist() == own
    assert x["guests"].tolist() == ([e for e in last if guest[e]] if learner and guests else own)
    for E, first in ((1, 0), (3, 2), (80, 60), (400, 360)):
        assert t2mir.tensors(numbered_data(2, E, 2), np.ones(2, bool), "cpu")["own"].tolist() == list(range(first, E))


def ranks_of(batch, x, length, n):
    """Places by return (B, n), 0 for the worst, of the first n episodes of a batch of `numbered_data`."""
    episodes = batch["states"][:, : n * length : length, 1].long()  # (B, n)
    return x["by_return"].argsort(dim=1)[batch["task_ids"]].gather(1, episodes)


def test_how_often_ad_draws_an_episode():
    """Two other finished episodes come from the worst r, r uniform; the running one is a guest's in half of the cases.

    How often each pair of places occurs is what a loop of the same draws counts. Of the running episodes each own one
    is as frequent as any other own one, and each guest as any other guest.
    """
    N, E, T, rng = 200, 12, 2, np.random.default_rng(0)
    data = numbered_data(N, E, T, guest=np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], bool))
    data["learner_actions"] = data["actions"]
    x, c = t2mir.tensors(data, np.ones(N, bool), "cpu"), tiny("ad", context=3)
    torch.manual_seed(0)
    pairs, slow, running, rounds = np.zeros((E, E)), np.zeros((E, E)), np.zeros(E), 50
    for _ in range(rounds):
        batch = t2mir.AD.batch(c, x, 2, 2 * N)
        np.add.at(pairs, tuple(ranks_of(batch, x, T, 2).T.numpy()), 1)
        np.add.at(running, batch["states"][:, -1, 1].long().numpy(), 1)
    draws = 2 * N * rounds
    ranks = x["by_return"].argsort(dim=1).numpy()  # [task, episode] -> place by return
    for _ in range(draws):
        acted = rng.choice([9, 11]) if rng.uniform() < 0.5 else 10  # the running episode is not in its own context
        others, r = rng.permutation([i for i in range(E) if i != ranks[rng.integers(N), acted]]), rng.uniform(0, E)
        worst = [i for i in others if i < r] + [i for i in others if i >= r]  # better ones only if there are too few
        slow[min(worst[:2]), max(worst[:2])] += 1
    assert pairs.sum() == draws and (abs(pairs - slow) < 5 * np.sqrt(2 * slow + 10)).all()
    expected = np.array([0] * 9 + [1 / 4, 1 / 2, 1 / 4]) * draws
    assert (abs(running - expected) <= 5 * np.sqrt(expected)).all()


def test_ad_draws_as_many_episodes_as_there_are():
    """With a context of one more than the stored episodes, as many finished ones as there are can be drawn."""
    data = numbered_data(4, 3, 5)
    x, c = t2mir.tensors(data, np.ones(4, bool), "cpu"), tiny("ad", context=4)
    torch.manual_seed(0)
    for step in range(40):
        batch = t2mir.AD.batch(c, x, step, 8)
        assert batch["states"].shape == (8, (step % 4 + 1) * 5, 3) and batch["targets"].shape == (8, 5, 2)


def test_dpt_draws_its_prompt_from_all_episodes():
    """Each of the episodes, prefixes and times of queries is as frequent as any other.

    No query is from an episode of its prompt, whose actions may be the targets.
    """
    N, E, T = 100, 6, 3
    data = numbered_data(N, E, T)
    data["expert_actions"] = data["actions"]
    x, c = t2mir.tensors(data, np.ones(N, bool), "cpu"), tiny("dpt", context=2, queries=4)
    torch.manual_seed(0)
    batches = [t2mir.DPT.batch(c, x, step, 2 * N) for step in range(50)]
    pairs = np.concatenate([ranks_of(batch, x, T, 2) for batch in batches])
    assert (pairs[:, 0] <= pairs[:, 1]).all()
    prompts = np.concatenate([batch["states"][:, ::T, 1] for batch in batches])  # (B, K), the numbers of its episodes
    asked = np.concatenate([batch["queries"][..., 1] for batch in batches])  # (B, Q)
    assert (asked[:, :, None] != prompts[:, None]).all()
    queries = np.concatenate([batch["queries"].flatten(0, 1) for batch in batches]).astype(int)
    seen = np.concatenate([batch["seen"].flatten() for batch in batches])
    for numbers, n in ((pairs.flatten(), E), (queries[:, 1], E), (queries[:, 2], T), (seen, 2 * T + 1)):
        counts = np.bincount(numbers, minlength=n)
        assert len(counts) == n and (abs(counts - len(numbers) / n) < 5 * np.sqrt(len(numbers) / n)).all()


@pytest.mark.parametrize("mode", MODES)
def test_remembered_arrays_replace_what_is_finished(mode, folder):
    """With `remembered`, the same draws take the finished episodes from there, at the same places by return.

    The running episode, the queries and the targets stay those of the task itself.
    """
    x = training_arrays(folder)
    torch.manual_seed(1)
    fresh = {key: torch.randn_like(x[key]) for key in ("states", "actions", "rewards")}
    fresh["by_return"] = fresh["rewards"].sum(-1).argsort(dim=1)
    c, kept = tiny(mode, stride=3), slice(0, None, 3)
    own, other = [], []
    for step in range(3):
        for batches, remembered in ((own, {}), (other, {"remembered": fresh})):
            torch.manual_seed(step)
            batches.append(BACKBONES[mode].batch(c, x, step, 8, **remembered))
    for one, two in zip(own, other):
        end = one["states"].shape[1] - (7 if mode == "ad" else 0)
        for b, task in enumerate(one["task_ids"]):
            for start in range(0, end, 7):
                part = slice(start, start + 7)
                episodes, drawn = x["states"][task, :, kept], one["states"][b, part]
                (place,) = [i for i, episode in enumerate(episodes) if torch.equal(episode, drawn)]
                rank = x["by_return"][task].tolist().index(place)
                for key in ("states", "actions", "rewards"):
                    assert torch.equal(two[key][b, part], fresh[key][task, fresh["by_return"][task, rank], kept])
        for key in ("states", "actions", "rewards"):
            assert torch.equal(one[key][:, end:], two[key][:, end:])
        for key in ("times", "task_ids", "targets", "queries", "query_times", "seen"):
            assert torch.equal(one[key], two[key])


def one_by_one(model, batch):
    """Mean and log deviation (B, P, act_dim), each from a pass of its own over what precedes it, and over no others."""
    x = model.tokens(batch["states"], batch["actions"], batch["rewards"], batch["times"])
    mean, log_std = torch.zeros_like(batch["targets"]), torch.zeros_like(batch["targets"])
    for b, p in np.ndindex(*batch["seen"].shape):
        time = batch["query_times"].expand(batch["seen"].shape)[b, p]
        query = model.state_tokens(batch["queries"][b : b + 1, p : p + 1], time)
        m, s, _ = model.act(torch.cat([x[b : b + 1, : 3 * batch["seen"][b, p]], query], dim=1))
        mean[b, p], log_std[b, p] = m[0, -1], s[0, -1]
    return mean, log_std


def test_neg_log_prob_is_that_of_a_normal_distribution():
    """Per action dimension, and up to the constant log(2 pi) / 2; its gradients are those of torch.distributions."""
    torch.manual_seed(0)
    actions, mean, log_std = (torch.randn(4, 6, 3, dtype=double, requires_grad=True) for _ in range(3))
    fast = t2mir.neg_log_prob(actions, mean, log_std)
    slow = -distributions.Normal(mean, log_std.exp()).log_prob(actions) - 0.5 * math.log(2 * math.pi)
    near(fast, slow)
    weight = torch.randn(4, 6, 3, dtype=double)
    got, expected = (torch.autograd.grad((y * weight).sum(), [mean, log_std]) for y in (fast, slow))
    near(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_action_loss_equals_one_pass_for_each_prediction(mode, stride, folder):
    """The loss is that of policies which are computed from nothing but what precedes the predictions."""
    model, x = tiny_model(mode, batch=4, stride=stride).double(), training_arrays(folder)
    for step in range(3):
        batch = in_double(draw(model.config, x, step))
        mean, log_std = one_by_one(model, batch)
        near(model.predict(batch)[:2], (mean, log_std), 1e-8)
        # Each prediction's -log P is weighted by its deviation.
        slow = -distributions.Normal(mean, log_std.exp()).log_prob(batch["targets"]) - 0.5 * math.log(2 * math.pi)
        near(model(batch)["action"], (log_std.exp() * slow).mean(), 1e-8)
        near(model(batch)["nll"], slow.mean(), 1e-8)
        assert mean.std() > 0.01 and log_std.std() > 0.01


@torch.no_grad()
def test_ad_queries_predict_as_the_state_tokens_do(folder):
    """With every step kept, AD's queries are what a causal pass predicts at the running episode's state tokens."""
    model, x = tiny_model("ad", batch=4, queries=20).double(), training_arrays(folder)
    for step in range(3):
        batch = in_double(draw(model.config, x, step))
        tokens = model.tokens(batch["states"], batch["actions"], batch["rewards"], batch["times"])
        at_states = [part[:, -60::3] for part in model.act(tokens)[:2]]  # (B, T, act_dim)
        for found, expected in zip(model.predict(batch), at_states):
            near(found, torch.stack([row[t] for row, t in zip(expected, batch["query_times"])]), 1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_learns_from_errors_over_deviations(mode, folder):
    """The gradient to a mean is its error over the deviation: the weight takes one of the two factors away."""
    model = tiny_model(mode, batch=4).double()
    batch, heard = in_double(draw(model.config, training_arrays(folder), 0)), []
    act = model.act

    def listening(*args, **given):
        heard.extend(act(*args, **given))
        heard[0].retain_grad()
        return heard

    model.act = listening
    model(batch)["action"].backward()
    error = (heard[0].detach() - batch["targets"]) / heard[1].detach().exp()
    near(heard[0].grad, error / error.numel(), 1e-8)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_changes_little(mode, folder):
    """Under autocast the routers keep float32, and the losses stay within a few percent of those in float32."""
    model = tiny_model(mode).train()
    batch, types, losses = draw(model.config, training_arrays(folder)), set(), []
    for block in model.blocks:
        for moe in (block.moe.token_moe, block.moe.task_moe):
            moe.register_forward_hook(lambda m, x, y: types.update((y[1].logits.dtype, y[1].gates.dtype)))
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(batch))
    assert types == {torch.float32}
    for name in ("action", "contrastive"):
        assert float(losses[1][name]) == pytest.approx(float(losses[0][name]), rel=0.05, abs=0.02)
    assert losses[1]["action"].dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Acting in context


CONTEXTS = ("own", "other", "hidden")
ACTING = [(mode, context, stride, 3) for mode in MODES for context in CONTEXTS for stride in (1, 3)]
ACTING += [(mode, "own", 1, K) for mode in MODES for K in (1, 2, 4)]


@torch.no_grad()
@pytest.mark.parametrize("mode, context, stride, K", ACTING)
def test_acting_with_the_cache_equals_the_full_pass(mode, context, stride, K, monkeypatch):
    """Every action of `evaluate` is drawn from the policy of one pass, without a cache, over all the right tokens.

    AD remembers the newest finished episode and the best K - 2 of the earlier ones, DPT the best K of all, sorted by
    return. With another task's context, what is remembered is that of the task before, and the running episode is the
    agent's own.
    """
    model, T, N, episodes, acted = tiny_model(mode, stride=stride, context=K), 20, 3, 6, []

    def recording(name, tasks):
        env = make_vec(name, tasks)
        reset, step = env.reset, env.step

        def reset_and_note(**given):
            acted.append([])
            env.seen, info = reset(**given)
            return env.seen, info

        def step_and_note(actions):
            result = step(actions)
            acted[-1].append((env.seen, actions, result[1].astype(np.float32)))
            env.seen = result[0]
            return result

        env.reset, env.step = reset_and_note, step_and_note
        return env

    monkeypatch.setattr(t2mir, "make_vec", recording)
    returns = evaluate(model, np.array([[0.9, 0.1], [-0.4, -0.8], [0.2, 0.7]]), episodes, seed=4, context=context)
    acted = [[torch.tensor(np.stack(part, axis=1)) for part in zip(*steps)] for steps in acted]  # (N, T, ...) each
    assert [episode[0].shape for episode in acted] == [(N, T, 2)] * episodes
    np.testing.assert_allclose(returns, [rewards.sum(1) for _, _, rewards in acted], rtol=1e-5)
    generator = torch.Generator().manual_seed(4)
    noise = torch.stack([torch.randn(N, 2, generator=generator) for _ in range(episodes * T)]).view(episodes, T, N, 2)
    kept, moved, selected = torch.arange(0, T, stride), 0, 0
    means, deviations = torch.zeros(episodes, N, T, 2), torch.zeros(episodes, N, T, 2)
    for e, i in itertools.product(range(episodes), range(N)):
        owner = (i - 1) % N if context == "other" else i

        def total(episode):
            return episode[2][owner].sum().item()

        best = sorted(acted[:e] if mode == "dpt" else acted[: max(0, e - 1)], key=total, reverse=True)
        if mode == "dpt":
            past = best[:K]
        else:
            past = (best[: max(0, K - 2)] + acted[e - 1 : e]) if e > 0 and K > 1 else []
        past = [] if context == "hidden" else sorted(past, key=total)
        in_order = [episode for episode in acted[:e] if any(episode is one for one in past)]
        moved += any(a is not b for a, b in zip(in_order, past))
        selected += any(a is not b for a, b in zip(in_order, acted[e - len(past) : e]))
        past = [model.tokens(*(part[owner : owner + 1, kept] for part in episode), kept) for episode in past]
        own = [part[i : i + 1] for part in acted[e]]
        strided = model.tokens(*(part[:, kept] for part in own), kept)
        for t in range(T):
            adds = context != "hidden" and (mode == "ad" or e == 0)  # the running episode is in the context
            so_far = [strided[:, : 3 * int((kept < t).sum())]] if adds else []
            now = model.state_tokens(own[0][:, t : t + 1], t if mode == "ad" else T)
            mean, log_std, _ = model.act(torch.cat([*past, *so_far, now], dim=1))
            means[e, i, t], deviations[e, i, t] = mean[0, -1], log_std[0, -1].exp()
            near(acted[e][1][i, t], (mean[0, -1] + deviations[e, i, t] * noise[e, t, i]).clamp(-1, 1), 1e-4)
    assert means.std(2).min() > 0.005 and deviations.std(2).min() > 0.001  # the policy is not constant
    if context != "hidden" and K > 1:  # choosing and sorting had work to do
        assert (moved or K == 2) and (selected or (mode, K) == ("ad", 2))


@torch.no_grad()
@pytest.mark.parametrize("keep, newest", [(2, False), (2, True), (1, True), (9, True), (0, True)])
def test_the_cache_is_filled_with_the_best_episodes(keep, newest):
    """The best `keep` ones enter by return, the best one last, in each task; the newest may displace the worst."""
    torch.manual_seed(0)
    model, N, T = tiny_model("ad", stride=3, context=6).double(), 3, 20
    memory = [[torch.randn(N, T, *size, dtype=double) for size in ((2,), (2,), ())] for _ in range(5)]
    cache, token, kept = t2mir.Cache(model, N), torch.randn(N, 1, 16, dtype=double), torch.arange(0, T, 3)
    for _ in range(2):  # what the cache held before is gone
        cache.fill(model, memory, keep, newest)
        mean, deviation = cache.step(model, token, keep=False)
        for i in range(N):
            by_return = sorted(memory, key=lambda episode: episode[2][i].sum())
            chosen = by_return[max(0, 5 - keep) :] if keep else []
            if newest and keep and not any(episode is memory[-1] for episode in chosen):
                chosen = sorted([memory[-1], *chosen[1:]], key=lambda episode: episode[2][i].sum())
            tokens = [model.tokens(*(part[i : i + 1, kept] for part in episode), kept) for episode in chosen]
            one_mean, one_log_std, _ = model.act(torch.cat([*tokens, token[i : i + 1]], dim=1))
            near((mean[i], deviation[i]), (one_mean[0, -1], one_log_std[0, -1].exp()))


def test_actions_spread_as_the_policy_says(monkeypatch):
    """Around a mean of zero, actions have the policy's deviation in every episode, and no draw repeats another."""
    taken, deviation = [], torch.tensor([0.1, 0.25])

    class Recorder(ENVS["point_robot"]):
        def step(self, actions):
            taken.append(actions)
            return super().step(actions)

    def act(self, x, **given):
        return torch.zeros(len(x), 1, 2), deviation.log().expand(len(x), 1, 2), []

    monkeypatch.setattr(t2mir, "make_vec", lambda name, tasks: Recorder(tasks))
    monkeypatch.setattr(T2MIR, "act", act)
    for mode, context in itertools.product(MODES, CONTEXTS):
        taken.clear()
        evaluate(tiny_model(mode), np.zeros((200, 2)), episodes=3, context=context)
        episodes = np.stack(taken).reshape(3, -1, 2)  # 4,000 draws of each dimension in an episode
        for draws in episodes:
            np.testing.assert_allclose(draws.std(0), deviation, rtol=0.06)  # five standard deviations
            np.testing.assert_allclose(draws.mean(0) / deviation.numpy(), 0, atol=0.08)
        assert (abs(np.corrcoef(episodes.transpose(0, 2, 1).reshape(6, -1)) - np.eye(6)) < 0.08).all()
        steps = np.stack(taken)[..., 0]  # (60, 200)
        assert abs(np.corrcoef(steps) - np.eye(60)).max() < 0.5
        assert abs(np.corrcoef(steps.T) - np.eye(200)).max() < 0.8


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_leaves_the_model_as_it_was(mode):
    """Evaluating twice gives the same returns, without dropout, and a model in training mode stays in it."""
    model, tasks = tiny_model(mode, dropout=0.5).train(), np.array([[0.5, 0.1], [-0.3, 0.2]])
    first = evaluate(model, tasks, 3, seed=1)
    torch.rand(5)
    np.testing.assert_array_equal(evaluate(model, tasks, 3, seed=1), first)
    assert model.training and not np.array_equal(evaluate(model, tasks, 3, seed=2), first)
    evaluate(model, tasks, 3, seed=1, memory=(memory := []))
    np.testing.assert_array_equal([rewards.sum(1).numpy() for _, _, rewards in memory], first)


@pytest.mark.parametrize("mode", MODES)
def test_a_robot_is_an_environment_of_its_own(mode):
    """A robot is any Gymnasium environment, here one with float64 states; its returns are those of the task's array.

    The environment stays open, and is given actions in [-1, 1] only.
    """
    class Robot(gymnasium.Wrapper):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)

        def reset(self, **how):
            state, info = super().reset(**how)
            return state.astype(np.float64), info

        def step(self, action):
            assert action.shape == (2,) and abs(action).max() <= 1
            state, *rest = super().step(action)
            return state.astype(np.float64), *rest

    model, task = tiny_model(mode), np.array([0.5, 0.1])
    robots = gymnasium.vector.SyncVectorEnv([lambda: Robot(gymnasium.make("t2mir/PointRobot-v0", task=task))])
    np.testing.assert_allclose(evaluate(model, robots, 3, seed=1), evaluate(model, task[None], 3, seed=1), rtol=1e-6)
    assert evaluate(model, robots, 2).shape == (2, 1) and robots.reset()[0].dtype == np.float64


def test_scores_leave_out_experts_that_are_no_better_than_random(folder):
    """A score is 0 at the random return and 1 at the expert's; it is NaN where these two are the wrong way round.

    Means in the log are over the other tasks.
    """
    data = load(f"{folder}/point_robot.npz")
    mask = np.array([True, False, True, True, False, True, False])
    data["random_return"], data["expert_return"] = np.arange(7) - 10.0, np.array([-8.0, 0, -9, -7, 0, -4, 0])
    scores = t2mir.normalised(np.array([[-10.0, -8, -7, -4], [-8.0, -9, -7, -5]]), data, mask)
    np.testing.assert_allclose(scores, [[0, np.nan, np.nan, 1], [1, np.nan, np.nan, 0]])
    test = np.flatnonzero(data["test"])
    data["random_return"][test], data["expert_return"][test] = (-30, -20), (-5, -25)
    model = tiny_model("dpt", eval_episodes=2)
    numbers = t2mir.measure(model, data, data["test"], t2mir.tensors(data, data["test"], "cpu"))
    last = evaluate(model, data["tasks"][test], 2)[-1]
    assert numbers["return"] == pytest.approx(last.mean()) and numbers["score"] == pytest.approx((last[0] + 30) / 25)


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_held_out_loss_equals_one_pass_for_each_prediction(mode, context, folder):
    """The controls change the context alone: hidden, a prediction knows its own state and no more.

    With another task's context, the finished episodes are those of the task before, at the same places by return.
    Without dropout, and the model stays in training mode.
    """
    model = tiny_model(mode, dropout=0.3, stride=5, queries=4).train()
    c, x, kept, expected, amount = model.config, training_arrays(folder), slice(0, None, 5), [], []
    seen, losses = t2mir.held_out_loss(model, x, context, batches=4)
    assert model.training
    model.eval()
    for i in range(4):
        batch = draw(c, x, step=i, seed=i)
        amount.append(batch["seen"].flatten())
        if context == "hidden":
            tokens = model.state_tokens(batch["queries"], batch["query_times"])
            policies = [model.act(token[None, None])[:2] for token in tokens.flatten(0, 1)]
            mean, log_std = (torch.cat(part).view_as(batch["targets"]) for part in zip(*policies))
        elif context == "other":
            end = batch["states"].shape[1] - (4 if mode == "ad" else 0)
            for b, start in itertools.product(range(8), range(0, end, 4)):
                part, task = slice(start, start + 4), int(batch["task_ids"][b])
                places = x["by_return"][task].tolist()
                episodes, drawn = x["states"][task, places][:, kept], batch["states"][b, part]
                (rank,) = [r for r, episode in enumerate(episodes) if torch.equal(episode, drawn)]
                for key in ("states", "actions", "rewards"):
                    batch[key][b, part] = x[key][task - 1, x["by_return"][task - 1, rank], kept]
        if context != "hidden":
            mean, log_std = one_by_one(model, batch)
        expected.append(t2mir.neg_log_prob(batch["targets"], mean, log_std).mean(-1).flatten())
    np.testing.assert_array_equal(seen, torch.cat(amount))
    np.testing.assert_allclose(losses, torch.cat(expected), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_the_held_out_loss_is_a_fixed_number_of_a_model(mode, folder):
    """It is the same whatever was drawn before, and the logged number is its mean with the own context."""
    data = load(f"{folder}/point_robot.npz")
    model = tiny_model(mode, dropout=0.3, context=2, stride=10, eval_episodes=1).train()
    x, measured = t2mir.tensors(data, data["test"], "cpu"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        measured.append(t2mir.measure(model, data, data["test"], x)["heldout"])
    assert measured[0] == measured[1] and model.training
    losses = {context: t2mir.held_out_loss(model, x, context)[1] for context in CONTEXTS}
    assert losses["own"].shape == (20 * 4 * 6,)  # two tasks are held out
    assert measured[0] == pytest.approx(losses["own"].mean(), rel=1e-6)
    assert len({float(part.mean()) for part in losses.values()}) == 3
    model.head.weight.mul_(1.5)
    assert t2mir.measure(model, data, data["test"], x)["heldout"] != measured[0]


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_model_learns_a_tiny_batch_by_heart(mode, folder):
    """Trained on one batch with all its losses, the means' squared error falls below 2% of the targets' variance."""
    torch.manual_seed(0)
    c = tiny(mode, d_model=32, batch=4, context=1, queries=16)
    model = T2MIR(c, sizes_of("point_robot"))
    batch, weights = draw(c, training_arrays(folder)), c.loss_weights
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for step in range(800):
        losses = model.train()(batch)
        optimizer.zero_grad()
        sum(weight * losses[name] for name, weight in weights.items()).backward()
        optimizer.step()
        if step % 25 == 24:
            mean, _, _ = model.eval().predict(batch)
            share = float((mean.detach() - batch["targets"]).square().mean() / batch["targets"].var())
            if share < 0.02:
                return
    pytest.fail(f"the squared error is still {share:.3f} of the variance")


def short_run(mode, folder, runs, **given):
    """The folder of a run of six steps, two evaluations and dropout."""
    short = dict(n_layers=1, context=2, steps=6, eval_every=3, warmup=2, eval_episodes=2, dropout=0.1)
    return t2mir.train(tiny(mode, **{**short, "data": str(folder), "runs": str(runs), "name": "run", **given}))


def test_the_learning_rate_rises_and_falls(folder, tmp_path, monkeypatch):
    """It rises in equal steps to its peak at the end of the warm-up, and from there follows half a cosine to zero.

    Both optimizers have the same rate.
    """
    rates = {torch.optim.AdamW: [], torch.optim.Muon: []}
    steps = {kind: kind.step for kind in rates}

    def recording(optimizer, *args):
        rates[type(optimizer)].append(optimizer.param_groups[0]["lr"])
        return steps[type(optimizer)](optimizer, *args)

    for kind in rates:
        monkeypatch.setattr(kind, "step", recording)
    short_run("dpt", folder, tmp_path, lr=0.008, warmup=4, steps=12, eval_every=12)
    for found in rates.values():
        assert found[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008])
        assert found[4:] == pytest.approx([0.004 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])


@pytest.mark.parametrize("moe", [True, False])
def test_muon_has_the_matrices_of_the_blocks(moe):
    """Attention, experts and dense layers are Muon's; AdamW has the rest; no parameter is left out or named twice."""
    model = T2MIR(tiny("dpt", token_moe=moe, task_moe=moe, moe_layers="last", n_layers=2), sizes_of("point_robot"))
    of_optimizer = [{id(p) for p in o.param_groups[0]["params"]} for o in t2mir.new_optimizers(model)]
    for name, p in model.named_parameters():
        inner = any(part in name for part in (".attention.", ".experts.", ".mlp."))
        expected = [inner and p.requires_grad, p.requires_grad and not inner]
        assert [id(p) in ids for ids in of_optimizer] == expected, name
        assert p.ndim == 2 or not inner
    assert sum(map(len, of_optimizer)) == sum(p.requires_grad for p in model.parameters())


def rows(path):
    """Rows of a CSV file without what depends on the clock."""
    with open(path) as file:
        return [
            {key: value for key, value in row.items() if key not in ("tokens_per_s", "seconds")}
            for row in csv.DictReader(file)
        ]


def call_main(monkeypatch, *argv):
    """t2mir.py as at the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["t2mir.py", *map(str, argv)])
    t2mir.main()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_repeats_and_leaves_its_folder(mode, folder, tmp_path, monkeypatch):
    """Same seed, same log; other seed, another one. The checkpoint gives back the model, and it acts as logged."""
    report, trained = t2mir.report, []

    def keep_and_report(folder, model, *rest):
        trained.append(copy.deepcopy(model).eval())
        report(folder, model, *rest)

    monkeypatch.setattr(t2mir, "report", keep_and_report)
    run, again, other = (
        short_run(mode, folder, tmp_path, seed=seed, name=f"run{i}") for i, seed in enumerate((5, 5, 6))
    )
    log = rows(run / "log.csv")
    assert [row["step"] for row in log] == ["3", "6"] and log == rows(again / "log.csv") != rows(other / "log.csv")
    assert {"loss", "action", "importance", "load", "contrastive", "token_experts", "task_experts"} < set(log[0])
    assert sorted(p.name for p in run.iterdir()) == ["ckpt.pt", "config.json", "incontext.png", "log.csv", "result.npz"]
    assert json.loads((run / "config.json").read_text())["seed"] == 5
    assert (run / "incontext.png").read_bytes()[:4] == b"\x89PNG"
    model, data = t2mir.load_agent(run), load(f"{folder}/point_robot.npz")
    assert not model.training and not t2mir.load_agent(str(run / "ckpt.pt")).training
    for (name, p), (_, q), (_, r) in zip(*(m.state_dict().items() for m in (model, trained[0], trained[2]))):
        assert torch.equal(p, q) and (p.ndim == 1 or not torch.equal(p, r)), name
    tasks, low, high = (data[key][data["test"]] for key in ("tasks", "random_return", "expert_return"))
    last = evaluate(model, tasks, 2)[-1]
    assert float(log[-1]["return"]) == pytest.approx(last.mean(), rel=1e-5)
    good = high > low
    if good.any():
        assert float(log[-1]["score"]) == pytest.approx(((last - low) / (high - low))[good].mean(), rel=1e-4)
    result = np.load(run / "result.npz")
    for context in ("own", "hidden", "other"):
        np.testing.assert_allclose(result[context], evaluate(model, tasks, 2, seed=1, context=context), rtol=1e-5)
    for key, array in (("tasks", tasks), ("random_return", low), ("expert_return", high)):
        np.testing.assert_array_equal(result[key], array)
    seen = data["states"][~data["test"]].reshape(-1, 2)
    near(model.state_mean, torch.tensor(seen.mean(0)), 1e-5)  # the test tasks' states are not in the normalisation
    near(model.state_std, torch.tensor(seen.std(0)), 1e-5)


def test_unreadable_checkpoints_are_named_in_one_line(folder, tmp_path):
    """Missing, cut, foreign and outdated files all raise BadInput with one line that names the file."""
    run = short_run("dpt", folder, tmp_path, steps=1)
    (tmp_path / "cut.pt").write_bytes((run / "ckpt.pt").read_bytes()[:5000])
    torch.save({"model": t2mir.load_agent(run).state_dict()}, tmp_path / "outdated.pt")
    torch.save([1, 2], tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name in ("cut.pt", "missing.pt", "outdated.pt", "foreign.pt", "text.pt", "no_such_run"):
        with pytest.raises(BadInput, match=name) as caught:
            t2mir.load_agent(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENVS)
def test_every_family_trains(name, mode, folder, tmp_path):
    """A dataset of each family gives a log with returns and an agent that acts in all three contexts."""
    run = short_run(mode, folder, tmp_path, env=name, batch=2, steps=2, stride=10, eval_every=2, eval_episodes=1)
    (row,) = rows(run / "log.csv")
    assert all(np.isfinite(float(row[key])) for key in ("loss", "heldout", "return"))
    held_out = load(f"{folder}/{name}.npz")["test"].sum()
    result = np.load(run / "result.npz")
    contexts = {"own", "hidden", "other"} if held_out > 1 else {"own", "hidden"}  # with one task there is no other
    assert contexts == {"own", "hidden", "other"} & set(result.files)
    assert {result[context].shape for context in contexts} == {(1, held_out)}


@pytest.mark.parametrize("mode", MODES)
def test_a_new_family_needs_no_presets(mode, tmp_path, monkeypatch):
    """A class in ENVS is all that a family needs: its data is collected and an agent is trained, without a preset."""

    class Slider(TaskVec):
        id, obs_dim, act_dim, task_dim, horizon = "t2mir/Slider-v0", 3, 1, 1, 6

        @staticmethod
        def draw_tasks(rng, num_tasks):
            return rng.uniform(-1, 1, (num_tasks, 1))

        def initial_state(self, rng):
            return rng.normal(size=(self.num_envs, 3))

        def observe(self):
            return self.state

        def advance(self, actions):
            self.state = self.state + 0.1 * actions
            return -abs(self.state - self.tasks).sum(1)

    monkeypatch.setitem(ENVS, "slider", Slider)
    collect("slider", steps=24, random_steps=12, train_tasks=3, test_tasks=1, hidden=8, batch=8, out=str(tmp_path))
    run = short_run(mode, tmp_path, tmp_path, env="slider", batch=4)
    assert all(np.isfinite(float(rows(run / "log.csv")[-1][key])) for key in ("heldout", "return"))
    assert t2mir.preset("slider", mode) == Config(env="slider", mode=mode, **t2mir.BY_MODE[mode])


def own_data(folder, experts=True, **changed):
    """Writes my_robot.npz: 123 state dimensions, 37 actions, 4 tasks, 7 steps, float64, no simulator."""
    rng, shape = np.random.default_rng(0), (4, 5, 7)
    data = dict(states=rng.normal(size=(*shape, 123)), actions=rng.uniform(-1, 1, (*shape, 37)))
    data |= dict(rewards=rng.normal(size=shape), test=np.array([False, False, True, True]))
    data |= dict(expert_actions=rng.uniform(-1, 1, (*shape, 37))) if experts else {}
    np.savez(Path(folder) / "my_robot.npz", **(data | changed))
    return data | changed


@pytest.mark.parametrize("mode", MODES)
def test_own_data_without_a_simulator(mode, tmp_path, capsys):
    """Another robot's data trains both backbones. The log has the held-out loss and no return, and the report
    compares the three contexts by this loss, at growing amounts of context."""
    own_data(tmp_path, experts=mode == "dpt")
    run = short_run(mode, tmp_path, tmp_path, env="my_robot", batch=4)
    log = rows(run / "log.csv")
    assert len(log) == 2 and all(np.isfinite(float(row["heldout"])) for row in log)
    assert not {"return", "score"} & set(log[0])
    result, said = np.load(run / "result.npz"), capsys.readouterr().out
    assert set(result.files) == {"own", "hidden", "other", "amount"} and (np.diff(result["amount"]) > 0).all()
    for context in ("own", "hidden", "other"):
        assert result[context].shape == (len(result["amount"]), 1) and np.isfinite(result[context]).all()
    lines = {line.split(":")[0]: line.split(":")[1].split() for line in said.splitlines() if "context" in line}
    np.testing.assert_allclose([float(x) for x in lines["own context"]], result["own"][:, 0], atol=6e-4)
    np.testing.assert_allclose([float(x) for x in lines["context hidden"]], result["hidden"][:, 0], atol=6e-4)
    model = t2mir.load_agent(run)
    assert (model.sizes["obs_dim"], model.sizes["act_dim"], model.horizon) == (123, 37, 7)
    assert (run / "incontext.png").read_bytes()[:4] == b"\x89PNG"


def test_context_helps_where_it_tells_the_task(tmp_path):
    """Where every action of a task is one constant, a trained AD agent's loss is lowest with its own context.

    It is higher without a context, and with another task's finished episodes.
    """
    rng, shape = np.random.default_rng(0), (12, 4, 5)
    actions = np.broadcast_to(np.where(np.arange(12) % 2, 0.8, -0.8)[:, None, None, None], (*shape, 1))
    data = dict(states=rng.normal(size=(*shape, 2)), actions=actions, rewards=np.zeros(shape), test=np.arange(12) > 9)
    np.savez(tmp_path / "coin.npz", **data)
    given = dict(steps=150, warmup=10, lr=5e-3, eval_every=150, dropout=0.0, batch=8)
    result = np.load(short_run("ad", tmp_path, tmp_path, env="coin", **given) / "result.npz")
    own, hidden, other = (result[context].mean() for context in ("own", "hidden", "other"))
    assert own < hidden - 1 and own < other - 0.5


def test_dpt_needs_expert_actions(tmp_path):
    """Data without expert actions is refused by DPT in one line that says what to do instead."""
    own_data(tmp_path, experts=False)
    with pytest.raises(BadInput, match="expert_actions.*--mode ad") as caught:
        short_run("dpt", tmp_path, tmp_path, env="my_robot", batch=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode, most", [("ad", 5), ("dpt", 4)])
def test_a_context_of_more_episodes_than_a_task_has_is_refused(mode, most, tmp_path):
    """Of five episodes AD's context may hold all, and DPT's prompt all but one, from which the queries are."""
    own_data(tmp_path)  # five episodes
    short_run(mode, tmp_path, tmp_path, env="my_robot", batch=4, steps=1, context=most)
    with pytest.raises(BadInput, match=f"--context {most + 1} is more than the {most} episodes that it can have"):
        short_run(mode, tmp_path, tmp_path, env="my_robot", batch=4, context=most + 1, name="more")


def test_a_dimension_that_hardly_moves_is_not_blown_up(tmp_path):
    """A state dimension with a deviation of 2e-6 does not dominate the tokens when it moves by a hundredth later."""
    states = np.random.default_rng(1).normal(size=(4, 5, 7, 123))
    states[:2, ..., 5] = 0.5 + 2e-6 * states[:2, ..., 5]
    states[2:, ..., 5] = 0.51
    states[..., 6] = 7.0  # and one that never moves
    states[..., 7] = 1000 + 0.5 * states[..., 7]  # and one with a large offset, which is normalised like the others
    own_data(tmp_path, states=states)
    model = t2mir.load_agent(short_run("dpt", tmp_path, tmp_path, env="my_robot", batch=4, steps=1))
    normalised = (torch.as_tensor(states).float() - model.state_mean) / model.state_std
    assert normalised.isfinite().all() and normalised.abs().max() < 20
    others = [i for i in range(123) if i not in (5, 6)]
    near(model.state_std[others], torch.tensor(states[:2].reshape(-1, 123).std(0)).float()[others], 1e-3)


def test_val_tasks_holds_out_training_tasks(folder, tmp_path):
    """With --val_tasks the agent is evaluated on training tasks that it is not trained on, and never on test tasks."""
    data = load(f"{folder}/point_robot.npz")
    run = short_run("dpt", folder, tmp_path, val_tasks=2, batch=6)
    held_out = (np.load(run / "result.npz")["tasks"][:, None] == data["tasks"]).all(-1)  # (2, 7)
    assert held_out.sum(1).tolist() == [1, 1]
    held_out = held_out.any(0)
    assert held_out.sum() == 2 and not (held_out & data["test"]).any()
    model, trained = t2mir.load_agent(run), data["states"][~data["test"] & ~held_out].reshape(-1, 2)
    assert model.sizes["num_tasks"] == 3
    near(model.state_mean, torch.tensor(trained.mean(0)), 1e-5)
    x = t2mir.tensors(data, held_out, "cpu")
    measured = t2mir.measure(model, data, held_out, x)
    assert float(rows(run / "log.csv")[-1]["heldout"]) == pytest.approx(measured["heldout"], rel=1e-5)
    with pytest.raises(BadInput, match="--batch 8 is more than twice the 3 training tasks"):
        short_run("dpt", folder, tmp_path, val_tasks=2, batch=8, name="other")


# ----------------------------------------------------------------------------------------------------------------------
# Stopping, continuing and sharing


def stop_at(monkeypatch, mode, step, num_tasks=5):
    """Lets the training on `num_tasks` tasks end with ctrl-C when it draws the batch of `step`."""
    backbone = BACKBONES[mode]
    batch = backbone.batch

    def stopping(c, x, now, *rest):
        if now == step and len(x["rewards"]) == num_tasks:
            raise KeyboardInterrupt
        return batch(c, x, now, *rest)

    monkeypatch.setattr(backbone, "batch", staticmethod(stopping))


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(mode, folder, tmp_path, monkeypatch):
    """Stopped between two checkpoints and continued from another directory, the run ends as one that was left alone.

    Log, results, weights and the optimizers' states are equal bit for bit, with dropout and the router's noise. The
    data was given as a relative path.
    """
    given = dict(steps=13, eval_every=5, n_layers=2, stride=3)
    monkeypatch.chdir(folder)
    whole = short_run(mode, ".", tmp_path, name="whole", **given)
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_at(stopping, mode, 8)
        short_run(mode, ".", tmp_path, name="broken", **given)
    assert [row["step"] for row in rows(tmp_path / "broken" / "log.csv")] == ["5"]
    monkeypatch.chdir(tmp_path)
    call_main(monkeypatch, "--resume", "broken")
    one, two = whole, tmp_path / "broken"
    assert rows(one / "log.csv") == rows(two / "log.csv") and len(rows(one / "log.csv")) == 3
    one, two = (torch.load(run / "ckpt.pt", weights_only=True) for run in (one, two))
    for name, p in one["model"].items():
        assert torch.equal(p, two["model"][name]), name
    for first, second in zip(one["optimizers"], two["optimizers"], strict=True):
        for i, moments in first["state"].items():
            assert all(torch.equal(value, second["state"][i][key]) for key, value in moments.items())
    differ = [key for key in one["config"] if one["config"][key] != two["config"][key]]
    assert differ in ([], ["name"]) and Path(two["config"]["data"]).is_absolute()
    one, two = (np.load(run / "result.npz") for run in (whole, tmp_path / "broken"))
    assert all(np.array_equal(one[key], two[key]) for key in one.files)


def test_a_run_continues_from_within_its_own_folder(folder, tmp_path, monkeypatch):
    """`--resume .` works in the folder of the run."""
    monkeypatch.chdir(short_run("dpt", folder, tmp_path))
    call_main(monkeypatch, "--resume", ".", "--steps", "7")
    assert [row["step"] for row in rows("log.csv")] == ["3", "6", "7"]


def test_a_run_goes_on_with_its_own_data_only(folder, tmp_path, monkeypatch):
    """Another dataset is refused, a missing one is not collected, and the same file elsewhere will do."""

    def never(*args, **given):
        raise AssertionError("a dataset was collected")

    monkeypatch.setattr(t2mir, "collect", never)
    for name in ("changed", "elsewhere", "empty"):
        (tmp_path / name).mkdir()
    content = Path(f"{folder}/point_robot.npz").read_bytes()
    (tmp_path / "elsewhere" / "point_robot.npz").write_bytes(content)
    with np.load(f"{folder}/point_robot.npz") as data:
        changed = dict(data)
    changed["rewards"][0, 0, 0] += 1
    np.savez(tmp_path / "changed" / "point_robot.npz", **changed)
    run = short_run("dpt", folder, tmp_path)
    before = (run / "ckpt.pt").read_bytes()
    saved = json.loads((run / "config.json").read_text()) | {"resume": str(run)}
    for name, message in (("changed", "another dataset"), ("empty", "is missing")):
        with pytest.raises(BadInput, match=message):
            t2mir.train(Config(**saved | {"data": str(tmp_path / name)}))
    assert (run / "ckpt.pt").read_bytes() == before
    t2mir.train(Config(**saved | {"data": str(tmp_path / "elsewhere"), "steps": 8}))
    assert [row["step"] for row in rows(run / "log.csv")] == ["3", "6", "8"]


def test_flags_beside_resume(folder, tmp_path, monkeypatch, capsys):
    """Only a longer run, another place of the data and another device may be asked for; others end with code 2."""
    run = short_run("ad", folder, tmp_path)
    before = (run / "ckpt.pt").read_bytes(), (run / "config.json").read_bytes()
    with pytest.raises(BadInput, match="--steps"):
        call_main(monkeypatch, "--resume", run, "--steps", "5")
    for flags in ("--lr 1", "--seed 3", "--env cheetah_vel", "--name other", "--dev cpu", "--steps 8.5", "--help"):
        for resume in (["--resume", run], [f"--resume={run}"]):
            with pytest.raises(SystemExit) as ended:
                call_main(monkeypatch, *resume, *flags.split())
            assert ended.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    assert before == ((run / "ckpt.pt").read_bytes(), (run / "config.json").read_bytes())
    call_main(monkeypatch, f"--resume={run}", "--steps", "8", "--data", folder, "--device", "cpu")
    assert [row["step"] for row in rows(run / "log.csv")] == ["3", "6", "8"]
    assert json.loads((run / "config.json").read_text())["steps"] == 8


def test_a_run_of_another_machine_continues_on_this_device(folder, tmp_path, monkeypatch):
    """A run that was trained on a device that is missing here continues where --device says."""
    run = short_run("dpt", folder, tmp_path)
    saved = torch.load(run / "ckpt.pt", weights_only=True)
    saved["config"]["device"] = "cuda:99"
    torch.save(saved, run / "ckpt.pt")
    assert t2mir.load_agent(run).config.device == "cpu"
    call_main(monkeypatch, "--resume", run, "--device", "cpu", "--steps", "7")
    assert rows(run / "log.csv")[-1]["step"] == "7"


@pytest.mark.parametrize("given", [{}, {"RANK": "0"}])
def test_missing_data_is_collected_by_a_single_process(given, folder, tmp_path, monkeypatch):
    """A family's missing dataset is collected; several processes do not each collect it, and own data never is."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked = []

    def copy_data(name, out):
        asked.append(name)
        Path(out).mkdir(parents=True)
        (Path(out) / f"{name}.npz").write_bytes(Path(f"{folder}/{name}.npz").read_bytes())

    monkeypatch.setattr(t2mir, "collect", copy_data)
    if given:
        with pytest.raises(BadInput, match="point_robot.npz is missing"):
            short_run("dpt", tmp_path / "data", tmp_path)
    else:
        assert short_run("dpt", tmp_path / "data", tmp_path, steps=1).exists()
    with pytest.raises(BadInput, match="my_robot.npz is missing"):
        short_run("dpt", tmp_path / "data", tmp_path, env="my_robot", name="other")
    assert asked == ([] if given else ["point_robot"])


def test_a_folder_belongs_to_one_run(folder, tmp_path, monkeypatch):
    """A folder that another process uses and one that holds a finished run are refused, and stay as they are.

    One that was stopped before its first checkpoint may be taken.
    """
    with claim(tmp_path / "run"), pytest.raises(BadInput, match="in use by another process"):
        short_run("dpt", folder, tmp_path)
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_at(stopping, "dpt", 2)
        short_run("dpt", folder, tmp_path)
    before = (short_run("dpt", folder, tmp_path) / "ckpt.pt").read_bytes()
    with pytest.raises(BadInput, match="--resume.*--name"):
        short_run("dpt", folder, tmp_path, seed=9)
    with claim(tmp_path / "run"), pytest.raises(BadInput, match="in use by another process"):
        call_main(monkeypatch, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


SEVERAL = """
import json, os, sys
import torch, t2mir

torch.set_num_threads(1)
torch.randn_like = torch.zeros_like  # no noise in the routers, so that the test can repeat the run
rank, given = os.environ["RANK"], json.loads(sys.argv[1])
fit, write = t2mir.fit, t2mir.write_atomically


def writing(path, content):
    assert rank == "0", f"process {rank} writes {path}"
    write(path, content)


t2mir.write_atomically = writing
for mode, backbone in t2mir.BACKBONES.items():
    def recording(*args, batch=backbone.batch):
        batches.append(batch(*args))
        return batches[-1]

    def watched(model, *rest):
        batches.clear()
        c = model.config
        start = {name: p.clone() for name, p in model.state_dict().items()}
        fit(model, *rest)
        content = {"start": start, "end": model.state_dict(), "batches": batches[: c.steps]}
        torch.save(content, f"{c.runs}/{c.mode}-{rank}.pt")

    batches, backbone.batch, t2mir.fit = [], staticmethod(recording), watched
    t2mir.train(t2mir.preset("point_robot", mode, name=mode, **given))
"""


def test_two_processes_train_one_model(folder, tmp_path):
    """torchrun with two processes: other batches, one model, and only the first process writes.

    Both end with the parameters of a plain loop that takes the mean of both losses in each step.
    """
    (tmp_path / "several.py").write_text(SEVERAL)
    given = dict(steps=10, eval_every=10, data=folder, runs=str(tmp_path), warmup=3, lr=1e-3, eval_episodes=1)
    given["momentum"] = 0.5
    kept = ("d_model", "n_layers", "n_heads", "dropout", "moe_layers", "token_experts", "task_experts", "context")
    kept += ("queries", "batch", "device")
    given |= {key: value for key, value in dataclasses.asdict(tiny("ad")).items() if key in kept}
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tmp_path / "several.py", json.dumps(given)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for mode in MODES:
        c, ranks = tiny(mode, **given), [torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in (0, 1)]
        for name, p in ranks[0]["end"].items():
            assert torch.equal(p, ranks[1]["end"][name]), name
            assert torch.equal(ranks[0]["start"][name], ranks[1]["start"][name]), name
        assert all(not torch.equal(a["states"], b["states"]) for a, b in zip(*(rank["batches"] for rank in ranks)))
        assert [row["step"] for row in rows(tmp_path / mode / "log.csv")] == ["10"]
        for name, p in t2mir.load_agent(tmp_path / mode).state_dict().items():
            assert torch.equal(p, ranks[0]["end"][name]), name

        model, moved = T2MIR(c, sizes_of("point_robot")).train(), 0.0
        model.load_state_dict(ranks[0]["start"])
        optimizers, randn_like = t2mir.new_optimizers(model), torch.randn_like
        try:
            torch.randn_like = torch.zeros_like
            for step, pair in enumerate(zip(*(rank["batches"] for rank in ranks))):
                falling = 0.5 * (1 + math.cos(math.pi * (step - 3) / 7))
                model.zero_grad()
                for batch in pair:
                    losses = model(batch)
                    loss = losses["action"] + c.w_imp * losses["importance"] + c.w_load * losses["load"]
                    ((loss + c.w_con * losses["contrastive"]) / 2).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = 1e-3 * ((step + 1) / 3 if step < 3 else falling)
                    optimizer.step()
                for block in model.blocks:
                    key, router = block.moe.task_moe.key_router.weight, block.moe.task_moe.router.weight
                    key.data = key.data + c.momentum * (router.data - key.data)
        finally:
            torch.randn_like = randn_like
        for name, p in model.state_dict().items():
            near(ranks[0]["end"][name], p, 2e-4)
            moved = max(moved, (p - ranks[0]["start"][name]).abs().max())
        assert moved > 3e-3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot tell which cores may be used")
def test_imports_need_nothing_that_windows_lacks():
    """Without CDLL(None), sched_getaffinity and the module `resource`, everything is imported and a simulator runs."""
    code = """
import ctypes, os, sys, filelock, gymnasium, mujoco.rollout, torch, tqdm, tyro  # these look at the platform themselves
sys.platform, ctypes.CDLL, sys.modules["resource"] = "win32", None, None
del os.sched_getaffinity
import envs, t2mir
print(envs.make_vec("point_robot", [[0.5, 0.5]]).reset(seed=0)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "(1, 2)\n", done.stderr


def test_threads_stay_within_the_cores_of_this_process(monkeypatch):
    """A simulator takes no more threads than the process may use cores, and no more than it has sub-environments."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # the machine's
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 10 + cores)))
        for name in ENVS:
            for threads in (None, 1, 8):
                vec = make_vec(name, sample_tasks(name, 3, seed=0), threads)
                assert vec.threads == min(threads or cores, cores, 3)
                vec.close()


# ----------------------------------------------------------------------------------------------------------------------
# The scripts in experiments/


def test_routing_picture_or_the_reason_why_not(folder, tmp_path, capsys):
    """It is drawn with three held-out tasks; with two tasks or without an MoE, one line says what is missing."""
    for name, given, said in (
        ("few", {}, "2 held-out tasks"),
        ("dense", dict(token_moe=False), "lacks an MoE"),
        ("enough", dict(val_tasks=3, batch=4, context=1), None),
    ):
        run = short_run("dpt", folder, tmp_path, name=name, **given)
        if said is None:
            routing.main(run, tmp_path)
            assert (tmp_path / "enough-routing.png").stat().st_size > 10_000
        else:
            with pytest.raises(BadInput, match=said):
                routing.main(run, tmp_path)


def test_returns_in_fresh_tasks(folder, tmp_path, capsys):
    """The file has the mean returns of two runs and their standard error over the runs, computed here by hand."""
    runs = [short_run("dpt", folder, tmp_path, name=f"seed{seed}", seed=seed) for seed in (0, 1)]
    fresh_tasks.main(tuple(runs), tasks=3, csv=tmp_path / "fresh.csv")
    fresh = sample_tasks("point_robot", 3, [0, 2])
    a, b = (evaluate(t2mir.load_agent(run), fresh, 2).mean(1) for run in runs)
    with open(tmp_path / "fresh.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["episode"] for row in table] == ["random", "1", "2"]
    assert [float(row["return"]) for row in table[1:]] == pytest.approx((a + b) / 2, rel=1e-4)
    assert [float(row["error"]) for row in table[1:]] == pytest.approx(abs(a - b) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["point_robot", *GYMNASIUM])
def test_a_gif_shows_the_episodes_that_the_agent_acts(name, folder, tmp_path, monkeypatch):
    """Its panels say the scores of `evaluate`, and its pictures differ from each other."""
    run = short_run("ad", folder, tmp_path, env=name, batch=2, steps=1, stride=10, eval_every=1, eval_episodes=1)
    with np.load(run / "result.npz") as result:
        tasks = result["tasks"][:1]
    states, returns = watch.act(t2mir.load_agent(run), tasks, 2)
    np.testing.assert_array_equal(returns, evaluate(t2mir.load_agent(run), tasks, 2, seed=1))
    vec = make_vec(name, tasks)
    vec.reset(seed=0)
    assert states.shape == (2, vec.horizon + 1, 1, vec.state.shape[1])
    monkeypatch.setattr(watch, "act", lambda *given: (states[:1, :5], returns[:1]))
    watch.main(run, tasks=1, episodes=1, out=tmp_path)
    frames = imageio.imread(tmp_path / "run.gif")
    assert len(frames) >= 3 and (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()


def test_comparison_of_runs(folder, tmp_path, capsys):
    """The table has the mean scores of two seeds, computed here by hand, and the baseline's."""
    good = dict(random_return=np.full(2, -9.0), expert_return=np.full(2, -1.0))  # the tiny experts may be worse
    scores = {}
    for name, given in (("a", {}), ("b", dict(seed=1)), ("dense", dict(token_moe=False, task_moe=False))):
        run = short_run("dpt", folder, tmp_path, name=name, **given)
        with np.load(run / "result.npz") as result:
            arrays = dict(result) | good
        np.savez(run / "result.npz", **arrays)
        scores[name] = (arrays["own"] + 9) / 8  # (2 episodes, 2 tasks)
    figures.main(tuple(tmp_path / name for name in scores), tmp_path / "out")
    text = (tmp_path / "out/results.md").read_text()
    both = (scores["a"] + scores["b"]) / 2
    assert f"| 2 | {both[0].mean():.3f} [" in text and f"{both[1].mean():.3f} [" in text
    assert f"| 1 | {scores['dense'][0].mean():.3f} [" in text
    assert len((tmp_path / "out/results.csv").read_text().splitlines()) == 4
    assert (tmp_path / "out/scores.png").read_bytes()[:4] == b"\x89PNG"


def test_pairs_of_runs(folder, tmp_path, capsys):
    """The differences are those of the agents' scores in the same fresh tasks, and those of their held-out losses."""
    dense = dict(token_moe=False, task_moe=False)
    one = [short_run("dpt", folder, tmp_path, name=f"t{seed}", seed=seed) for seed in (0, 1)]
    two = [short_run("dpt", folder, tmp_path, name=f"d{seed}", seed=seed, **dense) for seed in (0, 1)]
    compare.main(tuple(one), tuple(reversed(two)), tasks=5, label="pair", csv=tmp_path / "pairs.csv")
    (row,), data = rows(tmp_path / "pairs.csv"), load(f"{folder}/point_robot.npz")
    spread = data["expert_return"].mean() - data["random_return"].mean()
    returns = [np.stack([evaluate(t2mir.load_agent(run), sample_tasks("point_robot", 5, [1, 2]), 2, 1) for run in runs])
               for runs in (one, two)]  # (seeds, episodes, tasks)
    for name, episode in (("score_1", 0), ("score_2", 1), ("score", 1)):
        expected = (returns[0][:, episode] - returns[1][:, episode]).mean() / spread
        assert float(row[f"{name}_difference"]) == pytest.approx(expected, rel=1e-3)
        assert float(row[f"{name}_low"]) <= expected <= float(row[f"{name}_high"])
    heldout = [[t2mir.held_out_loss(t2mir.load_agent(run), t2mir.tensors(data, np.arange(7) == task, "cpu"))[1].mean()
                for run in runs for task in np.flatnonzero(data["test"])] for runs in (one, two)]
    assert float(row["heldout_difference"]) == pytest.approx(np.mean(heldout[0]) - np.mean(heldout[1]), rel=1e-3)
    draw_pairs.main(tmp_path / "pairs.csv", out=tmp_path)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("pairs.png", "growth.png"))
    with pytest.raises(BadInput, match="no row"):
        draw_pairs.main(one[0] / "log.csv")
    with pytest.raises(BadInput, match="seeds must be the same"):
        compare.main(tuple(one), tuple(two[:1]), tasks=5)
    with pytest.raises(BadInput, match="have seed 0"):
        compare.main((one[0], one[0]), tuple(two), tasks=5)
    for runs in ((), (one[0], two[1])):
        with pytest.raises(BadInput, match="runs of one agent"):
            compare.main(runs, tuple(two), tasks=5)
    other, saved = tmp_path / "other", t2mir.read_checkpoint(one[0])
    other.mkdir()
    with np.load(f"{folder}/point_robot.npz") as arrays:
        np.savez(other / "point_robot.npz", **{**arrays, "info": "another file"})
    torch.save(saved | {"config": saved["config"] | {"data": str(other)}}, one[0] / "ckpt.pt")
    with pytest.raises(BadInput, match="not the dataset"):
        compare.open_run(one[0])


@pytest.mark.parametrize("part", ["all", "early", "late", "mixed"])
def test_a_part_of_a_dataset(part, folder, tmp_path, capsys):
    """It has the first training tasks, all test tasks and the episodes that were asked for, and it can be loaded."""
    subset.main(Path(f"{folder}/point_robot.npz"), tmp_path, train_tasks=3, episodes=part)
    data, small = load(f"{folder}/point_robot.npz"), load(tmp_path / "point_robot.npz")
    E = data["rewards"].shape[1]
    wanted = {"all": range(E), "early": range(E // 2), "late": range(E // 2, E)}
    episodes = list(wanted.get(part, [e for e in range(E) if e % 8 < 4]))
    tasks = [*[n for n in range(len(data["test"])) if not data["test"][n]][:3], *np.flatnonzero(data["test"])]
    for key in ("states", "actions", "rewards", "expert_actions", "learner_actions"):
        np.testing.assert_array_equal(small[key], [[data[key][n, e] for e in episodes] for n in sorted(tasks)])
    np.testing.assert_array_equal(small["guest"], data["guest"][episodes])
    for key in ("test", "tasks", "random_return", "expert_return"):
        np.testing.assert_array_equal(small[key], data[key][sorted(tasks)])
    with pytest.raises(BadInput, match="exists"):
        subset.main(Path(f"{folder}/point_robot.npz"), tmp_path)


def test_the_interval_of_a_difference():
    """It has the width of a normal one: two agents whose scores differ by 0.1 and vary over seeds and tasks."""
    rng = np.random.default_rng(0)
    noise = [0.02 * rng.normal(size=(30, 1)) + 0.05 * rng.normal(size=(1, 80)) for _ in range(2)]
    difference, low, high = compare.interval(0.9 + noise[0], 0.8 + noise[1], np.mean)
    assert difference == pytest.approx(0.1 + noise[0].mean() - noise[1].mean())
    width = 2 * 1.96 * math.sqrt(2 * 0.02**2 / 30 + 2 * 0.05**2 / 80)  # both agents' noise
    assert high - low == pytest.approx(width, rel=0.2)
    x = rng.normal(size=(4, 10))
    assert compare.interquartile_mean(x) == pytest.approx(np.sort(x.flatten())[10:30].mean())


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


# What stands before the threshold are the flags of t2mir.py; behind it, what the message must name.
TRAIN = """
--env nope | nope.npz
--mode nope | --mode nope
--nope 1 | --nope
--stepz 9 | --steps
--lr abc | 'abc'
--lr nan | --lr nan
--lr -1 | --lr -1
--lr inf | --lr inf
--steps 0 | --steps 0
--steps 1.5 | '1.5'
--steps | --steps
--warmup -1 | --warmup -1
--d_model 30 | --d_model
--d_model 24 | --d_model
--n_heads 3 | --n_heads
--moe_layers 9 | --moe_layers 9
--moe_layers x | --moe_layers x
--moe_layers -1 | --moe_layers -1
--batch 7 | --batch 7
--batch 64 | --batch 64
--top_k 1 | --top_k 1
--top_k 6 | --top_k
--dropout 1 | --dropout 1
--stride 0 | --stride 0
--eval_episodes 0 | --eval_episodes 0
--dtype nope | nope
--device nope | --device nope
--context 0 | --context 0
word | word
--val_tasks 9 --batch 4 | --batch 4
--runs FILE --batch 4 | FILE
--resume none | none/ckpt.pt
--resume FOLDER | FOLDER/ckpt.pt
--resume FOLDER/ckpt.pt | folder of a run
--resume none --steps 9 --device cpu | none/ckpt.pt
--resume none --lr 1 | --lr
--resume none --steps 1.5 | '1.5'
--resume | --resume"""
CASES = TRAIN.split("\n")[1:]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_leaves_no_run(case, folder, tmp_path, monkeypatch, capsys):
    """Bad flags raise an error, or are reported by the parser with exit code 2, and no run's folder is left."""
    flags, said = case.split(" | ")
    (tmp_path / "FILE").write_bytes(b"no checkpoint")
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BadInput, OSError, SystemExit)) as ended:
        call_main(monkeypatch, *flags.split(), "--data", folder)
    out, err = capsys.readouterr()
    if ended.type is SystemExit:
        assert ended.value.code == 2
        assert said in re.sub(r"\s+", " ", err.replace("│", " "))
    else:
        assert said in str(ended.value) and "\n" not in str(ended.value) and err == ""
    assert out == "" and not list(tmp_path.rglob("*.json"))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name != "runs" and p.suffix != ".lock") == ["FILE", "FOLDER"]


def test_a_dataset_that_does_not_fit_is_named(folder, tmp_path, monkeypatch):
    """Another family's data under this name, a truncated file, or too few tasks; no run folder is left."""
    point, cheetah = (Path(f"{folder}/{name}.npz").read_bytes() for name in ("point_robot", "cheetah_vel"))
    cases = [(cheetah, "", "must have shape"), (point[:3000], "", "damaged"), (point, "--batch 64", "--batch 64")]
    for content, argv, message in cases:
        (tmp_path / "point_robot.npz").write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            call_main(monkeypatch, *argv.split(), "--data", tmp_path, "--runs", tmp_path / "runs", "--name", "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "runs" / "run").exists()


def test_a_script_exits_with_its_code(tmp_path):
    """As a process of its own, each script ends in one line on stderr, code 1 for bad input and 2 for a bad flag."""
    (tmp_path / "point_robot.npz").write_bytes(b"no dataset")
    for script, flags, code in (
        ("t2mir.py", "--data .", 1),
        ("t2mir.py", "--stepz 9", 2),
        ("collect.py", "--env nope", 1),
    ):
        ended = subprocess.run(
            [sys.executable, HERE / script, *flags.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert ended.returncode == code and ended.stdout == ""
        if code == 1:
            assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        else:
            assert "--stepz" in ended.stderr and "--steps" in ended.stderr and "Traceback" not in ended.stderr
        assert not list(tmp_path.rglob("config.json"))


def test_help_has_every_flag_with_its_default(monkeypatch, capsys):
    """Each field of Config is there with its comment and the default of the chosen environment and mode."""
    monkeypatch.setenv("COLUMNS", "120")
    for mode in MODES:
        with pytest.raises(SystemExit):
            call_main(monkeypatch, "--mode", mode, "--help")
        text = re.sub(r"[\s│]", "", capsys.readouterr().out)
        c, source = t2mir.preset("point_robot", mode), Path(t2mir.__file__).read_text()
        for f in dataclasses.fields(Config):
            (comment,) = re.findall(rf"^    {f.name}: [^#]*  # (.*)$", source, re.MULTILINE)
            assert f"--{f.name.replace('_', '-')}" in text, f.name
            value = getattr(c, f.name)
            assert re.sub(r"\s", "", f"{comment} (default: {value}").replace("''", "") in text.replace("''", ""), f.name


def test_flags_make_the_config(monkeypatch):
    """Typed flags stand on top of the preset of --env and --mode, in any order; own data has its mode's defaults."""
    configs = []
    monkeypatch.setattr(t2mir, "train", configs.append)
    flags = "--seed 3 --lr 1.5e-4 --no-token-moe --moe_layers 0,1 --data x --runs y --name z --device cpu"
    given = dict(seed=3, lr=1.5e-4, token_moe=False, moe_layers="0,1", data="x", runs="y", name="z", device="cpu")
    for env, mode in [*t2mir.PRESETS, ("point_robot", "dpt"), ("my_robot", "dpt"), ("my_robot", "ad")]:
        call_main(monkeypatch, *flags.split(), "--env", env, "--mode", mode)
        assert configs[-1] == t2mir.preset(env, mode, **given)
        expected = {f.name: f.default for f in dataclasses.fields(Config)} | t2mir.BY_MODE[mode]
        expected |= t2mir.PRESETS.get((env, mode), {})
        expected |= {"env": env, "mode": mode, **given}
        assert all(getattr(configs[-1], k) == v for k, v in expected.items() if v != "auto")
    assert (configs[-1].steps, configs[-1].w_imp, configs[-1].context) == (2500, 0.1, 4)
    assert (configs[-2].steps, configs[-2].w_imp, configs[-2].context) == (2500, 0.01, 1)


def test_the_type_follows_the_device_that_is_asked_for(monkeypatch):
    """Where there is a GPU, `--device cpu` computes in float32, as on a machine without one."""
    configs = []
    monkeypatch.setattr(t2mir, "train", configs.append)
    monkeypatch.setattr(t2mir, "pick_device", lambda name: "cuda" if name == "auto" else name)
    for flags in ("", "--device cpu", "--device cpu --dtype bfloat16", "--dtype float32"):
        call_main(monkeypatch, *flags.split())
    asked = [("cuda", "bfloat16"), ("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "float32")]
    assert [(c.device, c.dtype) for c in configs] == asked
    collected = []  # and collect.py, on a CPU without instructions for bfloat16
    monkeypatch.setattr(collect_module, "collect", lambda name, **settings: collected.append(settings))
    monkeypatch.setattr(collect_module, "pick_device", t2mir.pick_device)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    for flags in ("", "--device cpu", "--device cpu --dtype bfloat16", "--dtype float32"):
        monkeypatch.setattr(sys, "argv", ["collect.py", *flags.split()])
        collect_module.main()
    assert [(settings["device"], settings["dtype"]) for settings in collected] == asked


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    """Within the next look at the loss, long before the next evaluation, and no checkpoint is written."""
    given = dict(data=folder, runs=str(tmp_path), steps=500, eval_every=60, eval_episodes=2, name="run", warmup=100)
    with pytest.raises(BadInput, match="non-finite before step 50: .*--lr"):
        t2mir.train(tiny("dpt", lr=1e22, **given))
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path):
    """With the largest file size set to 50,000 bytes, a larger write fails in one line, and the old content stays."""
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_atomically(path, lambda file: file.write(b"old"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(BadInput, match="file cannot be written") as caught:
            write_atomically(path, lambda file: torch.save(torch.zeros(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_dataset_is_checked_array_by_array(folder, tmp_path):
    """Each broken array is named with what it should be; float64 is converted; four arrays are enough."""
    rng = np.random.default_rng(0)
    own = dict(states=rng.normal(size=(4, 3, 7, 37)), actions=rng.uniform(-1, 1, (4, 3, 7, 5)))
    own |= dict(rewards=rng.normal(size=(4, 3, 7)), test=np.array([0, 0, 0, 1]))
    path = tmp_path / "my_robot.npz"
    np.savez(path, **own)
    assert {name: load(path)[name].dtype for name in own} == dict.fromkeys(own, np.float32) | {"test": bool}
    for name, array, message in [
        ("rewards", np.zeros((4, 3)), r"`rewards` must have shape"),
        ("states", np.array(1.0), r"`states` must have shape \(N E T obs\)"),
        ("rewards", np.zeros((4, 0, 7)), "`rewards` must have shape .* at least 1"),
        ("states", np.full((4, 3, 7, 37), 1e39), "`states` has non-finite values in float32"),
        ("states", np.zeros((4, 3, 8, 37)), r"`states` must have shape \(N E T obs\) = \(4, 3, 7, 37\)"),
        ("expert_actions", np.zeros((4, 3, 7, 6)), "`expert_actions` must have shape"),
        ("actions", 3 * own["actions"], r"`actions` must lie in \[-1, 1\]"),
        ("states", own["states"] * np.nan, "`states` has non-finite values"),
        ("test", np.zeros(4), "`test` must mark some of the tasks"),
        ("test", np.ones(4), "`test` must mark some of the tasks"),
        ("test", None, "no array `test`"),
    ]:
        np.savez(path, **{k: v for k, v in (own | {name: array}).items() if v is not None})
        with pytest.raises(BadInput, match=message):
            load(path)
    np.savez(tmp_path / "cheetah_vel.npz", **own)  # a name of ours, and another horizon
    with pytest.raises(BadInput, match="200"):
        load(tmp_path / "cheetah_vel.npz")
    with np.load(f"{folder}/cheetah_vel.npz") as arrays:
        np.savez(tmp_path / "cheetah_vel.npz", **{**arrays, "tasks": np.zeros((len(arrays["test"]), 2))})
    with pytest.raises(BadInput, match="`tasks` must have shape"):
        load(tmp_path / "cheetah_vel.npz")


def test_collections_stop_where_they_must(tmp_path, monkeypatch):
    """A second process is refused at once; a collection that diverges writes no dataset; nonsense is refused.

    In the second family that diverges, rewards and states know nothing of the actions and stay finite.
    """
    small = dict(steps=100, random_steps=20, train_tasks=2, test_tasks=1, out=str(tmp_path))
    with claim(tmp_path / "point_robot.npz"), pytest.raises(BadInput, match="in use by another process"):
        collect("point_robot", **small)
    with pytest.raises(BadInput, match="non-finite"):
        collect("point_robot", lr=1e10, critic_norm=False, **small)
    monkeypatch.setitem(ENVS, "idle", type("Idle", (PointRobot,), {"advance": lambda self, a: np.zeros(len(a))}))
    with pytest.raises(BadInput, match="non-finite"):
        collect("idle", lr=1e10, critic_norm=False, **small)
    assert not list(tmp_path.glob("*.npz"))
    for given in (dict(lr=-1), dict(hidden=0), dict(gamma=1), dict(tau=2), dict(random_steps=100), dict(device="nope"),
                  dict(copies=63), dict(seed=10**13)):  # fmt: skip
        with pytest.raises(BadInput, match=f"--{next(iter(given))}"):
            collect("point_robot", **{**small, **given})

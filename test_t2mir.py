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
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from torch import distributions
from torch.utils.flop_counter import FlopCounterMode

import t2mir
from collect import PRESETS, BadInput, BatchedSAC, Collection, Settings, claim, collect, load, write_atomically
from envs import ENVS, make_vec, sample_tasks
from experiments.bench_collect import flops_of_update
from t2mir import T2MIR, Batches, Config, TaskMoE, TokenMoE, command_line, evaluate, make_config, parse_flags

torch.set_num_threads(1)  # the sizes are so small that a second thread would only wait for the first
pytestmark = pytest.mark.filterwarnings("ignore:.*Box observation space")  # unbounded observations are meant

HERE = Path(__file__).parent
GYMNASIUM = {"cheetah_vel": "HalfCheetah-v5", "walker_param": "Walker2d-v5"}  # where the models come from
double = torch.float64


def resolve(name, **given):
    """Settings of a collection: those of the environment's preset, with what is given on top."""
    return Settings(**{"env": name, **PRESETS.get(name, {}), **given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a tiny dataset of each family; most of its actions are random, all its experts are poor."""
    out = str(tmp_path_factory.mktemp("data"))
    tiny = dict(out=out, hidden=16, batch=16, copies=2, seed=3)
    collect("point_robot", steps=200, random_steps=130, episodes=8, train_tasks=5, test_tasks=2, **tiny)
    for name in GYMNASIUM:
        collect(name, steps=400, random_steps=385, episodes=3, train_tasks=2, test_tasks=1, **tiny)
    return out


def tiny(mode, **given):
    """A config small enough for a test, with a T2MIR layer in every block and no dropout."""
    sizes = dict(d_model=16, n_layers=2, n_heads=2, dropout=0.0, moe_layers="all", token_experts=4, task_experts=5)
    return make_config(
        "point_robot", mode, **{**sizes, "context": 3, "queries": 6, "batch": 8, "explore": 0.0, "noise": 0.0, **given}
    )


def tiny_model(mode, **given):
    """A fresh model in evaluation mode whose actions differ clearly from token to token."""
    torch.manual_seed(0)
    model = T2MIR(tiny(mode, **given), torch.tensor([0.3, -0.2]), torch.tensor([0.5, 0.7])).eval()
    model.head.weight.data *= 2
    return model


@pytest.fixture(autouse=True)
def grouped_mm_in_float64(monkeypatch):
    """torch's has no float64, in which most comparisons here are made: in that type, and only there, a plain loop."""
    theirs = F.grouped_mm

    def grouped_mm(x, w, *, offs):
        if x.dtype != double:
            return theirs(x, w, offs=offs)
        return torch.cat([rows @ w[i] for i, rows in enumerate(x.tensor_split(offs[:-1].tolist()))])

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)


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
        low, high = {"point_robot": (-1, 1), "cheetah_vel": (0, 3)}.get(name, (-3, 3))
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
    lived = torch.randn(num, 20, 2, dtype=double) * 3 + 1
    agents.update_normalisation(lived)
    pairs = []  # parameters: of the batch, agent i's rows in it (first critics, then second ones), of agent i alone
    for net, (i, one) in itertools.product(("actor", "critic", "target"), enumerate(alone)):
        of_batch, of_one = getattr(agents, net).parameters(), getattr(one, net).parameters()
        pairs += [(p, [i] if net == "actor" else [i, num + i], q) for p, q in zip(of_batch, of_one)]
    for p, rows, q in pairs:
        q.data.copy_(p.data[rows])
    for i, one in enumerate(alone):
        one.update_normalisation(lived[i : i + 1])
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
        if name == "point_robot":
            vec.state = s
        else:  # (time, qpos, qvel): cheetah shows its x, walker hides it
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
        "actions": ((N, E, T, a), f4), "learner_actions": ((N, E, T, a), f4), "rewards": ((N, E, T), f4), "expert_actions": ((N, E, T, a), f4),
        "guest": ((E,), np.bool_),
        "random_return": ((N,), f8), "expert_return": ((N,), f8), "curve": ((N, 10 if train == 5 else 2), f4),
    }  # fmt: skip
    info, fingerprint = json.loads(str(data.pop("info"))), data.pop("fingerprint")
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
        if key not in ("info", "fingerprint"):
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
def test_updates_draw_lived_moments_of_the_own_task(n):
    """Batches hold only what was lived before the step, each agent its own, all of it, about equally often, and each
    with the rewards of the next n steps, or of fewer where its episode ends or has not gone on."""
    given = dict(steps=100, copies=3, batch=3000, hidden=4, random_steps=99, episodes=1, n_step=n)
    run = Collection(resolve("point_robot", **given), 2)
    for _ in range(2):
        run.run_round()
    states, actions, rewards, discounts, next_states, _ = run.sample(27)  # in the second round, after its 7th step
    lived = torch.cat([run.states[:, :3, :20], run.states[:, 3:6, :7]], dim=2).flatten(1, 2)  # (2, 81, 2)
    same = (states[:, :, None] == lived[:, None]).all(-1)  # (2, 3000, 81)
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
    """A draw is younger than a fraction x of all that was lived with probability x^(1 / recency)."""
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
    lived = torch.randn(3, 5, 40, 4) * torch.tensor([0.1, 1, 10, 0]) + torch.tensor([0.0, 1, -20, 0.7])
    for part in lived.split(2, dim=1):
        agents.update_normalisation(part)
    near(agents.mean, lived.flatten(1, 2).mean(1, keepdim=True), 1e-4)
    near(agents.std, lived.flatten(1, 2).std(1, keepdim=True, correction=0) + 0.01, 1e-3)


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


def slow_balance(moe, gates, clean, noisy, sigma):
    """w_imp CV(Imp)^2 + w_load CV(Load)^2, token by token and expert by expert."""
    num = clean.shape[1]
    importance = [sum(gate[i] for gate in gates if i in gate) for i in range(num)]
    load = [0.0] * num
    for c, x, s in zip(clean, noisy, sigma):
        for i in range(num):
            bar = sorted((x[j] for j in range(num) if j != i), reverse=True)[moe.top_k - 1]
            load[i] = load[i] + (1 + torch.erf((c[i] - bar) / s[i] / math.sqrt(2))) / 2
    cv = [((x - x.mean()) ** 2).mean() / x.mean() ** 2 for x in map(torch.stack, (importance, load))]
    return moe.w_imp * cv[0] + moe.w_load * cv[1]


@pytest.mark.parametrize("kind", ["token", "token, training", "task"])
def test_moe_equals_a_loop_over_tokens(kind):
    """Outputs, balance loss and all gradients (inputs, routers, experts) equal those of the loops above, in float64."""
    torch.manual_seed(0)
    h, h_mean, weight = (torch.randn(30, d, dtype=double) for d in (8, 8, 4))
    if kind == "task":
        moe = TaskMoE(8, 4, 8, num_experts=5, top_k=2).double()
        router, inputs = moe.router.weight, [h, h_mean]
    else:
        moe = TokenMoE(8, 4, 8, num_experts=5, top_k=2, w_imp=3, w_load=7).double().train(kind != "token")
        router, inputs = moe.router.weight, [h]
    wanted = [x.requires_grad_() for x in inputs] + [router, moe.experts.w1, moe.experts.w2]
    wanted += [moe.W_noise.weight] if kind == "token, training" else []
    torch.manual_seed(1)
    y, balance = (moe(h, h_mean), torch.zeros((), dtype=double)) if kind == "task" else moe(h)
    got = torch.autograd.grad((y * weight).sum() + balance, wanted)

    clean = noisy = inputs[-1] @ router.T
    if kind == "token, training":
        torch.manual_seed(1)
        sigma = torch.log(1 + torch.exp(h @ moe.W_noise.weight.T)) + 1e-2
        noisy = clean + torch.randn(30, 5, dtype=double) * sigma
    gates = slow_gates(noisy, 2)
    slow_y, slow_b = slow_experts(moe.experts, h, gates), torch.zeros((), dtype=double)
    if kind == "token, training":
        slow_b = slow_balance(moe, gates, clean, noisy, sigma)
        assert slow_b > 0.05
    near((y, balance), (slow_y, slow_b), 1e-8)
    near(got, torch.autograd.grad((slow_y * weight).sum() + slow_b, wanted), 1e-8)

    for n in range(5):  # a token leaves no gradient in the experts that it was not sent to
        (g,) = torch.autograd.grad((moe(h, h_mean) if kind == "task" else moe.eval()(h)[0])[n].sum(), moe.experts.w1)
        assert set(g.flatten(1).any(1).nonzero().flatten().tolist()) == set(slow_gates(clean, 2)[n])

    in_float32 = moe.float()(h.float(), h_mean.float()) if kind == "task" else moe.float()(h.float())[0]
    near(in_float32.double(), slow_experts(moe.experts, h.float(), slow_gates(clean.float(), 2)).double(), 1e-5)


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
    """CV^2 is variance over squared mean; importance alone and load alone give the router and W_noise a gradient."""
    x = np.random.default_rng(0).uniform(1, 5, 7)
    assert t2mir.cv_squared(torch.tensor(x)).item() == pytest.approx(x.var() / x.mean() ** 2, rel=1e-8)
    assert t2mir.cv_squared(torch.full((4,), 3.0)).item() == 0
    torch.manual_seed(0)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        moe = TokenMoE(8, 4, 8, 5, 2, *weights)
        moe(torch.randn(30, 8))[1].backward()
        assert moe.router.weight.grad.abs().max() > 1e-3 and moe.W_noise.weight.grad.abs().max() > 1e-4
        assert moe.experts.w1.grad is None


@pytest.mark.parametrize("sequences", [2, 4])
def test_info_nce_equals_a_double_loop(sequences):
    """Value and gradients, of the layer's own loss too: the keys are constants, their router learns nothing."""
    torch.manual_seed(0)
    ids = torch.arange(3).repeat(sequences)[torch.randperm(3 * sequences)]
    moe = TaskMoE(6, 4, 7, num_experts=5, top_k=2).double()
    torch.nn.init.normal_(moe.key_router.weight)
    torch.nn.init.normal_(moe.W)
    h = torch.randn(len(ids), 6, dtype=double, requires_grad=True)
    z, keys = h @ moe.router.weight.T, (h @ moe.key_router.weight.T).detach()
    losses = []
    for i in range(len(ids)):
        positive = negative = 0.0
        for j in range(len(ids)):
            score = (z[i] @ moe.W @ keys[j]).exp()
            if ids[j] != ids[i]:
                negative = negative + score
            elif j != i:
                positive = positive + score
        losses.append(-(positive / (positive + negative)).log())
    slow, wanted = sum(losses) / len(ids), [h, moe.router.weight, moe.W]
    expected = torch.autograd.grad(slow, wanted, retain_graph=True)
    for fast in (t2mir.info_nce(z, keys, moe.W, ids), moe.contrast(h, ids)):
        near(fast, slow)
        near(torch.autograd.grad(fast, wanted, retain_graph=True), expected)
    moe.contrast(h, ids).backward()
    assert moe.key_router.weight.grad is None and not moe.key_router.weight.requires_grad


def test_key_router_is_a_moving_average():
    """It starts as the router and then moves the fraction `momentum` of the way to it in each update."""
    torch.manual_seed(0)
    moe = TaskMoE(6, 4, 7, num_experts=5, top_k=2, momentum=0.1).double()
    key = moe.router.weight.detach().numpy().copy()
    for _ in range(4):
        np.testing.assert_allclose(moe.key_router.weight.numpy(), key, rtol=1e-12)
        torch.nn.init.normal_(moe.router.weight)
        moe.update_key_router()
        key = key + 0.1 * (moe.router.weight.detach().numpy() - key)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_what_the_task_router_sees(mode, folder):
    """Each token's own prefix mean, the token itself, or while training the mean of the whole context."""
    batch = Batches(tiny(mode), load(f"{folder}/point_robot.npz")).next()
    n = 3 * batch["states"].shape[1]
    for router in ("prefix", "token", "sequence"):
        model, seen = tiny_model(mode, task_router=router, moe_layers="0").train(), []
        model.blocks[0].norm2.register_forward_hook(lambda module, x, y: seen.append(y))
        model.blocks[0].moe.task_moe.router.register_forward_hook(lambda module, x, y: seen.append(x[0]))
        model(batch)
        h, given = seen[:2]  # the router is called again, for InfoNCE
        for b, t in np.ndindex(*h.shape[:2]):
            if router == "sequence":
                wanted = h[b, :n].mean(0)
            elif router == "token":
                wanted = h[b, t]
            elif t < n:
                wanted = h[b, : t + 1].mean(0)
            else:
                p = batch["prefix"][b, t - n]
                wanted = (h[b, :p].sum(0) + h[b, t]) / (p + 1)
            near(given[b, t], wanted, 1e-4)


@pytest.mark.parametrize("moe_layers", ["last", "all"])
def test_variants_spend_equal_active_parameters(moe_layers):
    """Feed-forward weights that a token is multiplied with: both MoEs, either alone and the dense baseline agree.

    Counted from the shapes, top_k experts of each MoE; the routers, W_noise and W (some 20 d numbers) are left out.
    """
    counts = []
    for token, task in itertools.product((False, True), repeat=2):
        c = tiny("ad", moe_layers=moe_layers, n_layers=3, no_token_moe=token, no_task_moe=task)
        model = T2MIR(c)
        moes = [m for m in model.modules() if isinstance(m, (TokenMoE, TaskMoE))]
        assert len(moes) == (2 - token - task) * (3 if moe_layers == "all" else 1)
        routed = sum(c.top_k * (m.experts.w1[0].numel() + m.experts.w2[0].numel()) for m in moes)
        counts.append(routed + sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name))
    dense = 12 * c.d_model**2 * 3 if moe_layers == "all" else (12 + 8 + 8) * c.d_model**2
    assert counts == [dense] * 4


# ----------------------------------------------------------------------------------------------------------------------
# The model sees what it may


def test_prefix_mean_equals_a_loop():
    """Each token's mean runs over the tokens up to itself; a query's over its prefix and itself; also behind a past."""
    rng = np.random.default_rng(0)
    h, prefix = rng.normal(size=(2, 13, 4)), np.array([[0, 3, 9, 6], [9, 0, 1, 9]])
    P = 9
    slow = np.array([[row[: j + 1].mean(0) for j in range(P)] for row in h])
    queries = [[np.array([*h[b, : prefix[b, q]], h[b, P + q]]).mean(0) for q in range(4)] for b in range(2)]
    prompt = torch.tensor(h[:, :P])
    near(t2mir.prefix_mean(prompt), torch.tensor(slow))
    near(
        t2mir.prefix_mean(torch.tensor(h), torch.tensor(prefix)), torch.tensor(np.concatenate([slow, queries], axis=1))
    )
    near(t2mir.prefix_mean(prompt[:, 5:], None, prompt[:, :5].sum(1), 5), torch.tensor(slow[:, 5:]))


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
    y = model.trunk(x)[0]
    for j in range(30):
        other = x.clone()
        other[:, j] = torch.randn(16, dtype=double)
        assert changed(model.trunk(other)[0], y) == [i >= j for i in range(30)]


@torch.no_grad()
def test_dpt_queries_see_their_prefix_and_themselves():
    """The prompt is as if there were no queries; a query hears of its prefix and itself, of no other token or query."""
    model = tiny_model("dpt").double()
    P, prefix = 15, torch.tensor([0, 3, 7, 15, 15])
    x = torch.randn(2, P + 5, 16, dtype=double)
    y = model.trunk(x, prefix.repeat(2, 1))[0]
    near(y[:, :P], model.trunk(x[:, :P])[0])
    for j in range(P + 5):
        other = x.clone()
        other[:, j] = torch.randn(16, dtype=double)
        prompt = [i >= j for i in range(P)]
        queries = [j < n or j == P + q for q, n in enumerate(prefix)]
        assert changed(model.trunk(other, prefix.repeat(2, 1))[0], y) == prompt + queries


# ----------------------------------------------------------------------------------------------------------------------
# Batches and the action loss


CONTEXTS = [("ad", "sorted", 1), ("ad", "chronological", 3), ("dpt", "sorted", 1), ("dpt", "sorted", 3)]


@pytest.mark.parametrize("mode, history, stride", CONTEXTS)
def test_batches(mode, history, stride, folder):
    """Two sequences of each of batch / 2 distinct training tasks; order of AD's episodes, DPT's labels and prefixes.

    Of a finished episode every stride-th step is there, of AD's last one every step, behind two finished ones; with
    a stride behind two, one and none in turn.
    """
    data = load(f"{folder}/point_robot.npz")
    parts = [data[key][~data["test"]] for key in ("states", "actions", "rewards", "expert_actions")]
    batches = Batches(tiny(mode, history=history, queries=40, stride=stride), data)
    prefixes, prompts, tasks_seen = set(), set(), set()
    for i in range(12):
        finished = [slice(0, None, stride)] * (1 if mode == "dpt" else 2 if stride == 1 else 2 - i % 3)
        kept = finished + [slice(None)] * (mode == "ad")
        batch = {key: value.numpy() for key, value in batches.next().items()}
        ids, counts = np.unique(batch["task_ids"], return_counts=True)
        assert len(ids) == 4 and (counts == 2).all()
        tasks_seen |= set(ids)
        for b, task in enumerate(batch["task_ids"]):
            states, actions, rewards, labels = (part[task] for part in parts)
            places = []
            start = 0
            for keep in kept:
                own = slice(start, start + len(range(20)[keep]))
                (place,) = np.flatnonzero((states[:, keep] == batch["states"][b, own]).all((1, 2)))
                np.testing.assert_array_equal(actions[place, keep], batch["actions"][b, own])
                np.testing.assert_array_equal(rewards[place, keep], batch["rewards"][b, own])
                np.testing.assert_array_equal(range(20)[keep], batch["times"][own])
                assert (batch["own"][b, own] != data["guest"][place]).all()
                places.append(place)
                start = own.stop
            assert start == batch["states"].shape[1]
            prompts |= set(places)
            if mode == "ad":
                assert len(set(places)) == len(kept)
                key = (lambda p: rewards[p].sum()) if history == "sorted" else int
                assert places == sorted(places, key=key)
            else:
                for query, label in zip(batch["queries"][b], batch["labels"][b]):
                    e, t = np.argwhere((states == query).all(-1))[0]
                    np.testing.assert_array_equal(labels[e, t], label)
        prefixes |= set(batch.get("prefix", np.zeros(0)).flatten().tolist())
    assert tasks_seen == set(range(5)) and prompts == set(range(parts[0].shape[1]))
    assert prefixes == (set(range(0, 3 * len(range(0, 20, stride)) + 1, 3)) if mode == "dpt" else set())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_action_loss_equals_one_pass_for_each_prediction(mode, folder):
    """The loss is the mean squared error of actions that are computed from nothing but what precedes them."""
    model = tiny_model(mode, batch=4).double()
    batch = Batches(model.config, load(f"{folder}/point_robot.npz")).next()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    s, a, r = (batch[key] for key in ("states", "actions", "rewards"))
    x, errors = model.tokens(s, a, r, torch.arange(s.shape[1]) % 20), []
    if mode == "ad":
        assert 0 < batch["own"].sum() < batch["own"].numel()  # guests' actions are no targets
        for t in range(s.shape[1]):
            predicted = model.act(model.trunk(x[:, : 3 * t + 1])[0][:, -1])
            errors += (predicted - a[:, t])[batch["own"][:, t]]
    else:
        for b, q in np.ndindex(4, 6):
            query = model.state_tokens(batch["queries"][b : b + 1, q : q + 1], 20)
            seen = torch.cat([x[b : b + 1, : batch["prefix"][b, q]], query], dim=1)
            errors.append(model.act(model.trunk(seen)[0][:, -1]) - batch["labels"][b, q])
    near(model(batch)["action"], torch.stack(errors).square().mean(), 1e-7)  # it is added up in float32
    batch["own"][:] = False  # guests alone, as can happen in a small batch
    assert model(batch)["action"] == 0 or mode == "dpt"


# ----------------------------------------------------------------------------------------------------------------------
# Acting in context


CASES = [("ad", "sorted", "own"), ("ad", "chronological", "own"), ("ad", "sorted", "hidden"), ("ad", "sorted", "other")]
CASES += [("dpt", "sorted", "own"), ("dpt", "sorted", "hidden"), ("dpt", "sorted", "other")]
CASES = [(*case, 1) for case in CASES] + [("ad", "sorted", "own", 3), ("dpt", "sorted", "other", 3)]


@torch.no_grad()
@pytest.mark.parametrize("mode, history, context, stride", CASES)
def test_acting_with_the_cache_equals_the_full_pass(mode, history, context, stride, monkeypatch):
    """Every action of `evaluate` is that of one pass, without a cache, over all the tokens that its docstring says.

    There are two tasks, so that "another task" is the other one. Two of AD's episodes and one of DPT's are remembered.
    """
    model, T, episodes, lived = tiny_model(mode, history=history, stride=stride), 20, 5, []

    def recording(name, tasks):
        env = make_vec(name, tasks)
        reset, step = env.reset, env.step

        def reset_and_note(**given):
            lived.append([])
            env.seen, info = reset(**given)
            return env.seen, info

        def step_and_note(actions):
            result = step(actions)
            lived[-1].append((env.seen, actions, result[1].astype(np.float32)))
            env.seen = result[0]
            return result

        env.reset, env.step = reset_and_note, step_and_note
        return env

    monkeypatch.setattr(t2mir, "make_vec", recording)
    returns = evaluate(model, np.array([[0.9, 0.1], [-0.4, -0.8]]), episodes, seed=4, context=context)
    lived = [[torch.tensor(np.stack(part, axis=1)) for part in zip(*steps)] for steps in lived]  # (2, T, ...) each
    assert [episode[0].shape for episode in lived] == [(2, T, 2)] * episodes
    np.testing.assert_allclose(returns, [rewards.sum(1) for _, _, rewards in lived], rtol=1e-5)
    assert torch.stack([actions for _, actions, _ in lived]).std(2).min() > 0.005  # the actions are no constants
    reordered = 0
    for e, i in itertools.product(range(episodes), range(2)):
        owner = 1 - i if context == "other" else i
        past = lived[max(0, e - (2 if mode == "ad" else 1)) : e] if context != "hidden" else []
        if mode == "ad" and history == "sorted":
            ordered = sorted(past, key=lambda episode: episode[2][owner].sum().item())
            reordered += any(a is not b for a, b in zip(ordered, past))
            past = ordered
        kept = torch.arange(0, T, stride)
        past = [model.tokens(*(part[owner : owner + 1, kept] for part in episode), kept) for episode in past]
        states, actions, _ = (part[i : i + 1] for part in lived[e])
        own = model.tokens(*(part[i : i + 1] for part in lived[e]), torch.arange(T))
        others = model.tokens(*(part[owner : owner + 1, kept] for part in lived[e]), kept)
        for t in range(T):
            if mode == "ad":
                now = own[:, 3 * t * (context == "hidden") :][:, : 1 if context == "hidden" else 3 * t + 1]
            else:
                so_far = [others[:, : 3 * int((kept < t).sum())]] if e == 0 and context != "hidden" else []
                now = torch.cat([*so_far, model.state_tokens(states[:, t : t + 1], T)], dim=1)
            full = model.act(model.trunk(torch.cat([*past, now], dim=1))[0][:, -1])
            near(actions[:, t], full, 1e-5)
    assert reordered or mode == "dpt" or history == "chronological" or context == "hidden"  # sorting had work to do


def test_actions_spread_as_asked(monkeypatch):
    """Around a mean of zero, actions have the deviation `explore` in the first episode and `noise` in later ones."""
    taken = []

    class Recorder(ENVS["point_robot"]):
        def step(self, actions):
            taken.append(actions)
            return super().step(actions)

    monkeypatch.setattr(t2mir, "make_vec", lambda name, tasks: Recorder(tasks))
    monkeypatch.setattr(T2MIR, "act", lambda self, x: torch.zeros(len(x), 2))
    for mode in ("ad", "dpt"):
        taken.clear()
        evaluate(tiny_model(mode, explore=0.2, noise=0.1), np.zeros((200, 2)), episodes=3)
        spread = np.stack(taken).reshape(3, -1).std(1)  # 8,000 draws an episode
        np.testing.assert_allclose(spread, [0.2, 0.1, 0.1], rtol=0.05)
        taken.clear()
        evaluate(tiny_model(mode, explore=0.2, noise=0.0), np.zeros((2, 2)), episodes=2)
        assert np.any(taken[:20]) and not np.any(taken[20:])


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_a_tiny_model_learns_a_tiny_batch_by_heart(mode, folder):
    """Trained on one batch with all its losses, the action loss falls below 2% of the targets' variance."""
    torch.manual_seed(0)
    c = tiny(mode, d_model=32, batch=4, context=1, queries=16)
    model = T2MIR(c)
    batch = Batches(c, load(f"{folder}/point_robot.npz")).next()
    targets = batch["actions"] if mode == "ad" else batch["labels"]
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for step in range(800):
        losses = model.train()(batch)
        optimizer.zero_grad()
        (losses["action"] + losses["balance"] + c.w_con * losses["contrastive"]).backward()
        optimizer.step()
        if step % 25 == 24 and model.eval()(batch)["action"] < 0.02 * targets.var():
            return
    pytest.fail(f"the action loss is still {model.eval()(batch)['action'] / targets.var():.3f} of the variance")


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_a_training_step_compiles_as_one_graph(mode, folder):
    """Traced whole, without a break, the step gives the same losses; torch's compiler itself is not run."""
    model = tiny_model(mode).train()
    batch = Batches(model.config, load(f"{folder}/point_robot.npz")).next()
    losses = []
    for traced in (model, torch.compile(model, fullgraph=True, backend="eager")):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(traced(batch))
    near(losses[0], losses[1], 1e-6)


def short_run(mode, folder, runs, seed, name):
    given = dict(n_layers=1, context=2, steps=6, eval_every=3, warmup=2, eval_episodes=2, dropout=0.1, seed=seed)
    return t2mir.train(tiny(mode, **given, data=folder, runs=str(runs), name=name))


def rows(path):
    """Rows of a CSV file without what depends on the clock."""
    with open(path) as file:
        return [
            {key: value for key, value in row.items() if key not in ("tokens_per_s", "seconds")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_a_run_repeats_and_leaves_its_folder(mode, folder, tmp_path, monkeypatch):
    """Same seed, same log; other seed, another one. The checkpoint gives back the model, and it acts as logged."""
    save, trained = t2mir.save, []

    def save_and_keep(path, model, *rest):
        if path.name == "ckpt.pt":
            trained.append(copy.deepcopy(model).eval())
        save(path, model, *rest)

    monkeypatch.setattr(t2mir, "save", save_and_keep)
    run, again, other = (short_run(mode, folder, tmp_path, seed, f"run{i}") for i, seed in enumerate((5, 5, 6)))
    log = rows(run / "log.csv")
    assert [row["step"] for row in log] == ["3", "6"] and log == rows(again / "log.csv") != rows(other / "log.csv")
    names = ["best.pt", "ckpt.pt", "config.json", "incontext.png", "log.csv", "result.csv"]
    assert sorted(p.name for p in run.iterdir()) == names
    best = max(log, key=lambda row: float(row["test_score"]))
    assert t2mir.restore(run / "best.pt")[1]["step"] == int(best["step"])
    assert json.loads((run / "config.json").read_text())["seed"] == 5
    assert (run / "incontext.png").read_bytes()[:4] == b"\x89PNG"
    model, content = t2mir.restore(run / "ckpt.pt")
    assert content["step"] == 6 and not model.training
    assert torch.load(run / "ckpt.pt", weights_only=True)["config"] == json.loads((run / "config.json").read_text())
    data = load(f"{folder}/point_robot.npz")
    batch = Batches(model.config, data).next()
    for key, value in trained[1](batch).items():  # two checkpoints a run: trained[1] is the first run's last state
        assert torch.equal(value, model(batch)[key]) and not torch.equal(value, trained[0](batch)[key]) or value == 0
    low, high, tasks = (data[key][data["test"]] for key in ("random_return", "expert_return", "tasks"))
    returns = evaluate(model, tasks, 2, seed=1)
    (said,) = rows(run / "result.csv")
    scores = (returns - low) / (high - low)
    for name, value in (("return", returns.mean(1)), ("score", scores.mean(1)), ("score_of_task", scores[1])):
        np.testing.assert_allclose([float(x) for x in said[name].split()], value, rtol=1e-3)
    seen = data["states"][~data["test"]].reshape(-1, 2)
    near(model.state_mean, torch.tensor(seen.mean(0)), 1e-5)  # the test tasks' states are not in the normalisation
    near(model.state_std, torch.tensor(seen.std(0)), 1e-5)
    (tmp_path / "cut.pt").write_bytes((run / "ckpt.pt").read_bytes()[:5000])
    torch.save({**content, "format": 99}, tmp_path / "outdated.pt")
    torch.save([1, 2], tmp_path / "foreign.pt")
    for name in ("cut.pt", "missing.pt", "outdated.pt", "foreign.pt"):
        with pytest.raises(BadInput, match=name) as caught:
            t2mir.restore(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_command_makes_its_config():
    """`command`, typed, gives the same config; it names what differs from the preset and nothing else."""
    for env, mode in t2mir.PRESETS:
        c = make_config(env, mode, seed=3, lr=1.5e-4, no_balance=True, moe_layers="0,1", data="x", runs="y", name="z")
        assert c.command.split()[:2] == ["python", "t2mir.py"] and len(c.command) < 120
        again = make_config(**parse_flags(Config, c.command.split()[2:], ""))
        assert again == dataclasses.replace(c, data="data", runs="runs", name="")


def test_variants_have_names_of_their_own():
    """What bears on results is in the name; where a run is or how fast is not, nor a MoE's setting in a dense one."""
    dense = dict(no_token_moe=True, no_task_moe=True)
    for given, name in [
        (dict(seed=3, eval_every=7, device="cpu", dtype="bfloat16", runs="x"), "T2MIR-DPT"),
        (dict(no_balance=True), "T2MIR-DPT (no_balance)"),
        (dict(top_k=3, stride=4), "T2MIR-DPT (top_k=3, stride=4)"),
        (dict(**dense, top_k=3, w_con=0.1), "DPT"),
        (dict(**dense, lr=1e-4, moe_layers="0,2"), "DPT (moe_layers=0,2, lr=0.0001)"),
    ]:
        assert make_config("cheetah_vel", "dpt", **given).variant == name
    assert make_config("point_robot", "ad", dtype="bfloat16").variant == "T2MIR-AD (dtype=bfloat16)"


def test_figures_say_what_the_runs_did(folder, tmp_path, capsys):
    """Mean, standard error and paired difference in the table are those of result.csv; results.csv makes it again."""
    runs = [
        t2mir.train(tiny("dpt", seed=seed, no_token_moe=True, no_task_moe=dense, name=f"{seed}{dense}", **given))
        for given in [dict(moe_layers="last", steps=4, eval_every=2, eval_episodes=3, data=folder, runs=str(tmp_path))]
        for dense, seed in ((False, 0), (False, 1), (True, 1), (True, 0))
    ]
    capsys.readouterr()
    (tmp_path / "unfinished").mkdir()
    given = [str(tmp_path / "unfinished"), *(str(run / "result.csv") for run in runs)]
    t2mir.main(["--figures", *given, "--out", str(tmp_path / "one")])
    left_out, said = capsys.readouterr().out.split("\n", 1)
    assert left_out == f"{given[0]} holds no finished run: left out"
    t2mir.main(["--figures", str(tmp_path / "one" / "results.csv"), "--out", str(tmp_path / "two")])
    assert capsys.readouterr().out == said == (tmp_path / "two" / "results.md").read_text()
    assert (tmp_path / "two" / "point_robot.png").read_bytes()[:4] == b"\x89PNG"
    a0, a1, b1, b0 = ([float(x) for x in rows(run / "result.csv")[0]["score"].split()] for run in runs)

    def both(x, y):
        return f"{(x + y) / 2:.3f} ± {abs(x - y) / 2:.3f}"  # of two, the error of the mean is half their distance

    table = [line.split(" | ") for line in said.splitlines() if line.startswith("| point_robot")]
    variants = [json.loads((run / "config.json").read_text()) for run in (runs[0], runs[2])]
    assert [line[1:3] for line in table] == [[Config(**c).variant, "2"] for c in variants]
    assert table[0][3:6] == [both(a0[0], a1[0]), both(a0[1], a1[1]), both((a0[1] + a0[2]) / 2, (a1[1] + a1[2]) / 2)]
    assert table[1][6] == both(b0[2], b1[2])
    d0, d1 = ((a[1] + a[2] - b[1] - b[2]) / 2 for a, b in ((a0, b0), (a1, b1)))
    (difference,) = (line for line in said.splitlines() if "minus" in line)
    mean, error = (float(x) for x in re.search(r": (\S+) ± (\S+) over 2 seeds", difference).groups())
    assert mean == pytest.approx((d0 + d1) / 2, abs=2e-3) and error == pytest.approx(abs(d0 - d1) / 2, abs=2e-3)
    text = (runs[0] / "result.csv").read_text()
    (tmp_path / "again.csv").write_text(text.replace(",0,4,", ",0,4,another-commit-"))
    with pytest.raises(BadInput, match="two runs of one seed"):
        t2mir.figures([runs[0] / "result.csv", tmp_path / "again.csv"], tmp_path / "three")
    with pytest.raises(BadInput, match="no seeds of one agent"):
        t2mir.train(
            dataclasses.replace(Config(**json.loads((runs[0] / "config.json").read_text())), eval_every=4, name="c")
        )
        t2mir.figures([runs[0] / "result.csv", tmp_path / "c" / "result.csv"], tmp_path / "three")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


# What stands before the bar are the flags of t2mir.py, or of collect.py; behind it, what the message must name.
TRAIN = """
--env nope | --env 'nope'
--mode nope | --mode 'nope'
--nope 1 | --nope
--stepz 9 | --stepz 9: did you mean --steps?
--lr abc | --lr: invalid float value: 'abc'
--lr nan | --lr nan
--lr -1 | --lr -1
--steps 0 | --steps 0
--steps 1.5 | --steps: invalid int value: '1.5'
--steps | --steps
--warmup -1 | --warmup -1
--d_model 30 | --d_model 30
--moe_layers 9 | --moe_layers 9
--moe_layers x | --moe_layers x
--batch 7 | --batch 7
--batch 64 | --batch 64
--top_k 6 | --top_k 6
--dropout 1 | --dropout 1
--history nope | --history 'nope'
--task_router nope | --task_router 'nope'
--stride 0 | --stride 0
--eval_episodes 1 | --eval_episodes 1
--d_model 24 | --d_model 24
--dtype nope | --dtype 'nope'
--device nope | --device nope
--compile --dtype float32 | --compile needs --dtype bfloat16
word | word
--tasks 9 | --tasks
--mode ad --batch 4 --context 99 | --context 99
--runs FILE --batch 4 | FILE
--eval none | none/ckpt.pt
--eval FOLDER | FOLDER/ckpt.pt
--eval FILE | FILE is damaged
--eval none --tasks 1 | --tasks 1
--eval none --lr 1 | --lr
--eval none --device nope | --device nope
--resume none | none/ckpt.pt
--resume none --lr 1 | --lr
--figures none | none
--figures | --figures
--resume none --figures none | --resume"""
CASES = [(t2mir.main, case) for case in TRAIN.split("\n")[1:]]


@pytest.mark.parametrize("command, case", CASES, ids=[case for _, case in CASES])
def test_bad_input_ends_in_one_line_and_code_2(command, case, folder, tmp_path, monkeypatch, capsys):
    """At the command line: exit code 2, one line on stderr that names the fault, nothing on stdout, no new file."""
    flags, said = case.split(" | ")
    (tmp_path / "FILE").write_bytes(b"no checkpoint")
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    others = any(flag in flags for flag in ("--eval", "--figures", "--resume"))
    where = [] if others else ["--data", folder]
    monkeypatch.setattr(sys, "argv", ["program", *flags.split(), *where])
    with pytest.raises(SystemExit) as ended:
        command_line(command)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, (
        err
    )
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["FILE", "FOLDER"]


def test_a_dataset_that_does_not_fit_is_named(folder, tmp_path):
    """Another family's data under this name, a truncated file, too few tasks or episodes; no run folder is left."""
    point, cheetah = (Path(f"{folder}/{name}.npz").read_bytes() for name in ("point_robot", "cheetah_vel"))
    cases = [(cheetah, "", "must have shape"), (point[:3000], "", "damaged"), (point, "--batch 64", "--batch 64")]
    cases += [(point, "--mode ad --batch 4 --context 9", "--context 9")]
    for content, argv, message in cases:
        (tmp_path / "point_robot.npz").write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            t2mir.main([*argv.split(), "--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "runs").exists(), f"{message}: {list((tmp_path / 'runs').iterdir())}"


def test_a_script_exits_with_its_code(tmp_path):
    """The same as a process of its own, once for each script."""
    for script, flag in (("t2mir.py", "--data ."), ("collect.py", "--env nope")):
        (tmp_path / "point_robot.npz").write_bytes(b"no dataset")
        ended = subprocess.run(
            [sys.executable, HERE / script, *flag.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert ended.returncode in (1, 2) and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir()] == ["point_robot.npz"]


def test_help_has_every_flag_with_its_default(capsys):
    """One line or two for each field, under the headings in the order of the file."""
    with pytest.raises(SystemExit):
        t2mir.main(["--help"])
    text = re.sub(r"\s", "", capsys.readouterr().out)  # argparse breaks lines at hyphens too
    for f in dataclasses.fields(t2mir.Config):
        said = f.metadata["help"] + f" [{f.default}]" * (f.default not in (False, ""))
        assert re.sub(r"\s", "", f"--{f.name} {f.type.__name__.upper()} {said}".replace(" BOOL", "")) in text, f.name
    groups = ["what to train", "model", "mixture of experts", "context", "optimisation", "evaluation", "system"]
    places = [text.index(group.replace(" ", "") + ":--") for group in groups]
    assert places == sorted(places)


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    """Within the next look at the loss, long before the next evaluation, and the last checkpoint stays finite."""
    given = dict(data=folder, runs=str(tmp_path), steps=500, eval_every=60, eval_episodes=2, name="run", warmup=100)
    with pytest.raises(FloatingPointError, match=r"between steps \d+ and \d+: .*ckpt.pt, if there is one"):
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


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_a_run_stopped_by_ctrl_c_goes_on_as_if_nothing_had_been(folder, mode, tmp_path, monkeypatch):
    """Stopped between two evaluations and resumed, dropout and router noise on, the log is that of a run left alone."""
    given = dict(data=folder, runs=str(tmp_path), steps=12, eval_every=5, eval_episodes=2, dropout=0.1)
    whole = t2mir.train(tiny(mode, name="whole", **given))
    draw, drawn = Batches.next, []

    def draw_and_interrupt(batches):
        drawn.append(None)
        if len(drawn) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(batches)

    monkeypatch.setattr(Batches, "next", draw_and_interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 8"):
        t2mir.train(tiny(mode, name="broken", **given))
    t2mir.main(["--resume", str(tmp_path / "broken")])
    assert len(drawn) == 12
    for name in ("log.csv", "result.csv"):
        assert rows(whole / name) == rows(tmp_path / "broken" / name) != []


def test_eval_acts_in_fresh_tasks(folder, tmp_path, capsys):
    """--eval prints what `evaluate` returns on tasks drawn apart from the dataset's, of a folder or a checkpoint."""
    run = short_run("dpt", folder, tmp_path, 5, "run")
    stored = load(f"{folder}/point_robot.npz")
    for name in ("ckpt.pt", "best.pt"):
        capsys.readouterr()
        where = run if name == "ckpt.pt" else run / name
        t2mir.main(["--eval", str(where), "--tasks", "6", "--seed", "3", "--eval_episodes", "2"])
        said = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()[1:]}
        assert list(said) == ["random", "episode 1", "episode 2"]
        tasks = sample_tasks("point_robot", 6, [3, 2])
        assert not (tasks[:, None] == stored["tasks"]).all(-1).any()  # the dataset's seed is 3 too
        for i, returns in enumerate(evaluate(t2mir.restore(run / name)[0], tasks, 2, seed=3), 1):
            mean, error = map(float, said[f"episode {i}"].split("±"))
            assert abs(mean - returns.mean()) < 0.006 and abs(error - np.std(returns, ddof=1) / 6**0.5) < 0.006


SEVERAL = """
import sys, torch, t2mir
torch.set_num_threads(1)
torch.randn_like = torch.zeros_like  # no noise in the routers: what is left must not depend on the processes
for mode in ("ad", "dpt"):
    t2mir.main([*sys.argv[2:], "--mode", mode, "--name", mode + sys.argv[1]])
"""


def test_two_processes_follow_one(folder, tmp_path):
    """torchrun with half the batch each logs what one process does with all of it, for 20 steps, in both modes: the
    balance loss and InfoNCE's negatives are of the whole batch."""
    (tmp_path / "several.py").write_text(SEVERAL)
    flags = "--steps 20 --eval_every 1 --eval_episodes 2 --batch 8 --queries 5 --context 3 --d_model 16 --n_heads 2 "
    flags += "--n_layers 2 --moe_layers all --token_experts 4 --task_experts 4 --warmup 2 --dropout 0"
    flags = [*flags.split(), "--data", folder, "--runs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    for processes, how in (("1", []), ("2", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *how, tmp_path / "several.py", processes, *flags]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
    for mode in ("ad", "dpt"):
        one, two = (rows(tmp_path / (mode + processes) / "log.csv") for processes in "12")
        assert len(one) == len(two) == 20
        for a, b in zip(one, two):
            for key in ("loss", "action", "balance", "contrastive"):
                assert abs(float(a[key]) - float(b[key])) < 2e-5 * max(1, abs(float(a[key]))), (a, b)
        with pytest.raises(BadInput, match="ran in 2 processes"):
            t2mir.main(["--resume", str(tmp_path / f"{mode}2")])


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_flops_of_a_step_are_close_to_torchs_count(mode, folder):
    """Torch counts no attention scores on a CPU, but embeddings and head, here less than a hundredth."""
    c = tiny(mode, d_model=64, no_token_moe=True, no_task_moe=True, moe_layers="last")
    batches = Batches(c, load(f"{folder}/point_robot.npz"))
    with FlopCounterMode(display=False) as counter:
        t2mir.take_step(*(model := T2MIR(c), t2mir.make_optimizer(model)), batches, c)
    n, queries = (3 * 20 * c.context, 0) if mode == "ad" else (3 * 20, c.queries)
    pairs = n * n / 2 + queries * n / 2  # of tokens, one of which sees the other
    scores = 8 * 2 * pairs * 2 * 64 * 2 * 3  # sequences, layers, pairs, score and mix of 64 numbers, FLOPs, passes
    assert 1 <= counter.get_total_flops() / (t2mir.flops_of_step(c) - scores) < 1.01


def test_bench_runs(capsys):
    """Prints the rates of both agents; on made-up data, so no dataset is needed."""
    t2mir.bench(tiny("dpt", batch=4), num_tasks=2)
    out = capsys.readouterr().out
    assert "T2MIR trains" in out and "dense trains" in out and "T2MIR's step takes" in out
    (shares,) = (line for line in out.splitlines() if "where the time" in line)
    assert abs(sum(map(int, re.findall(r"(\d+)%", shares))) - 100) <= 2  # each is rounded
    assert all(kind in shares for kind in ("attention", "other products", "the rest"))


def test_a_dataset_is_checked_array_by_array(folder, tmp_path):
    """Each broken array is named with what it should be; float64 is converted; four arrays are enough."""
    rng = np.random.default_rng(0)
    own = dict(states=rng.normal(size=(4, 3, 7, 37)), actions=rng.uniform(-1, 1, (4, 3, 7, 5)))
    own |= dict(rewards=rng.normal(size=(4, 3, 7)), test=np.array([0, 0, 0, 1]))
    path = tmp_path / "my_robot.npz"
    np.savez(path, **own)
    assert {name: load(path)[name].dtype for name in own} == dict.fromkeys(own, np.float32) | {"test": bool}
    for name, array, message in [
        ("rewards", np.zeros((4, 3)), r"`rewards` must have shape \(tasks, episodes, steps\)"),
        ("states", np.zeros((4, 3, 8, 37)), r"`states` must have shape \(N E T obs_dim\) = \(4, 3, 7, 37\)"),
        ("expert_actions", np.zeros((4, 3, 7, 6)), "`expert_actions` must have shape"),
        ("actions", 3 * own["actions"], r"`actions` must lie in \[-1, 1\]"),
        ("states", own["states"] * np.nan, "`states` has non-finite values"),
        ("test", np.zeros(4), "`test` must mark at least one task"),
        ("test", np.ones(4), "`test` must mark at least one task"),
        ("test", None, "no array `test`"),
    ]:
        np.savez(path, **{k: v for k, v in (own | {name: array}).items() if v is not None})
        with pytest.raises(BadInput, match=message):
            load(path)
    np.savez(tmp_path / "cheetah_vel.npz", **own)  # a name of ours, and another horizon
    with pytest.raises(BadInput, match="200"):
        load(tmp_path / "cheetah_vel.npz")


def test_collections_stop_where_they_must(tmp_path):
    """A second process is refused at once; a collection that diverges writes no dataset; nonsense is refused."""
    small = dict(steps=100, random_steps=20, train_tasks=2, test_tasks=1, out=str(tmp_path))
    with claim(tmp_path / "point_robot.npz"), pytest.raises(BadInput, match="in use by another process"):
        collect("point_robot", **small)
    with pytest.raises(BadInput, match="non-finite"):
        collect("point_robot", lr=1e10, critic_norm=False, **small)
    assert not list(tmp_path.glob("*.npz"))
    for given in (dict(lr=-1), dict(hidden=0), dict(gamma=1), dict(tau=2), dict(random_steps=100), dict(device="nope")):
        with pytest.raises(BadInput, match=f"--{next(iter(given))}"):
            collect("point_robot", **{**small, **given})

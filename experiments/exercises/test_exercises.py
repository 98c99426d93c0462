"""Each exercise applies to the code as it is, trains and acts.

The tests stand apart from test_t2mir.py, so that a fork may drop them.
"""

import csv
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from cart_poles import CartPoles, draw_tasks, make_data

PATCHES = sorted(path.name for path in HERE.glob("*.patch"))
SMALL = {"d_model": 16, "n_heads": 2, "n_layers": 2, "batch": 4, "queries": 6}
SHORT = {"steps": 5, "eval_every": 5, "eval_episodes": 2, "device": "cpu"}
EARLY_ENDS = "6_early_ends.patch"
pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment")


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """A function that applies a patch to a copy of the code and imports this t2mir."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def apply(patch):
        for name in ("envs", "collect", "t2mir"):
            shutil.copy(HERE.parents[1] / f"{name}.py", tmp_path)
            monkeypatch.setitem(sys.modules, name, None)  # so that it is as before after the test
            del sys.modules[name]
        subprocess.run(["git", "apply", str(HERE / patch)], cwd=tmp_path, check=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("t2mir")

    yield apply
    torch.set_num_threads(threads)


@pytest.fixture
def early_ends(patched):
    """The t2mir of exercise 6, a dataset of cart-poles and its Config for a mode."""
    t2mir = patched(EARLY_ENDS)
    data = make_data(num_tasks=6, num_test=2, episodes=8)
    Path("data").mkdir()

    def configure(mode, name="cart_poles", **given):
        np.savez(f"data/{name}.npz", **data)
        return t2mir.preset(name, mode, **SMALL, **SHORT, context=3, **given)

    return t2mir, data, configure


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_is_small(patch):
    """An exercise changes at most 40 lines."""
    lines = (HERE / patch).read_text().splitlines()
    changed = [line for line in lines if re.match(r"[-+](?![-+])", line)]
    assert 1 <= len(changed) <= 40


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_trains_and_acts(patch, patched):
    """With each patch, AD and DPT train for five steps and act."""
    t2mir = patched(patch)
    env = "point_robot"
    if "spring" in t2mir.ENVS:
        env = "spring"
    collected = {"steps": 200, "random_steps": 130, "episodes": 8, "hidden": 16, "batch": 16}
    t2mir.collect(env, **collected, copies=2, train_tasks=4, test_tasks=2)
    for mode in ("ad", "dpt"):
        run = t2mir.train(t2mir.preset(env, mode, **SMALL, **SHORT))
        model = t2mir.load_agent(run)
        history = t2mir.evaluate(model, np.ones((3, 2)), 2)
        assert history["rewards"].isfinite().all()


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_padding_does_not_change_what_is_learned(mode, early_ends):
    """Exercise 6: two datasets that differ in their padding give the same weights."""
    t2mir, data, configure = early_ends
    one = t2mir.load_agent(t2mir.train(configure(mode)))
    padded = np.arange(data["rewards"].shape[2]) >= data["lengths"][..., None]
    assert 0.2 < padded.mean() < 0.8
    for name in ("states", "actions", "expert_actions", "rewards"):
        data[name][padded] = np.random.default_rng(0).uniform(-1, 1, data[name][padded].shape)
    other = t2mir.load_agent(t2mir.train(configure(mode, "other_padding")))
    for name, value in one.state_dict().items():
        assert value.equal(other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("mode", "late", "stride"), [("dpt", True, 1), ("ad", True, 1), ("ad", False, 3)]
)
def test_a_context_is_as_if_padding_were_cut_out(mode, late, stride, early_ends):
    """Exercise 6: outputs and task logits are those of contexts without the padded steps."""
    t2mir, data, configure = early_ends
    c = configure(mode, stride=stride, late_episode=late, worse_episodes=late)
    data, train_tasks, _ = t2mir.open_dataset(c)
    model = t2mir.new_model(c, data, train_tasks)
    torch.manual_seed(0)
    batch = t2mir.DRAW_BATCH[mode](c, t2mir.to_tensors(data, train_tasks), 2, c.batch)
    outputs, routings = model.eval().predict(batch)
    steps = (batch.context.times < model.horizon).sum(1)
    assert steps.min() < steps.max()
    for i in range(c.batch):
        real = batch.context.times[i] < model.horizon
        cut = t2mir.Steps(*(x[i : i + 1, real] for x in batch.context))
        seen = torch.stack([real[:n].sum() for n in batch.seen[i]])[None]
        queries = batch.queries[i : i + 1]
        times = batch.query_times[i : i + 1]
        alone = batch._replace(context=cut, queries=queries, query_times=times, seen=seen)
        expected, expected_routings = model.predict(alone)
        torch.testing.assert_close(outputs[i : i + 1], expected)
        at_the_end = expected_routings[-1].logits[0, 3 * steps[i] - 1]
        torch.testing.assert_close(routings[-1].logits[i, 3 * steps[i] - 1], at_the_end)


class RestlessPoles(CartPoles):
    """Cart-poles that go on after they have fallen, with noise and with rewards."""

    def step(self, actions):
        fallen = self.fallen.copy()
        seen, reward, *rest = super().step(actions)
        noise = np.random.default_rng(self.t).normal(size=seen.shape).astype(np.float32)
        seen = np.where(fallen[:, None], noise, seen)
        return seen, np.where(fallen, 5.0, reward), *rest


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_what_follows_an_end_does_not_count(mode, early_ends):
    """Exercise 6: returns are the same whatever an environment does after an episode's end."""
    t2mir, _, configure = early_ends
    model = untrained(t2mir, configure(mode))
    history = t2mir.evaluate(model, CartPoles(draw_tasks(5, 0)), 2)
    restless = t2mir.evaluate(model, RestlessPoles(draw_tasks(5, 0)), 2)
    returns = history["rewards"].sum(-1)
    assert returns.min() < returns.max()
    assert returns.equal(history["lengths"].double())
    assert returns.equal(restless["rewards"].sum(-1))


def test_an_agent_acts_until_episodes_end(early_ends):
    """Exercise 6: in a vector environment of Gymnasium's, episodes have the lengths that it says."""
    t2mir, _, configure = early_ends
    model = untrained(t2mir, configure("ad"))
    wrappers = [lambda pole: gymnasium.wrappers.RescaleAction(pole, -1.0, 1.0)]
    poles = gymnasium.make_vec("InvertedPendulum-v5", 3, "sync", wrappers=wrappers)
    history = t2mir.evaluate(model, poles, 2)
    poles.close()
    lengths = history["lengths"]
    assert lengths.min() < lengths.max() < model.horizon
    assert history["rewards"].sum(-1).equal(lengths - 1.0)  # the step in which it falls has none


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_the_cache_hides_padding_too(mode, early_ends):
    """Exercise 6: acting with a cache equals the full forward pass where episodes end early."""
    t2mir, _, configure = early_ends
    model = untrained(t2mir, configure(mode))
    tasks = draw_tasks(3, 0)
    cached = t2mir.evaluate(model, CartPoles(tasks), 3)
    full = t2mir.evaluate(model, CartPoles(tasks), 3, use_cache=False)
    torch.testing.assert_close(cached["actions"], full["actions"], atol=1e-4, rtol=0)


def untrained(t2mir, c):
    """A model with the weights that it starts with."""
    data, train_tasks, _ = t2mir.open_dataset(c)
    torch.manual_seed(0)
    return t2mir.new_model(c, data, train_tasks)


def test_answers(tmp_path, monkeypatch):
    """A row is the end of a run's log; without a patch it is that of the code as it is."""
    sys.path.insert(0, str(HERE.parents[1]))
    import t2mir
    from experiments.exercises import answers

    monkeypatch.chdir(tmp_path)
    collected = {"steps": 200, "random_steps": 130, "episodes": 8, "hidden": 16, "batch": 16}
    t2mir.collect("point_robot", **collected, copies=2, train_tasks=16, test_tasks=2)
    for name in list(answers.RUNS):
        if name not in ("without a patch", "2, a shared expert"):
            monkeypatch.delitem(answers.RUNS, name)
    for _ in range(2):  # the second time nothing is run
        answers.main((1,), 3, Path("data"), Path("table.csv"))
    plain, shared = csv.DictReader(Path("table.csv").read_text().splitlines())
    c = t2mir.preset("point_robot", "dpt", steps=3, eval_every=3, seed=1)
    log = csv.DictReader((t2mir.train(c) / "log.csv").read_text().splitlines())
    last = list(log)[-1]
    assert plain.items() >= {name: last[name] for name in answers.LOGGED}.items()
    assert shared["run"] == "2, a shared expert"
    assert shared["heldout"] != plain["heldout"]
    assert len(plain["own context"].split()) == c.eval_episodes

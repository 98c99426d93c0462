"""Tests of the scripts in this folder, on tiny datasets and runs of six steps.

python -m pytest -q experiments/test_experiments.py
"""

import csv
import dataclasses
import json
import math
import shlex
import sys
from itertools import combinations, pairwise
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import tyro
from matplotlib import pyplot
from matplotlib.backend_bases import MouseEvent
from matplotlib.figure import Figure

HERE = Path(__file__).parent
AGENTS = HERE / "agents"
sys.path.insert(0, str(HERE.parent))
import t2mir
from collect import BadInput, collect, load
from envs import ENVS, make_vec, sample_tasks
from experiments import (
    clone_experts,
    compare,
    dial,
    drawings,
    figures,
    gradients,
    pack,
    routing,
    stairs,
    subset,
    watch,
)
from experiments.report import open_run

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*Box observation space")

TINY = {
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "token_experts": 4,
    "task_experts": 5,
    "context": 2,
    "queries": 6,
    "stride": 1,
    "steps": 6,
    "batch": 4,
    "warmup": 2,
    "eval_every": 6,
    "eval_episodes": 2,
    "device": "cpu",
}
DENSE = {"token_moe": False, "task_moe": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny dataset of each family. Most actions are random, all experts poor.

    Those of Point-Robot are called better than random, because scores need such experts.
    """
    out = tmp_path_factory.mktemp("data")
    tiny = {"out": out, "hidden": 16, "batch": 16, "copies": 2, "seed": 3, "history": 1.0}
    tiny["device"] = "cpu"
    point = {"steps": 200, "random_steps": 130, "episodes": 16, "train_tasks": 8, "test_tasks": 3}
    path = collect("point_robot", **tiny | point)
    arrays = dict(np.load(path))
    arrays["expert_return"] = arrays["random_return"] + 5
    np.savez(path, **arrays)
    robot = {"steps": 400, "random_steps": 385, "episodes": 3, "train_tasks": 2, "test_tasks": 1}
    for name in ("cheetah_vel", "walker_param"):
        collect(name, **tiny | robot)
    return out


@pytest.fixture(scope="module")
def train(folder, tmp_path_factory):
    """train(name, mode, env, **given): the folder of a run, trained once for each name."""
    runs = tmp_path_factory.mktemp("runs")

    def train_once(name, mode="dpt", env="point_robot", **given):
        if not (runs / name).exists():
            where = {"data": str(folder), "runs": str(runs), "name": name}
            t2mir.train(t2mir.preset(env, mode, **TINY | where | given))
        return runs / name

    return train_once


@pytest.fixture(scope="module")
def pairs(train):
    """Two runs of T2MIR, and two of its dense baseline with the same seeds."""
    first = tuple(train(f"moe{seed}", seed=seed) for seed in (0, 1))
    second = tuple(train(f"dense{seed}", seed=seed, **DENSE) for seed in (1, 0))
    return first, second


@pytest.fixture(scope="module")
def row(pairs, tmp_path_factory):
    """The row of compare.py's table that compares `pairs` in five fresh tasks."""
    path = tmp_path_factory.mktemp("table") / "pairs.csv"
    compare.main(*pairs, tasks=5, label="pair", csv=path)
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    return row


def fresh_returns(runs):
    """The returns of runs in five fresh tasks of seed 1, (runs, tasks, episodes)."""
    tasks = sample_tasks("point_robot", 5, [1, 2])
    returns = []
    for run in runs:
        history = t2mir.evaluate(t2mir.load_agent(run), tasks, 2, 1)
        returns.append(history["rewards"].sum(-1).numpy())
    return np.stack(returns)


def numbers(text):
    return [float(number) for number in text.split()]


# ---- compare.py ----------------------------------------------------------------------------------


def test_returns_in_fresh_tasks(row, pairs):
    """The table has an agent's mean returns by episode."""
    for which, runs in zip(("first", "second"), pairs):
        expected = fresh_returns(runs).mean((0, 1))
        assert numbers(row[f"{which}_return"]) == pytest.approx(expected, rel=1e-3)


def test_standard_error_over_the_runs(row, pairs):
    """With two runs it is half of their difference."""
    a, b = fresh_returns(pairs[0]).mean(1)
    assert numbers(row["first_error"]) == pytest.approx(abs(a - b) / 2, rel=1e-2)


@pytest.mark.parametrize(("name", "episode"), [("score_1", 0), ("score_2", 1), ("score", 1)])
def test_differences_of_scores(name, episode, row, pairs, folder):
    """They are those of the agents' returns in the same fresh tasks, in units of the range."""
    data = load(folder / "point_robot.npz")
    width = data["expert_return"].mean() - data["random_return"].mean()
    first, second = (fresh_returns(runs)[:, :, episode].mean() for runs in pairs)
    expected = (first - second) / width
    assert float(row[f"{name}_difference"]) == pytest.approx(expected, rel=1e-3)
    assert float(row[f"{name}_low"]) <= expected <= float(row[f"{name}_high"])


def test_difference_of_held_out_losses(row, pairs, folder):
    """It is that of the mean losses in the single held-out tasks."""
    data = load(folder / "point_robot.npz")
    means = []
    for runs in pairs:
        losses = []
        for run in runs:
            for task in np.flatnonzero(data["test"]):
                x = t2mir.to_tensors(data, np.arange(len(data["test"])) == task)
                losses.append(t2mir.held_out_loss(t2mir.load_agent(run), x))
        means.append(np.mean(losses))
    assert float(row["heldout_difference"]) == pytest.approx(means[0] - means[1], rel=1e-3)


def test_one_agent_alone_is_measured(pairs, capsys):
    """Without a second agent the returns are printed, and nothing is compared."""
    compare.main(pairs[0], tasks=5)
    printed = capsys.readouterr().out
    for mean in fresh_returns(pairs[0]).mean((0, 1)):
        assert f"{mean:.2f}" in printed
    assert "difference" not in printed


def test_few_seeds_are_said(pairs, capsys):
    """With two pairs the output says that the intervals leave the seeds out."""
    compare.main(*pairs, tasks=5)
    assert "leaves the seeds out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("moe0", "moe1"), ("dense0",), "seeds must be the same"),
        (("moe0", "moe0"), ("dense0", "dense1"), "second run with seed 0"),
        (("moe0", "dense1"), ("dense0", "dense1"), "runs of one agent"),
        ((), ("dense0",), "runs of one agent"),
        (("moe0",), ("other_mode0",), "must have one environment"),
    ],
)
def test_what_cannot_be_compared(first, second, said, pairs, train):
    """Other seeds, a seed twice, several agents, no runs, another mode."""
    train("other_mode0", mode="ad", seed=0)
    runs = pairs[0][0].parent
    with pytest.raises(BadInput, match=said):
        compare.main([runs / name for name in first], [runs / name for name in second], tasks=2)


def test_a_run_that_has_not_ended(train, tmp_path):
    """It is refused: its agent would be compared before its time."""
    saved = t2mir.read_checkpoint(train("moe0", seed=0))
    torch.save(saved | {"step": 3}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="has not ended"):
        compare.main([tmp_path], tasks=2)


def test_another_dataset_is_refused(train, folder, tmp_path):
    """A dataset at the place of the one that a run was trained on is not taken for it."""
    saved = t2mir.read_checkpoint(train("moe0", seed=0))
    arrays = dict(np.load(folder / "point_robot.npz"))
    arrays["rewards"][0, 0, 0] += 1
    np.savez(tmp_path / "point_robot.npz", **arrays)
    moved = saved["config"] | {"data": str(tmp_path)}
    torch.save(saved | {"config": moved}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="not the dataset"):
        compare.open_run(tmp_path)


def test_an_outdated_report_is_refused(train, tmp_path):
    """Its returns are those of another agent than the one that the table names."""
    run = train("outdated")
    returns = {name: np.zeros((2, 3)) for name in figures.CONTEXTS}
    result = {"tasks": np.zeros((3, 2)), "random_return": np.zeros(3), "expert_return": np.ones(3)}
    np.savez(run / "result.npz", step=3, **result, **returns)
    with pytest.raises(BadInput, match="not finished, or its report is of an earlier step"):
        figures.main((run,), out=tmp_path)


def test_experts_no_better_than_random_have_no_scores(train, tmp_path):
    """The sign of a score would be turned round."""
    saved = t2mir.read_checkpoint(train("moe0", seed=0))
    arrays = t2mir.load(Path(saved["config"]["data"]) / "point_robot.npz")
    arrays["expert_return"] = arrays["random_return"] - 5
    data = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)}
    np.savez(tmp_path / "point_robot.npz", **data)
    config = saved["config"] | {"data": str(tmp_path)}
    changed = t2mir.open_dataset(t2mir.Config(**config))[0]["fingerprint"]
    torch.save(saved | {"config": config, "fingerprint": changed}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="no better than random actions"):
        compare.main((tmp_path,), tasks=2)


def test_a_missing_dataset_is_not_collected(train, tmp_path, monkeypatch):
    """A script that measures a run says that its dataset is missing."""
    saved = t2mir.read_checkpoint(train("moe0", seed=0))
    moved = saved["config"] | {"data": str(tmp_path)}
    torch.save(saved | {"config": moved}, tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="is missing"):
        compare.open_run(tmp_path)


def test_a_table_with_other_columns_is_left_alone(tmp_path):
    """A row is not added to a file of other columns."""
    path = tmp_path / "table.csv"
    compare.append(path, {"a": 1, "b": 2})
    with pytest.raises(BadInput, match="other columns"):
        compare.append(path, {"a": 1, "c": 2})
    assert path.read_text() == "a,b\n1,2\n"


def of_means(x, y):
    return x.mean() - y.mean()


def test_width_of_an_interval():
    """Two agents vary over seeds and tasks: the interval has the width of a normal one."""
    rng = np.random.default_rng(0)
    agents = []
    for level in (0.9, 0.8):
        by_seed = 0.02 * rng.normal(size=(30, 1))
        by_task = 0.05 * rng.normal(size=(1, 80))
        agents.append(level + by_seed + by_task)
    _, low, high = compare.interval(of_means, *agents)
    deviation = (2 * 0.02**2 / 30 + 2 * 0.05**2 / 80) ** 0.5  # the noise of both agents
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.2)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_fewer_than_three_seeds_are_left_out_of_an_interval(seeds):
    """Where only the seeds differ, the interval has no width with fewer than three of them."""
    scores = np.arange(seeds)[:, None] * np.ones((1, 10))
    _, low, high = compare.interval(np.mean, scores)
    assert (high > low) == (seeds >= 3)


def test_interquartile_mean():
    """It leaves out the lowest and the highest quarter of all numbers."""
    x = np.random.default_rng(0).normal(size=(4, 10))
    middle = np.sort(x.flatten())[10:30]
    assert compare.interquartile_mean(x) == pytest.approx(middle.mean())


# ---- figures.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    """What figures.py makes of `pairs` with made-up returns: its folder, and scores by run."""
    scores = {}
    for i, run in enumerate((*pairs[0], *pairs[1])):
        returns = {}
        for name in figures.CONTEXTS:
            returns[name] = np.random.default_rng(i).uniform(-9, -1, size=(2, 3))
        result = {"tasks": np.arange(6).reshape(3, 2), "amount": np.array([1, 2])}
        result["random_return"] = np.full(3, -9.0)
        result["expert_return"] = np.full(3, -1.0)
        np.savez(run / "result.npz", step=6, **result, **returns)
        scores[run.name] = (returns["own"] + 9) / 8  # (episodes, tasks)
    out = tmp_path_factory.mktemp("figures")
    figures.main((*pairs[0], *pairs[1]), out=out)
    return out, scores


def test_means_of_the_table(made):
    """A row has the mean scores of the two runs of an agent, by episode."""
    out, scores = made
    lines = (out / "results.md").read_text().splitlines()
    for agent, line in (("moe", lines[2]), ("dense", lines[3])):
        cells = line.split(" | ")
        assert cells[2] == "2"
        for episode in (0, 1):
            both = (scores[f"{agent}0"][episode] + scores[f"{agent}1"][episode]).mean() / 2
            assert cells[3 + episode].startswith(f"{both:.3f} [")


def test_rows_of_runs(made):
    """The CSV file has a row for each run, with its scores by episode."""
    out, scores = made
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows, scores.values(), strict=True):
        assert numbers(row["score_own"]) == pytest.approx(expected.mean(1), rel=1e-3)


def test_dense_baseline_has_the_colour_of_its_agent(pairs):
    """The name of T2MIR's baseline is that of the dense agent with the same settings."""
    moe, dense = (t2mir.read_checkpoint(runs[0])["config"] for runs in pairs)
    assert figures.names(moe)["baseline"] == figures.names(dense)["agent"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"recipe": "paper", "lr": 3e-3},
        {"mode": "ad", "guests": False, "moe_layers": (0, -1), "w_con": 0.0, "seed": 2},
    ],
)
def test_command_of_a_run(given):
    """The command that results.csv has for a run makes the run's settings."""
    config = dataclasses.asdict(t2mir.preset(**given))
    command = shlex.split(figures.names(config)["command"])
    recipe = given.get("recipe", "ours")
    default = t2mir.preset(config["env"], config["mode"], recipe)
    default = t2mir.Flags(**dataclasses.asdict(default), recipe=recipe)
    flags = tyro.cli(t2mir.Flags, default=default, args=command[2:])
    parsed = dataclasses.asdict(flags)
    assert {name: parsed[name] for name in config} == config
    assert ("--recipe" in command) == (recipe == "paper")


def test_pictures_are_drawn(made, tmp_path):
    """The runs' picture and that of the pairs are PNG files."""
    figures.main(pairs=HERE / "results/pairs.csv", out=tmp_path)
    for path in (made[0] / "scores.png", tmp_path / "pairs.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_table_without_pairs_is_refused(train):
    """The log of a run is not a table of compare.py."""
    with pytest.raises(BadInput, match="no row"):
        figures.main(pairs=train("moe0", seed=0) / "log.csv")


# ---- The other scripts ---------------------------------------------------------------------------


def test_masks_are_those_of_batches():
    """A drawn cell is at (column, row); AD's query i sees i steps, DPT's any number of them."""
    ax = Figure().subplots()
    batch = drawings.small_batch("ad", 2, 3, 1)
    drawings.draw_mask(ax, batch, 3, "")
    cells = {(patch.get_y(), patch.get_x()) for patch in ax.patches}
    expected = {(i, j) for i in range(18) for j in range(i + 1)}
    for i in range(6):
        expected |= {(18 + i, j) for j in range(3 * i)} | {(18 + i, 18 + i)}
    assert cells == expected
    batch = drawings.small_batch("dpt", 1, 6, 6)
    assert batch.seen.shape == (4, 6)
    assert len(batch.seen.unique()) > 2


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_routing_picture(mode, train, tmp_path, monkeypatch):
    """It is drawn for a run with three held-out tasks."""
    monkeypatch.setattr(routing, "POINTS", 100)  # for speed
    run = train(f"{mode}-routing", mode=mode)
    routing.main(run, tmp_path, tmp_path / "routing.csv")
    assert (tmp_path / f"{mode}-routing-routing.png").stat().st_size > 10_000
    (row,) = csv.DictReader((tmp_path / "routing.csv").open())
    assert (row["env"], row["mode"], row["seed"]) == ("point_robot", mode, "0")
    assert -1 <= float(row["correlation"]) <= 1


def test_correlation_of_tasks_and_experts():
    """It is that of the ranks of all distances, computed one pair after the other."""
    rng = np.random.default_rng(0)
    tasks = rng.normal(size=(6, 2))
    chosen = torch.from_numpy(rng.dirichlet(np.ones(5), (6, 3)))
    of_tasks = []
    of_experts = []
    for i, j in combinations(range(6), 2):
        of_tasks.append(math.dist(tasks[i], tasks[j]))
        shared = sum(min(a, b) for a, b in zip(chosen[i].mean(0), chosen[j].mean(0)))
        of_experts.append(1 - shared.item())
    ranks = [np.argsort(np.argsort(x)) for x in (of_tasks, of_experts)]
    expected = np.corrcoef(*ranks)[0, 1]
    assert routing.correlation(tasks, chosen) == pytest.approx(expected)


def test_agent_before_training(made, train):
    """It is the agent with which the run began, as a run that hardly moves shows."""
    run = train("moe0", seed=0)
    model, data, train_tasks, _ = open_run(run)
    before = routing.before_training(model, data, train_tasks)
    c = dataclasses.replace(model.config, runs=str(run.parent), name="untrained", lr=1e-12)
    untrained = t2mir.load_agent(t2mir.train(c))
    for a, b in zip(before.parameters(), untrained.parameters()):
        assert torch.allclose(a, b, atol=1e-8)


def test_routing_needs_both_routers(train):
    """A run without the token-wise MoE is refused."""
    with pytest.raises(BadInput, match="lacks an MoE"):
        routing.main(train("task_only", token_moe=False))


def test_routing_needs_three_tasks(train):
    """A run with one held-out task is refused."""
    with pytest.raises(BadInput, match="1 held-out tasks"):
        routing.main(train("one_task", val_tasks=1))


def test_queries_of_ad_are_routed_as_state_tokens(train, folder):
    """With stride 1 a query sees what the token of the same state sees."""
    model = t2mir.load_agent(train("ad-routing", mode="ad"))
    data = load(folder / "point_robot.npz")
    stored = {name: data[name] for name in ("states", "actions", "rewards")}
    for routed in routing.route(model, routing.arrays_of_episodes(stored)):
        states = routed.logits[:, 0:60:3]
        torch.testing.assert_close(states, routed.logits[:, 60:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENVS)
def test_watched_agent_acts_as_it_is_evaluated(name, train):
    """The returns are those of `evaluate`, and there is a state for each time of each episode."""
    agent = t2mir.load_agent(train(f"watch-{name}", env=name, stride=10))
    tasks = sample_tasks(name, 1, seed=0)
    states, history = watch.act(agent, tasks, 2)
    expected = t2mir.evaluate(agent, tasks, 2, seed=1)
    np.testing.assert_array_equal(history["rewards"], expected["rewards"])
    vec = make_vec(name, tasks)
    vec.reset(seed=0)
    assert states.shape == (2, vec.horizon + 1, 1, vec.state.shape[1])


@pytest.mark.parametrize("name", ENVS)
def test_frames_of_a_gif_differ(name):
    """What moves in the simulator moves in the pictures, also if the robot's place stays."""
    tasks = sample_tasks(name, 1, seed=0)
    vec = make_vec(name, tasks)
    vec.reset(seed=0)
    states = [vec.state.copy()]
    for _ in range(4):
        vec.step(np.ones(vec.action_space.shape))
        states.append(vec.state.copy())
    states = np.array(states)
    states[:, :, 1] = 0  # a robot's x, to which the view moves
    frames = watch.make_frames(name, states[None], tasks, np.zeros((1, 1)))
    assert (frames[0] != frames[1]).any()


def test_gif_of_a_run(made, train, tmp_path):
    """It can be read, and its first picture is not its last."""
    watch.main(train("moe0", seed=0), tasks=1, episodes=1, out=tmp_path)
    frames = imageio.imread(tmp_path / "moe0.gif")
    assert (frames[0] != frames[-1]).any()


@pytest.mark.parametrize("mode", ["dpt", "ad"])
def test_gates_of_watched_episodes(mode, train):
    """They are those of the tokens of an episode that is read alone, with dropout and noise off."""
    agent = t2mir.load_agent(train(f"gates-{mode}", mode=mode))
    _, history = watch.act(agent, np.array([[0.5, -0.7]]), 2)
    found = watch.gates_of_episodes(agent, history)
    for episode in range(2):
        steps = [history[name][:, episode] for name in ("states", "actions", "rewards")]
        x = agent.embed_steps(t2mir.Steps(*steps, torch.arange(agent.horizon)[None]))
        L = x.shape[1]
        sees = (
            torch.ones(L, L).tril().bool()
        )  # one row for each token, and no kernel for causal ones
        _, routings = agent.transform(x, sees[None])
        for gates, of_moe in zip(found, routings):
            for token in range(L):
                chosen = of_moe.chosen[0, token]
                expected = np.zeros(gates.shape[2])
                expected[chosen] = of_moe.gates[0, token].detach()
                assert gates[episode, token] == pytest.approx(expected, abs=1e-5)


def test_gates_appear_with_the_movement():
    """At time t those of the states, actions and rewards before t are drawn."""
    gates = np.random.default_rng(0).uniform(0.1, 1, (9, 4))
    ax = Figure().subplots()
    draw = watch.draw_gates(ax, gates, np.array([0, 5, 10]), "")
    for t, known in ((0, 0), (1, 3), (5, 3), (6, 6), (11, 9)):
        draw(t)
        shown = ax.images[0].get_array().T
        np.testing.assert_array_equal(shown[:known], gates[:known])
        assert (shown[known:] == 0).all()


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_picture_of_experts(mode, train):
    """Its panels have the gates of the queries and of each modality, one token after the other."""
    agent = t2mir.load_agent(train(f"gates-{mode}", mode=mode))
    found = watch.Episodes(agent, (0.5, -0.7), 2)
    panels = watch.picture_of_experts(found).axes[:8]
    for i, gates in enumerate(found.gates):
        shown = [ax.images[0].get_array() for ax in panels[4 * i : 4 * i + 4]]
        np.testing.assert_array_equal(shown[0], found.query_gates[i][1].T)
        for modality in range(3):
            for step in range(agent.horizon):
                expected = gates[1, 3 * step + modality]
                np.testing.assert_array_equal(shown[1 + modality][:, step], expected)


@pytest.mark.parametrize("mode", ["ad", "dpt"])
def test_gates_of_queries_while_acting(mode, train):
    """They are those of the last token of the full forward pass, without a cache."""
    agent = t2mir.load_agent(train(f"gates-{mode}", mode=mode))
    found = watch.Episodes(agent, (0.5, -0.7), 2)
    _, history = watch.act(agent, np.array([[0.5, -0.7]]), 2)
    for episode, t in ((0, 0), (0, 7), (1, 0), (1, 19)):
        context = t2mir.own_context(agent.config, history, episode, t)
        when = agent.horizon
        if mode == "ad":
            when = t
        state = history["states"][:, episode, t]
        x = torch.cat(
            [
                agent.embed_steps(context),
                agent.embed_states(state[:, None], torch.tensor([[when]])),
            ],
            dim=1,
        )
        _, routings = agent.transform(x, torch.ones(1, 1, x.shape[1], dtype=torch.bool))
        for gates, of_moe in zip(found.query_gates, routings):
            expected = np.zeros(gates.shape[2])
            expected[of_moe.chosen[0, -1]] = of_moe.gates[0, -1].detach()
            assert gates[episode, t] == pytest.approx(expected, abs=1e-4)


def test_gif_of_a_goal(made, train, tmp_path):
    watch.main(train("moe0", seed=0), goal=(0.5, -0.7), episodes=2, out=tmp_path)
    assert (tmp_path / "moe0-experts.png").exists()
    frames = imageio.imread(tmp_path / "moe0.gif")
    assert (frames[0] != frames[-1]).any()
    for goal in ((0.5,), (1, 2, 3)):
        with pytest.raises(BadInput, match="--goal"):
            watch.main(train("moe0", seed=0), goal=goal, out=tmp_path)


def test_click_sets_a_goal(made, train, monkeypatch):
    """In the window the agent acts, and after a click it acts for another goal."""
    goals = []
    act = watch.act
    monkeypatch.setattr(watch, "act", lambda *x: goals.append(x[1].tolist()) or act(*x))
    monkeypatch.setattr(pyplot, "show", lambda: None)
    animation = watch.open_window(t2mir.load_agent(train("moe0", seed=0)), (0.5, -0.7), 1)
    canvas = pyplot.gcf().canvas
    canvas.draw()  # starts the animation
    animation._step()
    ax = pyplot.gcf().axes[0]
    x, y = ax.transData.transform((-0.25, 0.75))
    canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", canvas, x, y))
    animation._step()
    assert goals == [[[0.5, -0.7]], [pytest.approx([-0.25, 0.75])]]
    pyplot.close("all")


def test_packed_agent(made, train, tmp_path):
    """It is small, acts as its file says, and holds the command that trained it."""
    run = train("moe0", seed=0)
    pack.main(run, tmp_path / "agent")
    about = json.loads((tmp_path / "agent" / "agent.json").read_text())
    assert about["score"] == pytest.approx(pack.mean_scores(tmp_path / "agent"), abs=6e-4)
    assert about["score"] == pytest.approx(pack.mean_scores(run), abs=0.05)
    assert (tmp_path / "agent" / "ckpt.pt").stat().st_size < (run / "ckpt.pt").stat().st_size / 3
    words = about["command"].split()
    assert words[:6] == ["python", "t2mir.py", "--env", "point_robot", "--mode", "dpt"]
    given = tyro.cli(t2mir.Config, default=t2mir.preset(), args=words[2:])
    trained = t2mir.read_checkpoint(run)["config"]
    for name in trained.keys() - {"data", "runs", "name", "device"}:
        assert getattr(given, name) == trained[name]


@pytest.mark.parametrize("folder_of_agent", sorted(AGENTS.iterdir()), ids=lambda path: path.name)
def test_stored_agent_scores_what_its_file_says(folder_of_agent):
    about = json.loads((folder_of_agent / "agent.json").read_text())
    agent = t2mir.load_agent(folder_of_agent)
    with np.load(folder_of_agent / "result.npz") as arrays:
        result = dict(arrays)
    history = t2mir.evaluate(agent, result["tasks"], 2, 1)
    found = t2mir.scores(history["rewards"].sum(-1).numpy(), result, slice(None)).mean(0)
    assert found == pytest.approx(about["score"][:2], abs=0.03)


def test_last_picture_stands_for_a_second():
    """It is repeated, so that the end can be seen."""
    states = np.random.default_rng(0).normal(size=(1, 5, 1, 2))
    frames = watch.make_frames("point_robot", states, np.zeros((1, 2)), np.zeros((1, 1)))
    assert len(frames) == 4 + watch.FRAMES_PER_SECOND


def test_watched_tasks_are_ordered():
    """Tasks of one number are picked in its order, without the extremes."""
    every = np.array([[3.0], [0.0], [2.0], [1.0], [4.0]])
    assert watch.pick_tasks(every, 3).tolist() == [3, 2, 0]


@pytest.mark.parametrize("part", ["all", "early", "late", "mixed"])
def test_part_of_a_dataset(part, folder, tmp_path):
    """It has the first training tasks, all test tasks, and the chosen episodes of them."""
    subset.main(folder / "point_robot.npz", tmp_path, train_tasks=3, episodes=part)
    whole = load(folder / "point_robot.npz")
    small = load(tmp_path / "point_robot.npz")
    kept = {
        "all": range(16),
        "early": range(8),
        "late": range(8, 16),
        "mixed": (0, 1, 2, 3, 8, 9, 10, 11),
    }
    episodes = list(kept[part])
    tasks = [0, 1, 2, 8, 9, 10]  # in a tiny dataset the test tasks are the last three
    for name in ("states", "actions", "rewards", "expert_actions", "learner_actions"):
        np.testing.assert_array_equal(small[name], whole[name][tasks][:, episodes])
    for name in ("test", "tasks", "random_return", "expert_return"):
        np.testing.assert_array_equal(small[name], whole[name][tasks])
    np.testing.assert_array_equal(small["guest"], whole["guest"][episodes])


def test_a_dataset_is_not_overwritten(folder):
    """A part is not written over a dataset."""
    with pytest.raises(BadInput, match="exists"):
        subset.main(folder / "point_robot.npz", folder)


def test_cosines_of_gradients(train, folder, tmp_path):
    """They are those of the gradients that `backward` leaves in the parameters of the layer."""
    run = train("moe0", seed=0)
    data = load(folder / "point_robot.npz")
    model = t2mir.load_agent(run)
    found = []
    for signs in ((1, 1), (-1, -1)):
        members = ~data["test"] & (np.sign(data["tasks"]) == signs).all(1)
        x = t2mir.to_tensors(data, members)
        model.zero_grad()
        for i in range(gradients.BATCHES):
            torch.manual_seed(i)
            batch = t2mir.dpt_batch(model.config, x, i, 2 * members.sum())
            outputs, _ = model.predict(batch)
            model.policy.loss(outputs, batch.targets).backward()
        layer = model.blocks[-1].moe.parameters()
        found.append(torch.cat([p.grad.flatten() for p in layer if p.grad is not None]))
    expected = torch.cosine_similarity(*found, dim=0)
    similarity = gradients.cosines_of_quadrants(run)
    assert similarity[0, 2] == pytest.approx(expected.item(), abs=1e-4)

    table = tmp_path / "gradients.csv"
    gradients.main((run,), tmp_path, table)
    (row,) = csv.DictReader(table.open())
    assert row["agent"] == "T2MIR-DPT"
    assert float(row["I_and_III"]) == pytest.approx(expected.item(), abs=1e-3)
    pairs = [similarity[i, j] for i, j in combinations(range(4), 2)]
    assert float(row["mean"]) == pytest.approx(np.mean(pairs), abs=1e-3)


def test_a_clone_that_is_told_the_task_fits_it():
    """Where the right action is the task itself, only the clone that is told the task knows it."""
    torch.manual_seed(0)
    states = torch.randn(8, 40, 2)
    told = torch.linspace(-0.8, 0.8, 8)[:, None]
    labels = told[:, None].expand(8, 40, 1)
    task = torch.arange(8)[:, None].expand(-1, 40)
    errors = []
    for seen in (told[:, :0], told):
        clone = clone_experts.Clone(states, 1, seen)
        clone_experts.fit(clone, states, labels, 100)
        errors.append((clone.act(states, task)[0] - labels).square().mean().item())
    assert errors[1] < 0.1 * errors[0]


# ---- stairs.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ad", "dpt"])
@pytest.mark.parametrize("env", ["point_robot", "cheetah_vel"])
def test_each_stair_has_one_change_more(env, mode):
    ours = dataclasses.asdict(t2mir.preset(env, mode))
    paper = dataclasses.asdict(t2mir.preset(env, mode, "paper"))
    # What the other mode changes has no effect on this one.
    of_other = {"dpt": ("late_episode", "worse_episodes", "clean_targets", "guests")}
    of_other |= {"ad": ("grow_prompt",)}
    expected = {k for k in ours if ours[k] != paper[k] and k not in of_other[mode]}
    found = stairs.stairs(env, mode)
    climbed = [fields for name, fields in found.items() if not name.startswith("without")]
    assert climbed[0] == {name: paper[name] for name in expected}
    assert climbed[-1] == {name: ours[name] for name in expected}
    for below, above in pairwise(climbed):
        assert sum(below[name] != above[name] for name in expected) == 1
    for name, fields in found.items():
        t2mir.preset(env, mode, **fields)  # raises BadInput if they do not go together
        if name.startswith("without"):
            back = {other for other in expected if fields[other] != ours[other]}
            assert name.removeprefix("without ") in back
            assert back <= {name.removeprefix("without "), "guests"}


@pytest.fixture(scope="module")
def climbed(folder, tmp_path_factory):
    """A table of stairs.py with two stairs, which share their trained agents, and their Config."""
    out = tmp_path_factory.mktemp("stairs")
    where = {"data": str(folder), "runs": str(out / "runs")}
    c = t2mir.preset("point_robot", "dpt", **TINY | where | {"steps": 2, "eval_episodes": 6})
    names = ("+ grow_prompt", "+ remember_best")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stairs, "VALIDATION_TASKS", 2)
        patch.setattr(stairs, "GRID", (1e-3, 2e-2))
        for _ in range(2):  # the second time there is nothing to do
            stairs.climb(c, out / "table.csv", names, ("t2mir", "dense"), (0,), 0)
            stairs.climb(c, out / "table.csv", names, ("t2mir", "dense"), (0, 1), 5)
    return out / "table.csv", c


def test_rows_of_stairs(climbed):
    """Two learning rates of two agents on two stairs, then two seeds of two agents on them."""
    rows = stairs.read(climbed[0])
    kinds = [row["tasks"] for row in rows]
    assert kinds == ["validation"] * 8 + ["fresh"] * 8
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    agents = {tuple(row[name] for name in ("agent", "tasks", "lr", "seed")) for row in rows}
    assert len(list((Path(climbed[1].runs)).rglob("ckpt.pt"))) == len(agents)


def test_scores_of_a_stair(climbed, folder):
    """They are those of the trained agent with this stair's way of acting, in fresh tasks."""
    table, c = climbed
    data = load(folder / "point_robot.npz")
    row = [row for row in stairs.read(table) if row["stair"] == "+ grow_prompt"][-1]
    (run,) = Path(c.runs).rglob(f"dense-lr{row['lr']}-seed1")
    agent = t2mir.load_agent(run)
    agent.config = dataclasses.replace(agent.config, remember_best=False)
    history = t2mir.evaluate(agent, sample_tasks("point_robot", 5, [1, 2]), 6, 1)
    low = data["random_return"].mean()
    high = data["expert_return"].mean()
    score = 100 * (history["rewards"].sum(-1).numpy() - low) / (high - low)
    assert numbers(row["mean"]) == pytest.approx(score.mean(0), abs=0.051)
    assert numbers(row["episode_5"]) == pytest.approx(score[:, 4], abs=0.051)
    assert numbers(row["after_1"]) == pytest.approx(score[:, 1:].mean(1), abs=0.051)
    # The held-out loss is that of each test task.
    x = t2mir.to_tensors(data, data["test"])
    losses = [t2mir.held_out_loss(agent, x | {"tasks": task}) for task in x["tasks"].split(1)]
    assert numbers(row["heldout"]) == pytest.approx(losses, abs=6e-5)


def test_a_run_with_other_settings_is_not_taken_for_a_stair(climbed):
    """It lies where the run of the stair would be, but has trained with other settings."""
    c = climbed[1]
    folder = next(Path(c.runs).rglob("dense-lr*-seed1")).relative_to(c.runs)
    with pytest.raises(BadInput, match="other settings"):
        stairs.trained(dataclasses.replace(c, name=str(folder)))


def test_runs_that_differ_in_more_than_seeds_are_no_stair(climbed, tmp_path):
    rows = climbed[0].read_text().splitlines()
    lr = stairs.read(climbed[0])[-1]["lr"]
    rows[-1] = rows[-1].replace(f"fresh,{lr},", "fresh,0.5,")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    with pytest.raises(BadInput, match="more than seeds"):
        stairs.by_stair(table, "point_robot", "dpt")


def test_best_learning_rate_of_a_stair(monkeypatch):
    """It has the highest mean over all episodes in the validation tasks."""
    monkeypatch.setattr(stairs, "GRID", (1e-3, 1e-2))
    key = {"env": "point_robot", "mode": "dpt", "tasks": "validation", "agent": "dense"}
    rows = [
        key | {"stair": "published", "lr": "0.001", "mean": "10 90"},
        key | {"stair": "published", "lr": "0.01", "mean": "20 60"},
        key | {"stair": "published", "lr": "0.01", "mean": "99 99", "tasks": "fresh"},
        key | {"stair": "published", "lr": "0.01", "mean": "99 99", "agent": "t2mir"},
        key | {"stair": "+ policy", "lr": "0.001", "mean": "0 20"},
        key | {"stair": "+ policy", "lr": "0.01", "mean": "50 50"},
        key | {"stair": "+ optimizer", "lr": "0.001", "mean": "100 100"},
        key | {"stair": "+ sample", "lr": "0.001", "mean": "7 9"},
        key | {"stair": "+ sample", "lr": "0.01", "mean": "7 8"},
    ]

    def best(name):
        return stairs.best_rate(rows, "point_robot", "dpt", name, "dense")

    assert best("published") == 1e-3
    assert best("+ policy") == 1e-2
    assert best("+ sample") == 1e-3
    # Stairs without rows take those of the next one with the same optimizer, or else of the last.
    assert best("without optimizer") == 1e-3
    assert best("+ remember_best") == 1e-3
    with pytest.raises(BadInput, match="first choose"):
        best("+ optimizer")  # its own rows, which lack a rate
    del rows[6]
    assert best("+ optimizer") == 1e-2


def test_worth_of_a_change(monkeypatch):
    """It is the gain over the stair before, or the loss without the change, in pairs of seeds."""
    scores = {"published": (10, 20), "+ a": (30, 50), "+ b": (31, 52), "without a": (11, 12)}
    found = {}
    for name, of_seeds in scores.items():
        rows = [{"seed": str(i), "after_1": f"{x} {x}"} for i, x in enumerate(of_seeds)]
        found[name] = {"t2mir": rows[::-1], "dense": []}
    found["+ a"]["t2mir"].append({"seed": "7", "after_1": "90 90"})  # without a partner
    means = {name: value[0] for name, value in stairs.worth(found).items()}
    assert means == pytest.approx({"+ a": 0.25, "+ b": 0.015, "without a": 0.3})


def test_picture_of_stairs(climbed, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_bytes(climbed[0].read_bytes())
    stairs.main("draw", table=table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + 2 + 1
    assert imageio.imread(tmp_path / "stairs-point_robot-dpt.png").std() > 0


def test_a_stair_may_have_t2mir_alone(climbed, tmp_path, capsys):
    """Its cells of the dense agent are empty, and all other cells are as they were."""
    table = tmp_path / "table.csv"
    table.write_bytes(climbed[0].read_bytes())
    stairs.main("draw", table=table)
    both = capsys.readouterr().out.splitlines()[3]
    lines = table.read_text().splitlines(keepends=True)
    last = "point_robot,dpt,+ remember_best,dense,fresh"
    table.write_text("".join(line for line in lines if not line.startswith(last)))
    stairs.main("draw", table=table)
    stair, alone = (line.split("|") for line in capsys.readouterr().out.splitlines()[3:5])
    assert "|".join(stair) == both
    filled = [i for i, cell in enumerate(alone[1:-1]) if cell.strip()]
    assert filled == [0, 1, 2, 3, 4, 5, 6, 11]  # without scores of dense and differences


# ---- dial.py -------------------------------------------------------------------------------------


def angles(matrices):
    """By which angles in degrees (1, 0) is turned."""
    return np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))


@pytest.mark.parametrize("largest", dial.ANGLES)
def test_turned_controls(largest):
    """The movement is the action, turned by an angle up to the largest one."""
    tasks = dial.turned(largest).draw_tasks(np.random.default_rng(0), 2000)
    matrices = tasks[:, 2:].reshape(-1, 2, 2)
    assert matrices @ matrices.transpose(0, 2, 1) == pytest.approx(np.tile(np.eye(2), (2000, 1, 1)))
    assert np.linalg.det(matrices) == pytest.approx(np.ones(2000))
    assert abs(angles(matrices)).max() <= largest + 1e-6
    assert np.quantile(angles(matrices), [0.25, 0.75]) == pytest.approx(
        [-largest / 2, largest / 2], abs=1e-9 + 0.05 * largest
    )


def test_mixed_controls():
    """A quarter of the tasks each is plain, turned, mirrored and scaled."""
    tasks = dial.Mixed.draw_tasks(np.random.default_rng(0), 4000)
    matrices = tasks[:, 2:].reshape(-1, 2, 2)
    size = np.linalg.det(matrices)
    plain = (matrices == np.eye(2)).all((1, 2))
    mirrored = (matrices == np.diag([-1, 1])).all((1, 2))
    scaled = (size < 1 - 1e-9) & ~mirrored
    turned = ~plain & ~mirrored & ~scaled
    for kind in (plain, mirrored, scaled, turned):
        assert kind.mean() == pytest.approx(0.25, abs=0.03)
    assert size[turned] == pytest.approx(np.ones(turned.sum()))
    assert (size[scaled] ** 0.5).min() == pytest.approx(0.3, abs=0.01)


def test_a_robot_with_turned_controls_moves():
    task = np.array([[0.5, 0.0, 0.0, -1.0, 1.0, 0.0]])  # turned by 90 degrees
    robot = dial.Controls(task)
    robot.reset(seed=0)
    robot.state[:] = 0
    states, rewards, *_ = robot.step(np.array([[0.3, 0.8]]))
    assert states[0] == pytest.approx([-0.08, 0.03])
    assert rewards[0] == pytest.approx(-np.hypot(0.58, 0.03))


def test_table_of_the_dial(monkeypatch, tmp_path, capsys):
    """A row for each run, nothing is done twice, and the difference is that of the rows."""
    monkeypatch.chdir(tmp_path)
    for name, family in dial.FAMILIES.items():
        monkeypatch.setitem(ENVS, name, family)  # undone afterwards
    tiny = {"out": "data8", "hidden": 16, "batch": 16, "copies": 2, "history": 1.0, "steps": 200}
    tiny |= {"random_steps": 130, "episodes": 16, "train_tasks": 8, "test_tasks": 3}
    collect("turned90", **tiny)
    path = Path("data8/turned90.npz")
    arrays = dict(np.load(path))
    arrays["expert_return"] = arrays["random_return"] + 5
    np.savez(path, **arrays)
    monkeypatch.setattr(t2mir, "MODES", {"dpt": TINY | {"eval_episodes": 3}})
    monkeypatch.setattr(t2mir, "measure", t2mir.measure)  # which dial.py changes
    for _ in range(2):
        dial.main(("turned90",), train_tasks=8, seeds=(0, 1), fresh_tasks=4, gradients=True)
    rows = stairs.read(Path("figures/dial.csv"))
    assert [(row["agent"], row["seed"]) for row in rows] == [
        ("t2mir", "0"),
        ("dense", "0"),
        ("t2mir", "1"),
        ("dense", "1"),
    ]
    # The last cosine is that of the trained agent, without dropout and noise.
    agent = t2mir.load_agent("runs/dial/data8/turned90-dpt-6-dense-seed1-gradients")
    data = load(path)
    cosines = gradients.cosines(agent, data, dial.groups("turned90", data), dial.BATCHES)
    expected = cosines[~torch.eye(4, dtype=torch.bool)].mean().item()
    assert numbers(rows[-1]["cosine"])[-1] == pytest.approx(expected, abs=6e-4)
    assert numbers(rows[-1]["logged_at"]) == [1, 2, 3, 4, 5, 6]

    capsys.readouterr()
    dial.main(draw=True)
    heldout = [np.mean(numbers(row["heldout"])) for row in rows]
    expected = (heldout[0] - heldout[1] + heldout[2] - heldout[3]) / 2
    line = capsys.readouterr().out.splitlines()[3].split(" | ")
    assert line[:4] == ["| dpt", "data8", "turned90", "2"]
    assert float(line[6].split()[0]) == pytest.approx(expected, abs=6e-4)
    assert imageio.imread("figures/dial.png").std() > 0
    assert imageio.imread("figures/dial-gradients.png").std() > 0


def test_groups_of_turned_tasks():
    """Each group has a quarter of the training tasks, and angles between which no others are."""
    tasks = dial.turned(90).draw_tasks(np.random.default_rng(0), 10)
    data = {"tasks": tasks, "test": np.arange(10) >= 8}
    masks = dial.groups("turned90", data)
    assert masks.sum(1).tolist() == [2, 2, 2, 2]
    assert not masks[:, 8:].any()
    of_tasks = angles(tasks[:, 2:].reshape(-1, 2, 2))
    for lower, higher in pairwise(masks):
        assert of_tasks[lower].max() < of_tasks[higher].min()


def test_groups_of_mixed_tasks():
    tasks = np.zeros((5, 6))
    tasks[:, 2:] = [
        [1, 0, 0, 1],
        [-1, 0, 0, 1],
        [0.5, 0, 0, 0.5],
        [0.6, -0.8, 0.8, 0.6],
        [1, 0, 0, 1],
    ]
    masks = dial.groups("mixed", {"tasks": tasks, "test": np.arange(5) == 4})
    assert (masks == np.eye(4, 5, dtype=bool)).all()

"""Shows a trained agent in unseen tasks: a GIF with a row for each task, a column for each episode.

    python experiments/watch.py RUN [--tasks 3] [--episodes 3]
    python experiments/watch.py RUN --goal 0.5 -0.7
    python experiments/watch.py RUN --play

RUN is the folder of a run, or one of experiments/agents/. Point-Robot: the path of each episode,
and the goal, which the agent is not shown. HalfCheetah and Walker2d: the robot from the side, drawn
from the simulator's own capsules, and below it its speed and the target (HalfCheetah), or the
distance walked (Walker2d). Above each panel stands the score of the episode: 0 is a random agent, 1
the task's expert. The tasks are evenly spaced among the held-out tasks of the run, on HalfCheetah
by their velocity. The file is FOLDER/NAME.gif.

With --goal there is one task, a goal of Point-Robot (x, y) or a velocity of HalfCheetah, and below
each episode stands what the two routers of the last T2MIR layer say about its tokens, in step with
the movement: which experts they choose for each state, action and reward, and with which gate. The
episode is read alone for this. In the last block no expert computes these tokens, but only the
queries, the states in which the agent acts. FOLDER/NAME-experts.png shows the last episode, large
and by kind of token, and first what the routers chose for the queries while the agent acted. With
--play the GIF is a window, one episode after the other, and a click on the map of Point-Robot sets a
new goal for an agent without experience. `MPLBACKEND=webagg` (with `pip install tornado`) opens it
in the browser instead.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__" and "--play" not in sys.argv:
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import imageio.v3 as imageio
import mujoco
import numpy as np
import torch
import tyro
from matplotlib.animation import FuncAnimation
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command, write_atomically
from envs import make_vec
from experiments.figures import save
from experiments.routing import route

FRAMES_PER_SECOND = 10
EVERY_NTH = {"point_robot": 1, "cheetah_vel": 2, "walker_param": 2}  # step is drawn


def act(agent, tasks, episodes):
    """Physical states (episodes, T + 1, N, state_dim) of an agent, and its history."""
    vec = make_vec(agent.config.env, tasks)
    reset = vec.reset
    step = vec.step
    states = []

    def watched_reset(**given):
        result = reset(**given)
        states.append([vec.state.copy()])
        return result

    def watched_step(actions):
        result = step(actions)
        states[-1].append(vec.state.copy())
        return result

    vec.reset = watched_reset
    vec.step = watched_step
    history = t2mir.evaluate(agent, vec, episodes, seed=1)
    vec.close()
    return np.array(states), history


def draw_point(ax, states, task):
    """Prepares a panel of Point-Robot; returns a function that draws time t of states (T + 1, 2)."""
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[], aspect="equal")
    ax.plot(*task, "*", color="C3", ms=11, mec="none")
    (path,) = ax.plot([], [], "-", color="C0", lw=1.5)
    (point,) = ax.plot([], [], "o", color="C0", ms=5)

    def draw(t):
        path.set_data(*states[: t + 1].T)
        point.set_data(*states[t : t + 1].T)

    return draw


def draw_robot(ax, states, task, vec):
    """Prepares a panel of a MuJoCo robot; returns a function that draws time t of its states.

    states (T + 1, state_dim) are (time, qpos, qvel).
    """
    model = vec.model
    data = mujoco.MjData(model)
    qpos = states[:, 1 : 1 + model.nq]
    x = qpos[:, 0]
    ax.set(ylim=(-0.75, 2), xticks=[], yticks=[], aspect="equal")
    ax.axhspan(-0.75, 0, color="0.9", lw=0)
    (marks,) = ax.plot([], [], "|", color="0.5", ms=6)  # every metre, so that speed can be seen
    text = ax.text(0.5, 0.06, "", transform=ax.transAxes, ha="center", fontsize=8)
    capsules = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    points_per_metre = 72 * ax.get_position().height * ax.figure.get_figheight() / 2.75
    limbs = []
    for radius in model.geom_size[capsules, 0]:
        width = 2 * radius * points_per_metre
        limbs += ax.plot([], [], color="C0", lw=width, solid_capstyle="round")

    def draw(t):
        ax.set_xlim(x[t] - 2, x[t] + 2)
        metres = np.arange(np.ceil(x[t] - 2), x[t] + 2)
        marks.set_data(metres, np.zeros_like(metres))
        data.qpos = qpos[t]
        mujoco.mj_forward(model, data)
        for limb, geom in zip(limbs, capsules):
            axis = data.geom_xmat[geom].reshape(3, 3)[:, 2]
            half = axis * model.geom_size[geom, 1]
            ends = np.stack([data.geom_xpos[geom] - half, data.geom_xpos[geom] + half])
            limb.set_data(ends[:, 0], ends[:, 2])
        if len(task) > 1:
            text.set_text(f"{x[t] - x[0]:.1f} m")
            return
        since = max(0, t - 20)
        speed = (x[t] - x[since]) / max(1, t - since) / vec.dt  # of the last 20 steps, in m/s
        text.set_text(f"{speed:.1f} m/s, target {task[0]:.1f}")

    return draw


def draw_gates(ax, gates, steps, title):
    """Prepares a panel of the gates (L, experts) of an episode's tokens s a r s a r ...

    Returns a function that draws those of the tokens up to time t; there is one state, action and
    reward for each of `steps` (S,) times.
    """
    image = ax.imshow(np.zeros_like(gates.T), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    image.set_interpolation("nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=7, pad=2)

    def draw(t):
        shown = np.zeros_like(gates)
        known = 3 * (steps < t).sum()
        shown[:known] = gates[:known]
        image.set_data(shown.T)

    return draw


def gates_of(routing):
    """The gates of all experts, (B, L, experts): 0 where a token does not choose an expert."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.chosen, routing.gates)


@torch.no_grad()
def gates_of_episodes(agent, history):
    """Gates (episodes, L, experts) of each MoE for the tokens of the episodes in one task.

    `history` is as of `evaluate` with N = 1.
    """
    names = ("states", "actions", "rewards")
    episodes = {name: history[name][0] for name in names}
    L = 3 * len(range(0, agent.horizon, agent.config.stride))
    return [gates_of(routing)[:, :L].numpy() for routing in route(agent, episodes)]


def pick_tasks(every, number):
    """Indices of `number` of the tasks `every` (N, task_dim), evenly spaced."""
    N = len(every)
    require(1 <= number <= N, f"--tasks must be from 1 to {N}")
    order = np.arange(N)
    if every.shape[1] == 1:
        order = np.argsort(every[:, 0], kind="stable")
    places = np.linspace(0, N - 1, number + 2)[1:-1]  # without the two extremes, if possible
    if number + 2 > N:
        places = np.linspace(0, N - 1, number)
    return order[places.round().astype(int)]


def make_frames(env, states, tasks, scores):
    """The pictures of a GIF: states as of `act`, tasks (N, task_dim), scores (N, episodes)."""
    N, episodes = scores.shape
    width = 2.6
    height = 2.1
    if env == "point_robot":
        width = 1.7
        height = 1.85
    fig = Figure(figsize=(width * episodes, height * N), dpi=80)
    axes = fig.subplots(N, episodes, squeeze=False)
    top = 1 - 0.22 / (height * N)
    fig.subplots_adjust(0.01, 0.01, 0.99, top, hspace=0.14, wspace=0.03)
    vec = make_vec(env, tasks)
    panels = []
    for (i, j), ax in np.ndenumerate(axes):
        title = f"episode {j + 1}: score {scores[i, j]:.2f}"
        panels.append(draw_task(ax, env, states[j, :, i], tasks[i], vec, title))
    frames = frames_of(fig, panels, states.shape[1] - 1, env)
    vec.close()
    return frames


def draw_task(ax, env, states, task, vec, title):
    """Prepares a panel of an episode in one task; returns a function that draws time t."""
    ax.set_title(title, fontsize=8, pad=3)
    if env == "point_robot":
        return draw_point(ax, states, task)
    return draw_robot(ax, states, task, vec)


def times_of(last, env):
    """The times of an episode that are drawn; the last one is drawn for a second."""
    return [*range(0, last, EVERY_NTH[env])] + [last] * FRAMES_PER_SECOND


def frames_of(fig, panels, last, env):
    """The pictures from time 0 to `last`, drawn by the functions `panels`."""
    canvas = FigureCanvasAgg(fig)
    frames = []
    for t in times_of(last, env):
        for draw in panels:
            draw(t)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return frames


# ---- One task, with the routers ------------------------------------------------------------------


class Episodes:
    """What an agent does in one task, episode after episode, and what its routers do with it."""

    def __init__(self, agent, goal, episodes):
        self.agent = agent
        self.env = agent.config.env
        self.goal = np.array(goal, float)
        layer = [block.moe for block in agent.blocks if block.moe is not None][-1]
        routings = []  # of both MoEs in each step; the last token is the query
        hook = layer.register_forward_hook(lambda _, inputs, output: routings.append(output[1]))
        self.states, history = act(agent, self.goal[None], episodes)
        hook.remove()
        self.query_gates = []  # (episodes, T, experts) of each MoE
        for of_moe in zip(*routings):
            gates = torch.stack([gates_of(routing)[0, -1] for routing in of_moe])
            self.query_gates.append(gates.view(episodes, agent.horizon, -1).numpy())
        self.returns = history["rewards"][0].sum(-1).numpy()
        self.gates = gates_of_episodes(agent, history)
        self.vec = make_vec(self.env, self.goal[None])

    def draw(self, axes, episode):
        """Prepares three panels of an episode; returns functions that draw time t."""
        title = f"episode {episode + 1}: return {self.returns[episode]:.1f}"
        states = self.states[episode, :, 0]
        panels = [draw_task(axes[0], self.env, states, self.goal, self.vec, title)]
        steps = np.arange(0, self.agent.horizon, self.agent.config.stride)
        names = ("token-wise router, tokens s a r s a r ...", "task-wise router")
        for ax, gates, name in zip(axes[1:], self.gates, names):
            panels.append(draw_gates(ax, gates[episode], steps, name))
        return panels


def subplots_with_routers(fig, columns):
    """Axes (3, columns): the robot above, and the two routers below."""
    grid = {"height_ratios": (4, 1.4, 1.6)}
    axes = fig.subplots(3, columns, squeeze=False, gridspec_kw=grid)
    fig.subplots_adjust(0.02, 0.02, 0.98, 0.95, hspace=0.14, wspace=0.06)
    return axes


def frames_with_routers(found):
    """The pictures of a GIF of Episodes, with a column for each of them."""
    episodes = len(found.returns)
    fig = Figure(figsize=(2.6 * episodes, 4), dpi=80)
    axes = subplots_with_routers(fig, episodes)
    panels = []
    for episode in range(episodes):
        panels += found.draw(axes[:, episode], episode)
    print(f"return by episode: {' '.join(f'{x:.1f}' for x in found.returns)}")
    return frames_of(fig, panels, found.agent.horizon, found.env)


def picture_of_experts(found):
    """The gates of the last one of Episodes: a row of panels for each MoE, a column by token."""
    fig = Figure(figsize=(11, 3.8), layout="constrained")
    axes = fig.subplots(2, 4, sharex=True, sharey="row")
    both = zip(axes, found.query_gates, found.gates, ("token-wise", "task-wise"))
    for row, of_queries, of_tokens, name in both:
        experts = of_queries.shape[-1]
        extent = (0, found.agent.horizon, experts - 0.5, -0.5)
        style = {"vmin": 0, "vmax": 1, "cmap": "Blues", "aspect": "auto", "extent": extent}
        by_modality = of_tokens[-1].reshape(-1, 3, experts).transpose(1, 0, 2)
        for ax, gates in zip(row, (of_queries[-1], *by_modality)):
            image = ax.imshow(gates.T, interpolation="nearest", **style)
        row[0].set_ylabel(f"{name} expert")
        row[0].set_yticks(range(experts))
    titles = ("queries", "state tokens", "action tokens", "reward tokens")
    for column, title in zip(axes.T, titles):
        column[0].set_title(title)
        column[1].set_xlabel("step of the episode")
    fig.colorbar(image, ax=axes, label="gate")
    return fig


def open_window(agent, goal, episodes):
    """Opens a window in which the agent acts, one episode after the other, until it is closed.

    A click on the map of Point-Robot sets a new goal.
    """
    from matplotlib import pyplot  # here, because it looks for a screen

    fig = pyplot.figure(figsize=(4, 6))
    axes = subplots_with_routers(fig, 1)[:, 0]
    shown = steps_of(axes, Episodes(agent, goal, episodes))

    def click(event):
        nonlocal shown
        if event.inaxes is axes[0] and agent.config.env == "point_robot":
            goal = (event.xdata, event.ydata)
            shown = steps_of(axes, Episodes(agent, goal, episodes))

    fig.canvas.mpl_connect("button_press_event", click)
    interval = 1000 / FRAMES_PER_SECOND
    animation = FuncAnimation(
        fig, lambda _: next(shown, None), interval=interval, cache_frame_data=False
    )
    pyplot.show()
    return animation


def steps_of(axes, found):
    """A generator that draws the next step of the Episodes `found` in each turn."""
    for episode in range(len(found.returns)):
        for ax in axes:
            ax.clear()
        panels = found.draw(axes, episode)
        for t in times_of(found.agent.horizon, found.env):
            for draw in panels:
                draw(t)
            yield


def main(
    run: tyro.conf.Positional[Path],
    tasks: int = 3,
    episodes: int = 3,
    goal: tuple[float, ...] = (),
    play: bool = False,
    out: Path = Path("figures"),
):
    """Writes the GIF, or opens the window.

    Args:
        run: folder of a finished run
        tasks: number of tasks
        episodes: number of episodes
        goal: one task of your own instead, with the routers: x and y, or a velocity
        play: open a window instead of writing a file
        out: folder of the GIF
    """
    agent = t2mir.load_agent(run)
    env = agent.config.env
    drawn = ("point_robot", "cheetah_vel", "walker_param")
    require(env in drawn, f"{run} is of {env}: only {', '.join(drawn)} are drawn")
    require(episodes >= 1, "--episodes must be at least 1")
    if play and not goal:
        goal = {"point_robot": (0.5, -0.7), "cheetah_vel": (1.5,)}.get(env, ())
    if goal or play:
        numbers = {"point_robot": 2, "cheetah_vel": 1}.get(env, 0)
        wanted = "two numbers on Point-Robot and one on HalfCheetah"
        require(len(goal) == numbers > 0, f"--goal and --play: {env}'s goal must be {wanted}")
        both = agent.config.token_moe and agent.config.task_moe
        require(both, f"{run} lacks an MoE: --goal and --play show both routers")
    if play:
        open_window(agent, goal, episodes)
        return
    if goal:
        found = Episodes(agent, goal, episodes)
        frames = frames_with_routers(found)
        save(picture_of_experts(found), out / f"{run.resolve().name}-experts.png")
    else:
        frames = frames_of_tasks(agent, run, tasks, episodes)
    gif = imageio.imwrite(
        "<bytes>", frames, extension=".gif", duration=1000 / FRAMES_PER_SECOND, loop=0
    )
    path = out / f"{run.resolve().name}.gif"
    write_atomically(path, lambda file: file.write(gif))
    print(f"{path}: {len(gif) / 1e6:.1f} MB")


def frames_of_tasks(agent, run, tasks, episodes):
    """The pictures of a GIF with as many of the run's held-out tasks as `tasks` says."""
    path = run / "result.npz"
    require(path.exists(), f"{path} is missing: python experiments/report.py {run}")
    with np.load(path) as arrays:
        result = dict(arrays)
    require("tasks" in result, f"{path} has no tasks: the dataset had no returns")
    pick = pick_tasks(result["tasks"], tasks)
    picked = result["tasks"][pick]
    states, history = act(agent, picked, episodes)
    scores = t2mir.scores(history["rewards"].sum(-1).numpy(), result, pick)
    return make_frames(agent.config.env, states, picked, scores)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

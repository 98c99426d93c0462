"""Shows a trained agent in unseen tasks: a GIF with a row for each task, a column for each episode.

    python experiments/watch.py RUN [--tasks 3] [--episodes 3]

Point-Robot: the path of each episode, and the goal, which the agent is not shown. HalfCheetah and
Walker2d: the robot from the side, drawn from the simulator's own capsules, and below it its speed
and the target (HalfCheetah), or the distance walked (Walker2d). Above each panel stands the score
of the episode: 0 is a random agent, 1 the task's expert. The tasks are evenly spaced among the
held-out tasks of the run, on HalfCheetah by their velocity. The file is FOLDER/NAME.gif.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the one that a notebook sets may not exist here

import imageio.v3 as imageio
import mujoco
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command, write_atomically
from envs import make_vec

FRAMES_PER_SECOND = 10


def act(agent, tasks, episodes):
    """Physical states (episodes, T + 1, N, state_dim) and returns (N, episodes) of an agent."""
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
    return np.array(states), history["rewards"].sum(-1).numpy()


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
    every_nth = 2  # step
    if env == "point_robot":
        width = 1.7
        height = 1.85
        every_nth = 1
    fig = Figure(figsize=(width * episodes, height * N), dpi=80)
    canvas = FigureCanvasAgg(fig)
    axes = fig.subplots(N, episodes, squeeze=False)
    top = 1 - 0.22 / (height * N)
    fig.subplots_adjust(0.01, 0.01, 0.99, top, hspace=0.14, wspace=0.03)
    vec = make_vec(env, tasks)
    panels = []
    for (i, j), ax in np.ndenumerate(axes):
        ax.set_title(f"episode {j + 1}: score {scores[i, j]:.2f}", fontsize=8, pad=3)
        if env == "point_robot":
            panels.append(draw_point(ax, states[j, :, i], tasks[i]))
        else:
            panels.append(draw_robot(ax, states[j, :, i], tasks[i], vec))
    last = states.shape[1] - 1
    times = [*range(0, last, every_nth)]
    times += [last] * FRAMES_PER_SECOND  # the last picture stands for a second
    frames = []
    for t in times:
        for draw in panels:
            draw(t)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    vec.close()
    return frames


def main(
    run: tyro.conf.Positional[Path],
    tasks: int = 3,
    episodes: int = 3,
    out: Path = Path("figures"),
):
    """Writes the GIF.

    Args:
        run: folder of a finished run
        tasks: number of tasks
        episodes: number of episodes
        out: folder of the GIF
    """
    agent = t2mir.load_agent(run)
    env = agent.config.env
    drawn = ("point_robot", "cheetah_vel", "walker_param")
    require(env in drawn, f"{run} is of {env}: only {', '.join(drawn)} are drawn")
    require(episodes >= 1, "--episodes must be at least 1")
    path = run / "result.npz"
    require(path.exists(), f"{path} is missing: python experiments/report.py {run}")
    with np.load(path) as arrays:
        result = dict(arrays)
    require("tasks" in result, f"{path} has no tasks: the dataset had no returns")
    pick = pick_tasks(result["tasks"], tasks)
    picked = result["tasks"][pick]
    states, returns = act(agent, picked, episodes)
    scores = t2mir.scores(returns, result, pick)
    frames = make_frames(env, states, picked, scores)
    gif = imageio.imwrite(
        "<bytes>", frames, extension=".gif", duration=1000 / FRAMES_PER_SECOND, loop=0
    )
    path = out / f"{run.resolve().name}.gif"
    write_atomically(path, lambda file: file.write(gif))
    print(f"{path}: {len(gif) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

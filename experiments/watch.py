"""Shows a trained agent in tasks that it has not been trained on: a GIF with a row per task and a column per episode.

    python experiments/watch.py RUN [--tasks 3] [--episodes 3] [--out FOLDER]

Point-Robot: the path of each episode and the goal, which the agent is not shown. HalfCheetah and Walker2d: the robot
from the side, drawn from the simulator's own capsules, and below it the speed and its target (HalfCheetah) or the
distance walked (Walker2d). Above each panel stands the score of the episode: 0 is a random agent, 1 the task's expert.
The tasks are evenly spaced among the held-out tasks of the run, on HalfCheetah by their target velocity.
"""

import sys
from pathlib import Path

import imageio.v3 as imageio
import mujoco
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir  # noqa: E402
from collect import BadInput, write_atomically  # noqa: E402
from envs import ENVS, make_vec  # noqa: E402

FRAMES_PER_SECOND = 10


def act(agent, tasks, episodes):
    """Physical states (episodes, T + 1, num_tasks, state_dim) and returns (episodes, num_tasks) of an agent."""
    family, states = ENVS[agent.config.env], []

    class Watched(family):
        def reset(self, **given):
            result = super().reset(**given)
            states.append([self.state.copy()])
            return result

        def step(self, actions):
            result = super().step(actions)
            states[-1].append(self.state.copy())
            return result

    ENVS[agent.config.env] = Watched  # what `make_vec` looks up
    try:
        returns = t2mir.evaluate(agent, tasks, episodes, seed=1)
    finally:
        ENVS[agent.config.env] = family
    return np.array(states), returns


def draw_point(ax, states, task):
    """Prepares a panel of Point-Robot; returns a function that draws time t of states (T + 1, 2)."""
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[], aspect="equal")
    ax.plot(*task, "*", color="C3", ms=11, mec="none")
    path, (point,) = ax.plot([], [], "-", color="C0", lw=1.5)[0], ax.plot([], [], "o", color="C0", ms=5)

    def draw(t):
        path.set_data(*states[: t + 1].T)
        point.set_data(*states[t : t + 1].T)

    return draw


def draw_robot(ax, states, task, vec):
    """Prepares a panel of a MuJoCo robot; returns a function that draws time t of states (T + 1, state_dim)."""
    model, data = vec.model, mujoco.MjData(vec.model)
    capsules = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    ax.set(ylim=(-0.75, 2), xticks=[], yticks=[], aspect="equal")
    ax.axhspan(-0.75, 0, color="0.9", lw=0)
    marks = ax.plot([], [], "|", color="0.5", ms=6)[0]  # every metre of the ground, so that speed can be seen
    points_per_metre = 72 * ax.get_position().height * ax.figure.get_figheight() / 2.75
    width = 2 * model.geom_size[capsules, 0] * points_per_metre
    lines = [ax.plot([], [], color="C0", lw=w, solid_capstyle="round")[0] for w in width]
    text = ax.text(0.5, 0.06, "", transform=ax.transAxes, ha="center", fontsize=8)
    x = states[:, 1]

    def draw(t):
        data.qpos, data.qvel = states[t, 1 : 1 + model.nq], 0
        mujoco.mj_forward(model, data)
        ax.set_xlim(x[t] - 2, x[t] + 2)
        metres = np.arange(np.ceil(x[t] - 2), x[t] + 2)
        marks.set_data(metres, np.zeros(len(metres)))
        for line, geom in zip(lines, capsules):
            half = data.geom_xmat[geom].reshape(3, 3)[:, 2] * model.geom_size[geom, 1]
            ends = np.stack([data.geom_xpos[geom] - half, data.geom_xpos[geom] + half])
            line.set_data(ends[:, 0], ends[:, 2])
        since = max(0, t - 20)
        speed = (x[t] - x[since]) / max(1, t - since) / vec.dt  # of the last 20 steps, in m/s
        text.set_text(f"{speed:.1f} m/s, target {task[0]:.1f}" if len(task) == 1 else f"{x[t] - x[0]:.1f} m")

    return draw


def main(run: tyro.conf.Positional[Path], tasks: int = 3, episodes: int = 3, out: Path = Path("figures")):
    agent, path = t2mir.load_agent(run), run / "result.npz"
    env = agent.config.env
    if env not in ("point_robot", "cheetah_vel", "walker_param") or not path.exists():
        raise BadInput(f"{run} is not a finished run of Point-Robot, HalfCheetah or Walker2d, which are drawn here")
    with np.load(path) as result:
        every, low, high = (result[k] for k in ("tasks", "random_return", "expert_return"))
    if not (1 <= tasks <= len(every) and episodes >= 1):
        raise BadInput(f"--tasks must lie between 1 and {len(every)}, --episodes must be at least 1")
    order = np.argsort(every[:, 0], kind="stable") if every.shape[1] == 1 else np.arange(len(every))
    inner = np.linspace(0, len(every) - 1, tasks + 2)[1:-1]  # without the two extremes, if there are enough tasks
    at = inner if tasks + 2 <= len(every) else np.linspace(0, len(every) - 1, tasks)
    pick = order[at.round().astype(int)]
    states, returns = act(agent, every[pick], episodes)
    scores = t2mir.normalised(returns, {"random_return": low, "expert_return": high}, pick)
    size = (1.7, 1.85) if env == "point_robot" else (2.6, 2.1)
    fig = Figure(figsize=(size[0] * episodes, size[1] * tasks), dpi=80)
    canvas, axes = FigureCanvasAgg(fig), fig.subplots(tasks, episodes, squeeze=False)
    fig.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.22 / (size[1] * tasks), hspace=0.14, wspace=0.03)
    vec, draws = make_vec(env, every[pick]), []
    for (i, j), ax in np.ndenumerate(axes):
        ax.set_title(f"episode {j + 1}: score {scores[j, i]:.2f}", fontsize=8, pad=3)
        of_panel = (ax, states[j, :, i], every[pick[i]])
        draws.append(draw_point(*of_panel) if env == "point_robot" else draw_robot(*of_panel, vec))
    every_nth = 1 if env == "point_robot" else 2
    times = [*range(0, states.shape[1], every_nth), *[states.shape[1] - 1] * FRAMES_PER_SECOND]
    frames = []
    for t in times:
        for draw in draws:
            draw(t)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    vec.close()
    path = out / f"{run.resolve().name}.gif"
    options = dict(extension=".gif", duration=1000 / FRAMES_PER_SECOND, loop=0)
    write_atomically(path, lambda file: file.write(imageio.imwrite("<bytes>", frames, **options)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")

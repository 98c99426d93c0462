"""Three families of continuous-control tasks: as one batched vector environment, and as single Gymnasium environments.

A task is a row of a float64 array `tasks` of shape (num_tasks, task_dim); what the row means is said in each class.
`make_vec(name, tasks)` steps all tasks together: one sub-environment a row, all of the same fixed horizon, none
terminating early, so that they start and end together. `gymnasium.make(id, task=row)` is a batch of one of the same.

Actions live in the box [-1, 1] (what lies outside is clipped), observations are float32, the physics is float64.
"""

import copy
import os
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.rollout import Rollout


class TaskVec(VectorEnv):
    """All sub-environments of one family, stepped together; each child says how states start, move and are seen.

    A child sets `id`, `obs_dim`, `act_dim`, `task_dim` and `horizon`, gets a name in ENVS, and defines `initial_state`,
    `observe` -> (num_envs, obs_dim), `advance`, which moves `state` and returns rewards (num_envs,) of about 1 in size,
    `draw_tasks`, a static method that draws row by row, and, for pictures only, `render`. The defaults of collect.py
    suit 20 steps; a longer horizon needs PRESETS there. After changing a child delete data/NAME.npz and data/NAME.part.

    `state` (num_envs, state_dim) float64 is the whole physical state, free to be read and set. There is no automatic
    reset (`AutoresetMode.DISABLED`): after `horizon` steps every sub-environment is truncated, and the caller resets.
    Raises ValueError where `tasks` is not (num_tasks, task_dim), gymnasium's ResetNeeded on a step without a reset.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, tasks, threads=None):
        self.tasks = np.asarray(tasks, dtype=np.float64)
        if self.tasks.ndim != 2 or self.tasks.shape[1] != self.task_dim or not len(self.tasks):
            raise ValueError(f"{self.id}: tasks must have shape (num_tasks, {self.task_dim}), got {self.tasks.shape}")
        self.num_envs = len(self.tasks)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = min(cores if threads is None else threads, cores, self.num_envs)  # no more than may be used
        self.single_observation_space = Box(-np.inf, np.inf, (self.obs_dim,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (self.act_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.t = self.horizon  # nothing may be stepped before the first reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = 0, self.initial_state(self.np_random)
        seen = self.observe().astype(np.float32)
        if seen.shape != self.observation_space.shape:
            raise ValueError(f"{self.id}: observe must return shape {self.observation_space.shape}, got {seen.shape}")
        return seen, {}

    def step(self, actions):
        if self.t >= self.horizon:
            raise gymnasium.error.ResetNeeded(f"{self.id}: the episode of {self.horizon} steps is over, call reset()")
        actions = np.clip(np.asarray(actions, dtype=np.float64).reshape(self.num_envs, self.act_dim), -1, 1)
        reward = self.advance(actions)
        if np.shape(reward) != (self.num_envs,):
            raise ValueError(f"{self.id}: advance must return shape ({self.num_envs},), got {np.shape(reward)}")
        self.t += 1
        truncated = np.full(self.num_envs, self.t == self.horizon)
        return self.observe().astype(np.float32), reward, np.zeros_like(truncated), truncated, {}


class PointRobot(TaskVec):
    """A point walks to a goal that it is not shown; a task is the goal's position (x, y) in [-1, 1]^2."""

    id, horizon = "t2mir/PointRobot-v0", 20
    obs_dim, act_dim, task_dim = 2, 2, 2

    @staticmethod
    def draw_tasks(rng, num_tasks):
        return rng.uniform(-1, 1, (num_tasks, 2))

    def initial_state(self, rng):
        return rng.uniform(-0.1, 0.1, (self.num_envs, 2))

    def observe(self):
        return self.state

    def advance(self, actions):
        self.state = self.state + 0.1 * actions
        return -np.linalg.norm(self.state - self.tasks, axis=1)

    def render(self):
        """Picture of the first sub-environment, (256, 256, 3) uint8: the point in blue, the goal in red."""
        y, x = np.mgrid[1.5:-1.5:256j, -1.5:1.5:256j]
        image = np.full((256, 256, 3), 255, np.uint8)
        for (cx, cy), color in ((self.tasks[0], (214, 39, 40)), (self.state[0], (31, 119, 180))):
            image[(x - cx) ** 2 + (y - cy) ** 2 < 0.05**2] = color
        return image


class MujocoVec(TaskVec):
    """A MuJoCo model (`xml`: a file of gymnasium's or an absolute path; `frame_skip`), stepped by `mujoco.rollout`.

    Each environment step starts the contact solver cold (no warm start is carried over), so that a step depends on
    `state` and the action alone: in a batch, alone, or replayed from stored states, the transition is the same.
    """

    def __init__(self, tasks, threads=None):
        super().__init__(tasks, threads)
        path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / self.xml
        # HalfCheetah's file uses an attribute that MuJoCo calls deprecated; the notice would also leave a log file.
        warn = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)
        try:
            self.model = mujoco.MjModel.from_xml_path(str(path))
        finally:
            mujoco.set_mju_user_warning(warn)
        self.dt = self.frame_skip * self.model.opt.timestep
        self.models = self.task_models()
        self.pool = Rollout(nthread=0 if self.threads <= 1 else self.threads)
        self.datas = [mujoco.MjData(self.model) for _ in range(max(1, self.threads))]
        self.renderer = None

    def task_models(self):
        return [self.model] * self.num_envs

    def pack(self, qpos, qvel):
        """States (time, qpos, qvel), as `Rollout` needs them, at time 0: qpos (num_envs, nq), qvel (num_envs, nv)."""
        return np.concatenate([np.zeros((self.num_envs, 1)), qpos, qvel], axis=1)

    @property
    def qpos(self):
        return self.state[:, 1 : 1 + self.model.nq]

    @property
    def qvel(self):
        return self.state[:, 1 + self.model.nq :]

    def simulate(self, actions):
        """Moves every state `frame_skip` steps on and returns the mean forward velocity, (num_envs,) in m/s."""
        before = self.qpos[:, 0]
        control = np.repeat(actions[:, None], self.frame_skip, axis=1)
        states, _ = self.pool.rollout(self.models, self.datas, self.state, control)
        self.state = states[:, -1]
        return (self.qpos[:, 0] - before) / self.dt

    def render(self):
        """Picture of the first sub-environment from the model's own tracking camera, (256, 256, 3) uint8."""
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.models[0], 256, 256)
        data = mujoco.MjData(self.models[0])
        data.qpos, data.qvel = self.qpos[0], self.qvel[0]
        mujoco.mj_forward(self.models[0], data)
        self.renderer.update_scene(data, camera="track")
        return self.renderer.render()

    def close_extras(self, **kwargs):
        if self.renderer is not None:
            self.renderer.close()
        self.pool.close()


class CheetahVel(MujocoVec):
    """HalfCheetah runs at a velocity that it is not told; a task is that target velocity in [0, 3] m/s."""

    id, horizon = "t2mir/CheetahVel-v0", 200
    obs_dim, act_dim, task_dim = 20, 6, 1
    xml, frame_skip = "half_cheetah.xml", 5

    @staticmethod
    def draw_tasks(rng, num_tasks):
        return rng.uniform(0, 3, (num_tasks, 1))

    def initial_state(self, rng):
        qpos = self.model.qpos0 + rng.uniform(-0.1, 0.1, (self.num_envs, self.model.nq))
        return self.pack(qpos, 0.1 * rng.standard_normal((self.num_envs, self.model.nv)))

    def observe(self):
        x, z = self.qpos[:, 0], self.qpos[:, 1]  # the torso is at (x, 0, 0.7 + z): 0.7 m is its height in the model
        return np.column_stack([self.qpos[:, 1:], self.qvel, x, np.zeros_like(x), 0.7 + z])

    def advance(self, actions):
        velocity = self.simulate(actions)
        return -np.abs(velocity - self.tasks[:, 0]) - 0.05 * (actions**2).sum(1)


class WalkerParam(MujocoVec):
    """Walker2d with other physics in each task; a task is a row of multipliers, one for each model entry.

    In this order: body masses (8), body inertias (8 x 3), geom frictions (8 x 3), each 1.5^U[-3, 3], and joint
    dampings (9), each 1.3^U[-3, 3]. A row of ones is gymnasium's Walker2d-v5 itself.
    """

    id, horizon = "t2mir/WalkerParam-v0", 200
    obs_dim, act_dim, task_dim = 17, 6, 65
    xml, frame_skip = "walker2d_v5.xml", 4
    fields = ("body_mass", "body_inertia", "geom_friction", "dof_damping")

    @staticmethod
    def draw_tasks(rng, num_tasks):
        return np.repeat([1.5, 1.3], [56, 9]) ** rng.uniform(-3, 3, (num_tasks, 65))

    def task_models(self):
        models = [copy.copy(self.model) for _ in self.tasks]
        for model, task in zip(models, self.tasks):
            for field in self.fields:
                entries = getattr(model, field)
                entries *= task[: entries.size].reshape(entries.shape)
                task = task[entries.size :]
            mujoco.mj_setConst(model, mujoco.MjData(model))  # derived constants (inverse weights) follow the new masses
        return models

    def initial_state(self, rng):
        qpos = self.model.qpos0 + rng.uniform(-0.005, 0.005, (self.num_envs, self.model.nq))
        return self.pack(qpos, rng.uniform(-0.005, 0.005, (self.num_envs, self.model.nv)))

    def observe(self):
        return np.concatenate([self.qpos[:, 1:], np.clip(self.qvel, -10, 10)], axis=1)

    def advance(self, actions):
        velocity = self.simulate(actions)
        height, pitch = self.qpos[:, 1], self.qpos[:, 2]
        healthy = (0.8 < height) & (height < 2) & (np.abs(pitch) < 1)
        return velocity + 1 - 0.001 * (actions**2).sum(1) - ~healthy


ENVS = {"point_robot": PointRobot, "cheetah_vel": CheetahVel, "walker_param": WalkerParam}


def sample_tasks(name, num_tasks, seed):
    """Draws tasks, (num_tasks, task_dim) float64: the same seed gives the same rows.

    Do not reset with this seed too: it is the same stream, and PointRobot would start at a tenth of its goal.
    """
    return ENVS[name].draw_tasks(np.random.default_rng(seed), num_tasks)


def make_vec(name, tasks, threads=None):
    """The batched environment of family `name`: one sub-environment for each row of `tasks` (repeat rows for copies).

    `threads` is the size of MuJoCo's thread pool, by default and at most one per usable core; PointRobot needs none.
    """
    return ENVS[name](tasks, threads)


class TaskEnv(gymnasium.Env):
    """One task as an ordinary Gymnasium environment: a batch of one, without the batch dimension.

    `task` is a row of `sample_tasks`; by default the first one of seed [0, 2].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, name, task=None, render_mode=None):
        task = sample_tasks(name, 1, seed=[0, 2])[0] if task is None else task
        self.vec = make_vec(name, [task], threads=1)
        self.observation_space, self.action_space = self.vec.single_observation_space, self.vec.single_action_space
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        observation, info = self.vec.reset(seed=seed)
        return observation[0], info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.vec.step(action)
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self):
        return self.vec.render()

    def close(self):
        self.vec.close()


for _name, _family in ENVS.items():
    gymnasium.register(id=_family.id, entry_point=TaskEnv, kwargs={"name": _name})

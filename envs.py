"""Three families of continuous-control tasks, as batched vector environments and in Gymnasium.

A task is a row of a float64 array `tasks` of shape (num_tasks, task_dim). Each class says what its
row means. `make_vec(name, tasks)` steps all tasks together, one sub-environment per row. They have
the same fixed horizon and never terminate early, so they all start and end together.
`gymnasium.make(id, task=row)` is a single environment: a batch of one.

Actions lie in the box [-1, 1] and are clipped to it. Observations are float32, and the physics is
computed in float64.
"""

import copy
import os
from pathlib import Path
from typing import ClassVar

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.rollout import Rollout


class TaskVec(VectorEnv):
    """The sub-environments of one family, stepped together. A family is one child of this class.

    A child gets a name in ENVS and sets the attributes `id`, `obs_dim`, `act_dim`, `task_dim` and
    `horizon`. It defines these methods:

        draw_tasks(rng, num_tasks)   static; draws tasks row by row, (num_tasks, task_dim)
        initial_state(rng)           start states, (num_envs, state_dim) float64
        observe()                    what the agent sees of `state`, (num_envs, obs_dim)
        advance(actions)             moves `state` one step and returns rewards, (num_envs,), of
                                     about 1 in size
        render()                     a picture of the first sub-environment; only for pictures

    A child may also set two dictionaries, which say where its defaults differ from the general
    ones. The general defaults of `collecting` suit episodes of 20 steps.

        collecting   fields of collect.Settings: {"steps": 4_800}
        training     fields of t2mir.Config for both modes: {"ad": {"stride": 8}, "dpt": {}}

    After a change of a child, delete data/NAME.npz and data/NAME.part.

    `state` is the whole physical state and may be read and set. There is no automatic reset
    (`AutoresetMode.DISABLED`): after `horizon` steps every sub-environment is truncated, and the
    caller resets. Raises ValueError if `tasks` does not have shape (num_tasks, task_dim), and
    Gymnasium's ResetNeeded if a step is taken without a reset.
    """

    metadata: ClassVar = {
        "render_modes": ["rgb_array"],
        "render_fps": 20,
        "autoreset_mode": AutoresetMode.DISABLED,
    }
    collecting: ClassVar = {}
    training: ClassVar = {"ad": {}, "dpt": {}}

    def __init__(self, tasks, threads=None):
        self.tasks = np.asarray(tasks, dtype=np.float64)
        shape = self.tasks.shape
        if self.tasks.ndim != 2 or shape[0] == 0 or shape[1] != self.task_dim:
            wanted = f"(num_tasks, {self.task_dim})"
            raise ValueError(f"{self.id}: tasks must have shape {wanted}, got {shape}")
        self.num_envs = len(self.tasks)

        self.threads = min(usable_cores(), self.num_envs)
        if threads is not None:
            self.threads = min(self.threads, threads)

        self.single_observation_space = Box(-np.inf, np.inf, (self.obs_dim,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (self.act_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.t = self.horizon  # a step before the first reset is refused

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.state = self.initial_state(self.np_random)
        seen = self.observe().astype(np.float32)
        shape = self.observation_space.shape
        if seen.shape != shape:
            raise ValueError(f"{self.id}: observe must return shape {shape}, got {seen.shape}")
        return seen, {}

    def step(self, actions):
        if self.t >= self.horizon:
            over = f"the episode of {self.horizon} steps is over"
            raise gymnasium.error.ResetNeeded(f"{self.id}: {over}, call reset()")
        actions = np.asarray(actions, dtype=np.float64)
        actions = actions.reshape(self.num_envs, self.act_dim)

        reward = self.advance(np.clip(actions, -1, 1))
        shape = np.shape(reward)
        if shape != (self.num_envs,):
            wanted = (self.num_envs,)
            raise ValueError(f"{self.id}: advance must return shape {wanted}, got {shape}")

        self.t += 1
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.full(self.num_envs, self.t == self.horizon)
        return self.observe().astype(np.float32), reward, terminated, truncated, {}


def usable_cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class PointRobot(TaskVec):
    """A point walks to a goal that the observation does not contain.

    A task is the goal's position (x, y) in [-1, 1]^2. In `collecting`, the defaults let the agent
    act randomly in the first quarter of the run, because an in-context agent also moves randomly
    when it meets a new task.
    """

    id = "t2mir/PointRobot-v0"
    obs_dim = 2
    act_dim = 2
    task_dim = 2
    horizon = 20
    training = TaskVec.training | {"ad": {"steps": 12_000, "eval_every": 4_000}}

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
        """A picture, (256, 256, 3) uint8, with the goal in red and the point in blue."""
        y, x = np.mgrid[1.5:-1.5:256j, -1.5:1.5:256j]
        image = np.full((256, 256, 3), 255, np.uint8)
        red = (214, 39, 40)
        blue = (31, 119, 180)
        for center, color in ((self.tasks[0], red), (self.state[0], blue)):
            inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < 0.05**2
            image[inside] = color
        return image


class MujocoVec(TaskVec):
    """A MuJoCo model, stepped by `mujoco.rollout`.

    A child sets `xml`, a model file of Gymnasium's or an absolute path, and `frame_skip`.

    The contact solver starts cold in each environment step: no warm start is carried over. So a
    step depends on `state` and the action alone, and the transition is the same in a batch, alone,
    or replayed from stored states.
    """

    # How most of these settings were found is told in experiments/RESULTS.md.
    collecting: ClassVar = {
        "steps": 4_800,
        "hidden": 256,
        "updates": 4,
        "lr": 1e-3,
        "gamma": 0.98,
        "random_steps": 400,
        "train_tasks": 105,  # many tasks and few copies: in-context agents overfit few tasks
        "copies": 2,
        "test_tasks": 15,
        "episodes": 80,
        "history": 1.0,
    }
    both_modes: ClassVar = {"d_model": 128, "lr": 4e-3, "stride": 8, "sample": False}
    training: ClassVar = {
        "ad": {**both_modes, "steps": 1_500, "eval_every": 500},
        "dpt": {**both_modes, "steps": 800, "eval_every": 400, "n_layers": 4},
    }

    def __init__(self, tasks, threads=None):
        super().__init__(tasks, threads)
        assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
        # HalfCheetah's file has an attribute that MuJoCo calls deprecated. The warning is silenced,
        # because it would also leave a log file.
        warn = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)
        try:
            self.model = mujoco.MjModel.from_xml_path(str(assets / self.xml))
        finally:
            mujoco.set_mju_user_warning(warn)
        self.dt = self.frame_skip * self.model.opt.timestep
        self.models = self.task_models()

        workers = self.threads
        if workers <= 1:
            workers = 0  # the calling thread does the work
        self.pool = Rollout(nthread=workers)
        self.datas = [mujoco.MjData(self.model) for _ in range(max(1, self.threads))]
        self.renderer = None

    def task_models(self):
        return [self.model] * self.num_envs

    def pack(self, qpos, qvel):
        """The states (time, qpos, qvel) that `Rollout` needs, at time 0.

        qpos (num_envs, nq) and qvel (num_envs, nv) -> (num_envs, 1 + nq + nv)
        """
        time = np.zeros((self.num_envs, 1))
        return np.concatenate([time, qpos, qvel], axis=1)

    @property
    def qpos(self):
        return self.state[:, 1 : 1 + self.model.nq]

    @property
    def qvel(self):
        return self.state[:, 1 + self.model.nq :]

    def simulate(self, actions):
        """Moves every state by `frame_skip` simulator steps.

        Returns the mean forward velocity, (num_envs,) in m/s.
        """
        before = self.qpos[:, 0]
        control = np.repeat(actions[:, None], self.frame_skip, axis=1)
        states, _ = self.pool.rollout(self.models, self.datas, self.state, control)
        self.state = states[:, -1]
        return (self.qpos[:, 0] - before) / self.dt

    def render(self):
        """A picture from the model's own tracking camera, (256, 256, 3) uint8."""
        model = self.models[0]
        if self.renderer is None:
            self.renderer = mujoco.Renderer(model, 256, 256)
        data = mujoco.MjData(model)
        data.qpos = self.qpos[0]
        data.qvel = self.qvel[0]
        mujoco.mj_forward(model, data)
        self.renderer.update_scene(data, camera="track")
        return self.renderer.render()

    def close_extras(self, **kwargs):
        if self.renderer is not None:
            self.renderer.close()
        self.pool.close()


class CheetahVel(MujocoVec):
    """HalfCheetah runs at a velocity that the observation does not contain.

    A task is this target velocity, in [0, 3] m/s.
    """

    id = "t2mir/CheetahVel-v0"
    obs_dim = 20
    act_dim = 6
    task_dim = 1
    horizon = 200
    xml = "half_cheetah.xml"
    frame_skip = 5
    collecting = MujocoVec.collecting | {"tau": 0.05, "temperature": 0.05}

    @staticmethod
    def draw_tasks(rng, num_tasks):
        return rng.uniform(0, 3, (num_tasks, 1))

    def initial_state(self, rng):
        noise = rng.uniform(-0.1, 0.1, (self.num_envs, self.model.nq))
        qvel = 0.1 * rng.standard_normal((self.num_envs, self.model.nv))
        return self.pack(self.model.qpos0 + noise, qvel)

    def observe(self):
        # The torso is at (x, 0, 0.7 + z), where 0.7 m is its height in the model.
        x = self.qpos[:, 0]
        z = self.qpos[:, 1]
        return np.column_stack([self.qpos[:, 1:], self.qvel, x, np.zeros_like(x), 0.7 + z])

    def advance(self, actions):
        velocity = self.simulate(actions)
        return -np.abs(velocity - self.tasks[:, 0]) - 0.05 * (actions**2).sum(1)


class WalkerParam(MujocoVec):
    """Walker2d with other physics in each task.

    A task is a row of multipliers, one for each of these entries of the model, in this order: body
    masses (8), body inertias (8 x 3) and geom frictions (8 x 3), each 1.5^U[-3, 3], and joint
    dampings (9), each 1.3^U[-3, 3]. A row of ones is Gymnasium's Walker2d-v5 itself.
    """

    id = "t2mir/WalkerParam-v0"
    obs_dim = 17
    act_dim = 6
    task_dim = 65
    horizon = 200
    xml = "walker2d_v5.xml"
    frame_skip = 4
    fields = ("body_mass", "body_inertia", "geom_friction", "dof_damping")
    collecting = MujocoVec.collecting | {
        "steps": 12_000,
        "temperature": 0.2,
        "n_step": 3,
        "recency": 4.0,
        "critic_norm": True,
    }

    @staticmethod
    def draw_tasks(rng, num_tasks):
        base = np.repeat([1.5, 1.3], [56, 9])
        return base ** rng.uniform(-3, 3, (num_tasks, 65))

    def task_models(self):
        models = [copy.copy(self.model) for _ in self.tasks]
        for model, multipliers in zip(models, self.tasks):
            for field in self.fields:
                entries = getattr(model, field)  # a view into the model
                entries *= multipliers[: entries.size].reshape(entries.shape)
                multipliers = multipliers[entries.size :]
            # The inverse weights and other derived constants follow the new masses.
            mujoco.mj_setConst(model, mujoco.MjData(model))
        return models

    def initial_state(self, rng):
        noise = rng.uniform(-0.005, 0.005, (self.num_envs, self.model.nq))
        qvel = rng.uniform(-0.005, 0.005, (self.num_envs, self.model.nv))
        return self.pack(self.model.qpos0 + noise, qvel)

    def observe(self):
        return np.concatenate([self.qpos[:, 1:], np.clip(self.qvel, -10, 10)], axis=1)

    def advance(self, actions):
        velocity = self.simulate(actions)
        height = self.qpos[:, 1]
        pitch = self.qpos[:, 2]
        healthy = (0.8 < height) & (height < 2) & (np.abs(pitch) < 1)
        return velocity + 1 - 0.001 * (actions**2).sum(1) - ~healthy


ENVS = {
    "point_robot": PointRobot,
    "cheetah_vel": CheetahVel,
    "walker_param": WalkerParam,
}


def sample_tasks(name, num_tasks, seed):
    """Draws tasks, (num_tasks, task_dim) float64. The same seed gives the same rows.

    Reset the environments with another seed. The same seed is the same stream of random numbers,
    so PointRobot would start at a tenth of its goal.
    """
    rng = np.random.default_rng(seed)
    return ENVS[name].draw_tasks(rng, num_tasks)


def make_vec(name, tasks, threads=None):
    """The batched environment of family `name`, with one sub-environment per row of `tasks`.

    Repeat rows for several copies of a task. `threads` is the size of MuJoCo's thread pool, which
    is by default and at most the number of usable cores. PointRobot needs none.
    """
    return ENVS[name](tasks, threads)


class TaskEnv(gymnasium.Env):
    """One task as an ordinary Gymnasium environment: a batch of one, without the batch dimension.

    `task` is a row of `sample_tasks`. By default it is the first row of seed [0, 2].
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, name, task=None, render_mode=None):
        if task is None:
            task = sample_tasks(name, 1, seed=[0, 2])[0]
        self.vec = make_vec(name, [task], threads=1)
        self.observation_space = self.vec.single_observation_space
        self.action_space = self.vec.single_action_space
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

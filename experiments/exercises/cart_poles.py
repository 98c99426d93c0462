"""Cart-poles for exercise 6: a dataset whose episodes end early, and environments to act in.

    python experiments/exercises/cart_poles.py                                # writes the data
    python experiments/exercises/cart_poles.py --run runs/cart_poles-dpt-seed0  # acts

A cart balances a pole. A task is the length of the pole and the sign of the motor, and the agent is
told neither. The reward is 1 in each step until the pole falls or 50 steps are over.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

T = 50


class CartPoles(VectorEnv):
    """One cart-pole for each row (pole length in m, sign of the motor) of `tasks`.

    A pole that has fallen stays `terminated`, and its reward is 0.
    """

    def __init__(self, tasks):
        self.length, self.sign = np.asarray(tasks, float).T
        self.num_envs = len(tasks)
        self.single_observation_space = Box(-np.inf, np.inf, (4,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.fallen = np.zeros(self.num_envs, bool)
        self.state = self.np_random.uniform(-0.05, 0.05, (self.num_envs, 4))
        return self.state.astype(np.float32), {}

    def step(self, actions):
        """Cart of 1 kg, pole of 0.1 kg, force up to 10 N, 0.04 s (Barto, Sutton, Anderson 1983)."""
        reward = 1.0 - self.fallen
        _, v, angle, turn = self.state.T
        force = 10 * self.sign * np.clip(actions[:, 0], -1, 1)
        half = self.length / 2
        push = (force + 0.1 * half * turn**2 * np.sin(angle)) / 1.1
        gravity = 9.8 * np.sin(angle) - np.cos(angle) * push
        spin = gravity / (half * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1))
        speed_up = push - 0.1 * half * spin * np.cos(angle) / 1.1
        change = np.stack([v, speed_up, turn, spin], axis=1)
        change[self.fallen] = 0
        self.state = self.state + 0.04 * change
        self.t += 1
        self.fallen |= (abs(self.state[:, 2]) > 0.2) | (abs(self.state[:, 0]) > 2.4)
        truncated = np.full(self.num_envs, self.t == T)
        return self.state.astype(np.float32), reward, self.fallen.copy(), truncated, {}


def draw_tasks(num_tasks, seed):
    rng = np.random.default_rng([seed, 1])
    return np.stack([rng.uniform(0.5, 2, num_tasks), rng.choice([-1, 1], num_tasks)], axis=1)


def expert(states, sign):
    """A controller that knows the sign of the motor: states (N, 4) -> actions (N, 1)."""
    return np.clip(sign[:, None] * states @ [[0.1], [0.3], [4.0], [1.0]], -1, 1)


def make_data(num_tasks=120, num_test=20, episodes=60, seed=0):
    """The arrays of a dataset: a learner that becomes better goes from random actions to the expert's."""
    tasks = draw_tasks(num_tasks, seed)
    rng = np.random.default_rng(seed)
    env = CartPoles(tasks)
    states = np.zeros((num_tasks, episodes, T, 4), np.float32)
    actions = np.zeros((num_tasks, episodes, T, 1), np.float32)
    experts = np.zeros_like(actions)
    rewards = np.zeros((num_tasks, episodes, T), np.float32)
    for episode in range(episodes):
        skill = episode / (episodes - 1)
        seen, _ = env.reset(seed=seed + 1 if episode == 0 else None)
        for t in range(T):
            states[:, episode, t] = seen
            experts[:, episode, t] = expert(seen, env.sign)
            random = rng.uniform(-1, 1, (num_tasks, 1))
            actions[:, episode, t] = skill * experts[:, episode, t] + (1 - skill) * random
            seen, rewards[:, episode, t], *_ = env.step(actions[:, episode, t])
    return {
        "states": states,
        "actions": actions,
        "rewards": rewards,
        "expert_actions": experts,
        "lengths": rewards.sum(-1).astype(int),
        "test": np.arange(num_tasks) >= num_tasks - num_test,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="", help="the folder of a run whose agent acts")
    run = parser.parse_args().run
    if run:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        import t2mir

        history = t2mir.evaluate(t2mir.load_agent(run), CartPoles(draw_tasks(50, seed=1)), 10)
        print("mean return by episode:", history["rewards"].sum(-1).mean(0).numpy().round(1))
    else:
        Path("data").mkdir(exist_ok=True)
        data = make_data()
        np.savez("data/cart_poles.npz", **data)
        by_episode = data["lengths"].mean(0)
        print("mean steps of the learners, every tenth episode:", by_episode[::10].round(1))

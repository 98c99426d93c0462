"""Each exercise still applies to the code and trains. It stands apart from test_t2mir.py, so that a fork may drop it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXERCISE = """
import torch
torch.set_num_threads(1)
import collect, envs, t2mir
env = "spring" if "spring" in envs.ENVS else "point_robot"
tiny = dict(steps=200, random_steps=130, episodes=8, train_tasks=4, test_tasks=2, hidden=16, batch=16, copies=2)
collect.collect(env, **tiny)
sizes = dict(d_model=16, n_heads=2, n_layers=2, batch=4, queries=6, steps=5, eval_every=5, eval_episodes=2)
for mode in ("ad", "dpt"):
    run = t2mir.train(t2mir.preset(env, mode, **sizes, name=mode, device="cpu"))
    t2mir.load_agent(run)
"""


@pytest.mark.parametrize("patch", sorted(HERE.glob("*.patch")), ids=lambda path: path.stem)
def test_exercises_apply_and_train(patch, tmp_path):
    """Each exercise is a patch of at most 40 lines, with which both backbones train for five steps and act."""
    lines = [line for line in patch.read_text().splitlines() if re.match(r"[-+](?![-+])", line)]
    assert 1 <= len(lines) <= 40
    for name in ("envs.py", "collect.py", "t2mir.py"):
        (tmp_path / name).write_text((HERE.parents[1] / name).read_text())
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, "-c", EXERCISE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/ad/result.npz").exists() and (tmp_path / "runs/dpt/result.npz").exists()

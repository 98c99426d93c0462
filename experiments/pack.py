"""Makes a small folder of a run that can be shared: the weights in 16 bits, and what it scores.

    python experiments/pack.py runs/point_robot-dpt-seed0 --out experiments/agents/point_robot-dpt

The new folder has ckpt.pt without the optimizers, so the agent can act but not be trained further;
result.npz of the run, with its held-out tasks; and agent.json: the command that trained it, the
commit of this code, and the mean score by episode of the agent in 16 bits in these tasks.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2mir
from collect import require, run_command, write_atomically
from experiments.compare import commit


def command_of(config):
    """The command of a run with the fields `config`: those that differ from the preset's."""
    default = dataclasses.asdict(t2mir.preset(config["env"], config["mode"]))
    words = ["python", "t2mir.py", "--env", config["env"], "--mode", config["mode"]]
    for name, value in config.items():
        if name in ("data", "runs", "name", "device", "env", "mode") or value == default[name]:
            continue
        flag = name.replace("_", "-")
        if value is False:
            words.append(f"--no-{flag}")
        elif value is True:
            words.append(f"--{flag}")
        else:
            words += [f"--{flag}", *map(str, np.atleast_1d(value))]
    return shlex.join(words)


def mean_scores(folder):
    """The mean score by episode of the agent of a folder in the tasks of its result.npz."""
    agent = t2mir.load_agent(folder)
    with np.load(folder / "result.npz") as arrays:
        result = dict(arrays)
    history = t2mir.evaluate(agent, result["tasks"], agent.config.eval_episodes, 1)
    returns = history["rewards"].sum(-1).numpy()
    return np.nanmean(t2mir.scores(returns, result, slice(None)), axis=0)


def main(run: tyro.conf.Positional[Path], out: Path):
    """Writes the folder.

    Args:
        run: folder of a finished run with a simulator
        out: the new folder
    """
    saved = t2mir.read_checkpoint(run)
    require(saved["step"] == saved["config"]["steps"], f"{run} is not finished")
    require((run / "result.npz").exists(), f"{run} has no result.npz: run experiments/report.py")
    about = {"command": command_of(saved["config"]), "commit": commit()}
    del saved["optimizers"]
    saved["config"] |= {"data": "data", "runs": "runs"}  # not the folders of this computer
    for name, x in saved["model"].items():
        if x.dtype == torch.float32:
            saved["model"][name] = x.half()
    write_atomically(out / "ckpt.pt", lambda file: torch.save(saved, file))
    shutil.copy(run / "result.npz", out)
    scores = [round(float(score), 3) for score in mean_scores(out)]
    text = json.dumps(about | {"score": scores}) + "\n"
    write_atomically(out / "agent.json", lambda file: file.write(text.encode()))
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, mean score by episode {scores}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

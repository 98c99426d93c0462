"""Kills training and collection with SIGKILL, again and again, and checks what is left.

    python experiments/kill.py [--kills 20] [--seed 0]

Training is killed at random and while a checkpoint is written, collection at random. After each
kill every file can be read, and the log is at most one interval behind the checkpoint. In the end,
after all kills and continuations, weights and log (or the dataset) are those of a run that was left
alone. Takes about ten minutes, and needs a system that can fork.
"""

import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import collect
import t2mir

EVERY = 20  # training steps between checkpoints
TRAINING = {"steps": 120, "eval_every": EVERY, "eval_episodes": 2, "batch": 8, "queries": 5}
TRAINING |= {"dropout": 0.1, "device": "cpu"}
COLLECTION = {"steps": 600, "random_steps": 200, "episodes": 20, "train_tasks": 6, "test_tasks": 2}
COLLECTION |= {"device": "cpu"}
DATASET = "point_robot.npz"


def train(folder):
    """Trains a tiny agent in `folder`, or goes on with the run that is there."""
    if (folder / "ckpt.pt").exists():
        config = t2mir.read_checkpoint(folder)["config"]
        t2mir.train(t2mir.Config(**config), resume=str(folder))
    else:
        t2mir.train(t2mir.preset(**TRAINING, runs=str(folder.parent), name=folder.name))


def gather(folder):
    """Collects a small dataset in `folder`, or goes on with the collection that is there."""
    collect.SAVE_EVERY = 0.1
    collect.collect("point_robot", out=str(folder), **COLLECTION)


def start(job, folder):
    """Runs job(folder) in a forked child, which needs no new imports; returns its process id."""
    pid = os.fork()
    if pid > 0:
        return pid
    code = 1
    try:
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        job(folder)
        code = 0
    except BaseException as error:  # noqa: BLE001 - the child must not go on as its parent
        print(repr(error))
    sys.stdout.flush()
    os._exit(code)


def ended(pid, options=os.WNOHANG):
    """Whether the child has ended; an error of its own ends this program."""
    found, status = os.waitpid(pid, options)
    if status != 0:
        sys.exit(f"a run failed: {Path('output.txt').read_text()[-500:]}")
    return found != 0


def log(folder):
    """The rows of a run's log, without the column that depends on the clock."""
    path = folder / "log.csv"
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for row in rows:
        del row["seconds"]
    return rows


def check_run(folder):
    """The checkpoint can be read, and the log is at most one interval behind it."""
    saved = 0
    if (folder / "ckpt.pt").exists():
        t2mir.load_agent(folder)
        saved = t2mir.read_checkpoint(folder)["step"]
    logged = 0
    if log(folder):
        logged = int(log(folder)[-1]["step"])
    assert logged <= saved <= logged + EVERY, (saved, logged)


def check_collection(folder):
    """What is there of the dataset, or of its beginning, can be read."""
    if (folder / DATASET).exists():
        collect.load(folder / DATASET)
    part = folder / "point_robot.part"
    if part.exists():
        torch.load(part)


def kill_again_and_again(job, folder, check, kills, moment):
    """Starts job(folder), kills it when moment(seconds) holds, checks, and so on; then it may end.

    A job that ends before its last kill is started from the beginning.
    """
    killed = 0
    while True:
        pid = start(job, folder)
        begun = time.time()
        over = False
        while not over:
            time.sleep(0.0005)
            over = ended(pid)
            if not over and killed < kills and moment(time.time() - begun):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed += 1
                check(folder)
                over = (folder / DATASET).exists()  # when only the tidying up was left
                break
        if over and killed == kills:
            return
        if over:
            shutil.rmtree(folder)


def at_random(seconds):
    """A moment: on average halfway through a job that takes so many seconds."""
    return lambda passed: random.random() < 0.001 / seconds and passed > 0.05


def in_writes(path):
    """A moment: while the file `path` is being written."""
    temporary = path.with_name(f".{path.name}.tmp")
    return lambda passed: temporary.exists() and random.random() < 0.3


def seconds_alone(job, folder):
    """Seconds of a job that is left alone."""
    begun = time.time()
    ended(start(job, folder), options=0)  # waits
    return time.time() - begun


def main(kills: int = 20, seed: int = 0):
    """Kills, checks and prints.

    Args:
        kills: how often training, checkpoint writes and collection are killed
        seed: random seed of the moments
    """
    random.seed(seed)
    torch.set_num_threads(1)
    data = Path("data")
    whole = Path("runs/whole")
    seconds = seconds_alone(gather, data)
    other = Path("other")
    kill_again_and_again(gather, other, check_collection, kills, at_random(seconds))
    one = collect.load(data / DATASET)
    two = collect.load(other / DATASET)
    assert one["fingerprint"] == two["fingerprint"]
    print(f"collection, {kills} kills at random: the same dataset")

    seconds = seconds_alone(train, whole)
    weights = t2mir.load_agent(whole).state_dict()
    written = Path("runs/written")
    for folder, moment, text in (
        (Path("runs/killed"), at_random(seconds), "at random"),
        (written, in_writes(written / "ckpt.pt"), "in checkpoint writes"),
    ):
        kill_again_and_again(train, folder, check_run, kills, moment)
        assert log(folder) == log(whole) != [], folder
        for name, value in t2mir.load_agent(folder).state_dict().items():
            assert torch.equal(value, weights[name]), (folder, name)
        print(f"training, {kills} kills {text}: the same weights and log")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        tyro.cli(main, description=__doc__)

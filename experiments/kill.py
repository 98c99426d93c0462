"""Kills training, checkpoint writes and collection with SIGKILL, again and again, and checks what is left.

    python experiments/kill.py [--kills 20] [--seed 0]

After each kill every file can be read, and a checkpoint is at most one interval behind the log; in the end, after all
kills and continuations, the log and the returns (or the dataset) are those of a run left alone. Last, both meet a limit
on the size of files, which a program sees like a full disk. Takes about ten minutes, and needs a system that can fork.
"""

import csv
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import collect  # noqa: E402
import t2mir  # noqa: E402

EVERY = 20  # training steps between checkpoints
TINY = dict(steps=120, eval_every=EVERY, eval_episodes=2, batch=8, queries=5, dropout=0.1, device="cpu")
SMALL = dict(steps=600, random_steps=200, episodes=20, train_tasks=6, test_tasks=2, device="cpu")
DATASET = "point_robot.npz"


def train(folder):
    """Trains a tiny agent in `folder`, or continues the run that is there."""
    if (folder / "ckpt.pt").exists():
        config = json.loads((folder / "config.json").read_text())
        t2mir.train(t2mir.Config(**config | {"resume": str(folder)}))
    else:
        t2mir.train(t2mir.preset(**TINY, runs=str(folder.parent), name=folder.name))


def gather(folder):
    """Collects a small dataset in `folder`, or continues the collection that is there."""
    collect.SAVE_EVERY = 0.1
    collect.collect("point_robot", out=str(folder), **SMALL)


def start(job, folder, file_size=resource.RLIM_INFINITY):
    """Runs job(folder) in a forked child, which needs no new imports; returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        job(folder)
        code = 0
    except BaseException as error:
        print(repr(error))
    sys.stdout.flush()
    os._exit(code)


def ended(pid, options=os.WNOHANG):
    """True once the child has ended well; an error of its own ends this program."""
    found, status = os.waitpid(pid, options)
    if found and status:
        sys.exit(f"a run failed: {Path('output.txt').read_text()[-500:]}")
    return bool(found)


def log(folder):
    """Rows of the run's log, without what depends on the clock."""
    path = folder / "log.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def check_run(folder):
    """The checkpoint can be read, and is at most one interval behind the log."""
    logged, saved = int((log(folder) or [{"step": 0}])[-1]["step"]), 0
    if (folder / "ckpt.pt").exists():
        t2mir.load_agent(folder)
        saved = torch.load(folder / "ckpt.pt")["step"]
    assert logged - EVERY <= saved <= logged, (saved, logged)


def check_collection(folder):
    """What is there of the dataset or of its beginning can be read."""
    for path, read in ((folder / DATASET, collect.load), (folder / "point_robot.part", torch.load)):
        if path.exists():
            read(path)


def kill_again_and_again(job, folder, check, kills, seconds, write=None):
    """Starts job(folder), kills it within `seconds` or while `write` exists, and so on; at last lets it end."""
    done = 0
    while True:
        pid, begun, patience = start(job, folder), time.time(), random.uniform(0.05, seconds)
        while not (over := ended(pid)):
            now = time.time() - begun > patience if write is None else write.exists() and random.random() < 0.3
            if done < kills and now:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                done += 1
                check(folder)
                break
            time.sleep(0.0005)
        over = over or (folder / DATASET).exists()  # killed when only the tidying up was left
        if over and done == kills:
            return
        if over:  # it ended before the last kill: once more from the beginning
            shutil.rmtree(folder)


def main(kills: int = 20, seed: int = 0):
    random.seed(seed)
    torch.set_num_threads(1)
    times, whole, data = {}, Path("runs/whole"), Path("data")
    for job, folder in ((gather, data), (train, whole)):
        begun = time.time()
        ended(start(job, folder), options=0)  # waits
        times[job] = time.time() - begun
    for folder, write in ((Path("runs/killed"), None), (Path("runs/written"), Path("runs/written/.ckpt.pt.tmp"))):
        kill_again_and_again(train, folder, check_run, kills, times[train], write)
        assert log(folder) == log(whole) != [], folder
        with np.load(folder / "result.npz") as one, np.load(whole / "result.npz") as two:
            assert all(np.array_equal(one[key], two[key]) for key in two), folder
        print(f"training, {kills} kills {'in checkpoint writes' if write else 'at random'}: the same log and returns")
    kill_again_and_again(gather, Path("other"), check_collection, kills, times[gather])
    one, two = (collect.load(folder / DATASET) for folder in (data, Path("other")))
    assert all(np.array_equal(one[key], two[key]) for key in one if key not in ("info", "fingerprint"))
    print(f"collection, {kills} kills at random: the same dataset")
    for job, folder in ((train, Path("runs/full")), (gather, Path("full"))):
        _, status = os.waitpid(start(job, folder, file_size=50_000), 0)
        message = Path("output.txt").read_text().splitlines()[-1]
        left = [path.name for path in folder.iterdir() if path.suffix in (".pt", ".part", ".npz", ".tmp")]
        assert status and message.startswith("BadInput") and not left, (message, left)
        print(f"{job.__name__} on a full disk: {message}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        tyro.cli(main, description=__doc__)

"""Kills training, checkpoint writes and collection with SIGKILL, 20 times each, and checks what is left.

    python experiments/kill.py

After each kill every file must be readable and at most one interval lost; in the end, after all the kills and resumes,
the log (or the dataset) must be that of a run left alone. Last, both meet a full disk (a small tmpfs, so as root).
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import collect  # noqa: E402
import t2mir  # noqa: E402

KILLS, EVERY = 20, 20
TINY = f"--steps 120 --eval_every {EVERY} --eval_episodes 2 --batch 8 --queries 5 --dropout 0.1 --data data"
SMALL = dict(steps=600, random_steps=200, episodes=20, train_tasks=6, test_tasks=2)


def train(name):
    resume = Path(f"runs/{name}/ckpt.pt").exists()
    t2mir.main(["--resume", f"runs/{name}"] if resume else [*TINY.split(), "--name", name])


def gather(folder):
    collect.SAVE_EVERY = 0.1
    collect.collect("point_robot", out=folder, **SMALL)


def start(job, name):
    """Runs job(name) in a forked child that needs no new imports; returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        quiet = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        job(name)
        code = 0
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(code)


def ended(pid):
    """True once the child has ended well; an error of its own ends this program."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found and status:
        sys.exit(f"a run failed: {Path('output.txt').read_text()[-500:]}")
    return bool(found)


def log(name, file="log.csv"):
    """Rows of a CSV file without what depends on the clock or on a commit made meanwhile."""
    path, rows = Path(f"runs/{name}/{file}"), []
    if path.exists():
        rows = list(csv.DictReader(open(path)))
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds", "commit")} for row in rows]


def check_run(name):
    """The checkpoint can be read and is at most one interval behind the log."""
    done = int((log(name) or [{"step": 0}])[-1]["step"])
    for path in (Path(f"runs/{name}/ckpt.pt"), Path(f"runs/{name}/best.pt")):
        if path.exists():
            step = t2mir.restore(path)[1]["step"]
            assert path.name == "best.pt" or done - EVERY <= step <= done, (step, done)
        else:
            assert done <= EVERY


def kill_again_and_again(job, name, seconds, check, write=None):
    """Starts and kills job(name) KILLS times, at random or when file `write` appears, then lets it end."""
    kills = 0
    while True:
        pid, begun, patience = start(job, name), time.time(), random.uniform(0.05, seconds)
        while not (over := ended(pid)):
            writing = write is not None and write.exists() and random.random() < 0.3
            if kills < KILLS and (writing or write is None and time.time() - begun > patience):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                check()
                break
            time.sleep(0.0005)
        over = over or Path(name, "point_robot.npz").exists()  # killed when all was done but tidying up
        if over and kills == KILLS:
            return
        if over:  # it ended before the last kill: from the beginning
            shutil.rmtree(Path(f"runs/{name}") if job is train else name)


def main():
    random.seed(0)
    times = {}
    for job, name in ((gather, "data"), (train, "whole")):
        begun = time.time()
        pid = start(job, name)
        while not ended(pid):
            time.sleep(0.01)
        times[job] = time.time() - begun
    for name, write in (("killed", None), ("written", Path("runs/written/.ckpt.pt.tmp"))):
        kill_again_and_again(train, name, times[train], lambda: check_run(name), write)
        for file in ("log.csv", "result.csv"):
            assert log(name, file) == log("whole", file) != [], name
        print(f"training, {KILLS} kills {'while it writes a checkpoint' if write else 'at random moments'}: same log")

    def check_collection():
        if Path("other/point_robot.npz").exists():
            collect.load("other/point_robot.npz")

    kill_again_and_again(gather, "other", times[gather], check_collection)
    one, two = (collect.load(f"{folder}/point_robot.npz") for folder in ("data", "other"))
    assert all(np.array_equal(one[key], two[key]) for key in one if key != "info")
    print(f"collection, {KILLS} kills at random moments: same dataset")

    disk = Path("disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], check=True)
    try:
        for name, argv in (("train", [*TINY.split(), "--runs", str(disk)]), ("gather", None)):
            try:
                t2mir.main(argv) if argv else collect.collect("point_robot", out=str(disk), **SMALL)
            except collect.BadInput as error:
                print(f"full disk: {error}")
            else:
                sys.exit(f"{name} did not notice that the disk is full")
            for path in disk.rglob("*.pt"):
                torch.load(path, weights_only=True)
    finally:
        subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
        os.chdir("/")

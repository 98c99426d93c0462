"""The answers in numbers: trains with and without each patch and adds a row to a table for each run.

    python experiments/exercises/answers.py --table figures/exercises.csv

The row has the end of the run's log, and its score in the held-out tasks by episode. The patches are
applied to copies of the code. What the table has is not repeated.
"""

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from collect import run_command
from experiments.compare import append, commit

# What is run: a patch, if any, and flags of t2mir.py.
RUNS = {
    "without a patch": ("", ""),
    "without a patch, --top-k 5": ("", "--top-k 5"),
    "1, top-p routing, --top-k 5": ("1_top_p", "--top-k 5"),
    "2, a shared expert": ("2_shared_expert", ""),
    "3, a classifier instead of InfoNCE": ("3_classifier", ""),
    "without a patch, --w-imp 0": ("", "--w-imp 0"),
    "4, a load that is a count, --w-imp 0": ("4_load_as_a_count", "--w-imp 0"),
    "5, a mass on a spring": ("5_new_family", "--env spring"),
}
LOGGED = ("load", "importance", "token_experts", "task_experts", "contrastive", "heldout")


def run(patch, flags, seed, data, steps):
    """Trains in a copy of the code; returns a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("envs.py", "collect.py", "t2mir.py"):
            shutil.copy(HERE.parents[1] / name, folder)
        shutil.copytree(HERE.parent, Path(folder) / "experiments")
        if patch:
            subprocess.run(["git", "apply", HERE / f"{patch}.patch"], cwd=folder, check=True)
        command = ["t2mir.py", "--steps", str(steps), "--eval-every", str(steps)]
        command += ["--seed", str(seed), "--data", str(data.resolve()), "--name", "answer"]
        command += flags.split()
        ended = subprocess.run(
            [sys.executable, *command], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
        with open(Path(folder) / "runs" / "answer" / "log.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
    row = {name: last[name] for name in LOGGED}
    for context in ("own context", "no context"):
        row[context] = re.search(f"{context}:(.*)", ended.stdout)[1].strip()
    return row


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 500,
    data: Path = Path("data"),
    table: Path = Path("figures/exercises.csv"),
):
    """Trains.

    Args:
        seeds: seeds of the training
        steps: training steps
        data: folder of the datasets
        table: CSV file, to which rows are added
    """
    for seed in seeds:
        for name, (patch, flags) in RUNS.items():
            key = {"run": name, "seed": str(seed), "steps": str(steps)}
            rows = []
            if table.exists():
                with open(table, newline="") as file:
                    rows = list(csv.DictReader(file))
            if any(key.items() <= row.items() for row in rows):
                continue
            row = run(patch, flags, seed, data, steps)
            append(table, key | row | {"commit": commit()})
            print(f"{name}, seed {seed}: {row['own context']}", flush=True)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))

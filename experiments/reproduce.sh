#!/bin/sh
# Makes the tables and pictures of part 1 of RESULTS.md, by name:
#
#     sh experiments/reproduce.sh defaults
#
# The times are those of one core of an AMD EPYC, in minutes; two names at once use two cores. The data comes first:
# Point-Robot's is collected by the first run in 2 minutes, HalfCheetah's takes 16.
set -e
train() { python t2mir.py "$@"; }
dense="--no-token-moe --no-task-moe"
compare() { python experiments/compare.py --csv experiments/results/pairs.csv "$@"; }

case "$1" in
defaults)  # the first table and its picture: 25 minutes for DPT and 45 for AD
    for s in 0 1 2; do
        train --env point_robot --mode dpt --seed $s
        train --env point_robot --mode ad --seed $s --eval-episodes 30
        train --env cheetah_vel --mode dpt --seed $s
        train --env cheetah_vel --mode ad --seed $s
    done
    python experiments/figures.py runs/*-seed[012] --out figures
    for agent in point_robot-dpt point_robot-ad; do
        python experiments/fresh_tasks.py runs/$agent-seed[012] --tasks 400 --seed 1 --csv figures/fresh_tasks.csv
    done
    for agent in cheetah_vel-dpt cheetah_vel-ad; do
        python experiments/fresh_tasks.py runs/$agent-seed[012] --csv figures/fresh_tasks.csv
    done ;;
esac

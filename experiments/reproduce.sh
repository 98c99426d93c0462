#!/bin/sh
# Makes the tables and pictures of part 1 of RESULTS.md, by name:
#
#     sh experiments/reproduce.sh defaults
#
# The times are minutes of one core of an AMD EPYC; two names at once use two cores. The data comes first: Point-Robot's
# takes 2 minutes, HalfCheetah's 16. Tables are printed and written to figures/.
set -e
cd "$(dirname "$0")/.."
dense="--no-token-moe --no-task-moe"

data() { [ -f "data/$1.npz" ] || python collect.py --env "$1"; }

pairs() { # DATA FOLDER, PREFIX: five pairs of T2MIR-DPT and DPT on Point-Robot
    for s in 0 1 2 3 4; do
        python t2mir.py --data "$1" --name "$2-dpt-s$s" --seed $s
        python t2mir.py --data "$1" --name "$2-dense-s$s" --seed $s $dense
    done
    python experiments/compare.py --first runs/$2-dpt-s* --second runs/$2-dense-s* --label "$2" --csv figures/pairs.csv
}

case "$1" in
defaults) # 10 minutes for Point-Robot with DPT, 45 with AD, 15 for HalfCheetah with DPT, 20 with AD, 10 to act
    data point_robot; data cheetah_vel
    for s in 0 1 2; do
        python t2mir.py --env point_robot --mode dpt --seed $s
        python t2mir.py --env point_robot --mode ad --seed $s --eval-episodes 30
        python t2mir.py --env cheetah_vel --mode dpt --seed $s
        python t2mir.py --env cheetah_vel --mode ad --seed $s
    done
    python experiments/figures.py runs/*-dpt-seed[012] runs/*-ad-seed[012] --out figures
    for agent in point_robot-dpt point_robot-ad cheetah_vel-dpt cheetah_vel-ad; do
        fresh="--tasks 100"
        [ "${agent#point}" = "$agent" ] || fresh="--tasks 400 --seed 1"
        python experiments/fresh_tasks.py runs/$agent-seed[012] $fresh --csv figures/fresh_tasks.csv
    done
    python experiments/watch.py runs/point_robot-dpt-seed0
    python experiments/watch.py runs/cheetah_vel-dpt-seed0 ;;
pairs) # 27 minutes
    data point_robot
    pairs data pr200 ;;
tasks) # 27 minutes for 45 tasks, 27 for 1,000, and 13 to collect these
    for n in 45 1000; do
        [ -f data$n/point_robot.npz ] || python collect.py --train-tasks $n --test-tasks 50 --out data$n
        pairs data$n pr$n
    done ;;
gradients) # 1 minute, after `defaults` and `pairs`
    python experiments/gradients.py runs/point_robot-dpt-seed* runs/point_robot-ad-seed* runs/pr200-dense-s* ;;
*) grep '^[a-z]*) #' "$0" ;;
esac

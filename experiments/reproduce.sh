#!/bin/sh
# Makes the tables and pictures of the default agents and of the pairs in part 1 of RESULTS.md, by name:
#
#     sh experiments/reproduce.sh defaults
#
# The times are minutes of one core of an AMD EPYC; two names at once use two cores. The data comes first: Point-Robot's
# takes 2 minutes, HalfCheetah's 16. Tables are printed and written to figures/, where rows are added to CSV files. Runs
# that have ended are not repeated.
set -e
cd "$(dirname "$0")/.."

data() { [ -f "data/$1.npz" ] || python collect.py --env "$1"; }

run() { # NAME and the flags of t2mir.py; an interrupted run is continued
    name=$1
    shift
    if [ -f "runs/$name/result.npz" ]; then return; fi
    if [ -f "runs/$name/ckpt.pt" ]; then python t2mir.py --resume "runs/$name"; else python t2mir.py --name "$name" "$@"; fi
}

pairs() { # PREFIX, DATA FOLDER: five pairs of T2MIR-DPT and DPT on Point-Robot
    for s in 0 1 2 3 4; do
        run "$1-dpt-seed$s" --data "$2" --seed $s
        run "$1-dense-seed$s" --data "$2" --seed $s --no-token-moe --no-task-moe
    done
    python experiments/compare.py --first runs/$1-dpt-seed[01234] --second runs/$1-dense-seed[01234] --label "$1" \
        --csv figures/pairs.csv
}

case "$1" in
pairs) # 35 minutes
    data point_robot
    pairs point_robot data ;;
defaults) # 115 minutes after `pairs`: 50 for Point-Robot with AD, 18 for HalfCheetah with DPT, 44 with AD
    data point_robot
    data cheetah_vel
    for s in 0 1 2; do
        run point_robot-dpt-seed$s --seed $s
        run point_robot-dense-seed$s --seed $s --no-token-moe --no-task-moe
        run point_robot-ad-seed$s --mode ad --seed $s --eval-episodes 30
        run cheetah_vel-dpt-seed$s --env cheetah_vel --seed $s
        run cheetah_vel-ad-seed$s --env cheetah_vel --mode ad --seed $s
    done
    python experiments/figures.py runs/point_robot-dpt-seed[012] runs/point_robot-dense-seed[012] \
        runs/point_robot-ad-seed[012] runs/cheetah_vel-dpt-seed[012] runs/cheetah_vel-ad-seed[012] --out figures
    for agent in point_robot-dpt point_robot-ad; do
        python experiments/fresh_tasks.py runs/$agent-seed[012] --tasks 400 --seed 1 --csv figures/fresh_tasks.csv
    done
    for agent in cheetah_vel-dpt cheetah_vel-ad; do
        python experiments/fresh_tasks.py runs/$agent-seed[012] --tasks 100 --csv figures/fresh_tasks.csv
    done
    python experiments/fresh_tasks.py runs/point_robot-dpt-seed[012] --tasks 400 --seed 1 --context other
    python experiments/speeds.py runs/cheetah_vel-dpt-seed[012] --out figures/cheetah_vel-dpt-speeds.csv
    python experiments/watch.py runs/point_robot-dpt-seed0
    python experiments/watch.py runs/cheetah_vel-dpt-seed0 ;;
tasks) # 35 minutes and 13 to collect the data
    [ -f data1000/point_robot.npz ] || python collect.py --train-tasks 1000 --test-tasks 50 --out data1000
    pairs point_robot1000 data1000 ;;
gradients) # 1 minute, after `defaults`
    python experiments/gradients.py runs/point_robot-dpt-seed[012] runs/point_robot-dense-seed[012] \
        runs/point_robot-ad-seed[012] ;;
*) grep '^[a-z]*) #' "$0" ;;
esac

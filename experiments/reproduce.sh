#!/bin/sh
# Makes the tables and pictures of RESULTS.md by name:
#
#     sh experiments/reproduce.sh defaults
#
# The times are minutes of one core of an AMD EPYC; two names at once use two cores. The data comes first, in a minute
# (HalfCheetah's in 4, Walker2d's in 16). Tables are printed and written to figures/; a comparison adds a row to
# figures/pairs.csv. Runs that have ended are not repeated. Where RESULTS.md names an older commit, check that one out:
# its data were collected in another way, and these names do the same with today's data.
set -e
cd "$(dirname "$0")/.."
data() { [ -f "data/$1.npz" ] || python collect.py --env "$1"; }
data1000() { [ -f data1000/point_robot.npz ] || python collect.py --train-tasks 1000 --test-tasks 50 --out data1000; }

run() { # NAME and the flags of t2mir.py; an interrupted run is continued
    name=$1
    shift
    if [ -f "runs/$name/result.npz" ]; then return; fi
    if [ -f "runs/$name/ckpt.pt" ]; then set -- --resume "runs/$name"; else set -- --name "$name" "$@"; fi
    python t2mir.py "$@"
}

runs() { for s in $2; do echo "runs/$1-seed$s"; done; } # NAME, SEEDS

compare() { # LABEL, NAME and OTHER NAME of two agents, SEEDS, FRESH TASKS: the first one minus the second one
    python experiments/compare.py --label "$1" --first $(runs "$2" "$4") --second $(runs "$3" "$4") --tasks "$5" \
        --csv figures/pairs.csv
}

pairs() { # LABEL, NAME, SEEDS, FRESH TASKS and flags: trains T2MIR and its dense baseline, and compares them
    label=$1 agent=$2 seeds=$3 tasks=$4
    shift 4
    for s in $seeds; do
        run "$agent-seed$s" --seed "$s" "$@"
        run "$agent-dense-seed$s" --seed "$s" "$@" --no-token-moe --no-task-moe
    done
    compare "$label" "$agent" "$agent-dense" "$seeds" "$tasks"
}

against() { # LABEL, NAME, VARIANT, SEEDS and flags: T2MIR of the pairs NAME minus a variant of it
    label=$1 agent=$2 variant=$3 seeds=$4
    shift 4
    for s in $seeds; do run "$agent-$variant-seed$s" --seed "$s" "$@"; done
    compare "$label" "$agent" "$agent-$variant" "$seeds" 400
}

subset() { [ -f "$2/point_robot.npz" ] || python experiments/subset.py "$1/point_robot.npz" --out "$2" "$3" "$4"; }
data45() { data1000; subset data1000 data45 --train-tasks 45; }
half() { data point_robot; subset data "data_$1" --episodes "$1"; } # early, late or mixed

ablations() { # BACKBONE, NAME, VARIANTS' SEEDS and flags: the pairs NAME against T2MIR without one of its parts
    backbone=$1 agent=$2 seeds=$3
    shift 3
    against "against T2MIR-$backbone without: the balance loss" "$agent" nobalance "$seeds" "$@" --w-imp 0 --w-load 0
    against "against T2MIR-$backbone without: InfoNCE" "$agent" noinfonce "$seeds" "$@" --w-con 0
    against "against T2MIR-$backbone without: the token-wise MoE" "$agent" notoken "$seeds" "$@" --no-token-moe
    against "against T2MIR-$backbone without: the task-wise MoE" "$agent" notask "$seeds" "$@" --no-task-moe
}

short="--data data1000 --steps 1000"
ad="--mode ad --steps 3000 --lr 8e-3"
case "$1" in
pairs) # 35 minutes
    data point_robot
    pairs "DPT, 2,500 steps: 200 tasks" point_robot-dpt-2500 "0 1 2 3 4" 400 --steps 2500 ;;
tasks) # 84 minutes
    data45
    pairs "DPT, 45 tasks: 1,000 steps" point_robot45-1000 "0 1 2 3 4" 400 --data data45 --steps 1000
    pairs "DPT, 2,500 steps: 45 tasks" point_robot45 "0 1 2 3 4" 400 --data data45 --steps 2500
    pairs "DPT, 2,500 steps: 1,000 tasks" point_robot1000 "0 1 2 3 4" 400 --data data1000 --steps 2500 ;;
steps) # 215 minutes
    data1000
    pairs "DPT, 1,000 tasks: 500 steps" point_robot1000-500 "0 1 2 3 4" 400 --data data1000 --steps 500
    pairs "DPT, 1,000 tasks: 1,000 steps" point_robot1000-short "0 1 2 3 4" 400 --data data1000 --steps 1000
    flags="--data data1000 --steps 10000 --eval-every 2500"
    pairs "DPT, 1,000 tasks: 10,000 steps" point_robot1000-10000 "0 1 2" 400 $flags
    flags="--data data1000 --steps 50000 --eval-every 10000"
    pairs "DPT, 1,000 tasks: 50,000 steps" point_robot1000-50000 "0" 400 $flags ;;
width) # 19 minutes
    data1000
    flags="--data data1000 --steps 2500 --d-model 16"
    pairs "DPT, 1,000 tasks: 2,500 steps, width 16" point_robot1000-d16 "0 1 2 3 4" 400 $flags ;;
paper) # 640 minutes: the paper's sizes and length
    data45
    flags="--d-model 128 --n-heads 8 --dropout 0.05 --lr 3e-4 --warmup 10000 --steps 100000 --eval-every 5000"
    pairs "DPT, 45 tasks: 100,000 steps, width 128" point_robot45-paper "0" 400 --data data45 $flags ;;
ad) # 98 minutes
    data point_robot
    pairs "AD, 200 tasks: 12,000 steps" point_robot-ad "0 1 2" 400 --mode ad --eval-episodes 30 ;;
ad-short) # 38 minutes
    data point_robot
    pairs "AD, 200 tasks: 3,000 steps" point_robot-ad-3000 "0 1 2 3 4" 400 $ad ;;
ad-tasks) # 73 minutes
    data45
    pairs "AD, 3,000 steps: 45 tasks" point_robot45-ad "0 1 2 3 4" 400 --data data45 $ad
    pairs "AD, 3,000 steps: 1,000 tasks" point_robot1000-ad "0 1 2 3 4" 400 --data data1000 $ad ;;
cheetah) # part of `defaults`, compared in fresh tasks
    data cheetah_vel
    pairs "HalfCheetah: DPT" cheetah_vel-dpt "0 1 2" 100 --env cheetah_vel
    pairs "HalfCheetah: AD" cheetah_vel-ad "0 1 2" 100 --env cheetah_vel --mode ad ;;
walker) # 60 minutes: 20 with DPT, 40 with AD
    data walker_param
    pairs "Walker2d: DPT" walker_param-dpt "0 1 2" 100 --env walker_param
    pairs "Walker2d: AD" walker_param-ad "0 1 2" 100 --env walker_param --mode ad ;;
ablations) # 34 minutes after `steps`
    data1000
    ablations DPT point_robot1000-short "0 1 2 3 4" $short ;;
ad-ablations) # 81 minutes after `ad-short`
    data point_robot
    ablations AD point_robot-ad-3000 "0 1 2 3 4" $ad ;;
experts) # 63 minutes after `steps` and `tasks`
    data45
    other="against T2MIR with other experts"
    for n in "3 4" "12 16" "24 32"; do
        set -- $n
        experts="--token-experts $1 --task-experts $2"
        against "$other, 1,000 tasks: $1 and $2" point_robot1000-short "experts$1" "0 1 2 3 4" $short $experts
        against "$other, 45 tasks: $1 and $2" point_robot45 "experts$1" "0 1 2" --data data45 --steps 2500 $experts
    done ;;
quality) # 43 minutes
    for half in early late mixed; do
        half "$half"
        pairs "DPT, 1,000 steps: $half half" "point_robot-$half" "0 1 2" 400 --data "data_$half" --steps 1000
    done
    pairs "DPT, 2,500 steps: early half" point_robot-early-2500 "0 1 2" 400 --data data_early --steps 2500 ;;
ad-quality) # 70 minutes after `quality`
    for half in early late; do
        half "$half"
        pairs "AD, 3,000 steps: $half half" "point_robot-$half-ad" "0 1 2 3 4" 400 --data "data_$half" $ad
    done ;;
changes) # 90 minutes: each change of AD and DPT taken away, and the published form; result.npz has the scores
    data point_robot
    for variant in "ours" "squared --policy squared" "adamw --optimizer adamw --lr 3e-3" "last --no-remember-best" \
        "empty --no-grow-prompt" "greedy --no-sample" "paper --recipe paper --lr 3e-3" \
        "paper3e-4 --recipe paper --lr 3e-4" "paper-dense --recipe paper --lr 3e-3 --no-token-moe --no-task-moe"; do
        set -- $variant
        name=changes-dpt-$1
        shift
        run "$name" --steps 2500 --eval-every 2500 "$@"
    done
    for variant in "ours" "noguests --no-guests" "noworse --no-worse-episodes" "nolate --no-late-episode" \
        "noclean --no-clean-targets --no-guests" "paper --recipe paper --lr 3e-3"; do
        set -- $variant
        name=changes-ad-$1
        shift
        run "$name" $ad --eval-every 3000 --eval-episodes 30 "$@"
    done ;;
stairs) # 210 minutes for `stairs dpt`, 290 for `stairs ad`: from the published agents to ours, change by change
    data point_robot
    mode=${2:-dpt}
    if [ "$mode" = dpt ]; then
        python experiments/stairs.py choose --mode dpt
        python experiments/stairs.py measure --mode dpt
    else
        python experiments/stairs.py choose --mode ad --stair published "+ remember_best"
        python experiments/stairs.py measure --mode ad --seeds 0 1 2
    fi
    python experiments/stairs.py draw --mode "$mode" ;;
exercises) # 20 minutes: three seeds of each, with and without its patch
    data point_robot
    python experiments/exercises/answers.py ;;
dial) # 160 minutes for `dial dpt 200`, four hours for `dial ad 200`: T2MIR minus dense where tasks conflict
    python experiments/dial.py --mode "${2:-dpt}" --train-tasks "${3:-200}"
    python experiments/dial.py --draw ;;
defaults) # 140 minutes: the default agents and their dense baselines, but for AD on Point-Robot (`ad`)
    agents=""
    for agent in point_robot-dpt cheetah_vel-dpt cheetah_vel-ad walker_param-dpt; do
        env=${agent%-*} mode=${agent#*-}
        data "$env"
        for s in 0 1 2; do
            run "$agent-seed$s" --env "$env" --mode "$mode" --seed "$s"
            run "$agent-dense-seed$s" --env "$env" --mode "$mode" --seed "$s" --no-token-moe --no-task-moe
        done
        agents="$agents $(runs "$agent" "0 1 2") $(runs "$agent-dense" "0 1 2")"
    done
    python experiments/figures.py $agents --out figures
    for env in point_robot cheetah_vel walker_param; do python experiments/watch.py "runs/$env-dpt-seed0"; done ;;
gradients) # 10 minutes after `stairs dpt` and `stairs ad`: the agents with all changes; adds rows to figures/gradients.csv
    agents=runs/stairs/point_robot
    table="--csv figures/gradients.csv"
    python experiments/gradients.py $agents-dpt-2000/*muon*gaussian/*-lr0.005-seed? $table
    python experiments/gradients.py $agents-ad-2000/worse_episodes=True*late_episode=True*guests=True*muon*gaussian/*[0-9]-seed? $table ;;
routing) # 5 minutes after `defaults`; adds rows to figures/routing.csv
    for agent in point_robot-dpt cheetah_vel-dpt cheetah_vel-ad; do
        for run in $(runs $agent "0 1 2"); do python experiments/routing.py "$run" --csv figures/routing.csv; done
    done ;;
drawings) # 1 minute after any of the comparisons
    python experiments/drawings.py --out figures
    python experiments/figures.py --pairs figures/pairs.csv ;;
*) grep '^[a-z-]*) #' experiments/reproduce.sh ;;
esac

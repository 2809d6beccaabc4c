# shellcheck shell=bash
# The life of a job, the same for all scripts here: start the nodes, run the command, hear signals, take down, requeue.
# Nothing here ends what another job started: processes are known by their id or their Slurm step.

export QLORA_DIST_HOME LAUNCHER WORKERS_PER_NODE MAX_RESTARTS
export WORLD_SIZE_WANTED=$((SLURM_JOB_NUM_NODES * WORKERS_PER_NODE))
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))
LOGS=$QLORA_DIST_LOGS/$SLURM_JOB_ID/attempt-$ATTEMPT
STARTED=$(date +%s)
NOTICE=
PIDS=()
ASKER=
RUN_DIR=

if [[ -x $QLORA_DIST_VENV/bin/python ]]; then PYTHON=$QLORA_DIST_VENV/bin/python; else PYTHON=python3; fi
export PYTHON
RUN=("${CONTAINER[@]}" "$PYTHON" -m)

say() { echo "[job $SLURM_JOB_ID, attempt $ATTEMPT] $*"; }

ask() { "${RUN[@]}" qlora_dist.cluster.slurm_job "$@"; }

# SIGUSR1 comes before the time limit or a preemption: checkpoint, end, requeue. SIGTERM: the same without the requeue,
# which is Slurm's then. A second signal changes nothing but that.
on_signal() {
    [[ $1 == USR1 ]] && NOTICE=USR1
    : "${NOTICE:=$1}"
    [[ -n $RUN_DIR ]] || return 0
    if [[ -z $ASKER ]]; then
        say "SIG$1: asking for a checkpoint at the next step boundary"
        ask_to_stop "$1" &
        ASKER=$!
    fi
}

ask_to_stop() {
    ask stop "$RUN_DIR" "$STARTED" "$STOP_S" "Slurm sent SIG$1 to job $SLURM_JOB_ID"
    # Another code is that of its own death.
    if (($? == 1)); then
        say "the run did not end within $STOP_S s; it goes on from its last checkpoint"
        # The first makes `train` ask once more, the second ends it.
        for _ in 1 2; do
            kill -TERM "${PIDS[@]}" 2>/dev/null
            sleep 1
        done
    fi
}

trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
trap 'code=$?; take_down; exit "$code"' EXIT

# The exit code of a child, however many signals interrupt the wait for it.
await() {
    local code again
    while true; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null && continue
        wait "$1" 2>/dev/null
        again=$?
        # 127: the first wait has had the answer already.
        ((again == 127)) || code=$again
        return "$code"
    done
}

# Ends what this script has started, and nothing else. Ray's processes get 10 s to leave in order, 2 of a cancelled job.
take_down() {
    local pid tries step most=100
    trap '' USR1 TERM
    [[ $NOTICE == TERM ]] && most=20
    # Its child first: started after the end of its parent, it would not know that it has lost it.
    [[ -z $ASKER ]] || { pkill -P "$ASKER"; kill "$ASKER" 2>/dev/null; }
    [[ $LAUNCHER == torchrun ]] || for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null; done
    for ((tries = 0; tries < most; tries++)); do
        if [[ $LAUNCHER == torchrun ]] || ! kill -0 "${PIDS[@]}" 2>/dev/null; then break; fi
        sleep 0.1
    done
    for step in $(squeue -h -s -j "$SLURM_JOB_ID" -o %i | grep -E '\.[0-9]+$'); do
        scancel --signal=KILL "$step" 2>/dev/null
    done
    for pid in "${PIDS[@]}"; do kill -KILL "$pid" 2>/dev/null; done
    rm -f "$LOGS/ray-token"
    [[ -z ${JOB_TMP:-} ]] || rm -rf "$JOB_TMP"
}

# The address by which Slurm itself reaches the first node, where this script runs.
head_address() {
    local name
    name=$(scontrol show node -o "$SLURMD_NODENAME" | grep -o ' NodeAddr=[^ ]*')
    getent ahostsv4 "${name#*=}" | awk 'NR == 1 { print $1 }'
}

# A hundred ports of this job's own, below those that the system hands out.
prepare() {
    mkdir -p "$LOGS" || exit 1
    HEAD_ADDRESS=${QLORA_DIST_HEAD_ADDRESS:-$(head_address)}
    BASE_PORT=$((10000 + SLURM_JOB_ID % 220 * 100))
    JOB_TMP=$QLORA_DIST_SCRATCH/qd-$SLURM_JOB_ID-$ATTEMPT
    export HEAD_ADDRESS BASE_PORT JOB_TMP LOGS
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RAY_USAGE_STATS_ENABLED=0
    # Else the agents of torch 2.13 wait for each other in two stores.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    say "$SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, $WORLD_SIZE_WANTED worker(s) by $LAUNCHER, logs in $LOGS"
}

# One task on each node: `node.sh` and its arguments.
on_all_nodes() {
    # srun of 22.05 and later does not take over sbatch's --cpus-per-task.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none \
        "${CONTAINER[@]}" bash "$QLORA_DIST_HOME/slurm/node.sh" "$@" &
    PIDS+=("$!")
}

# A Ray cluster over the allocation; whoever has not the token is refused. Fails where the nodes do not join.
start_ray() {
    local waiter
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LOGS/ray-token RAY_ADDRESS=$HEAD_ADDRESS:$BASE_PORT
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") || exit 1
    on_all_nodes ray >"$LOGS/ray.log" 2>&1
    # Not by `ask`: the number would be that of a shell around it.
    "${RUN[@]}" qlora_dist.cluster.slurm_job wait-ray "$RAY_ADDRESS" "$SLURM_JOB_NUM_NODES" "$JOIN_S" &
    waiter=$!
    # A signal ends a wait, too.
    while kill -0 "$waiter" 2>/dev/null && kill -0 "${PIDS[-1]}" 2>/dev/null; do
        wait -n "$waiter" "${PIDS[-1]}"
    done
    if kill -0 "${PIDS[-1]}" 2>/dev/null; then
        await "$waiter" && return
        say "the nodes did not join a Ray cluster within $JOIN_S s; see $LOGS/ray.log"
    else
        # Slurm has not started the nodes' step, or one has failed: nobody will join.
        kill -KILL "$waiter" 2>/dev/null
        wait "$waiter" 2>/dev/null
        say "the nodes' step ended before they had joined a Ray cluster; see $LOGS/ray.log"
    fi
    return 1
}

# run_train CONFIG [OVERRIDES]: `qlora-dist train` over the allocation; ends the script with its exit code.
run_train() {
    local config=$1 code
    shift
    local words=("$config" "launch.num_workers=$WORLD_SIZE_WANTED" "$@")
    prepare
    RUN_DIR=$(ask run-dir "${words[@]}") || exit
    case $LAUNCHER in
        ray)
            start_ray || finish_up 1
            words+=("launch.backend=ray" "launch.address=$RAY_ADDRESS")
            # A signal that came before there was something to stop.
            [[ -z $NOTICE ]] || finish_up 143
            "${RUN[@]}" qlora_dist.cli train "${words[@]}" &
            PIDS+=("$!")
            ;;
        torchrun)
            words+=("launch.backend=torchrun")
            [[ -z $NOTICE ]] || finish_up 143
            on_all_nodes torchrun "${words[@]}"
            ;;
        *)
            say "LAUNCHER=$LAUNCHER is neither ray nor torchrun"
            exit 2
            ;;
    esac
    await "${PIDS[-1]}"
    code=$?
    # Its number may be another process's by now.
    unset 'PIDS[-1]'
    # Slurm leaves a cancelled job seconds.
    if [[ $NOTICE == TERM ]] && ((code != 0)); then exit "$code"; fi
    ((code == 0 || code == 2)) || code=$(ask exit-code "$RUN_DIR" "$STARTED")
    finish_up "$code"
}

# run_bench [OPTIONS]: `qlora-dist bench throughput` over the allocation, its results beside the job's logs.
run_bench() {
    LAUNCHER=ray
    prepare
    start_ray || exit 1
    "${RUN[@]}" qlora_dist.cli bench throughput --scratch "$LOGS/scratch" --out "$LOGS/bench-throughput.json" \
        --set launch.backend=ray --set "launch.address=$RAY_ADDRESS" --set "launch.num_workers=$WORLD_SIZE_WANTED" \
        "$@" &
    PIDS+=("$!")
    await "$!"
    exit
}

# Whether every node of the job still starts what it is asked to.
nodes_answer() {
    env -u SLURM_GPUS_PER_NODE timeout 30 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" \
        --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 --mpi=none true
}

# End with an exit code, or give the job back to the queue: where it was stopped before it was done, or lost a node.
finish_up() {
    local code=$1 how why=
    how=$(ask state "$RUN_DIR" "$STARTED")
    say "exit code $code, the run is $how"
    take_down
    if [[ $how != finished ]]; then
        # 2 is for what a person can mend, and for a Ray run that waited in vain for the workers of a lost node.
        if [[ $NOTICE == USR1 && $code != 2 ]]; then
            why="Slurm gave notice"
        elif ((code != 0)) && [[ -z $NOTICE ]] && ! nodes_answer; then
            why="a node is lost"
        fi
    fi
    [[ -n $why ]] || exit "$code"
    # Not one that a person has cancelled meanwhile.
    if ((ATTEMPT <= MAX_REQUEUES)) && [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
        say "$why: requeued; the next attempt goes on from the last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    say "$why: not requeued; the same command goes on from the last checkpoint"
    exit 1
}

# Run a command with a Dask scheduler and one worker a task, or a GPU, of this allocation. Read by batch scripts.
. ./site.sh

with_workers() { # COMMAND...
    # A requeued job has the same id, and Slurm may have killed it before it had cleaned up. Its workers must not
    # find the address of the scheduler before.
    rm -f "$PWD/scheduler-$SLURM_JOB_ID-"*.json
    scheduler_file="$PWD/scheduler-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.json"
    dask_log="$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.dask.log"
    trap leave EXIT
    trap 'exit 143' TERM # 128 + SIGTERM, as the command itself exits if it hears of it first
    start_scheduler
    start_workers
    wait_for_workers
    "$@" --set cluster.kind=address --set cluster.scheduler_file="$scheduler_file" &
    command=$!
    local status=0
    wait -n || status=$?
    kill -0 "$scheduler" && kill -0 "$workers" || fail "the scheduler or the workers ended"
    exit "$status"
}

fail() { # MESSAGE
    echo "error: $1; look at $dask_log" >&2
    exit 1
}

start_scheduler() {
    # Slurm sends SIGTERM to every process of a job it requeues. The scheduler has to stay until the ranks have
    # made their checkpoints, so it hears SIGINT only.
    python -c 'import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
from distributed.cli.dask_scheduler import main
main(sys.argv[1:])' \
        --interface "$H2MV_INTERFACE" --port 0 --dashboard-address 127.0.0.1:0 --scheduler-file "$scheduler_file" \
        --preload h2mv_dist.jobs.preload >> "$dask_log" 2>&1 &
    scheduler=$!
}

start_workers() {
    local per_task=1 worker=(dask worker)
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        [ "$SLURM_NTASKS" = "$SLURM_JOB_NUM_NODES" ] || fail "GPU jobs need one task a node, not $SLURM_NTASKS tasks"
        per_task=$SLURM_GPUS_ON_NODE worker=(dask cuda worker)
    fi
    n_workers=$((SLURM_NTASKS * per_task))
    # srun does not take the number of CPUs of a task from the batch job
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "${worker[@]}" \
        --scheduler-file "$scheduler_file" --interface "$H2MV_INTERFACE" --nthreads 1 \
        --memory-limit "$(memory_limit "$per_task")" \
        --local-directory "${TMPDIR:-/tmp}" --death-timeout 300 --dashboard-address 127.0.0.1:0 >> "$dask_log" 2>&1 &
    workers=$!
}

memory_limit() { # WORKERS_OF_A_TASK
    local most
    # of the fullest node, as in 4(x2),3: four tasks on each of two nodes, three on another one
    most=$(tr , '\n' <<< "$SLURM_TASKS_PER_NODE" | cut -d '(' -f 1 | sort -n | tail -n 1)
    # Slurm says in MiB what --mem-per-cpu or --mem asked for; without them, or for all of a node (--mem=0), nothing
    if [ "${SLURM_MEM_PER_CPU:-0}" != 0 ]; then
        echo "$((SLURM_MEM_PER_CPU * SLURM_CPUS_PER_TASK / $1))MiB"
    elif [ "${SLURM_MEM_PER_NODE:-0}" != 0 ]; then
        echo "$((SLURM_MEM_PER_NODE / (most * $1)))MiB"
    else
        # Dask takes a number below 1 for a share of the node
        awk "BEGIN { print 1 / ($most * $1) }"
    fi
}

wait_for_workers() {
    timeout 600 python -c 'import sys
from distributed import Client
with Client(scheduler_file=sys.argv[1], set_as_default=False) as client:
    client.wait_for_workers(int(sys.argv[2]))' "$scheduler_file" "$n_workers" >> "$dask_log" 2>&1 &
    command=$!
    wait "$command" || fail "no $n_workers workers after ten minutes"
}

leave() {
    local status=$?
    set +e
    trap '' TERM
    if [ "$status" = 143 ]; then
        # SIGTERM to srun itself would make it kill the workers; this one lets their ranks make a checkpoint
        scancel --signal=TERM "$SLURM_JOB_ID"
        wait "${workers:-}"
    fi
    kill -TERM "${command:-}"
    # without a scheduler, workers end
    kill -INT "${scheduler:-}"
    wait
    rm -f "$scheduler_file"
} 2> /dev/null

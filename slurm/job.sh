# shellcheck shell=bash
# A training job from its preparation to its requeue: what train.sbatch and sweep.sbatch share.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit 1
: "${job:?how Slurm calls this job}" "${code:?the folder of the code to run}"
# shellcheck source=slurm/cluster.env
source "$code/slurm/cluster.env"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# sbatch takes the submitting shell's variables along. Of a launcher there (torchrun, an interactive job) these would tell
# every task that it is one and the same rank.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

# srun does not take --cpus-per-task from the job by itself.
srun=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${SRUN_OPTIONS[@]}")
restart=${SLURM_RESTART_COUNT:-0} stopped='' status=''

# train --config RUN_FILE [--set KEY=VALUE ...], or --list FILE --line N [--set ...]
train() {
    local prepared run record decision
    say "start $restart on $SLURM_JOB_NODELIST, code in $code"
    trap stop USR1 TERM
    if [[ -f $code/run.yaml ]]; then set -- --config "$code/run.yaml"; fi    # a later start: what was kept, not what is now
    if ((restart > MAX_RESTARTS)); then
        say "ends: it has been restarted $restart times, more often than MAX_RESTARTS allows"
        exit 3
    fi
    prepared=$(tool prepare "$@")
    status=$?
    if ((status == 0)) && [[ -z $prepared ]]; then exit 0; fi
    if ((status != 0)); then
        # What has worked before fails for a reason that may pass, but not for ever.
        if ((restart > 0)) && echo "$restart" >>"$code/failed_starts" && (($(wc -l <"$code/failed_starts") < 3)); then
            requeue
        fi
        exit "$status"
    fi
    code=$prepared
    rm -f "$code/failed_starts"
    scontrol update jobid="$job" comment="$code"    # train.sbatch looks there when the job starts again
    run=${code%/code/*}
    record=$run/slurm/$SLURM_JOB_ID/$restart
    say "run folder: $run"

    export STOP_REQUEST=$record/stop
    if [[ -n $stopped ]]; then touch "$STOP_REQUEST"; fi
    rendezvous
    ENDINGS=$record/health step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --time=10 -- \
        "$PYTHON" "$code/tools/check_node.py" --folder "$run" --min-free-gb "$MIN_FREE_GB" \
        ${SLURM_GPUS_PER_NODE:+--gpus "${SLURM_GPUS_PER_NODE##*:}"}
    if ((status == 0)); then
        ENDINGS=$record/ranks TASK_LOG=$run/logs/slurm_${SLURM_JOB_ID}_rank step --kill-on-bad-exit=1 --wait=60 -- \
            "$PYTHON" "$code/pretrain/train.py" --config "$code/run.yaml"
    fi
    trap '' USR1 TERM

    decision=$(tool verdict --run "$run" --code "$status" --nodes "$SLURM_JOB_NUM_NODES" ${stopped:+--told-to-stop})
    case $decision in
        requeue*) requeue "${decision#requeue }" ;;
        end*) exit "${decision#end }" ;;
        *) exit $((status ? status : 1)) ;;
    esac
}

# Ahead of the time limit, or when something else needs the nodes. The file is for tasks that have not begun yet.
# shellcheck disable=SC2329  # the trap calls it
stop() {
    stopped=1
    say "told to stop: the ranks are told to save"
    if [[ -n ${STOP_REQUEST:-} ]]; then touch "$STOP_REQUEST"; fi
    scancel --signal=USR1 "$job"
}

# Where the ranks meet: the first node's address from its record (its name need not resolve), the port from the job's number
# and start: one that was taken is not tried again.
rendezvous() {
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node -o "$head" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * restart) % 10000))
    export MASTER_ADDR MASTER_PORT
}

# step SRUN_OPTION... -- COMMAND...: one task per rank, or as the options say; its exit code is left in `status`.
step() {
    local options=() pid
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    "${srun[@]}" "${options[@]}" bash "$code/slurm/task.sh" "${CONTAINER[@]}" "$@" &
    pid=$!
    # wait returns early when a trap ran; only the last one has the real status
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid"
    status=$?
}

# tools/slurm_job.py on the first node, in the container if there is one.
tool() {
    "${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=0 "${CONTAINER[@]}" \
        "$PYTHON" "$code/tools/slurm_job.py" --max-restarts "$MAX_RESTARTS" "$@"
}

# requeue [NODES]: back into the queue, NODES excluded from now on. Ends this script one way or the other.
requeue() {
    local exclude=${1:-} known per_node state
    state=$(squeue --noheader --jobs="$job" --format=%T)
    if [[ $state != RUNNING ]]; then    # cancelled, or Slurm is taking it back itself
        say "not requeued: Slurm has the job as ${state:-gone}"
        exit 3
    fi
    if ! scontrol requeue "$job"; then
        say "not requeued: Slurm does not allow it. The same sbatch command goes on from the newest checkpoint."
        exit 3
    fi
    # These changes are allowed from here on only, while the job is pending. Slurm has counted the tasks of all nodes that the
    # job had, and would wait for as many nodes again. With the fewest tasks that so many nodes can have it keeps to --nodes.
    if [[ -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
        per_node=$SLURM_NTASKS_PER_NODE
        scontrol update jobid="$job" numtasks=$((per_node * ((SLURM_JOB_NUM_NODES + per_node - 1) / per_node)))
    fi
    if [[ -n $exclude ]]; then
        known=$(scontrol show job -o "$job" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2)
        exclude=$exclude${known:+,$known}
        if scontrol update jobid="$job" excnodelist="${exclude%,(null)}"; then say "excluded: ${exclude%,(null)}"; fi
    fi
    trap - TERM
    sleep 600    # Slurm ends this script; if it ended by itself now, the job would be over
}

say() { echo "== $(date '+%F %T') job $job: $*"; }

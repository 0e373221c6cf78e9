#!/usr/bin/env bash
# One task of a job step, a rank or a node's health check: bash slurm/task.sh COMMAND...
# srun's exit code is that of whichever task it ended itself. So each task leaves its own in $ENDINGS if it is not 0.
# With TASK_LOG set, what the task says goes into that file and its number, and only what task 0 says to the job's log too.
set -uo pipefail

trap : USR1 TERM INT HUP    # the command gets the signal too; this shell stays to see how it ends
if [[ -e $STOP_REQUEST ]]; then exit 0; fi    # the signal came before this task did

ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
cache=${NODE_CACHE:-${TMPDIR:-/tmp}/evenkeel-$UID}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions}

if [[ -n ${TASK_LOG:-} ]]; then
    log=${TASK_LOG}_$SLURM_PROCID.txt
    if ((SLURM_PROCID == 0)); then
        exec > >(trap '' USR1 TERM INT HUP; exec tee -a "$log") 2>&1
    else
        exec >>"$log" 2>&1
    fi
fi

"$@"
code=$?
((code == 0)) || echo "$code" >"$ENDINGS/$SLURMD_NODENAME.$SLURM_PROCID"
exit "$code"

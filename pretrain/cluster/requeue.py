"""The decision whether a job goes back into the queue after its training has ended."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.cluster.slurm_attempts import FAULT, Attempts, Task
from pretrain.errors import DIVERGED, MACHINE_FAULT, OTHER, USER_ERROR

MAX_FAULTS = 3  # faults in a row without a newer checkpoint, after which the next start would end like them
_BY_SIGNAL = 128  # exit codes above it mean the end by a signal


@dataclass(frozen=True)
class RequeueDecision:
    """The decision about a job after one of its starts has ended.

    Attributes:
        requeue: whether it goes back into the queue. If not, it ends with `code`.
        exclude: nodes on which it shall not start again.
    """

    requeue: bool
    code: int
    outcome: str
    reason: str
    exclude: tuple[str, ...] = ()


def decide(attempts: Attempts, code: int, signalled: bool, nodes: int, max_restarts: int) -> RequeueDecision:
    """Decide what happens after the present start of a job, and record how the start ended.

    Args:
        attempts: the starts of the job.
        code: srun's exit code, which is reliable only on whether all ranks ended with 0.
        signalled: whether the batch script was signalled to stop.
        nodes: the number of nodes of the job.
        max_restarts: how often a job may be requeued.
    """
    decision = _decide(attempts, code, signalled, nodes)
    attempts.end(decision.outcome, decision.reason)
    if not decision.requeue:
        return decision
    if decision.outcome == FAULT and (faults := attempts.faults_without_progress()) >= MAX_FAULTS:
        return _end(decision, f"{faults} starts ended so without a new checkpoint between them")
    if attempts.job.restart >= max_restarts:
        return _end(decision, f"it has been restarted {attempts.job.restart} times (MAX_RESTARTS)")
    return decision


def _decide(attempts: Attempts, code: int, signalled: bool, nodes: int) -> RequeueDecision:
    """Decide from this start alone."""
    unhealthy = attempts.failed_tasks("health")
    if unhealthy and not (signalled and all(task.code > _BY_SIGNAL for task in unhealthy)):
        return _unhealthy(unhealthy, nodes)
    failed, status = attempts.failed_tasks("ranks"), attempts.status()
    state, reason = status.get("status"), str(status.get("reason", ""))
    codes = {task.code for task in failed} | ({status["exit_code"]} if status.get("exit_code") else set())
    if state in ("finished", "stopped"):
        return RequeueDecision(False, 0, state, reason)
    for hopeless in (USER_ERROR, DIVERGED):
        if hopeless in codes:
            return RequeueDecision(
                False, hopeless, "refused" if hopeless == USER_ERROR else "diverged", _first(attempts, failed)
            )
    # If a rank fails by itself, srun signals the others to end. They record a stop, which is not the reason.
    if state == "preempted" and (signalled or not codes & {OTHER, MACHINE_FAULT}):
        return RequeueDecision(True, MACHINE_FAULT, state, reason)
    if signalled and all(
        ended > _BY_SIGNAL for ended in codes
    ):  # the signal itself ended ranks that did not handle it yet
        return RequeueDecision(True, MACHINE_FAULT, "preempted", "told to stop before the training had begun")
    if code == 0 and not codes:
        return RequeueDecision(
            False, 1, "unclear", f"all ranks ended with 0, but status.json says {state or 'nothing of it'}"
        )
    return RequeueDecision(
        True, min(codes & {OTHER, MACHINE_FAULT}, default=MACHINE_FAULT), FAULT, _first(attempts, failed)
    )


def _unhealthy(failed: list[Task], nodes: int) -> RequeueDecision:
    """Exclude the nodes that failed the health check, unless all of several nodes did: then none would be left."""
    names = tuple(sorted({task.node for task in failed}))
    reason = f"failed the health check: {', '.join(names)}"
    if 1 < nodes == len(names):
        return RequeueDecision(True, MACHINE_FAULT, FAULT, f"{reason} (every node: none is excluded)")
    return RequeueDecision(True, MACHINE_FAULT, FAULT, reason, names)


def _first(attempts: Attempts, failed: list[Task]) -> str:
    """Name the rank that failed first, with its last message."""
    status = attempts.status()
    recorded = "" if status.get("status") == "preempted" else str(status.get("reason", ""))
    if not failed:
        return recorded or "the ranks were killed, and none was left to say why"
    task = failed[0]
    log = attempts.rank_log(task.number)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    message = recorded or (lines[-1] if lines else "it said nothing")
    return f"rank {task.number} on {task.node} ended first, with code {task.code}: {message} (its log: {log})"


def _end(decision: RequeueDecision, why: str) -> RequeueDecision:
    return RequeueDecision(False, decision.code, decision.outcome, f"{decision.reason}; not requeued: {why}")

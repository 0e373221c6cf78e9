"""Whether a job goes back into the queue once its training has ended."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.cluster.slurm_attempts import FAULT, Attempts, Task
from pretrain.errors import DIVERGED, MACHINE_FAULT, OTHER, USER_ERROR

MAX_FAULTS = 3  # in a row that leave no newer checkpoint: the next start would end like them
_BY_SIGNAL = 128  # and more: ended by a signal


@dataclass(frozen=True)
class RequeueDecision:
    """requeue: go on later; else the job ends with `code`. exclude: nodes on which it shall not start again."""

    requeue: bool
    code: int
    outcome: str
    reason: str
    exclude: tuple[str, ...] = ()


def decide(attempts: Attempts, code: int, told_to_stop: bool, nodes: int, max_restarts: int) -> RequeueDecision:
    """Judge the present start of a job and note it there.

    code: srun's, which says reliably only whether all ranks ended with 0. told_to_stop: whether the batch script was
    signalled. nodes: how many the job has.
    """
    found = _decide(attempts, code, told_to_stop, nodes)
    attempts.end(found.outcome, found.reason)
    if not found.requeue:
        return found
    if found.outcome == FAULT and (faults := attempts.faults_without_progress()) >= MAX_FAULTS:
        return _end(found, f"{faults} starts ended so without a new checkpoint between them")
    if attempts.job.restart >= max_restarts:
        return _end(found, f"it has been restarted {attempts.job.restart} times (MAX_RESTARTS)")
    return found


def _decide(attempts: Attempts, code: int, told_to_stop: bool, nodes: int) -> RequeueDecision:
    unhealthy = attempts.failed_tasks("health")
    if unhealthy and not (told_to_stop and all(task.code > _BY_SIGNAL for task in unhealthy)):
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
    # Where a rank fails by itself, srun tells the others to end, and what they then say of a stop is not the reason.
    if state == "preempted" and (told_to_stop or not codes & {OTHER, MACHINE_FAULT}):
        return RequeueDecision(True, MACHINE_FAULT, state, reason)
    if told_to_stop and all(ended > _BY_SIGNAL for ended in codes):  # by the signal itself: nobody listened yet
        return RequeueDecision(True, MACHINE_FAULT, "preempted", "told to stop before the training had begun")
    if code == 0 and not codes:
        return RequeueDecision(
            False, 1, "unclear", f"all ranks ended with 0, but status.json says {state or 'nothing of it'}"
        )
    return RequeueDecision(
        True, min(codes & {OTHER, MACHINE_FAULT}, default=MACHINE_FAULT), FAULT, _first(attempts, failed)
    )


def _unhealthy(failed: list[Task], nodes: int) -> RequeueDecision:
    """What all of several nodes have is not the nodes' fault: excluding them would leave nothing to run on."""
    names = tuple(sorted({task.node for task in failed}))
    common = 1 < nodes == len(names)
    reason = f"failed the health check: {', '.join(names)}" + " (every node: none is excluded)" * common
    return RequeueDecision(True, MACHINE_FAULT, FAULT, reason, () if common else names)


def _first(attempts: Attempts, failed: list[Task]) -> str:
    """Who failed first, and its last word."""
    status = attempts.status()
    recorded = "" if status.get("status") == "preempted" else str(status.get("reason", ""))
    if not failed:
        return recorded or "the ranks were killed, and none was left to say why"
    task = failed[0]
    log = attempts.rank_log(task.number)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    last_word = recorded or (lines[-1] if lines else "it said nothing")
    return f"rank {task.number} on {task.node} ended first, with code {task.code}: {last_word} (its log: {log})"


def _end(found: RequeueDecision, why: str) -> RequeueDecision:
    return RequeueDecision(False, found.code, found.outcome, f"{found.reason}; not requeued: {why}")

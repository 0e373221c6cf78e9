"""Keep the other metrics of an evaluation if one cannot be computed.

lm-evaluation-harness computes all metrics of all tasks after the model's last answer, hours into an evaluation. One that
raises loses the others. It happens: the word perplexity of a long text without spaces is larger than any float, and
functions of task files have faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from lm_eval import evaluator_utils
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from pretrain.errors import first_line

# (task, {(metric, filter): values}, bootstrap draws) -> ({"metric,filter": value, "metric_stderr,filter": ...}, documents)
_Compute = Callable[[Task, dict[tuple[str, str], list], int], tuple[dict[str, Any], int]]


@contextmanager
def nothing_lost(tasks: list[Task | Group]) -> Iterator[list[dict[str, Any]]]:
    """Let a metric that raises become infinite (if it overflowed) or NaN, and keep the others, within this context.

    Yields:
        A list that fills with {task, metric, reason}. If metric is None, a document of the task could not be scored. Then
        no metric of the task has a value, as it would be that of other documents.
    """
    faults: list[dict[str, Any]] = []
    compute = evaluator_utils._compute_task_aggregations
    with ExitStack() as stack:
        stack.enter_context(_replaced(evaluator_utils, compute.__name__, _one_at_a_time(compute, faults)))
        for task in _leaves(tasks):
            stack.enter_context(_replaced(task, "process_results", _noted(task, faults)))
        yield faults


@contextmanager
def _replaced(owner: object, name: str, new: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _leaves(tasks: list[Task | Group]) -> list[Task]:
    return [leaf for task in tasks for leaf in (task.get_all_tasks() if isinstance(task, Group) else [task])]


def _noted(task: Task, faults: list[dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return the task's scoring of one document, which gives nothing if it raises; the first fault of a task is noted."""
    score = task.process_results

    def process_results(*arguments: Any, **named: Any) -> dict[str, Any]:
        try:
            return score(*arguments, **named)
        except Exception as error:  # a task file's own function
            if not _is_at_fault(task, faults):
                faults.append(_fault(task, None, error))
            return {}

    return process_results


def _one_at_a_time(compute: _Compute, faults: list[dict[str, Any]]) -> _Compute:
    def compute_task(
        task: Task, raw_metrics: dict[tuple[str, str], list], bootstrap_iters: int
    ) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        for (metric, answers), items in raw_metrics.items():
            value, error_bar = f"{metric},{answers}", f"{metric}_stderr,{answers}"
            found |= {value: math.nan, error_bar: "N/A"}
            if _is_at_fault(task, faults):
                continue
            for draws in (bootstrap_iters, 0):  # 0: keep a value whose standard error cannot be computed
                try:
                    found |= compute(task, {(metric, answers): items}, draws)[0]
                except Exception as error:  # an aggregation of the harness or of a task file
                    found[value] = math.inf if isinstance(error, OverflowError) else math.nan
                    fault = _fault(task, metric, error)
                else:
                    break
            else:
                faults.append(fault)
            if found[error_bar] != "N/A":
                found[error_bar] = np.float64(
                    found[error_bar]
                )  # groups square it: too large becomes inf instead of an exception
        return found, max(map(len, raw_metrics.values()), default=0)

    return compute_task


def _is_at_fault(task: Task, faults: list[dict[str, Any]]) -> bool:
    return any(fault["task"] == task.task_name and fault["metric"] is None for fault in faults)


def _fault(task: Task, metric: str | None, error: Exception) -> dict[str, Any]:
    return {"task": task.task_name, "metric": metric, "reason": f"{type(error).__name__}: {first_line(error)}"}

"""Runs work that training does not need: a failure is logged once, and the run continues.

Reports, autopsies, probes, the description of the machine and the writing of rows run within `optional`. Work that training
needs (data, weights, checkpoints) does not. Other ranks must not be left waiting, so nothing within `optional` is
collective. A part that has to succeed on every rank before a collective operation is `prepared`. The operation itself, done
`together`, succeeds on all ranks or counts on none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pretrain.distributed.ranks import all_gather_object, control_group
from pretrain.errors import UserError

PATIENCE_S = 10.0  # for ranks that have not failed, before the run is given up

T = TypeVar("T")
Listener = Callable[[str, str], None]

log = logging.getLogger("evenkeel")

_EXPECTED = (OSError, UserError)  # their messages suffice; other exceptions are logged with their traceback
_said: set[tuple[str, type]] = set()
_listener: Listener | None = None


def listen(listener: Listener) -> None:
    """Call `listener` with the kind and the reason of each failure that is logged from now on."""
    global _listener
    _listener = listener


@contextmanager
def optional(kind: str, failing: str) -> Iterator[None]:
    """Log an exception that ends the block, and continue after it. Nothing collective may be within.

    Args:
        kind: the work in a word or two. Each kind is logged once for each class of exception.
        failing: the sentence that names what did not work, without the reason.
    """
    try:
        yield
    except Exception as error:
        _say(kind, failing, str(error) if isinstance(error, _EXPECTED) else repr(error), error)


def prepared(kind: str, failing: str, action: Callable[[], T]) -> T | None:
    """Return the result of `action` here if it succeeds on every rank, else None on all. Collective, except `action`.

    Args:
        kind: the work in a word or two, as for `optional`.
        failing: the sentence that names what did not work.
        action: local work.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    return None if _failed(kind, failing, failure) else result


def together(kind: str, failing: str, action: Callable[[], T]) -> T | None:
    """Return the result here of `action`, which is collective, if it succeeds on every rank, else None on all of them.

    Args:
        kind: the work in a word or two, as for `optional`.
        failing: the sentence that names what did not work.
        action: work with collective operations.

    Raises:
        Exception: this rank has failed, and another is still within `action` after PATIENCE_S. It waits for this rank, so
            the run cannot continue.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
        if not _all_leave(PATIENCE_S):
            raise
    else:
        _all_leave(None)
    return None if _failed(kind, failing, failure) else result


def _all_leave(patience_s: float | None) -> bool:
    """Return whether every rank comes here within `patience_s`. None: as long as collectives may take."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    here = dist.all_reduce(torch.zeros(1), group=control_group(), async_op=True)
    if patience_s is None:
        here.wait()
        return True
    try:
        return here.wait(timedelta(seconds=patience_s))
    except RuntimeError:  # too late, or the other one is lost
        return False


def _failed(kind: str, failing: str, failure: Exception | None) -> bool:
    """Return whether any rank has failed, and log it. Collective."""
    for rank, reason in enumerate(all_gather_object(failure and repr(failure))):
        if reason:
            _say(kind, failing, f"{reason} on rank {rank}", failure)
            return True
    return False


def _say(kind: str, failing: str, reason: str, error: Exception | None) -> None:
    """Log a failure, unless one of its kind was logged. error: this rank's exception, None if another rank failed."""
    if (known := (kind, type(error))) in _said:
        return
    _said.add(known)
    log.warning(
        f"{failing}: {reason.rstrip('.')}. The run continues.", exc_info=None if isinstance(error, _EXPECTED) else error
    )
    if _listener is not None:
        _listener(kind, reason.partition("\n")[0])

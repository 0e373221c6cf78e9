"""Work that training does not need: where it fails that is said once, and the run goes on.

Reports, autopsies, probes, facts about the machine, the writing of rows: all of it runs within `optional`. What training
needs (data, weights, checkpoints) does not. Other ranks must not be left waiting: within `optional` there is nothing
collective. A part that has to succeed on every rank before they do something together is `prepared`; what they do
`together` succeeds on all or counts on none.
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

PATIENCE_S = 10.0  # with ranks that have not failed, before the run is given up

T = TypeVar("T")
Listener = Callable[[str, str], None]

log = logging.getLogger("evenkeel")

_EXPECTED = (OSError, UserError)  # they say by themselves what is wrong; the traceback of others is told too
_said: set[tuple[str, type]] = set()
_listener: Listener | None = None


def listen(listener: Listener) -> None:
    """Call `listener` with the kind and the reason of each failure that is said from now on."""
    global _listener
    _listener = listener


@contextmanager
def optional(kind: str, failing: str) -> Iterator[None]:
    """Whatever exception ends the block ends nothing else. Nothing collective may be within.

    kind: what it is, in a word or two: each kind is said once for each class of exception. failing: the sentence that says
    what did not work, without its reason.
    """
    try:
        yield
    except Exception as error:
        _say(kind, failing, str(error) if isinstance(error, _EXPECTED) else repr(error), error)


def prepared(kind: str, failing: str, action: Callable[[], T]) -> T | None:
    """Return the result of `action` here if it succeeds on every rank, else None on all. Collective, but for `action`."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    return None if _failed(kind, failing, failure) else result


def together(kind: str, failing: str, action: Callable[[], T]) -> T | None:
    """Return the result here of `action`, which is collective, if it succeeds on every rank, else None on all of them.

    Where this rank fails and another is still within it after PATIENCE_S, what this rank met is raised: the other one
    waits for what this one does not do any more, and the run cannot go on.
    """
    result, failure = None, None
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
    """Whether every rank comes here within `patience_s`; None for as long as collectives may take."""
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
    """Whether any rank has failed, which is said. Collective."""
    for rank, found in enumerate(all_gather_object(failure and repr(failure))):
        if found:
            _say(kind, failing, f"{found} on rank {rank}", failure)
            return True
    return False


def _say(kind: str, failing: str, reason: str, error: Exception | None) -> None:
    """Say that something optional has failed, unless that has been said. error: of this rank, None if it was another's."""
    if (known := (kind, type(error))) in _said:
        return
    _said.add(known)
    log.warning(
        f"{failing}: {reason.rstrip('.')}. The run goes on.", exc_info=None if isinstance(error, _EXPECTED) else error
    )
    if _listener is not None:
        _listener(kind, reason.partition("\n")[0])

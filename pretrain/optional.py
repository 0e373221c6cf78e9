"""What training does not need: where it fails that is said once, and the run goes on.

Reports, autopsies, probes, facts about the machine, the writing of rows: all of it runs within `optional`. What training
needs (data, weights, checkpoints) does not. Other ranks must not be left waiting: within `optional` there is nothing
collective. A part that has to succeed on every rank before they do something together is `prepared`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pretrain.distributed import all_gather_object
from pretrain.errors import UserError, first_line

T = TypeVar("T")
Listener = Callable[[str, str], None]

log = logging.getLogger("evenkeel")

_said: set[tuple[str, str]] = set()
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
        gone_without(kind, failing, error)


def gone_without(kind: str, failing: str, error: Exception) -> None:
    """Say that something optional has failed, unless that has been said. The arguments are those of `optional`."""
    if (known := (kind, type(error).__name__)) in _said:
        return
    _said.add(known)
    expected = isinstance(error, OSError | UserError)
    reason = str(error) if expected else repr(error)
    log.warning(f"{failing}: {reason.rstrip('.')}. The run goes on.", exc_info=None if expected else error)
    if _listener is not None:
        _listener(kind, first_line(error) if expected else repr(error))


def prepared(kind: str, failing: str, action: Callable[[], T]) -> T | None:
    """What `action` gives here, if it succeeds on every rank, else None on all of them. Collective, but for `action`."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = repr(error)
    failures = {rank: found for rank, found in enumerate(all_gather_object(failure)) if found}
    if not failures:
        return result
    rank, found = next(iter(failures.items()))
    gone_without(kind, failing, RuntimeError(f"on rank {rank}: {found}"))
    return None

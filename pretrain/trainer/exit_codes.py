"""The exit code of a rank, and the rank that reports the reason.

0: done, or stopped after saving. 2: the user's input was wrong. 3: a rank or a machine was lost or hung, and the same
command may continue. 4: the run diverged, and a person must look. 1: anything else.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from pretrain.distributed.ranks import Ranks, rank_from_environment
from pretrain.errors import (
    DIVERGED,
    MACHINE_FAULT,
    OTHER,
    USER_ERROR,
    Diverged,
    MachineFault,
    SharedUserError,
    UserError,
    first_line,
)
from pretrain.monitor.logs import log
from pretrain.monitor.phase import current
from pretrain.trainer.run_folder import RunFolder

# Parts of the messages with which gloo, NCCL and the store report that a peer is gone or silent.
_LOST = (
    "closed by peer",
    "reset by peer",
    "timed out",
    "timeout",
    "connection refused",
    "broken pipe",
    "remote process",
    "socket",
    "unhandled system error",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "clients joined",
)
# Parts of the messages with which NCCL reports that it was called wrongly.
_WRONG_CALL = ("invalid usage", "invalid argument", "duplicate gpu", "out of memory")


def end_badly(error: Exception, folder: RunFolder | None, ranks: Ranks) -> NoReturn:
    """Record why this rank fails and exit at once. Peers may wait for it in a collective: the launcher ends them."""
    if isinstance(error, UserError):
        if folder is not None and folder.begun:
            folder.fail(str(error), USER_ERROR)
            if not ranks.is_first:  # into this rank's file: the launcher decides what the console shows
                log.warning(f"error: {error}")
        refuse(error)
    code, reason = _explain(error, ranks)
    if code == OTHER:
        log.exception(f"rank {ranks.rank} failed: {error!r}")
    else:
        log.error(f"rank {ranks.rank}: {reason}")
    if folder is not None:
        folder.fail(reason, code)
    os._exit(code)


def end_alone(error: RuntimeError | MachineFault) -> NoReturn:
    """Exit because this rank has not met the others, or has met them and could not connect to them."""
    if isinstance(error, MachineFault):
        message = str(error)
    else:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        message = (
            f"rank {rank_from_environment()} met the other ranks at {where} but could not connect to them: "
            f"{first_line(error)}. Look at firewalls between the nodes, and at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        )
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(MACHINE_FAULT)


def refuse(error: UserError) -> NoReturn:
    """Exit with code 2 and print the message, on rank 0 only if every rank has the same one.

    The other ranks wait a little: a launcher that sees one rank exit kills the rest before rank 0 has printed.
    """
    rank = rank_from_environment()
    if rank != 0:
        time.sleep(3)
    if rank == 0 or not isinstance(error, SharedUserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(USER_ERROR)


def _is_lost_peer(error: Exception) -> bool:
    """Return whether an error of a collective means that a peer is gone or silent."""
    text = str(error).lower()
    lost = any(words in text for words in _LOST) and not any(words in text for words in _WRONG_CALL)
    return isinstance(error, RuntimeError) and lost


def _explain(error: Exception, ranks: Ranks) -> tuple[int, str]:
    """Return the exit code and the reason for an error of the run."""
    if isinstance(error, (Diverged, FloatingPointError)):  # the latter from a method that found NaN in the weights
        return DIVERGED, str(error)
    if isinstance(error, MachineFault):
        return MACHINE_FAULT, str(error)
    phase = current()
    if ranks.world_size > 1 and _is_lost_peer(error):
        return MACHINE_FAULT, f"lost another rank in '{phase.name}' of step {phase.step} ({first_line(error)})"
    return OTHER, f"{repr(error)[:500]} in '{phase.name}' of step {phase.step}"

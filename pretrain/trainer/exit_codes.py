"""How a rank ends: its exit code, and who says why.

0 done, or stopped after saving; 2 the user's input was wrong; 3 a rank or a machine was lost or hung: the same command may
go on by itself; 4 the run diverged: a person must look; 1 anything else.
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

# How gloo, NCCL and the store say that a peer is gone or silent, and how NCCL says that it was asked for nonsense.
_LOST = (
    "closed by peer",
    "reset by peer",
    "timed out",
    "timeout",
    "connection refused",
    "broken pipe",
    "remote process",
)
_LOST += ("socket", "unhandled system error", "ncclremoteerror", "nccl communicator was aborted", "clients joined")
_ASKED_WRONGLY = ("invalid usage", "invalid argument", "duplicate gpu", "out of memory")


def end_badly(error: Exception, folder: RunFolder | None, ranks: Ranks) -> NoReturn:
    """Record why this rank fails and leave at once: peers may wait for it in a collective, the launcher ends them."""
    if isinstance(error, UserError):
        if folder is not None and folder.begun:
            folder.fail(str(error), USER_ERROR)
            if not ranks.is_first:  # into this rank's file: what the console shows of it is up to the launcher
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
    """End this rank because it has not met the others, or could not connect to them although it has."""
    if isinstance(error, MachineFault):
        told = str(error)
    else:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        told = (
            f"rank {rank_from_environment()} met the other ranks at {where} but could not connect to them: "
            f"{first_line(error)}. Look at firewalls between the nodes, and at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        )
    print(f"error: {told}", file=sys.stderr, flush=True)
    os._exit(MACHINE_FAULT)


def refuse(error: UserError) -> NoReturn:
    """End this rank with exit code 2 and the message: from rank 0 alone when every rank has the same one to tell.

    The other ranks linger, because a launcher that sees one rank leave kills the rest before rank 0 has spoken.
    """
    rank = rank_from_environment()
    if rank != 0:
        time.sleep(3)
    if rank == 0 or not isinstance(error, SharedUserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(USER_ERROR)


def _tells_of_a_lost_peer(error: Exception) -> bool:
    text = str(error).lower()
    said = any(words in text for words in _LOST) and not any(words in text for words in _ASKED_WRONGLY)
    return isinstance(error, RuntimeError) and said


def _explain(error: Exception, ranks: Ranks) -> tuple[int, str]:
    if isinstance(error, (Diverged, FloatingPointError)):  # the latter from a method that met NaN in the weights
        return DIVERGED, str(error)
    if isinstance(error, MachineFault):
        return MACHINE_FAULT, str(error)
    phase = current()
    if ranks.world_size > 1 and _tells_of_a_lost_peer(error):
        return MACHINE_FAULT, f"lost another rank in '{phase.name}' of step {phase.step} ({first_line(error)})"
    return OTHER, f"{repr(error)[:500]} in '{phase.name}' of step {phase.step}"

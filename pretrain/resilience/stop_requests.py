"""Lets all ranks agree between steps whether the run stops, saves, or takes the next step.

One small all-reduce over gloo before each step answers three questions: was any rank asked to stop, does every rank have
its batch, did any rank fail to read one. So no rank begins a step that another rank never begins.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.data.batches.loader import Loader
from pretrain.distributed.launcher import ancestors
from pretrain.distributed.ranks import Ranks, control_group, on_every_rank
from pretrain.distributed.signals import StopFlag
from pretrain.monitor.phase import enter

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
_STOP_FILE_FOUND, _LAUNCHER_GONE = 1000, 1001  # beyond every signal's number
_LOOK_EVERY_S = 1.0  # at the files, which may lie on a slow file system
_ROUND_S = 0.5


@dataclass(frozen=True)
class StopRequest:
    """A request to stop or save.

    Attributes:
        stop: the reason why the run ends here; None if it continues.
        requested: whether a person asked for the end, by a file.
        save: whether to save a checkpoint first.
    """

    stop: str | None = None
    requested: bool = False
    save: bool = False


class StopRequests:
    """Collects signals, the files STOP and SAVE in the run folder, and the end of the launcher, for all ranks."""

    def __init__(self, folder: Path, ranks: Ranks, flag: StopFlag) -> None:
        self._folder, self._ranks, self._flag = folder, ranks, flag
        flag.heed()
        self._stop: StopRequest | None = None
        self._looked, self._files = 0.0, {STOP_FILE: False, SAVE_FILE: False}

    def before_step(self, loader: Loader, step: int) -> StopRequest:
        """Wait until every rank has its next batch, or until the run is to stop. Collective.

        Raises:
            UserError, MachineFault: on every rank, if the loader of any rank has failed.
        """
        enter("waiting for data", step)
        while True:
            here = loader.wait(_ROUND_S)
            stop, save, missing, failed = self._agree(self._received(), self._asked(SAVE_FILE), not here, loader.failed)
            if request := self._remembered(stop):
                return request
            if failed:
                on_every_rank(lambda: loader.next_batch() if loader.failed else None)
            if not missing:
                return StopRequest(save=bool(save))

    def now(self) -> StopRequest | None:
        """Return the request to stop, if there is one; the same on every rank. Collective."""
        (stop,) = self._agree(self._received())
        return self._remembered(stop)

    def saved(self) -> None:
        """Remove the file SAVE: the checkpoint is saved."""
        self._files[SAVE_FILE] = False
        if self._ranks.is_first:
            with suppress(OSError):
                (self._folder / SAVE_FILE).unlink(missing_ok=True)

    def _remembered(self, stop: int) -> StopRequest | None:
        """Return the first request to stop: work that was cut short for it is not resumed."""
        if stop and self._stop is None:
            self._stop = _stop(stop)
        return self._stop

    def _received(self) -> int:
        """Return a signal's number or one of the codes above, 0 without a request."""
        if self._flag.received:
            return self._flag.received
        if self._ranks.launched and ancestors() != self._flag.ancestors:
            return _LAUNCHER_GONE
        return _STOP_FILE_FOUND if self._asked(STOP_FILE) else 0

    def _asked(self, name: str) -> bool:
        """Return whether a person has left the file `name` in the run folder. Rank 0 looks for all ranks."""
        if self._ranks.is_first and time.monotonic() - self._looked > _LOOK_EVERY_S:
            with suppress(OSError):  # a file server that does not answer now will do so later
                self._files = {file: (self._folder / file).exists() for file in self._files}
            self._looked = time.monotonic()
        return self._files[name]

    @staticmethod
    def _agree(*values: int) -> list[int]:
        """Return the maximum of each value over all ranks."""
        agreed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=control_group())
        return agreed.tolist()


def _stop(received: int) -> StopRequest:
    own = {_STOP_FILE_FOUND: f"the file {STOP_FILE}", _LAUNCHER_GONE: "the end of its launcher"}
    return StopRequest(own.get(received) or signal.Signals(received).name, requested=received == _STOP_FILE_FOUND)

"""What all ranks do next, agreed between steps.

One small all-reduce over gloo before each step: has any rank been told to stop, has every rank its batch, has anybody
failed to read one. So no rank is alone in a step that another never begins.
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
    """stop: why the run ends here, None to go on. requested: whether a person asked for it, by a file. save: save first."""

    stop: str | None = None
    requested: bool = False
    save: bool = False


class StopRequests:
    """Hears signals, the files STOP and SAVE in the run folder, and the launcher's end, for all ranks."""

    def __init__(self, folder: Path, ranks: Ranks, flag: StopFlag) -> None:
        self._folder, self._ranks, self._flag = folder, ranks, flag
        flag.heed()
        self._stop: StopRequest | None = None
        self._looked, self._files = 0.0, {STOP_FILE: False, SAVE_FILE: False}

    def before_step(self, loader: Loader, step: int) -> StopRequest:
        """Wait until every rank has its next batch, or until the run is to stop. Collective.

        Raises on every rank what any rank's loader has met.
        """
        enter("waiting for data", step)
        while True:
            here = loader.wait(_ROUND_S)
            stop, save, missing, failed = self._agree(self._heard(), self._asked(SAVE_FILE), not here, loader.failed)
            if stop or self._stop:
                return self._remember(stop)
            if failed:
                on_every_rank(lambda: loader.next_batch() if loader.failed else None)
            if not missing:
                return StopRequest(save=bool(save))

    def now(self) -> StopRequest | None:
        """The order to stop, if there is one, the same on every rank. Collective."""
        (stop,) = self._agree(self._heard())
        return self._remember(stop)

    def saved(self) -> None:
        """What SAVE asked for is done."""
        self._files[SAVE_FILE] = False
        if self._ranks.is_first:
            with suppress(OSError):
                (self._folder / SAVE_FILE).unlink(missing_ok=True)

    def _remember(self, stop: int) -> StopRequest | None:
        """The order that was given first: what has been cut short for it is not taken up again."""
        if stop and self._stop is None:
            self._stop = _stop(stop)
        return self._stop

    def _heard(self) -> int:
        if self._flag.received:
            return self._flag.received
        if self._ranks.launched and ancestors() != self._flag.ancestors:
            return _LAUNCHER_GONE
        return _STOP_FILE_FOUND if self._asked(STOP_FILE) else 0

    def _asked(self, name: str) -> bool:
        """Whether a person has left the file `name` in the run folder; rank 0 looks for all."""
        if self._ranks.is_first and time.monotonic() - self._looked > _LOOK_EVERY_S:
            with suppress(OSError):  # a file server that does not answer now will do so later
                self._files = {file: (self._folder / file).exists() for file in self._files}
            self._looked = time.monotonic()
        return self._files[name]

    @staticmethod
    def _agree(*values: int) -> list[int]:
        """The largest of all ranks' values, of each."""
        agreed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=control_group())
        return agreed.tolist()


def _stop(heard: int) -> StopRequest:
    own = {_STOP_FILE_FOUND: f"the file {STOP_FILE}", _LAUNCHER_GONE: "the end of its launcher"}
    return StopRequest(own.get(heard) or signal.Signals(heard).name, requested=heard == _STOP_FILE_FOUND)

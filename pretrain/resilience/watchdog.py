"""Ends a run that stands still, and names the rank that causes it.

A thread on every rank looks at the phase that its rank is in. At intervals it writes a pulse to `<run>/logs/pulses/`: the
phase, the Python stacks and how far the rank has come in its collectives. If a phase takes longer than the limit, the first
rank to notice creates a file, and all others write a last pulse. The pulses show the cause: a rank without a last pulse is
stopped or dead. If all have one, the others wait for the ranks that are furthest behind in their phases, or, where these
wait too, in their collectives. No rank has to answer a message.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.distributed.ranks import Ranks, from_first_rank
from pretrain.errors import MACHINE_FAULT
from pretrain.files import write_text
from pretrain.monitor import phase
from pretrain.optional import optional
from pretrain.resilience.waiting import Progress, collective_progress, furthest_behind, waits_for_others

ANSWER_S = 5.0  # a rank has two ticks and this time to write its last pulse


@dataclass(frozen=True)
class Pulse:
    """The state of a rank at `time`.

    Attributes:
        rank, host, pid: the process.
        time: in seconds since the epoch.
        phase, step, number, seconds: the phase that the rank was in, see `monitor.phase`.
        stacks: the Python stacks of its threads.
        waits: whether it waited for other ranks, or for its GPU.
        last: whether it was written because the run stands still.
        collectives: how far it had come in those of each process group. Only last pulses have them.
    """

    rank: int
    host: str
    pid: int
    time: float
    phase: str
    step: int
    number: int
    seconds: float
    stacks: str
    waits: bool
    last: bool
    collectives: dict[str, Progress] = field(default_factory=dict)


class Watchdog:
    """Watches this rank until `close`. Collective at construction."""

    def __init__(self, folder: Path, ranks: Ranks, limit_s: float, on_hang: Callable[[str], None]) -> None:
        """Start to watch.

        Args:
            folder: the run folder, shared by all ranks.
            ranks: this rank's place among all.
            limit_s: seconds that a phase may take.
            on_hang: called on one rank with the verdict, before all ranks end.
        """
        self._pulses, self._report = folder / "logs/pulses", folder / "logs/hang.txt"
        self._ranks, self._limit_s, self._on_hang = ranks, limit_s, on_hang
        self._tick_s, self._pulse_s = min(limit_s / 10, 5.0), min(limit_s / 4, 60.0)
        self._pulses.mkdir(parents=True, exist_ok=True)
        self._file(ranks.rank).unlink(missing_ok=True)
        phase.mirror(self._phase_file(ranks.rank))
        # The name belongs to this start: a rank that an earlier start has left behind must not end this one.
        self._hang = self._pulses / f"hang_{from_first_rank(time.time_ns)}"
        self._closed, self._pulsed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._pulsed.wait()  # so every rank has written its phase and stacks at least once

    def close(self) -> None:
        """Stop to watch."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        try:
            self._leave_pulse()
        finally:
            self._pulsed.set()
        pulsed = time.monotonic()
        while not self._closed.wait(self._tick_s):
            # For hangs that no Python thread can notice: the interpreter's lock is never released, or the folder does not answer.
            faulthandler.dump_traceback_later(2 * self._limit_s + 30, exit=True)
            if phase.current().seconds > self._limit_s or self._called():
                self._end_run()
            if time.monotonic() - pulsed > self._pulse_s:
                self._leave_pulse()
                pulsed = time.monotonic()

    def _called(self) -> bool:
        with suppress(OSError):
            return self._hang.exists()
        return False

    def _end_run(self) -> None:
        """Report the hang, as far as the run folder can be written, and end this rank."""
        try:
            with suppress(OSError):
                self._hang.touch()
            self._leave_pulse(last=True)
            self._wait_for_the_others()
            self._conclude()
        finally:
            os._exit(MACHINE_FAULT)

    def _wait_for_the_others(self) -> None:
        """Wait until all have written their last pulses. They look once a tick, or later on a loaded machine."""
        deadline = time.monotonic() + 2 * self._tick_s + ANSWER_S
        while time.monotonic() < deadline and not all(pulse and pulse.last for pulse in self._pulses_of_all()):
            time.sleep(min(self._tick_s, 0.5))

    def _pulses_of_all(self) -> list[Pulse | None]:
        return [self._read(rank) for rank in range(self._ranks.world_size)]

    def _conclude(self) -> None:
        """Write the report and call `on_hang`, on the first rank that answers."""
        pulses = [pulse for pulse in self._pulses_of_all() if pulse]
        phases = [phase.read_mirror(self._phase_file(rank)) for rank in range(self._ranks.world_size)]
        verdict, blamed = diagnose(pulses, phases)
        if self._ranks.rank != min((pulse.rank for pulse in pulses if pulse.last), default=self._ranks.rank):
            time.sleep(1)  # a launcher that sees one rank leave kills the rest
            return
        with suppress(OSError):
            write_text(self._report, describe(verdict, blamed, pulses, phases))
            self._hang.unlink()
        self._on_hang(f"{verdict} The stacks of all ranks are in {self._report}.")

    def _leave_pulse(self, last: bool = False) -> None:
        now = phase.current()
        pulse = Pulse(
            rank=self._ranks.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            phase=now.name,
            step=now.step,
            number=now.number,
            seconds=now.seconds,
            stacks=python_stacks(),
            waits=waits_for_others(),
            last=last,
            collectives=_progress_if_known() if last else {},  # taking it costs more than the rest
        )
        with suppress(OSError):
            write_text(self._file(self._ranks.rank), json.dumps(asdict(pulse)))

    def _read(self, rank: int) -> Pulse | None:
        with suppress(OSError, ValueError):
            fields = json.loads(self._file(rank).read_bytes())
            collectives = {name: Progress(**progress) for name, progress in fields.pop("collectives", {}).items()}
            return Pulse(**fields, collectives=collectives)
        return None

    def _file(self, rank: int) -> Path:
        return self._pulses / f"rank_{rank}.json"

    def _phase_file(self, rank: int) -> Path:
        return self._pulses / f"rank_{rank}.phase"


def diagnose(pulses: list[Pulse], phases: list[str]) -> tuple[str, list[int]]:
    """Return the cause of a hang in a sentence or two, and the numbers of the ranks to blame.

    Args:
        pulses: the newest pulses, at most one for each rank.
        phases: the last known phase of each rank, empty where it is not known.
    """
    answering = [pulse for pulse in pulses if pulse.last]
    known = {pulse.rank: pulse for pulse in pulses}
    silent = sorted(set(range(len(phases))) - {pulse.rank for pulse in answering})
    if silent:
        return " ".join(_describe_silent(rank, known.get(rank), phases[rank]) for rank in silent), silent
    behind = min(pulse.number for pulse in answering)
    slowest = [pulse for pulse in answering if pulse.number == behind]
    blamed = [pulse for pulse in slowest if not pulse.waits] or _behind_in_collectives(answering) or slowest
    longest = max(blamed, key=lambda pulse: pulse.seconds)
    where = f"in {phases[longest.rank]} for {longest.seconds:.0f} s"
    if len(blamed) == len(phases):
        unfinished = sorted(
            {str(p) for pulse in pulses for p in pulse.collectives.values() if p.completed < p.enqueued}
        )
        what = f" ({'; '.join(unfinished)})" if unfinished else ""
        return f"All ranks are {where}: what they do together does not end{what}.", []
    names = ", ".join(f"{pulse.rank} ({pulse.host})" for pulse in blamed)
    return f"The others wait for rank {names}: {where}.", [pulse.rank for pulse in blamed]


def _progress_if_known() -> dict[str, Progress]:
    """Return this rank's progress in its collectives. Empty where torch's recorder cannot be read, which hides no hang."""
    with optional("flight recorder", "the collectives that this rank has completed are not known"):
        return collective_progress()
    return {}


def _behind_in_collectives(pulses: list[Pulse]) -> list[Pulse]:
    """Return the pulses of the ranks that the others wait for by what they have enqueued and completed; empty if unknown."""
    ranks = furthest_behind({pulse.rank: pulse.collectives for pulse in pulses})
    return [pulse for pulse in pulses if pulse.rank in ranks]


def _describe_silent(rank: int, pulse: Pulse | None, last_phase: str) -> str:
    who = f"rank {rank}" if pulse is None else f"rank {rank} ({pulse.host}, process {pulse.pid})"
    was = f" It was in {last_phase}." if last_phase else ""
    return f"No answer from {who}: it is stopped, or its machine is gone.{was}"


def describe(verdict: str, blamed: list[int], pulses: list[Pulse], phases: list[str]) -> str:
    """Return the report: the verdict, a line for each rank, and the stacks.

    The stacks of the blamed ranks come first, and equal stacks are shown once. A rank without a pulse is listed too.

    Args:
        verdict: the cause of the hang, from `diagnose`.
        blamed: the ranks to blame.
        pulses: the newest pulses, at most one for each rank.
        phases: the last known phase of each rank, empty where it is not known.
    """
    now, known = time.time(), {pulse.rank: pulse for pulse in pulses}
    lines: list[str] = []
    ranks_with: dict[str, list[int]] = {}
    for rank in sorted(range(len(phases)), key=lambda rank: rank not in blamed):
        was = f"it was in {phases[rank]}" if phases[rank] else "nothing is known of it"
        stacks = known[rank].stacks if rank in known else f"it did not answer and has left no stacks; {was}\n"
        ranks_with.setdefault(stacks, []).append(rank)
    for rank, last_phase in enumerate(phases):
        pulse = known.get(rank)
        if pulse is None:
            lines.append(f"rank {rank:>4}  SILENT from the start  {last_phase}")
            continue
        state = "answers" if pulse.last else f"SILENT, {now - pulse.time:.0f} s ago:"
        lines.append(
            f"rank {rank:>4}  {pulse.host}  {state}  step {pulse.step:>7,}  {pulse.phase} for {pulse.seconds:.1f} s"
        )
        lines += [f"           {group}: {progress}" for group, progress in sorted(pulse.collectives.items())]
    parts = [f"--- rank {', '.join(map(str, ranks))}\n{stacks}" for stacks, ranks in ranks_with.items()]
    return "\n".join([time.strftime("%Y-%m-%d %H:%M:%S"), verdict, "", *lines, "", *parts])


def python_stacks() -> str:
    """Return the stacks of this process's threads, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "".join(parts)

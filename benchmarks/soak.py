"""Kill a run at random moments, again and again, and compare its losses with those of a run that was left alone.

    python tools/soak.py --config configs/tiny_tvr.yaml --out soak [--set key=value ...] [--kills 50] [--minutes 60]

Give it a short run with checkpoints every few steps. A broken promise ends the soak with code 2 and a sentence. What
happened to each kill is in OUT/soak.json.

The soak is its own launcher. It starts the ranks, strikes some of them, waits for the others to end by themselves, checks
what is left, and starts the same command again. Ranks that have not met yet cannot notice each other's end, so the soak
ends them, as every launcher does. Nothing is injected into the ranks: they get signals, as from a cluster.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from pretrain.checkpoints.folders import complete_checkpoints
from pretrain.checkpoints.manifest import verify
from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.errors import MACHINE_FAULT, UserError
from pretrain.files import write_json
from pretrain.monitor.phase import read_mirror
from pretrain.paths import REPOSITORY

SOON_S = 30
_HANGS_UP_TO_S = 60  # while one rank is silent; the watchdog's limit is WATCHDOG_S
WATCHDOG_S = 15
_NOT_MET = "starting"
STRUCK_AT_START = 0.2  # the share of faults before the ranks have met
_TRAIN = REPOSITORY / "pretrain/train.py"


@dataclass(frozen=True)
class Strike:
    """A fault: signals to one rank or to all, a second apart.

    Attributes:
        name: As the table calls it.
        numbers: The signals that each struck rank gets, in this order.
        to_all: Whether all ranks get them.
        weight: How often this fault is chosen, relative to the others.
    """

    name: str
    numbers: tuple[signal.Signals, ...]
    to_all: bool
    weight: int

    @property
    def saves(self) -> bool:
        """Return whether the struck ranks are to save and end by themselves."""
        return self.numbers == (signal.SIGTERM,)


STRIKES = (
    Strike("SIGKILL to one rank", (signal.SIGKILL,), False, 5),
    Strike("SIGKILL to all ranks", (signal.SIGKILL,), True, 4),
    Strike("SIGTERM to one rank", (signal.SIGTERM,), False, 2),
    Strike("SIGTERM to all ranks, SIGKILL a second later", (signal.SIGTERM, signal.SIGKILL), True, 2),
    Strike("SIGSTOP to one rank", (signal.SIGSTOP,), False, 1),
)


@dataclass(frozen=True)
class Trial:
    """One fault and what followed.

    Attributes:
        fault: The name of the `Strike`.
        phase: The phase that the struck rank was in.
        step: The last step that the run had logged.
        seconds: Time until the other ranks had ended.
        codes: The exit codes of the ranks that were not killed.
    """

    fault: str
    phase: str
    step: int
    seconds: float
    codes: list[int]


class Soak:
    """Runs of one command line, in folders below `out`, that are struck and compared.

    Attributes:
        trials: The faults so far.
    """

    def __init__(self, words: list[str], out: Path, ranks: int, seed: int) -> None:
        """Take a run to strike.

        Args:
            words: The command line after train.py, without `out` and `name`.
            out: The folder of the runs.
            ranks: How many local ranks to start, on the CPU or on as many GPUs.
            seed: Decides the moments and the faults.
        """
        self.words, self.out, self.ranks = words, out, ranks
        self._random = random.Random(seed)
        self._startup_s = 10.0
        self.trials: list[Trial] = []

    def run(self, kills: int, deadline: float) -> None:
        """Strike `kills` times, or until the monotonic clock passes `deadline`.

        Raises:
            UserError: If a promise is broken: other losses, a damaged checkpoint, ranks that hang or end with another code.
        """
        whole = self._undisturbed()
        number = 0
        with tqdm(total=kills, unit="kill", disable=not sys.stderr.isatty()) as progress:
            while len(self.trials) < kills and time.monotonic() < deadline:
                number += 1
                folder = self.out / f"struck_{number}"
                while len(self.trials) < kills and time.monotonic() < deadline:
                    if (trial := self._strike(folder)) is None:
                        break
                    self.trials.append(trial)
                    progress.update()
                self._finish(folder)
                self._compare(folder, whole)

    def _undisturbed(self) -> dict[int, float]:
        folder = self.out / "whole"
        began = time.monotonic()
        processes = self._start(folder)
        while not _losses(folder) and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        self._startup_s = time.monotonic() - began
        self._expect_success(folder, [process.wait() for process in processes])
        return _losses(folder)

    def _strike(self, folder: Path) -> Trial | None:
        """Start the run and strike it once. Return None if the run ended before that."""
        (fault,) = self._random.choices(STRIKES, [fault.weight for fault in STRIKES])
        struck = list(range(self.ranks)) if fault.to_all else [self._random.randrange(self.ranks)]
        mirror = folder / f"logs/pulses/rank_{struck[0]}.phase"
        mirror.unlink(missing_ok=True)
        processes = self._start(folder)
        if self._random.random() > STRUCK_AT_START:
            _wait_for(lambda: mirror.exists() or processes[0].poll() is not None)
        time.sleep(self._random.uniform(0, self._startup_s))
        if all(process.poll() is not None for process in processes):
            return None
        phase = read_mirror(mirror) or _NOT_MET
        try:
            self._send(fault, [processes[rank] for rank in struck])
            seconds = 0.0 if phase == _NOT_MET else _wait_for_the_rest(fault, processes, struck)
        finally:
            for process in processes:
                process.kill()
        codes = [process.wait() for rank, process in enumerate(processes) if rank not in struck or fault.saves]
        if phase != _NOT_MET and not set(codes) <= {0, MACHINE_FAULT}:
            raise UserError(f"after {fault.name} in {phase} ranks ended with {codes}: see {folder}.err.")
        for checkpoint in complete_checkpoints(folder / "checkpoints"):
            try:
                verify(checkpoint)
            except UserError as error:
                raise UserError(f"{fault.name} in {phase} left a checkpoint that is not whole: {error}") from error
        return Trial(fault.name, phase, max(_losses(folder), default=0), seconds, codes)

    @staticmethod
    def _send(fault: Strike, processes: list[subprocess.Popen]) -> None:
        for number in fault.numbers:
            for process in processes:
                process.send_signal(number)  # harmless if the rank has ended
            if number != fault.numbers[-1]:
                time.sleep(1)

    def _finish(self, folder: Path) -> None:
        self._expect_success(folder, [process.wait() for process in self._start(folder)])

    def _compare(self, folder: Path, whole: dict[int, float]) -> None:
        found = _losses(folder)
        if found != whole:
            steps = [step for step in whole if found.get(step) != whole[step]]
            raise UserError(f"{folder} has other losses than {self.out / 'whole'}, from step {min(steps)} on.")

    def _expect_success(self, folder: Path, codes: list[int]) -> None:
        if any(codes):
            raise UserError(f"the run in {folder} ended with {codes}: see {folder.parent / (folder.name + '.err')}.")

    def _start(self, folder: Path) -> list[subprocess.Popen]:
        settings = [f"out={json.dumps(str(self.out))}", f"name={folder.name}", f"resilience.watchdog_s={WATCHDOG_S}"]
        settings += ["log.interval_steps=1"]
        words = [*self.words, *(word for setting in settings for word in ("--set", setting))]
        port = _free_port()
        self.out.mkdir(parents=True, exist_ok=True)
        with (
            open(self.out / f"{folder.name}.out", "a", encoding="utf-8") as out,
            open(self.out / f"{folder.name}.err", "a", encoding="utf-8") as err,
        ):
            return [
                subprocess.Popen(
                    [sys.executable, "-u", str(_TRAIN), *words],
                    env=os.environ | _place(rank, self.ranks, port),
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
                for rank in range(self.ranks)
            ]


def table(trials: list[Trial]) -> str:
    """Return a table by fault: how often, the longest wait for the other ranks, the phases, the exit codes."""
    rows = [
        "| fault | trials | longest wait | phases that were hit | exit codes of the others |",
        "|---|---|---|---|---|",
    ]
    for fault in STRIKES:
        mine = [trial for trial in trials if trial.fault == fault.name]
        if not mine:
            continue
        phases = _counted(trial.phase.split(" of step")[0].strip("'") for trial in mine)
        codes = _counted(str(code) for trial in mine for code in trial.codes if code >= 0)
        rows.append(
            f"| {fault.name} | {len(mine)} | {max(trial.seconds for trial in mine):.1f} s | {phases} | {codes or '-'} |"
        )
    return "\n".join(rows)


def _counted(values: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return ", ".join(f"{value} {count}x" for value, count in sorted(counts.items(), key=lambda item: -item[1]))


def _losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def _wait_for_the_rest(fault: Strike, processes: list[subprocess.Popen], struck: list[int]) -> float:
    """Return the seconds until the ranks that were not stopped have ended. Raise UserError if it takes too long."""
    began, stopped = time.monotonic(), signal.SIGSTOP in fault.numbers
    limit = _HANGS_UP_TO_S if stopped else SOON_S
    waited_for = [process for rank, process in enumerate(processes) if not (stopped and rank in struck)]
    while any(process.poll() is None for process in waited_for):
        if time.monotonic() - began > limit:
            raise UserError(f"{limit} s after {fault.name} other ranks were still there.")
        time.sleep(0.05)
    return time.monotonic() - began


def _wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {key: str(value) for key, value in place.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Strike the run of the command line; print and write what happened."""
    parser = tool_parser(__doc__)
    parser.add_argument("--config", required=True, type=argument_types.path, help="the run file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    parser.add_argument("--out", required=True, type=argument_types.path, help="folder for the runs; must not exist")
    parser.add_argument(
        "--kills", type=argument_types.whole(1), default=50, help="how many faults (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=argument_types.number(above=0), default=60.0, help="at most so long (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=argument_types.whole(1), default=2, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=argument_types.whole(), default=0, help="of the moments and faults (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.out.exists():
        raise UserError(f"{options.out} exists: name a new folder.")
    words = ["--config", str(options.config), *(word for setting in options.set for word in ("--set", setting))]
    soak = Soak(words, options.out.absolute(), options.ranks, options.seed)
    try:
        soak.run(options.kills, time.monotonic() + 60 * options.minutes)
    finally:
        write_json(options.out / "soak.json", [asdict(trial) for trial in soak.trials])
        print(table(soak.trials))
    if len(soak.trials) < options.kills:
        raise UserError(f"only {len(soak.trials)} of {options.kills} faults in {options.minutes:g} minutes.")
    print(f"\n{len(soak.trials)} faults; every run ended with the losses of one that was left alone, bit for bit")

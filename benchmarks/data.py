"""Compare loaders of shuffled token sequences, ready to train on: Evenkeel's and others, on the same tokens, interleaved.

Every loader reads a data set that its own library wrote, in a process of its own (loading.py for Evenkeel,
rivals/loaders.py for the others), with its files in the page cache.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import loading
from benchmarks.rivals import missing_modules, short_error, spread
from benchmarks.table import render
from benchmarks.usage import Usage, measure
from pretrain.processes import own_package

LOADERS = Path(__file__).with_name("rivals") / "loaders.py"
OURS = "evenkeel"
SEQ_LEN = 2048
BATCH_SIZE = 8
VOCAB_SIZE = 1 << 15
# Numbers of samples at which the start is measured. The others' memory grows with them: 10^10 would take a terabyte.
RIVALS_SIZES = (10**6, 10**8)
OUR_SIZES = (10**6, 10**8, 10**10)
MIDDLES = {10**6: 5 * 10**5, 10**8: 5 * 10**7, 10**10: 10**9}  # where a run resumes


@dataclass(frozen=True)
class Contestant:
    """A loader that is measured.

    Attributes:
        label: Its name in the tables.
        needs: The modules that it imports, each with pip's name of the package.
        worker_processes: Whether it has them.
        resumes: Whether it can start in the middle.
    """

    label: str
    needs: tuple[tuple[str, str], ...]
    worker_processes: bool = True
    resumes: bool = False


EVENKEEL = Contestant("Evenkeel", (), worker_processes=False, resumes=True)
RIVALS = {
    "gather": Contestant("NumPy gather by a permutation (the limit)", (("torch", "torch"),), worker_processes=False),
    "memmap": Contestant("torch DataLoader on numpy.memmap", (("torch", "torch"),)),
    "litdata": Contestant("litdata TokensLoader", (("litdata", "litdata"),), resumes=True),
    "datatrove": Contestant("datatrove DatatroveFolderDataset", (("datatrove", "datatrove"), ("torch", "torch"))),
    "datasets": Contestant("HF datasets, Arrow on disk", (("datasets", "datasets"), ("torch", "torch"))),
    "mosaicml": Contestant("mosaicml-streaming MDS", (("streaming", "mosaicml-streaming"),), resumes=True),
}


def bench_data(
    *,
    rounds: int,
    tokens: int,
    seconds: float,
    rivals: Sequence[str],
    rivals_python: str,
    workers: Sequence[int],
    our_sizes: Sequence[int] = OUR_SIZES,
    rivals_sizes: Sequence[int] = RIVALS_SIZES,
) -> str:
    """Return two tables, medians over interleaved rounds: reading, and the first batch of ever larger data sets.

    A rival that `rivals_python` cannot import, or that fails, is in the tables with the reason.

    Args:
        rounds: How often each loader is measured.
        tokens: Size of the data set, which is drawn at random.
        seconds: How long each loader reads in each round.
        rivals: Keys of RIVALS.
        rivals_python: The interpreter that runs them.
        workers: Numbers of worker processes to try, for loaders that have them.
        our_sizes: Numbers of samples at which Evenkeel's start is measured.
        rivals_sizes: The same for the others.

    Raises:
        RuntimeError: If Evenkeel's own loader fails.
    """
    with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
        bench = _LoaderBench(Path(name), rivals, rivals_python)
        bench.write(tokens)
        reading = bench.table_of_reading(rounds, seconds, workers)
        starting = bench.table_of_starting(rounds, our_sizes, rivals_sizes)
    return f"{reading}\n\n{starting}"


class _LoaderBench:
    def __init__(self, folder: Path, rivals: Sequence[str], rivals_python: str) -> None:
        self._folder, self._rivals_python = folder, rivals_python
        self._loaders = {OURS: EVENKEEL, **{rival: RIVALS[rival] for rival in rivals}}
        self._left_out = {rival: missing_modules(rivals_python, RIVALS[rival].needs) for rival in rivals}

    def write(self, tokens: int) -> None:
        """Write every loader's data set, of the same tokens, in a folder of its name."""
        samples = max(tokens // SEQ_LEN, 1)
        drawn = np.random.default_rng(0).integers(0, VOCAB_SIZE, samples * SEQ_LEN, dtype=np.uint16)
        drawn.tofile(self._folder / "tokens.bin")
        self._samples = samples
        for loader in self._loaders:
            (self._folder / loader).mkdir()
            if loader == OURS:
                loading.write(drawn, self._folder / loader)
            else:
                self._run(loader, do="write", folder=loader, tokens=str(self._folder / "tokens.bin"))

    def table_of_reading(self, rounds: int, seconds: float, workers: Sequence[int]) -> str:
        cases = [
            (loader, count)
            for loader, contestant in self._loaders.items()
            for count in (workers if contestant.worker_processes else [0])
        ]
        found: dict[tuple[str, int], list[tuple[dict, int]]] = {case: [] for case in cases}
        for number in range(rounds):
            for loader, count in cases:
                usage = self._run(loader, do="read", folder=loader, seconds=seconds, workers=count)
                if usage is not None:
                    found[loader, count].append((_last_line(usage), usage.peak_bytes))
                    print(f"round {number + 1}: {loader}, {count} workers: {_last_line(usage)}", file=sys.stderr)
        return self._describe_reading(found, rounds, seconds)

    def table_of_starting(self, rounds: int, our_sizes: Sequence[int], rivals_sizes: Sequence[int]) -> str:
        rows = []
        for size in our_sizes:
            for loader, contestant in self._loaders.items():
                row = (
                    self._start(loader, size, rounds) if loader == OURS or size in rivals_sizes else ["not run", *"---"]
                )
                rows.append((f"{size:.0e}", contestant.label, *row))
        resumed_at = ", ".join(f"{MIDDLES[size]:.0e} of {size:.0e}" for size in our_sizes)
        explanation = (
            f"To the first batch of a data set of so many samples, shuffled, on one rank, no worker processes; medians over "
            f"{rounds} round(s). Its files are holes, or links to one. CPU-s: after the libraries are loaded. MB: peak beyond "
            f"that of the small data set. Resuming: at sample {resumed_at}; -: the loader keeps no such state."
        )
        header = ("samples", "loader", "start CPU-s", "start MB", "resume CPU-s", "resume MB")
        return f"{explanation}\n\n{render(header, rows)}"

    def _start(self, loader: str, size: int, rounds: int) -> list[object]:
        """Return CPU seconds and megabytes beyond the small data set's: from the first sample, and from the middle."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            grown, small = Path(name) / "grown", self._folder / loader
            shutil.copytree(small, grown)
            if loader == OURS:
                loading.grow(grown, size, SEQ_LEN)
            else:
                self._run(loader, do="grow", folder=str(grown), samples=size)
            cases = {"small": (small, 0), "first": (grown, 0)}
            if self._loaders[loader].resumes:
                cases["middle"] = (grown, MIDDLES[size])
            found: dict[str, list[Usage]] = {case: [] for case in cases}
            for _ in range(rounds):
                for case, (folder, position) in cases.items():
                    usage = self._run(
                        loader, do="start", folder=str(folder), small=str(small), workers=0, position=position
                    )
                    if usage is None:
                        return [self._left_out[loader], *"---"]
                    found[case].append(usage)
        peaks = {case: median(usage.peak_bytes for usage in usages) for case, usages in found.items()}
        row: list[object] = []
        for case in ("first", "middle"):
            if case in found:
                row.append(median(_last_line(usage)["cpu_s"] for usage in found[case]))
                row.append(max(0.0, peaks[case] - peaks["small"]) / 1e6)
        print(f"{loader} at {size:.0e}: {row}", file=sys.stderr)
        return row if "middle" in found else [*row, *"--"]

    def _run(self, loader: str, *, folder: str, **asked: object) -> Usage | None:
        """Return the cost of one process, or None where a rival is left out, now or before."""
        if self._left_out.get(loader):
            return None
        asked |= {"folder": str(self._folder / folder), "seq_len": SEQ_LEN}
        if asked["do"] in ("read", "start"):
            asked["batch_size"] = BATCH_SIZE
        if loader == OURS:
            return measure([sys.executable, "-m", "benchmarks.loading", json.dumps(asked)], own_package())
        command = [self._rivals_python, "-W", "ignore", str(LOADERS), json.dumps({"loader": loader, **asked})]
        caches = self._folder / "caches"
        caches.mkdir(exist_ok=True)
        try:
            return measure(command, {"TMPDIR": str(caches), "HF_HOME": str(caches), "HF_HUB_OFFLINE": "1"})
        except RuntimeError as error:
            self._left_out[loader] = short_error(error)
            return None

    def _describe_reading(self, found: dict, rounds: int, seconds: float) -> str:
        rows: list[tuple[object, ...]] = []
        ours = [_speed(read) for read, _ in found[OURS, 0]]
        for (loader, count), results in found.items():
            label = self._loaders[loader].label
            if not results:
                rows.append((label, count, self._left_out[loader], "", "", "", ""))
                continue
            speeds = [_speed(read) for read, _ in results]
            rows.append(
                (
                    label,
                    count,
                    spread(speeds),
                    median(our / their for our, their in zip(ours, speeds, strict=True)),
                    median(read["tokens"] / read["wall_s"] / 1e6 for read, _ in results),
                    median(read["first_s"] for read, _ in results),
                    median(peak for _, peak in results) / 1e6,
                )
            )
        explanation = (
            f"{self._samples:,} sequences of {SEQ_LEN} tokens, shuffled, in batches of {BATCH_SIZE}, int64; medians over "
            f"{rounds} round(s) of {seconds:g} s, interleaved. Peak: of all processes, libraries included, without mapped files."
        )
        header = ("loader", "worker processes", "M tokens per CPU-s (range)", "Evenkeel's / this")
        return f"{explanation}\n\n{render((*header, 'M tokens/s', 'first batch s', 'peak MB'), rows)}"


def _last_line(usage: Usage) -> dict:
    return json.loads(usage.output.splitlines()[-1])


def _speed(read: dict) -> float:
    return read["tokens"] / read["cpu_s"] / 1e6

"""The checkpoints of one run: saved, found, verified, loaded and retired by all ranks together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from pretrain.checkpoints.disk_space import bytes_of
from pretrain.checkpoints.folders import (
    complete_checkpoints,
    delete_leftovers,
    folder_of,
    put_in_place,
    resolve,
    retire,
    step_of,
)
from pretrain.checkpoints.manifest import save_manifest, saved_at, verify
from pretrain.checkpoints.rng import random_states, restore_random_states
from pretrain.checkpoints.safe_load import read_safely
from pretrain.checkpoints.shard_metadata import notes_on, save_notes
from pretrain.checkpoints.shards import gather_shards, load_shards, read_shards
from pretrain.checkpoints.staging import host_copy
from pretrain.checkpoints.state import TrainerState, read_matching_state, save_state
from pretrain.checkpoints.writer import Entries, Writing, told
from pretrain.config.schema import CheckpointSection
from pretrain.distributed.ranks import Ranks, all_gather_object, control_group, from_first_rank, on_every_rank
from pretrain.errors import MachineFault, SharedUserError, UserError
from pretrain.files import free_bytes, patiently, sync_folder, write_text
from pretrain.sharded.engine_protocol import Engine

Result = TypeVar("Result")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete now. seconds: since its save began. stall_s: for how many of them training stood still."""

    path: Path
    step: int
    seconds: float
    stall_s: float


@dataclass(frozen=True)
class _UnderWay:
    """A save that is not published yet. began: on the clock of `perf_counter`, as `copied`, when training could go on."""

    step: int
    aside: Path
    began: float
    copied: float
    writing: Writing


class Checkpoints:
    """Saves, finds, verifies, loads and retires the checkpoints of one run. Every method is collective."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointSection,
        ranks: Ranks,
        say: Callable[[str], None],
        check: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """check: raises UserError for a checkpoint whose files are as they were saved but that none may go on from."""
        self.folder, self.config, self.ranks, self.say, self.check = folder, config, ranks, say, check
        self._under_way: _UnderWay | None = None
        self._damaged: set[Path] = set()
        self._of_others: set[Path] = set()  # what an earlier history of this folder left, where a rule says to leave it

    def save(self, engine: Engine, state: TrainerState, add_files: Callable[[Path], None]) -> Saved | None:
        """Write the checkpoint of `state`; `add_files` runs on rank 0 and adds the trainer's own files.

        With `asynchronous` the large files are only copied here, and None is returned: `advance` publishes the checkpoint.
        The one before must be published. Raises UserError, on every rank, when there is no room or a file cannot be
        written. Older checkpoints are never touched before the new one is complete.
        """
        began, aside = time.perf_counter(), self.folder / f".{folder_of(state.step)}.incomplete"
        with self._or_nothing(aside):
            return self._save(engine, state, add_files, aside, began)

    def _save(
        self, engine: Engine, state: TrainerState, add_files: Callable[[Path], None], aside: Path, began: float
    ) -> Saved | None:
        on_every_rank(lambda: self._prepare(aside, engine))
        contents = gather_shards(engine, aside)
        contents[aside / _random_file(self.ranks)] = random_states()
        if self.config.asynchronous:
            contents = host_copy(contents)

        def write_small_files() -> list[str]:
            if not self.ranks.is_first:
                return []
            add_files(aside)
            save_notes(aside, notes_on(engine))
            save_state(aside, state)
            return [path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()]

        present = on_every_rank(lambda: self._told(write_small_files, aside))
        writing = Writing(aside, contents, present, self.ranks.rank)
        self._under_way = _UnderWay(state.step, aside, began, time.perf_counter(), writing)
        return None if self.config.asynchronous else self.advance(wait=True)

    def advance(self, *, wait: bool = False) -> Saved | None:
        """Publish the save under way if every rank has written its files; `wait` for them.

        None where there is none or it goes on. UserError, on every rank, if a file could not be written.
        """
        save, called = self._under_way, time.perf_counter()
        if save is None or not (wait or _all(save.writing.done)):
            return None
        self._under_way = None
        final = self.folder / folder_of(save.step)
        with self._or_nothing(save.aside):
            entries: Entries = {}
            for part in all_gather_object(on_every_rank(save.writing.entries)):
                entries.update(part)
            from_first_rank(lambda: self._publish(save.aside, final, entries))
        now = time.perf_counter()
        return Saved(final, save.step, seconds=now - save.began, stall_s=save.copied - save.began + now - called)

    def find(self) -> Path | None:
        """The checkpoint to start from under the run's `resume` rule, verified; None to start from scratch.

        `auto` takes the run's newest and falls back to an older one when it is damaged, and says so; when all are
        damaged, or the one that was named is, UserError. A job that Slurm has requeued goes on from its own newest
        checkpoint whatever the rule, which was meant for its first start.
        """
        rule = "auto" if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and self._own() else self.config.resume
        if rule != "auto":
            self._of_others = set(self._own())
        if rule == "never":
            return None
        if rule != "auto":
            chosen = from_first_rank(lambda: resolve(Path(rule)))
            self._verify(chosen)
            self._of_others -= {path for path in self._of_others if path.samefile(chosen)}
            return chosen
        found, damage = self._newest_whole(self._own())
        if found is None and damage:
            raise SharedUserError(
                f"no checkpoint in {self.folder} is whole: {' '.join(damage)} "
                "Start from scratch with --set checkpoint.resume=never and another --set name=..."
            )
        return found

    def find_before(self, step: int) -> Path | None:
        """The run's newest whole checkpoint of `step` or an earlier one, verified; None if there is none.

        Those that the start has left alone by its `resume` rule are not the run's.
        """
        own = [path for path in self._own() if path not in self._of_others]
        return self._newest_whole([path for path in own if step_of(path) <= step])[0]

    def load(self, path: Path, engine: Engine, expected: TrainerState) -> TrainerState:
        """Load weights, optimizer and random states into an engine, new or under way; returns the stored state.

        The optimizer's options (weight decay, betas, ...) stay those of this run. Raises UserError, on every rank and
        before anything is loaded, naming the first difference where the checkpoint belongs to another run than `expected`
        (whose step and samples are not compared), or the file that cannot be read safely.
        """
        state = on_every_rank(lambda: read_matching_state(path, expected))
        files = on_every_rank(lambda: read_shards(engine, path))
        states = on_every_rank(lambda: read_safely(path / _random_file(self.ranks)))
        load_shards(engine, path, files)
        restore_random_states(states)
        return state

    @contextmanager
    def _or_nothing(self, aside: Path) -> Iterator[None]:
        """Leave nothing of a save that all ranks know to have failed: the status is to be written yet, and needs room."""
        try:
            yield
        except (UserError, MachineFault):
            if self.ranks.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _prepare(self, aside: Path, engine: Engine) -> None:
        """Room for the new checkpoint and an empty folder; what killed runs left half written goes."""
        if not self.ranks.is_first:
            return
        try:
            delete_leftovers(self.folder)
            free = free_bytes(self.folder.parent)
            if free is not None and free < (needed := bytes_of(engine)):
                raise UserError(
                    f"the checkpoint needs {needed / 1e9:.2f} GB but {self.folder} has {free / 1e9:.2f} GB free. "
                    "The older checkpoints are intact; free space and start the same command again."
                )
            patiently(lambda: aside.mkdir(parents=True), f"making {aside}")
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror}.") from error

    def _told(self, write: Callable[[], Result], aside: Path) -> Result:
        return told(lambda: patiently(write, f"writing to {aside}"), aside, self.ranks.rank)

    def _publish(self, aside: Path, final: Path, entries: Entries) -> None:
        def complete() -> None:
            save_manifest(aside, entries, after=max(map(saved_at, complete_checkpoints(self.folder)), default=0.0))
            for folder in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
                sync_folder(folder)

        def name() -> None:
            sync_folder(self.folder)
            write_text(self.folder / "latest", final.name + "\n")

        for part in (complete, lambda: put_in_place(aside, final), name):
            self._told(part, aside)
        self._damaged.discard(final)
        self._of_others.discard(final)
        self._retire_old()

    def _retire_old(self) -> None:
        """Delete what is older than the newest `keep_last` whole ones, but for the multiples of `keep_every_steps`."""
        own, every = complete_checkpoints(self.folder), self.config.keep_every_steps
        oldest = [path for path in own if path not in self._damaged][-self.config.keep_last :][0]
        for path in own[: own.index(oldest)]:
            if every and step_of(path) % every == 0:
                continue
            try:
                retire(path)
            except OSError as error:
                self.say(f"could not delete the old checkpoint {path}: {error.strerror}")

    def _newest_whole(self, paths: list[Path]) -> tuple[Path | None, list[str]]:
        """The last of `paths` that is whole, and what is wrong with those after it, which is said too."""
        damage: list[str] = []
        for path in reversed(paths):
            try:
                self._verify(path)
            except UserError as error:
                damage.append(str(error))
                self._damaged.add(path)
                self.say(f"skipping a damaged checkpoint: {error}")
            else:
                return path, damage
        return None, damage

    def _verify(self, path: Path) -> None:
        """`verify`, the ranks sharing the reading, and `check`. UserError on every rank if a file differs or it is refused."""
        on_every_rank(lambda: verify(path, self.ranks.rank, self.ranks.world_size))
        from_first_rank(lambda: self.check(path))

    def _own(self) -> list[Path]:
        """The complete checkpoints of the run's folder as rank 0 sees them, oldest first."""
        return from_first_rank(lambda: complete_checkpoints(self.folder))


def _random_file(ranks: Ranks) -> str:
    return f"rng_rank_{ranks.rank}.pt"


def _all(mine: bool) -> bool:
    """Whether it is so on every rank."""
    every = torch.tensor(mine, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(every, op=dist.ReduceOp.MIN, group=control_group())
    return bool(every)

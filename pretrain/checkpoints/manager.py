"""Saves, finds, verifies, loads and retires the checkpoints of one run, on all ranks together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from pretrain.checkpoints.deepspeed_files import fits, gather_shards, load_shards, read_shards
from pretrain.checkpoints.disk_space import checkpoint_bytes_of
from pretrain.checkpoints.elastic import load_stored
from pretrain.checkpoints.folders import (
    complete_checkpoints,
    delete_leftovers,
    find_start,
    folder_of,
    put_in_place,
    retire,
    step_of,
)
from pretrain.checkpoints.manifest import save_manifest, saved_at, verify
from pretrain.checkpoints.rng import random_states, restore_random_states, seed_for_new_layout
from pretrain.checkpoints.safe_load import read_safely
from pretrain.checkpoints.shard_metadata import metadata_of, save_shard_metadata, weights_by_group
from pretrain.checkpoints.staging import Staging
from pretrain.checkpoints.state import TrainerState, layout_changes, read_matching_state, save_state
from pretrain.checkpoints.stored import (
    is_universal,
    stored_counters,
    stored_weights,
    universal_counters,
    universal_weights,
)
from pretrain.checkpoints.writer import Entries, Writing, explaining_failures
from pretrain.config.schema import CheckpointSection
from pretrain.distributed.ranks import Ranks, all_gather_object, control_group, from_first_rank, on_every_rank
from pretrain.errors import MachineFault, SharedUserError, UserError
from pretrain.files import free_bytes, patiently, sync_folder, write_text
from pretrain.sharded.engine_protocol import Engine

Result = TypeVar("Result")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has just become complete.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        seconds: since its save began.
        stall_s: seconds for which training stood still.
    """

    path: Path
    step: int
    seconds: float
    stall_s: float


@dataclass(frozen=True)
class _UnderWay:
    """A save that is not published yet.

    Attributes:
        step: optimizer steps done.
        temporary: the folder that is written.
        began: when the save began, on the clock of `perf_counter`.
        copied: when training could continue, on the same clock.
        writing: the thread that writes the files.
    """

    step: int
    temporary: Path
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
        """Manage the checkpoints in `folder`.

        Args:
            folder: the run's `checkpoints`.
            config: the section `checkpoint` of the run file.
            ranks: this rank's place among all.
            say: logs one line.
            check: raises UserError for a checkpoint whose files are whole but that no run may resume from.
        """
        self.folder, self.config, self.ranks, self.say, self.check = folder, config, ranks, say, check
        self._under_way: _UnderWay | None = None
        self._staging = Staging()
        self._damaged: set[Path] = set()
        self._of_others: set[Path] = set()  # left by an earlier history of the folder, which `resume` says to ignore

    def save(self, engine: Engine, state: TrainerState, add_files: Callable[[Path], None]) -> Saved | None:
        """Write the checkpoint of `state`. Older checkpoints are never touched before the new one is complete.

        With `asynchronous` the large files are only copied here, and `advance` publishes the checkpoint. The checkpoint
        before it must be published.

        Args:
            engine: the engine whose weights and optimizer states are saved.
            state: the trainer's state.
            add_files: called on rank 0 with the folder, to add the trainer's own files.

        Returns:
            The checkpoint; None with `asynchronous`.

        Raises:
            UserError: on every rank, if there is no room or a file cannot be written.
        """
        began, temporary = time.perf_counter(), self.folder / f".{folder_of(state.step)}.incomplete"
        with self._or_nothing(temporary):
            return self._save(engine, state, add_files, temporary, began)

    def _save(
        self, engine: Engine, state: TrainerState, add_files: Callable[[Path], None], temporary: Path, began: float
    ) -> Saved | None:
        on_every_rank(lambda: self._prepare(temporary, engine))
        contents = gather_shards(engine, temporary)
        contents[temporary / _random_file(self.ranks)] = random_states()
        if self.config.asynchronous:
            contents = self._staging.host_copy(contents)

        def write_small_files() -> list[str]:
            if not self.ranks.is_first:
                return []
            add_files(temporary)
            save_shard_metadata(temporary, metadata_of(engine))
            save_state(temporary, state)
            return [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]

        present = on_every_rank(lambda: self._explaining(write_small_files, temporary))
        writing = Writing(temporary, contents, present, self.ranks.rank)
        self._under_way = _UnderWay(state.step, temporary, began, time.perf_counter(), writing)
        return None if self.config.asynchronous else self.advance(wait=True)

    def advance(self, *, wait: bool = False) -> Saved | None:
        """Publish the save under way if every rank has written its files; with `wait`, wait for them.

        Returns:
            The checkpoint; None if no save is under way or it is not finished.

        Raises:
            UserError: on every rank, if a file could not be written.
        """
        save, called = self._under_way, time.perf_counter()
        if save is None or not (wait or _all(save.writing.done)):
            return None
        self._under_way = None
        final = self.folder / folder_of(save.step)
        with self._or_nothing(save.temporary):
            entries: Entries = {}
            for part in all_gather_object(on_every_rank(save.writing.entries)):
                entries.update(part)
            from_first_rank(lambda: self._publish(save.temporary, final, entries))
        now = time.perf_counter()
        return Saved(final, save.step, seconds=now - save.began, stall_s=save.copied - save.began + now - called)

    def find(self) -> Path | None:
        """Return the checkpoint to start from under the run's `resume` rule, verified; None to start from scratch.

        `auto` takes the run's newest. If it is damaged, that is logged and an older one is taken. A job that Slurm has
        requeued continues from its own newest checkpoint under every rule, which was meant for its first start.

        Raises:
            UserError: all checkpoints are damaged, or the one that the rule names.
        """
        rule = "auto" if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and self._own() else self.config.resume
        if rule != "auto":
            self._of_others = set(self._own())
        if rule == "never":
            return None
        if rule != "auto":
            chosen = from_first_rank(lambda: find_start(Path(rule)))
            if not is_universal(chosen):  # those have no checksums
                self._verify(chosen)
            self._of_others -= {path for path in self._of_others if path.samefile(chosen)}
            return chosen
        newest, damage = self._newest_whole(self._own())
        if newest is None and damage:
            raise SharedUserError(
                f"no checkpoint in {self.folder} is whole: {' '.join(damage)} "
                "Start from scratch with --set checkpoint.resume=never and another --set name=..."
            )
        return newest

    def find_before(self, step: int) -> Path | None:
        """Return the run's newest whole checkpoint of `step` or an earlier one, verified; None if there is none.

        Checkpoints that the `resume` rule has ignored at the start are not the run's.
        """
        own = [path for path in self._own() if path not in self._of_others]
        return self._newest_whole([path for path in own if step_of(path) <= step])[0]

    def load(self, path: Path, engine: Engine, expected: TrainerState) -> TrainerState:
        """Load weights, optimizer and random states into an engine, new or under way, and return the stored state.

        The optimizer's options (weight decay, betas, ...) stay those of this run. Where the checkpoint was written by other
        ranks or in another layout, each rank reads its share of every weight and moment from the files of all.

        Args:
            path: the checkpoint, verified.
            engine: the engine to load into.
            expected: the state of this run. Its step and samples are not compared.

        Raises:
            UserError: on every rank and before anything is loaded, if the checkpoint belongs to another run than
                `expected`, or a file cannot be read safely.
        """
        if is_universal(path):
            return self._load_universal(path, engine, expected)
        state = on_every_rank(lambda: read_matching_state(path, expected))
        elsewhere = bool(layout_changes(state, expected))
        if elsewhere or not _all(on_every_rank(lambda: fits(engine, path))):
            self._load_elsewhere(path, engine)
        else:
            files = on_every_rank(lambda: read_shards(engine, path))
            load_shards(engine, path, files)
        if (state.world_size, state.tensor_parallel) == (expected.world_size, expected.tensor_parallel):
            restore_random_states(on_every_rank(lambda: read_safely(path / _random_file(self.ranks))))
        else:
            seed_for_new_layout(expected.seed, state.step, self.ranks.rank // expected.tensor_parallel)
        return state

    def _load_universal(self, path: Path, engine: Engine, expected: TrainerState) -> TrainerState:
        """Load the weights and optimizer states of another trainer. Its data order is unknown: this run's begins."""
        stored, counters = on_every_rank(lambda: (universal_weights(path), universal_counters(path)))
        load_stored(engine, stored, counters, self.say)
        seed_for_new_layout(expected.seed, counters.global_steps, self.ranks.rank // expected.tensor_parallel)
        return replace(expected, step=counters.global_steps)

    def _load_elsewhere(self, path: Path, engine: Engine) -> None:
        """Load the weights and optimizer states of a checkpoint of another layout."""
        folder = path / "deepspeed"
        order = weights_by_group(engine)
        stored, counters = on_every_rank(lambda: (stored_weights(folder, order), stored_counters(folder)))
        load_stored(engine, stored, counters, self.say)

    @contextmanager
    def _or_nothing(self, temporary: Path) -> Iterator[None]:
        """Remove a save that has failed on all ranks: the run's status must still be written, and needs room."""
        try:
            yield
        except (UserError, MachineFault):
            if self.ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _prepare(self, temporary: Path, engine: Engine) -> None:
        """Check for room and make an empty folder for the new checkpoint. What killed runs left half written is deleted."""
        if not self.ranks.is_first:
            return
        try:
            delete_leftovers(self.folder)
            free = free_bytes(self.folder.parent)
            if free is not None and free < (needed := checkpoint_bytes_of(engine)):
                raise UserError(
                    f"the checkpoint needs {needed / 1e9:.2f} GB but {self.folder} has {free / 1e9:.2f} GB free. "
                    "The older checkpoints are intact; free space and start the same command again."
                )
            patiently(lambda: temporary.mkdir(parents=True), f"making {temporary}")
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror}.") from error

    def _explaining(self, write: Callable[[], Result], temporary: Path) -> Result:
        return explaining_failures(lambda: patiently(write, f"writing to {temporary}"), temporary, self.ranks.rank)

    def _publish(self, temporary: Path, final: Path, entries: Entries) -> None:
        def complete() -> None:
            save_manifest(temporary, entries, after=max(map(saved_at, complete_checkpoints(self.folder)), default=0.0))
            for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
                sync_folder(folder)

        def name() -> None:
            sync_folder(self.folder)
            write_text(self.folder / "latest", final.name + "\n")

        for part in (complete, lambda: put_in_place(temporary, final), name):
            self._explaining(part, temporary)
        self._damaged.discard(final)
        self._of_others.discard(final)
        self._retire_old()

    def _retire_old(self) -> None:
        """Delete checkpoints older than the newest `keep_last` whole ones, except multiples of `keep_every_steps`."""
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
        """Return the last of `paths` that is whole, and the damage of those after it, which is logged."""
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
        """Verify a checkpoint, sharing the reading among ranks, and `check` it. Raises UserError on every rank at a fault."""
        on_every_rank(lambda: verify(path, self.ranks.rank, self.ranks.world_size))
        from_first_rank(lambda: self.check(path))

    def _own(self) -> list[Path]:
        """Return the complete checkpoints of the run's folder as rank 0 sees them, oldest first."""
        return from_first_rank(lambda: complete_checkpoints(self.folder))


def _random_file(ranks: Ranks) -> str:
    return f"rng_rank_{ranks.rank}.pt"


def _all(mine: bool) -> bool:
    """Return whether `mine` is true on every rank."""
    every = torch.tensor(mine, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(every, op=dist.ReduceOp.MIN, group=control_group())
    return bool(every)

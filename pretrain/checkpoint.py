"""Checkpoints that are complete or do not exist.

Layout of `<run>/checkpoints/step_00000500/`: DeepSpeed's own shards, `shards.json` about them, one `rng_rank_N.pt` per
rank, whatever the trainer adds (see train.py), `trainer.json`, and `manifest.json` with the size and checksum of every
file, written last. The folder is written under a temporary name and renamed when it is whole; `checkpoints/latest` names
the newest afterwards. The file system is shared by all ranks.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from pretrain.config import CheckpointSection
from pretrain.distributed import Ranks, all_gather_object, from_first_rank, on_every_rank
from pretrain.errors import SharedUserError, UserError
from pretrain.files import checksum, sync_folder, write_json, write_text
from pretrain.shard_notes import notes_on, save_notes

_DATA_KEYS = ("data.train", "data.shuffle", "data.packing", "data.document_attention")
_COMPLETE = re.compile(r"step_(\d{8,})")
_SHARDS = "deepspeed"


@dataclass(frozen=True)
class TrainerState:
    """What the trainer itself must remember; everything else is a function of it, the configuration and the weights.

    step: optimizer steps done. samples: samples of the run's order consumed by all ranks. The rest identifies the
    run, so that a checkpoint of another one is refused; None: an older trainer did not write it down. forward: a digest of
    what forward computes with besides `model`: names and shapes of all weights, methods that act there.
    """

    step: int
    samples: int
    world_size: int
    zero_stage: int
    precision: str
    model: dict[str, Any]
    data_fingerprint: str
    tokenizer_fingerprint: str
    seed: int
    seq_len: int
    global_batch_size: int
    tensor_parallel: int = 1
    forward: str | None = None
    optimizer: str | None = None


_WHY_EQUAL = {
    "world_size": "elastic resume is not supported yet: start the same number of ranks",
    "tensor_parallel": "DeepSpeed's shards of one tensor-parallel size cannot be loaded by another: set parallel.tensor",
    "zero_stage": "DeepSpeed's shards of one stage cannot be loaded by another: name the same stage",
    "precision": "DeepSpeed's shards of one precision cannot be loaded in another: name the same precision",
    "model": "it is a checkpoint of another architecture",
    "forward": "the weights would serve another function with this run's. Give back the methods, or start anew: "
    "checkpoint.resume=never and another name",
    "optimizer": "its optimizer state belongs to another optimizer. Give back optim.name",
    "data_fingerprint": "its sample order belongs to other token shards, or to other weights, shuffling or packing of them. "
    "Give back these keys, or start anew: checkpoint.resume=never and another name",
    "tokenizer_fingerprint": "it was trained with another tokenizer",
    "seed": "its sample order belongs to another seed",
    "seq_len": "its sample order belongs to another sequence length",
    "global_batch_size": "its sample order belongs to another batch size",
}


class Checkpoints:
    """Saves, finds, verifies, loads and retires the checkpoints of one run. Every method is collective."""

    def __init__(self, folder: Path, config: CheckpointSection, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.folder, self.config, self.ranks, self.say = folder, config, ranks, say

    def save(self, engine, state: TrainerState, add_files: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `state`; `add_files` runs on rank 0 and adds the trainer's own files.

        Raises UserError when there is no room, on every rank; where DeepSpeed meets a failing disk while it writes its
        shards, on the ranks that met it. Older checkpoints are never touched before the new one is complete.
        """
        final = self.folder / f"step_{state.step:08d}"
        aside = self.folder / f".{final.name}.incomplete"
        on_every_rank(lambda: self._prepare(aside, engine))
        with self._telling_write_failures(state.step):
            engine.save_checkpoint(str(aside), tag=_SHARDS, save_latest=False)

        def write_own_files() -> None:
            with self._telling_write_failures(state.step):
                torch.save(_random_states(), aside / f"rng_rank_{self.ranks.rank}.pt")
                if self.ranks.is_first:
                    add_files(aside)
                    save_notes(aside, notes_on(engine))
                    write_json(aside / "trainer.json", asdict(state))

        def publish() -> None:
            with self._telling_write_failures(state.step):
                manifest = {"schema_version": 1, "saved_at": time.time(), "files": entries}
                write_json(aside / "manifest.json", manifest)
                self._publish(aside, final)

        on_every_rank(write_own_files)
        entries = self._describe_files(aside)
        from_first_rank(publish)
        return final

    def find(self) -> Path | None:
        """The checkpoint to start from under the run's `resume` rule, verified; None to start from scratch.

        `auto` takes the run's newest and falls back to an older one when it is damaged, and says so; when all are
        damaged, or the one that was named is, UserError. A job that Slurm has requeued goes on from its own newest
        checkpoint whatever the rule, which was meant for its first start.
        """
        rule = "auto" if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and self._own() else self.config.resume
        if rule == "never":
            return None
        if rule != "auto":
            chosen = from_first_rank(lambda: resolve(Path(rule)))
            self._verify(chosen)
            return chosen
        damage: list[str] = []
        for path in reversed(self._own()):
            try:
                self._verify(path)
            except UserError as error:
                damage.append(str(error))
                self.say(f"skipping a damaged checkpoint: {error}")
            else:
                return path
        if damage:
            raise SharedUserError(
                f"no checkpoint in {self.folder} is whole: {' '.join(damage)} "
                "Start from scratch with --set checkpoint.resume=never and another --set name=..."
            )
        return None

    def load(self, path: Path, engine, expected: TrainerState, changed: Sequence[str] = ()) -> TrainerState:
        """Load weights, optimizer and random states; returns the stored state.

        The optimizer's options (weight decay, betas, ...) stay those of this run. changed: what the run file asks
        otherwise than the checkpoint's, to explain a refusal. Raises UserError naming the first difference where the
        checkpoint belongs to another run than `expected` (whose step and samples are not compared).
        """
        state = on_every_rank(lambda: _read_matching_state(path, expected, changed))
        groups = engine.optimizer.param_groups
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        loaded, _ = engine.load_checkpoint(str(path), tag=_SHARDS)
        if loaded is None:
            raise UserError(f"DeepSpeed found no checkpoint in {path}.")
        for group, own in zip(engine.optimizer.param_groups, options, strict=True):
            group.update(own)
        _restore_random_states(torch.load(path / f"rng_rank_{self.ranks.rank}.pt", weights_only=False))
        return state

    def _prepare(self, aside: Path, engine) -> None:
        """Room for the new checkpoint and an empty folder; what killed runs left half written goes."""
        if not self.ranks.is_first:
            return
        try:
            for leftover in self.folder.glob(".step_*"):
                shutil.rmtree(leftover, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free
            if free < (needed := checkpoint_bytes(_elements(engine), half=_half_precision(engine))):
                raise UserError(
                    f"the checkpoint needs {needed / 1e9:.2f} GB but {self.folder} has {free / 1e9:.2f} GB free. "
                    "The older checkpoints are intact; free space and start the same command again."
                )
            aside.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror}.") from error

    def _describe_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and checksum of every file, flushed to disk; the ranks share the reading."""
        names = from_first_rank(
            lambda: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        )
        mine = {
            name: {"bytes": (folder / name).stat().st_size, "xxh3_128": checksum(folder / name, sync=True)}
            for name in names[self.ranks.rank :: self.ranks.world_size]
        }
        entries: dict[str, dict[str, Any]] = {}
        for part in all_gather_object(mine):
            entries.update(part)
        return dict(sorted(entries.items()))

    def _publish(self, aside: Path, final: Path) -> None:
        for folder in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        if final.exists():
            _retire(final)
        os.rename(aside, final)
        sync_folder(self.folder)
        write_text(self.folder / "latest", final.name + "\n")
        self._retire_old()

    def _retire_old(self) -> None:
        """Delete all but the newest `keep_last` and the multiples of `keep_every_steps`."""
        for path in complete_checkpoints(self.folder)[: -self.config.keep_last]:
            every = self.config.keep_every_steps
            if not (every and _step_of(path) % every == 0):
                _retire(path)

    def _verify(self, path: Path) -> None:
        """`verify`, the ranks sharing the reading. UserError on every rank if a file differs."""
        on_every_rank(lambda: verify(path, self.ranks.rank, self.ranks.world_size))

    def _own(self) -> list[Path]:
        """This run's complete checkpoints as rank 0 sees them, oldest first."""
        return from_first_rank(lambda: complete_checkpoints(self.folder))

    @contextmanager
    def _telling_write_failures(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_write_failure(error):
                raise
            raise UserError(
                f"rank {self.ranks.rank} could not write the checkpoint of step {step} to {self.folder}: {error}. "
                "The older checkpoints are intact; free space or fix the folder and start the same command again."
            ) from error


def verify(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files of a checkpoint with its manifest: every `world_size`-th from number `rank` on.

    Raises UserError that names a file which is missing, has another size, or another content.
    """
    files = _read_manifest(path)
    for name in sorted(files)[rank::world_size]:
        file, (expected_bytes, expected_sum) = path / name, files[name]
        size = file.stat().st_size if file.is_file() else None
        if size != expected_bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected_bytes}"
            raise UserError(f"{file} {found}.")
        if checksum(file) != expected_sum:
            raise UserError(f"{file} does not match its checksum: its content has changed since it was saved.")


def checkpoint_bytes(elements: int, *, half: bool) -> int:
    """What a checkpoint takes on disk: master, two Adam moments, and the working copy in half precision or fp32."""
    return elements * (14 if half else 16) + (1 << 20)


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the one that a `latest` file names.

    Raises UserError if there is none.
    """
    if path.name == "latest" and path.is_file():
        path = path.parent / path.read_text().strip()
    if not (path / "manifest.json").is_file():
        raise UserError(
            f"{path} is not a complete checkpoint: it has no manifest.json. "
            "Name a folder such as runs/NAME/checkpoints/step_00000500, or runs/NAME/checkpoints/latest."
        )
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: by when they were saved, as a run may have begun anew."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _COMPLETE.fullmatch(path.name)), key=_age)


def _age(path: Path) -> tuple[float, int]:
    """When a checkpoint was saved, and its step."""
    try:
        return float(_read_json(path / "manifest.json")["saved_at"]), _step_of(path)
    except (UserError, KeyError, TypeError, ValueError):
        return path.stat().st_mtime, _step_of(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _retire(path: Path) -> None:
    """Delete a checkpoint such that no half-deleted one carries a valid name."""
    doomed = path.with_name(f".{path.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Bytes and checksum of every file of the checkpoint, by name."""
    manifest = _read_json(path / "manifest.json")
    try:
        return {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'manifest.json'} is damaged: {type(error).__name__} {error}.") from error


def _read_state(path: Path) -> TrainerState:
    fields = _read_json(path / "trainer.json")
    try:
        return TrainerState(**fields)
    except TypeError as error:
        raise UserError(f"{path / 'trainer.json'} was written by another version of the trainer: {error}.") from error


def _read_matching_state(path: Path, expected: TrainerState, changed: Sequence[str]) -> TrainerState:
    state = _read_state(path)
    for key, reason in _WHY_EQUAL.items():
        stored, wanted = getattr(state, key), getattr(expected, key)
        if stored in (wanted, None):
            continue
        if key == "forward":
            found = f"it was trained with other methods ({'; '.join(changed) or 'in another order'})"
        elif key == "data_fingerprint":
            of_data = [change for change in changed if change.startswith(_DATA_KEYS)]
            found = f"it was trained on other data ({'; '.join(of_data) or 'at the same place'})"
        else:
            found = _difference(key, stored, wanted)
        raise UserError(f"cannot resume from {path}: {found}; {reason}.")
    return state


def _difference(key: str, stored: Any, wanted: Any) -> str:
    if isinstance(stored, dict):
        fields = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
        stored, wanted = ({name: values.get(name) for name in fields} for values in (stored, wanted))
    return f"it has {key} {stored}, this run {wanted}"


def _elements(engine) -> int:
    """Elements that the ranks of one tensor-parallel group hold together: each stores what is whole on all of them."""
    mine = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return mine * max(1, engine.autotp_size())


def _half_precision(engine) -> bool:
    return engine.bfloat16_enabled() or engine.fp16_enabled()


def _is_write_failure(error: Exception) -> bool:
    """Whether a file could not be written: torch and safetensors say so in ways of their own."""
    return isinstance(error, OSError | SafetensorError) or "inline_container" in str(error)


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])

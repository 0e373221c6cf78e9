"""DeepSpeed's files of a checkpoint, which DeepSpeed itself neither writes nor reads.

DeepSpeed passes the content of each file in memory, in both directions. There are barriers between its own writes, so a
rank whose disk fails would leave the others waiting for ever. Its own reads would run code that a file contains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.safe_load import read_safely
from pretrain.checkpoints.stored.files import open_stored
from pretrain.sharded.engine_protocol import Engine

_FOLDER = "deepspeed"


def gather_shards(engine: Engine, folder: Path) -> dict[Path, Any]:
    """Return the content of each of this rank's files in the checkpoint `folder`, by path. Collective.

    The tensors are those of `engine`, not copies.
    """
    with _in_memory(engine, {}) as files:
        engine.save_checkpoint(str(folder), tag=_FOLDER, save_latest=False)
    return {Path(path): content for path, content in files.items()}


def read_shards(engine: Engine, folder: Path) -> dict[str, Any]:
    """Return the content of this rank's files in the checkpoint `folder`, by path.

    Raises:
        UserError: a file cannot be read safely.
    """
    paths = {engine._get_ckpt_name(folder, _FOLDER), *engine._get_all_ckpt_names(folder, _FOLDER)[:1]}
    if engine.zero_optimization():
        paths.add(engine._get_zero_ckpt_name(folder, _FOLDER))
    return {path: read_safely(Path(path)) for path in paths}


def fits(engine: Engine, folder: Path) -> bool:
    """Return whether this rank's files in the checkpoint `folder` are laid out as `engine` would write them.

    With equal ranks, stage and precision they may still differ: in the size of sub-groups, in alignment, in the order of
    gradients, in DeepSpeed's class for bf16, and in the momentum of Muon.
    """
    if not engine.zero_optimization():
        return True
    zero_file = Path(engine._get_zero_ckpt_name(folder, _FOLDER))
    if not zero_file.exists():
        return False
    model = open_stored(Path(engine._get_all_ckpt_names(folder, _FOLDER)[0]))
    if [list(group.items()) for group in model["param_shapes"]] != [
        list(group.items()) for group in engine._get_zero_param_shapes()
    ]:
        return False
    stored = open_stored(zero_file)
    state, optimizer = stored["optimizer_state_dict"], engine.optimizer
    if "param_alignment_paddings" in state and state["param_alignment_paddings"] != optimizer.round_robin_bit16_padding:
        return False
    by_muon = any(group.get("use_muon") for group in engine.basic_optimizer.param_groups)
    was = stored.get("ds_config", {}).get("zero_optimization", {})
    return not by_muon or bool(was.get("offload_optimizer")) == bool(_offloaded(optimizer))


def _offloaded(optimizer: Any) -> bool:
    return getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)


def load_shards(engine: Engine, folder: Path, files: dict[str, Any]) -> None:
    """Load the weights and optimizer states of `read_shards` into `engine`. Collective. Its optimizer's options stay."""
    groups = engine.optimizer.param_groups
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    with _in_memory(engine, files):
        engine.load_checkpoint(str(folder), tag=_FOLDER)
    for group, own in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(own)
    put_steps_beside_moments(engine.basic_optimizer)


def put_steps_beside_moments(optimizer: torch.optim.Optimizer) -> None:
    """Move step counters to the device of the moments where a fused kernel takes the step: it reads them there.

    Those of a checkpoint that a CPU has written stay on the host, because the options of that run, which was not fused,
    count while the state is loaded. Under ZeRO-3 the groups hold no parameters between steps, so all states are looked at.
    """
    if not any(group.get("fused") for group in optimizer.param_groups):
        return
    for state in optimizer.state.values():
        moment = next((each for each in state.values() if isinstance(each, torch.Tensor) and each.dim()), None)
        if isinstance(step := state.get("step"), torch.Tensor) and moment is not None:
            state["step"] = step.to(moment.device)


@contextmanager
def _in_memory(engine: Engine, files: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Redirect DeepSpeed's writes to `files`, by path, and its reads from there."""
    own, engine.checkpoint_engine = engine.checkpoint_engine, _Memory(files)
    engine._copy_recovery_script = lambda folder: None  # it writes past the checkpoint engine
    try:
        yield files
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


class _Memory:
    """A stand-in for DeepSpeed's `CheckpointEngine`, which is not imported."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = files

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        return self.files[path]

    def commit(self, info: Any) -> None: ...

    def is_decoupled(self) -> bool:
        return False

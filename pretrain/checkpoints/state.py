"""The trainer's own state in a checkpoint, and the check whether a run may resume from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pretrain.errors import UserError
from pretrain.files import patiently, write_json

_FILE = "trainer.json"
_FORWARD_KEYS = ("methods", "order of methods", "model", "init")
_DATA_KEYS = ("data.train", "data.shuffle", "data.packing", "data.document_attention")


@dataclass(frozen=True)
class TrainerState:
    """The trainer's own state. Everything else is a function of it, the configuration and the weights.

    The fields after `samples` identify the run, so that a checkpoint of another run is refused. Where they are None, an
    older trainer did not store them.

    Attributes:
        step: optimizer steps done.
        samples: samples of the run's order consumed by all ranks.
        forward: a digest of what forward computes with besides `model`: names and shapes of all weights, and the methods
            that act there.
        evaluation_due: whether a stop has cut short the evaluation of this step.
        guard: the state of the step gate.
        bos_id: the token before every document. None: only the separator that ended the document before.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

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
    batch_ramp: dict[str, float] | None = None
    forward: str | None = None
    optimizer: str | None = None
    evaluation_due: bool = False
    guard: dict[str, Any] | None = None
    bos_id: int | None = None


_OR_BEGIN = "or start from scratch: checkpoint.resume=never and another name"
_WHY_EQUAL = {
    # Before the model, whose number of positions follows it.
    "seq_len": f"its sample order belongs to another sequence length. Give back data.seq_len, {_OR_BEGIN}",
    "model": f"it is a checkpoint of another architecture. Give back the model, {_OR_BEGIN}",
    "forward": f"the weights would serve another function with this run's. Give back the methods, {_OR_BEGIN}",
    "optimizer": f"its optimizer state belongs to another optimizer. Give back optim.name, {_OR_BEGIN}",
    "data_fingerprint": "its sample order belongs to other token shards, or to other weights, shuffling or packing of them. "
    f"Give back these keys, {_OR_BEGIN}",
    "tokenizer_fingerprint": f"it was trained with another tokenizer. Give that one back, {_OR_BEGIN}",
    "seed": f"its sample order belongs to another seed. Give back seed, {_OR_BEGIN}",
    "batch_ramp": f"the sizes of its steps follow another ramp. Give back data.global_batch_size, {_OR_BEGIN}",
    "global_batch_size": f"its sample order belongs to another batch size. Give back data.global_batch_size, {_OR_BEGIN}",
}


# What the files of a checkpoint depend on, and a resumed run may change.
_OF_LAYOUT = {
    "world_size": "ranks",
    "tensor_parallel": "parallel.tensor",
    "zero_stage": "ZeRO stage",
    "precision": "precision",
}


def save_state(folder: Path, state: TrainerState) -> None:
    """Write the state into a checkpoint folder."""
    write_json(folder / _FILE, asdict(state))


def read_matching_state(folder: Path, expected: TrainerState, changed: Sequence[str] = ()) -> TrainerState:
    """Return the state in a checkpoint folder.

    Args:
        folder: the checkpoint.
        expected: the state of this run. Its step and samples are not compared.
        changed: differences between the checkpoint's run file and this one, to explain a refusal.

    Raises:
        UserError: the checkpoint belongs to another run than `expected`; the message names the first difference.
    """
    state = read_state(folder)
    for key, reason in _WHY_EQUAL.items():
        stored, wanted = (_compared(getattr(whose, key)) for whose in (state, expected))
        if stored in (wanted, None):
            continue
        if key == "forward":
            of_methods = [change for change in changed if change.startswith(_FORWARD_KEYS)]
            difference = f"it was trained with other methods ({'; '.join(of_methods) or 'in another order'})"
        elif key == "data_fingerprint":
            of_data = [change for change in changed if change.startswith(_DATA_KEYS)]
            difference = f"it was trained on other data ({'; '.join(of_data) or 'at the same place'})"
        else:
            difference = _difference(key, stored, wanted)
        raise UserError(f"cannot resume from {folder}: {difference}; {reason}.")
    return state


def layout_changes(state: TrainerState, expected: TrainerState) -> list[str]:
    """Return what differs between the layouts of a checkpoint and of this run, each as "what old -> new"."""
    pairs = {name: (getattr(state, key), getattr(expected, key)) for key, name in _OF_LAYOUT.items()}
    return [f"{name} {was} -> {now}" for name, (was, now) in pairs.items() if was != now]


def _compared(value: Any) -> Any:
    """Return a model's fields without the token that begins a text: forward ignores it, and older trainers set another."""
    if not isinstance(value, dict):
        return value
    return {name: field for name, field in value.items() if name != "bos_token_id"}


def read_state(folder: Path) -> TrainerState:
    """Return the state in a checkpoint folder. Raises UserError if it cannot be read."""
    path = folder / _FILE
    try:
        return TypeAdapter(TrainerState).validate_json(patiently(path.read_bytes, f"reading {path}"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path} was written by another version of the trainer: {mistakes}.") from error


def _difference(key: str, stored: Any, wanted: Any) -> str:
    if isinstance(stored, dict):
        fields = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
        stored, wanted = ({name: values.get(name) for name in fields} for values in (stored, wanted))
    return f"it has {key} {stored}, this run {wanted}"

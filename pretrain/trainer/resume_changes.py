"""Differences between a resumed run's configuration and that of the run that wrote the checkpoint, and what follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pretrain.config.diff import Change, flat
from pretrain.config.schema import Config
from pretrain.data.json_files import read_json
from pretrain.engine.compiled_blocks import form_of_blocks
from pretrain.errors import UserError
from pretrain.optim.schedule import learning_rate
from pretrain.trainer.environment import version_of

# Keys that say where a run is and what it resumes from. They do not change what it computes.
_PLACES = ("name", "out", "checkpoint.resume")
_OF_SCHEDULE = ("steps", "tokens", "data.global_batch_size", "data.seq_len", "optim.lr", "optim.schedule.")
_EFFECTS = {
    **dict.fromkeys(("init.", "model.init_from", "warm_start"), "without effect, the weights have their values"),
    "data.val": "validation losses before and after are not of the same text",
    "eval.batches": "validation losses before and after are not of the same text",
    "data.micro_batch_size": "the same batches, in other parts: losses differ by rounding",
    "deterministic": "the same computation by other kernels: on a GPU losses differ by rounding",
    "environment.": "losses may differ by rounding",
}


def changes(checkpoint: Path, config: Config, step: int) -> list[Change]:
    """List the keys that differ from those of the run that wrote `checkpoint` after `step` steps.

    Keys that an older version did not have count as their defaults.

    Raises:
        UserError: the checkpoint's configuration cannot be read.
    """
    path = checkpoint / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        was = flat(stored)
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    before = _as_config(stored)
    if before is not None:
        was = flat(before.model_dump(mode="json"))
    now_dump = config.model_dump(mode="json")
    now = flat(now_dump)
    found = [
        Change(key, _shown(was, key), _shown(now, key), _effect(key))
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key) and key not in _PLACES  # null is as good as absent
    ]
    orders = [[method["name"] for method in methods or ()] for methods in (stored.get("methods"), now_dump["methods"])]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        found.append(Change("order of methods", *(", ".join(order) for order in orders)))
    return _with_schedule(found, before, config, step)


def environment_changes(checkpoint: Path, config: Config) -> list[Change]:
    """List what differs from the last start in the checkpoint's run folder: versions, and whether blocks are compiled.

    What the folder does not record is left out. Runs of versions that could not compile blocks count as eager.
    """
    path = checkpoint.parent.parent / "environment.json"
    if not path.exists():
        return []
    record = read_json(path)
    was = {"blocks": record.get("blocks", "eager"), **record.get("packages", {})}
    now = {"blocks": form_of_blocks(config), **{name: version_of(name) for name in record.get("packages", {})}}
    return [
        Change(f"environment.{name}", str(was[name]), str(now[name]), _effect("environment."))
        for name in was
        if was[name] != now[name]
    ]


def check_length(checkpoint: Path, step: int, config: Config) -> None:
    """Raise UserError if the run would be shorter than what has been trained."""
    total = config.total_steps
    if step <= total:
        return
    key = "steps" if config.steps else f"tokens, {config.tokens:g}, are {total:,} steps; tokens"
    raise UserError(
        f"cannot resume from {checkpoint}: it has trained {step:,} steps, this run asks for {total:,} in all. Raise {key} "
        f"to train on, give back what they were, or start from scratch: checkpoint.resume=never and another name."
    )


def _effect(key: str) -> str:
    """Return what follows from a change of the key, empty if it is plain."""
    return next((effect for start, effect in _EFFECTS.items() if key.startswith(start)), "")


def _with_schedule(found: Sequence[Change], before: Config | None, now: Config, step: int) -> list[Change]:
    """Return `found`, with the effect on the learning rate at the last of the keys that determine it."""
    of_schedule = [change for change in found if change.key.startswith(_OF_SCHEDULE)]
    if not of_schedule:
        return list(found)
    effect = schedule_effect(before, now, step)
    return [replace(change, effect=effect) if change is of_schedule[-1] else change for change in found]


def schedule_effect(before: Config | None, now: Config, step: int) -> str:
    """Describe the learning rate after `step` steps that the run took with the configuration `before`, None if unknown."""
    total, following = now.total_steps, step + 1
    if following > total:
        return "all steps are done"
    rate = learning_rate(now.optim, following, total)
    first = f"the learning rate of step {following:,} is {rate:.2e}"
    if before is None:
        return first
    old_total = before.total_steps

    def old_rate(at: int) -> float:
        return learning_rate(before.optim, at, old_total)

    if following > old_total:
        return f"{first}; the old schedule ended with {old_rate(old_total):.2e} at step {old_total:,}"
    if not isclose(rate, old_rate(following)):
        return f"{first}, by the old schedule {old_rate(following):.2e}"
    for later in range(following, min(total, old_total) + 1):
        if not isclose(learning_rate(now.optim, later, total), old_rate(later)):
            new = learning_rate(now.optim, later, total)
            return f"{first} as before; step {later:,} has {new:.2e}, by the old schedule {old_rate(later):.2e}"
    return f"{first} as before, and so for all steps that both schedules have"


def _as_config(stored: dict[str, Any]) -> Config | None:
    """Return the stored configuration, None if another version wrote what this one does not accept."""
    try:
        return Config.model_validate(stored)
    except ValidationError:
        return None


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value)

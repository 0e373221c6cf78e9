"""The `model` section of a run that starts from another model: what the run file leaves out is that model's."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pretrain.config.model_section import InitFromSection, ModelSection, hf_class
from pretrain.config.schema import Config, load_config
from pretrain.errors import UserError
from pretrain.starting.source import Source, source_of

# The tokens are those of the run's tokenizer. A padding row of the embedding is not trained, so a run asks for it itself.
_OF_TOKENIZER = {"bos_token_id", "eos_token_id", "pad_token_id"}
_LAYERS = "num_hidden_layers"


def model_of(config: Config) -> Config:
    """Return the configuration with a complete `model` section if it starts from another model, else as it is.

    The section then names a model of the hub by its revision, and a checkpoint by its step. So the resolved configuration
    alone reproduces the run. A run that has begun does not need the other model any more: its sections are in its folder.

    Raises:
        UserError: the model cannot be found, is of another family, or does not fit what the run file says.
    """
    init_from, section = config.model.init_from, type(config.model)
    if init_from is None:
        return config
    given = _by_own_names(config.model)
    try:
        source = source_of(init_from.path)
        fields = fields_of(source, section, config.model.family)
    except UserError:
        begun = as_it_began(config)
        if begun is None:
            raise
        return config.model_copy(update={"model": section.model_validate({**begun.model_dump(), **given})})
    own = hf_class(config.model.family).attribute_map.get(_LAYERS, _LAYERS)
    fields[own] = _layers(source, fields[own], given.get(own), init_from.layers)
    merged = {**fields, **given}
    if "rope_parameters" in given:
        merged["rope_parameters"] = _rope(fields.get("rope_parameters", {}), given["rope_parameters"])
    try:
        section.model_validate({"family": config.model.family, **merged})  # which checks the sizes against each other
        complete = section.model_validate(
            {"family": config.model.family, "init_from": _named(source, init_from), **merged}
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'model'}: {fault['msg']}" for fault in error.errors())
        raise UserError(
            f"model.init_from: the configuration of {source.name}, with what the run file changes, cannot be trained here: "
            f"{faults}."
        ) from error
    return config.model_copy(update={"model": complete})


def as_it_began(config: Config) -> ModelSection | None:
    """Return the complete `model` section in the run's folder, None if it has not begun from the weights of this family."""
    path = config.folder / "config.yaml"
    if not path.is_file():
        return None
    stored = load_config(path).model
    return stored if stored.init_from is not None and stored.family == config.model.family else None


def fields_of(source: Source, section: type[ModelSection], family: str) -> dict[str, Any]:
    """Return the fields of the source's configuration that a run file may give, by their own names."""
    stored = source.model_config(family)
    older = {"rope_theta", "rope_scaling"}  # they are in rope_parameters
    names = section.model_fields.keys() - {"family", "init_from"} - _OF_TOKENIZER - older - stored.attribute_map.keys()
    found = {name: getattr(stored, name, None) for name in sorted(names)}
    if rope := found.get("rope_parameters"):
        found["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}  # rope_type, once more
    return {name: value for name, value in found.items() if value is not None}


def _by_own_names(section: ModelSection) -> dict[str, Any]:
    """Return what the run file gives, under the names of the family's configuration."""
    aliases = hf_class(section.family).attribute_map
    return {aliases.get(name, name): value for name, value in section.hf_fields.items()}


def _rope(theirs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the model's rotary positions with what the run file gives. Another type has other keys, but the same theta."""
    of_any_type = ("rope_theta", "partial_rotary_factor")
    kept = {key: value for key, value in theirs.items() if "rope_type" not in given or key in of_any_type}
    return {**kept, **given}


def _layers(source: Source, theirs: int, given: int | None, listed: tuple[int, ...] | None) -> int:
    """Return the number of blocks of the run's model."""
    if listed is None:
        if given not in (None, theirs):
            raise UserError(
                f"model.{_LAYERS} is {given}, and {source.name} has {theirs} blocks. Say which of them each block starts "
                "from: model.init_from: {path: ..., layers: [0, 0, 1, 1, ...]}."
            )
        return theirs
    if max(listed) >= theirs:
        raise UserError(
            f"model.init_from.layers names block {max(listed)}, and {source.name} has the blocks 0 to {theirs - 1}."
        )
    if given not in (None, len(listed)):
        raise UserError(
            f"model.init_from.layers lists {len(listed)} blocks, and model.{_LAYERS} is {given}. Make them agree."
        )
    return len(listed)


def _named(source: Source, init_from: InitFromSection) -> dict[str, Any]:
    return {"path": source.name, "layers": init_from.layers}

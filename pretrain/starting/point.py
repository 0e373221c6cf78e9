"""A starting point: which weights of a run are loaded, and whether the run can start from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pretrain.checkpoints.state import read_state
from pretrain.checkpoints.stored import StoredTensor
from pretrain.config.schema import Config
from pretrain.data import load_tokenizer
from pretrain.errors import UserError, first_line
from pretrain.methods.base import INITIAL_DEVIATIONS
from pretrain.model.layout import Weight
from pretrain.starting.hub import HUB
from pretrain.starting.model_of import as_it_began, fields_of
from pretrain.starting.names import tensors_of
from pretrain.starting.source import Source, source_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class StartingPoint:
    """The model that a run starts from, checked as far as its configuration and its tokenizer go.

    Attributes:
        source: the model.
        family: its family, and the run's.
        loaded: the weights that are loaded.
        layers: the block of the source for each block of the run; None: its own.
        tied: whether the source's head is its embedding.
        same_methods: the source is a checkpoint whose methods act in forward as this run's do, so its stored weights and
            the state of its methods are taken as they are. Else it is a plain model.
        notes: what a person should know, as clauses.
    """

    source: Source
    family: str
    loaded: Sequence[Weight]
    layers: tuple[int, ...] | None
    tied: bool
    same_methods: bool
    notes: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of the weights that are loaded."""
        return frozenset(weight.name for weight in self.loaded)

    def check_files(self) -> None:
        """Check what can be checked without fetching the weights of a model of the hub. UserError as in `tensors`."""
        if not self.source.name.startswith(HUB):
            self.tensors()

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the stored tensor of each loaded weight, by the name of the weight. Fetches a model of the hub.

        Raises:
            UserError: the files are damaged, or hold other weights than the run's.
        """
        return tensors_of(
            self.loaded,
            self.source.weights(),
            family=self.family,
            layers=self.layers,
            tied=self.tied,
            place=self.source.name,
        )

    def __str__(self) -> str:
        kind = "the same methods' weights" if self.same_methods else "weights"
        return "; ".join([f"unless it resumes: {kind} of {self.source.name}", *self.notes])


def starting_point(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    weights: Sequence[Weight],
    plain: Sequence[Weight],
    forward: str,
) -> StartingPoint:
    """Return where a run with `model.init_from` starts from.

    Args:
        config: the run, with a complete `model` section and bound methods.
        tokenizer: its tokenizer.
        weights: the weights of its model.
        plain: the weights of the same model without methods.
        forward: the digest of what its forward computes with, as checkpoints store it.

    Raises:
        UserError: the source's tokenizer or its methods do not fit this run's.
    """
    init_from, family = config.model.init_from, config.model.family
    assert init_from is not None
    try:
        source = source_of(init_from.path)
    except UserError as error:
        if as_it_began(config) is None:
            raise
        gone = Source(init_from.path, Path(init_from.path), missing=str(error))
        return StartingPoint(gone, family, plain, init_from.layers, False, False, ("which is not there any more",))
    same = _has_same_methods(source, forward, init_from.layers)
    for method in config.methods:
        if not (same and method.acts_in_forward()) and (reason := method.why_not_from_weights()):
            raise UserError(f"model.init_from: {reason}.")
    notes = [_tokens_in_common(source, tokenizer, config.tokenizer), *_differences(source, config)]
    if not same:
        factors = [method.name for method in config.methods if INITIAL_DEVIATIONS in method.decides]
        notes += [f"the initial values of {name} follow from them, not from its options" for name in factors]
    return StartingPoint(
        source=source,
        family=family,
        loaded=weights if same else plain,
        layers=init_from.layers,
        tied=bool(source.model_config(family).tie_word_embeddings),
        same_methods=same,
        notes=tuple(filter(None, notes)),
    )


def rule_in_words(weight: Weight, point: StartingPoint | None, config: Config) -> str | None:
    """Return where a weight's initial values come from, None where they are drawn."""
    if point is None:
        return None
    if weight.name in point.names:
        changed = config.warm_start if weight.fan_in else None
        return f"{changed.shrink:g} x model.init_from + N(0, {changed.noise:g}²)" if changed else "model.init_from"
    return "so that the loaded function stays" if weight.role == "scale" else None


def _has_same_methods(source: Source, forward: str, layers: tuple[int, ...] | None) -> bool:
    """Return whether the source's methods act in forward as the run's; False for a plain model. UserError for others."""
    run = source.run()
    acting = [method.name for method in run.methods if not method.leaves_weights_plain()] if run else []
    if not acting or source.checkpoint is None:
        return False
    names = ", ".join(acting)
    export = "Convert it (tools/convert_to_hf.py --dtype float32) and start from the export, which is a plain model"
    if layers is not None:
        raise UserError(
            f"model.init_from.layers: {source.name} was trained with {names}, whose stored weights and state belong to its own "
            f"blocks. {export}."
        )
    if read_state(source.checkpoint).forward != forward:
        raise UserError(
            f"model.init_from: {source.name} was trained with {names}, which change what the model computes with its stored "
            f"weights, and this run does not list the same methods with the same options. List them, or: {export}."
        )
    return True


def _tokens_in_common(source: Source, tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """Check that each token of the run's tokenizer is the same in the source's. Return a clause where that is not known."""
    if not any((source.folder / file).is_file() for file in _TOKENIZER_FILES):
        return "no tokenizer lies with them, so whether its tokens are this run's is not known"
    try:
        theirs = load_tokenizer(source.folder)
    except UserError as error:
        return f"whether its tokens are this run's is not known: {first_line(error)}"
    by_id = {number: token for token, number in theirs.get_vocab().items()}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if by_id.get(number) != token:
            there = f"{by_id[number]!r}" if number in by_id else "no token"
            raise UserError(
                f"model.init_from: token {number} is {token!r} in {name} and {there} in {source.name}, so its row of the "
                "embedding would stand for another text. Take the tokenizer that the model was trained with, and prepare the "
                "data with it."
            )
    return None


def _differences(source: Source, config: Config) -> list[str]:
    """Return a clause for each field of the configuration in which the run's model is another than the source."""
    theirs = fields_of(source, type(config.model), config.model.family)
    ours = config.model.hf_fields
    return [
        f"model.{name} is {ours.get(name)} instead of {theirs.get(name)}"
        for name in sorted(theirs.keys() | ours.keys())
        if ours.get(name) != theirs.get(name) and name not in ("bos_token_id", "eos_token_id", "pad_token_id")
    ]

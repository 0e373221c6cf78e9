"""The `model` section: the fields of a family's Hugging Face configuration, typed and bounded before anything is built.

The names and most types are transformers' own, which checks few of their values. Values that it accepts and cannot build,
or builds and ignores, are refused here. The older spelling of RoPE, `rope_theta` and `rope_scaling`, becomes
`rope_parameters`.

`init_from` names a model to start from. Fields that the run file leaves out are that model's (`pretrain/starting`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, create_model, field_validator, model_serializer, model_validator
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin

from pretrain.model.families import FAMILIES
from pretrain.paths import expanded
from pretrain.values import Positive, Share, Values, at

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def _known_rope_type(name: str) -> str:
    if name not in ROPE_TYPES:
        raise ValueError(f"there is no such rope type; there are: {', '.join(ROPE_TYPES)}")
    return name


RopeType = Annotated[str, AfterValidator(_known_rope_type)]
Factors = tuple[Positive, ...]


class RopeSection(Values):
    """Rotary positions, as in transformers. It decides which keys belong to a `rope_type`."""

    rope_type: RopeType | None = None
    type: RopeType | None = None
    rope_theta: float | None = Field(None, gt=1)
    partial_rotary_factor: float | None = Field(None, gt=0, le=1)
    factor: float | None = Field(None, ge=1)
    original_max_position_embeddings: int | None = Field(None, ge=2, le=2**31)
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if None not in (self.rope_type, self.type) and self.rope_type != self.type:
            raise at("type", f"'{self.type}' is not what rope_type says, '{self.rope_type}': keep rope_type alone")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            below, above = getattr(self, low), getattr(self, high)
            if None not in (below, above) and below >= above:
                raise at(high, f"{above:g} must be greater than {low} {below:g}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The keys as they were given, `type` under its present name."""
        keys = {key: value for key, value in self if value is not None}
        return {"rope_type" if key == "type" else key: value for key, value in keys.items()}


class _KeysOf(Exception):
    """The required and the optional keys of a rope type, as its two arguments."""


class _KeyFinder(RotaryEmbeddingConfigMixin):
    """transformers' check of RoPE parameters, which raises the keys that it is about to look for."""

    @staticmethod
    def _check_received_keys(
        rope_type: str,
        received_keys: set[str],
        required_keys: set[str],
        optional_keys: set[str] | None = None,
        ignore_keys: set[str] | None = None,
    ) -> None:
        raise _KeysOf(required_keys, optional_keys or set())


@cache
def rope_keys(rope_type: str) -> tuple[set[str], set[str]]:
    """Return the keys that `rope_parameters` of this type must have, and those that it may have."""
    try:
        getattr(_KeyFinder(), f"_validate_{rope_type}_rope_parameters")({"rope_type": rope_type})
    except _KeysOf as keys:
        required, optional = keys.args
    return required, optional | ({"partial_rotary_factor"} if rope_type == "proportional" else set())


_ACTIVATIONS = tuple(sorted(ACT2FN.keys() - {"prelu", "xielu"}))  # these two train weights that have no initial rule


def _known_activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"there is no such activation here; there are: {', '.join(_ACTIVATIONS)}")
    return name


Size = Annotated[int, Field(gt=0, le=2**24)]
Length = Annotated[int, Field(gt=0, le=2**31)]
TokenId = Annotated[int, Field(ge=0)]
Activation = Annotated[str, AfterValidator(_known_activation)]

# The types of fields for which transformers has none, or none that is narrow enough.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim"), Size),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), Size),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), Annotated[int, Field(gt=0, le=4096)]),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), Length),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), TokenId),
    "eos_token_id": TokenId | tuple[TokenId, ...],
    **dict.fromkeys(("hidden_act", "activation_function"), Activation),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), Annotated[float, Field(gt=0, lt=1)]),
    "initializer_range": Annotated[float, Field(ge=0, le=1)],
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), Share),
    "rope_parameters": RopeSection,
    "sliding_window": Length,
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        Annotated[float, Field(ge=1e-6, le=1e6)],
    ),
    "max_window_layers": Annotated[int, Field(ge=0, le=4096)],
    # Other values would be built and never trained, or have no effect.
    "pretraining_tp": Annotated[int, Field(ge=1, le=1)],
    "add_cross_attention": Literal[False],
    "reorder_and_upcast_attn": Literal[False],
}
_OURS = ("family", "init_from")  # keys that are no field of the family's configuration
_OLDER_ROPE = {"rope_theta": Annotated[float, Field(gt=1)], "rope_scaling": RopeSection}


def _place_of_a_model(path: str) -> str:
    path = expanded(path)
    if "://" in path and not re.fullmatch(r"hf://([\w.\-]+/)?[\w.\-]+(@[\w.\-/]+)?", path):
        raise ValueError("is no place of a model: give a folder, or hf://owner/name, with @revision if it must be one")
    return path


class InitFromSection(Values):
    """The model whose weights a run starts from.

    Attributes:
        path: A Hugging Face folder with safetensors, a checkpoint of another run, or `hf://owner/name[@revision]`.
        layers: The model's block (counted from 0) that each block of this run starts from: [0, 0, 1, 1] doubles two blocks.
            Null: each from its own.
    """

    path: Annotated[str, AfterValidator(_place_of_a_model)]
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @field_validator("layers")
    @classmethod
    def _some(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given == ():
            raise ValueError("names no block: list one for each block of this run, or leave the key out")
        return given

    @model_serializer
    def _as_it_was_given(self) -> str | dict[str, Any]:
        return self.path if self.layers is None else {"path": self.path, "layers": list(self.layers)}


class ModelSection(Values):
    """The model: its family, and the fields of that family's Hugging Face configuration under their own names.

    Fields without a meaning here mean what they mean in transformers.

    Attributes:
        family: The kind of model.
        init_from: The model whose weights the run starts from: its path, or a mapping. Null: weights are drawn.
        vocab_size: If not set, the tokenizer's.
        max_position_embeddings: If not set, `data.seq_len`.
        rope_theta: Of older configurations. It is taken into `rope_parameters`.
        rope_scaling: Of older configurations. It is taken into `rope_parameters`.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {
        "model_type": "it is called 'family' here",
        "architectures": "leave it out: the class follows from 'family' and the methods",
        "transformers_version": "leave it out",
        "_name_or_path": "'init_from' names a model to start from",
        "torch_dtype": "leave it out: the DeepSpeed file says the precision, in its 'bf16' or 'fp16' block",
        "dtype": "leave it out: the DeepSpeed file says the precision, in its 'bf16' or 'fp16' block",
        "layer_types": "leave it out: use_sliding_window and max_window_layers say which layers have a window",
        "n_ctx": "did you mean 'model.n_positions'?",
    }

    family: str
    init_from: InitFromSection | None = None
    if TYPE_CHECKING:  # fields of the families with rotary positions: see `family_section`
        rope_theta: float | None = None
        rope_parameters: RopeSection | None = None
        rope_scaling: RopeSection | None = None

    @property
    def hf_fields(self) -> dict[str, Any]:
        """The fields that the run file set (null leaves the default), for the family's Hugging Face configuration."""
        return {key: _plain(value) for key, value in self if key not in _OURS and value is not None}

    @model_serializer
    def _only_what_was_set(self) -> dict[str, Any]:
        start = {"init_from": self.init_from.model_dump()} if self.init_from else {}
        return {"family": self.family, **start, **self.hf_fields}

    @field_validator("init_from", mode="before")
    @classmethod
    def _a_path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @field_validator("eos_token_id", mode="before", check_fields=False)
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        several = given if isinstance(given, tuple) and given else (given,)
        if given is not None and not all(type(one) is int and one >= 0 for one in several):
            raise ValueError("give one token id, or a list of them, from 0 on")
        return given

    @model_validator(mode="after")
    def _that_can_be_built(self) -> Self:
        result = self._with_one_spelling_of_rope() if "rope_scaling" in type(self).model_fields else self
        faults = [result._spelt_twice()]
        if result.init_from is None:  # else the other fields are those of a model that has not been read yet
            faults += [*result._shapes_that_do_not_fit(), result._rope_that_does_not_work()]
        for fault in faults:
            if fault is not None:
                raise fault
        return result

    def _with_one_spelling_of_rope(self) -> Self:
        """Merge the older keys into `rope_parameters`."""
        older = {"rope_theta": self.rope_theta} if self.rope_theta else {}
        spellings = {"rope_parameters": self.rope_parameters, "rope_scaling": self.rope_scaling}
        merged: dict[str, Any] = {}
        for key, given in [*((key, rope.given) for key, rope in spellings.items() if rope), ("rope_theta", older)]:
            for name, value in given.items():
                if merged.setdefault(name, value) != value:
                    raise at(
                        key, f"says {name} {value}, and rope_parameters or rope_scaling says {merged[name]}: keep one"
                    )
        if not self.rope_scaling and not older:
            return self
        rope = RopeSection(**merged) if merged else None
        return self.model_copy(update={"rope_parameters": rope, "rope_scaling": None, "rope_theta": None})

    def _spelt_twice(self) -> Exception | None:
        """Return an error for a field that is given under two names."""
        for alias, name in hf_class(self.family).attribute_map.items():
            if {alias, name} <= self.hf_fields.keys():
                return at(alias, f"is another name of '{name}', which is given too: keep one of them")
        return None

    def _shapes_that_do_not_fit(self) -> list[Exception]:
        """Return an error for each size that does not divide another as it must."""
        hidden, heads = self._value("hidden_size"), self._value("num_attention_heads")
        key_value_heads = self._value("num_key_value_heads") or heads
        faults: list[Exception] = []
        if hidden % heads:
            key = self._spelling("num_attention_heads" if self._is_set("num_attention_heads") else "hidden_size")
            faults.append(at(key, f"the {heads} attention heads do not divide hidden_size {hidden}"))
        if heads % key_value_heads:
            faults.append(at("num_key_value_heads", f"{key_value_heads} does not divide num_attention_heads {heads}"))
        return faults

    def _rope_that_does_not_work(self) -> Exception | None:
        """Return an error for rotary positions that transformers would not build, or not as they are written."""
        if "rope_parameters" not in type(self).model_fields:
            return None
        head_dim = self._value("head_dim") or self._value("hidden_size") // self._value("num_attention_heads")
        if head_dim % 2:
            key = "head_dim" if self._is_set("head_dim") else self._spelling("hidden_size")
            return at(key, f"rotary positions need heads of an even size, not {head_dim}")
        given = self.rope_parameters.given if self.rope_parameters else {}
        kind = given.get("rope_type", "default")
        required, optional = rope_keys(kind)
        filled = {"rope_type", "rope_theta"} | ({"original_max_position_embeddings"} & required)
        if missing := required - given.keys() - filled:
            return at("rope_parameters", f"rope_type {kind} needs {', '.join(sorted(missing))}")
        if extra := given.keys() - required - optional:
            takes = ", ".join(sorted((required | optional) - {"rope_type"}))
            return at("rope_parameters", f"rope_type {kind} does not take {', '.join(sorted(extra))}, only: {takes}")
        for key in ("short_factor", "long_factor"):
            if len(given.get(key, ())) not in (0, head_dim // 2) or given.get(key) == ():
                return at("rope_parameters", f"{key} needs one number for each of the {head_dim // 2} frequencies")
        if kind == "dynamic" and head_dim == 2:
            return at("rope_parameters", "rope_type dynamic needs heads larger than 2")
        return None

    def _value(self, name: str) -> Any:
        """Return the value of a field, by its standard name. If it is not set, return transformers' default."""
        given, own = getattr(self, self._spelling(name), None), hf_class(self.family).attribute_map.get(name, name)
        return getattr(hf_class(self.family), own, None) if given is None else given

    def _is_set(self, name: str) -> bool:
        return getattr(self, self._spelling(name), None) is not None

    def _spelling(self, name: str) -> str:
        """Return the name that the run file uses for a field, else the family's own."""
        own = hf_class(self.family).attribute_map.get(name, name)
        return name if getattr(self, name, None) is not None else own


def _plain(value: Any) -> Any:
    """Return a value as the lists and mappings that transformers and YAML use."""
    if isinstance(value, RopeSection):
        return {key: _plain(item) for key, item in value.given.items()}
    return list(value) if isinstance(value, tuple) else value


@cache
def hf_class(family: str) -> type[PreTrainedConfig]:
    """Return the class of the family's Hugging Face configuration."""
    return FAMILIES[family].config_class


def family_section(family: str) -> type[ModelSection]:
    """Return a `ModelSection` whose keys are the fields of the family's Hugging Face configuration."""
    config_class = hf_class(family)
    theirs = {field.name: field.type for field in dataclasses.fields(config_class)}
    names = theirs.keys() - {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names |= config_class.attribute_map.keys() | {"tie_word_embeddings", "bos_token_id", "eos_token_id"}
    names -= {"layer_types"}
    types: dict[str, Any] = {name: _TYPES.get(name) or theirs[name] for name in names}
    if "rope_parameters" in names:
        types |= _OLDER_ROPE
    fields: dict[str, Any] = {name: (types[name] | None, None) for name in sorted(types)}
    fields["family"] = (Literal[family], family)
    return create_model(f"{family}_model", __base__=ModelSection, **fields)

"""The `optim` section: keys that all optimizers share, and a section for each optimizer that has options of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, create_model, model_validator

from pretrain.optimizers import OPTIMIZERS
from pretrain.values import Positive, Share, Values, at

Rate = Annotated[float, Field(gt=0, le=100)]


class ScheduleSection(Values):
    """The learning rate over the run: see `pretrain.optim.schedule.learning_rate`.

    Attributes:
        name: The curve after warmup.
        warmup_steps: Steps over which the rate rises linearly to `optim.lr`.
        min_lr_ratio: The lowest rate, as a share of `optim.lr`.
        decay_ratio: The share of the run that decays at the end. Only with name `wsd`.
    """

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    decay_ratio: float = Field(0.2, gt=0, le=1)


class ZClipSection(Values):
    """Clipping that adapts to the run (ZClip, Kumar et al. 2025, arXiv 2504.02507, algorithm 1).

    Attributes:
        z_threshold: Standard deviations above the mean gradient norm from which the norm is clipped.
        alpha: Decay of the running mean and variance.
        warmup_steps: First steps, unclipped, from which mean and variance are computed.
    """

    z_threshold: Positive = 2.5
    alpha: float = Field(0.97, gt=0, lt=1)
    warmup_steps: int = Field(25, ge=2)


if TYPE_CHECKING:
    OptimizerName: TypeAlias = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


class _OptimKeys(Values):
    """The keys of `optim` that come before the sections of the optimizers. See `OptimSection`."""

    name: OptimizerName = "adamw"
    lr: Rate
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: Positive | None = 1.0
    zclip: ZClipSection | None = None

    @property
    def own(self) -> Any:
        """The options of the run's optimizer, None where it has none."""
        return getattr(self, self.name, None)


if TYPE_CHECKING:
    _WithOwnSections: TypeAlias = _OptimKeys
else:
    _OWN = {each.name: each.options for each in OPTIMIZERS.values() if each.options}
    _WithOwnSections = create_model(
        "_WithOwnSections", __base__=_OptimKeys, **{name: (options, options()) for name, options in _OWN.items()}
    )


class OptimSection(_WithOwnSections):
    """The optimizer. Each one that has options of its own has a section of its name here, which counts with that name only.

    Attributes:
        name: The optimizer: a file of `pretrain/optimizers/`.
        lr: Peak learning rate.
        betas: Decay rates of its moments: AdamW's of the two, Lion's of what it steps by and of what it keeps.
        eps: AdamW's term in the denominator.
        weight_decay: Weight decay per unit of learning rate, of matrices only.
        grad_clip: Largest global gradient norm. Null: off.
        zclip: Clipping by the run's own gradient norms, after `grad_clip`. Null: off.
        muon: Muon's options. Only with name `muon`.
        schedule: The learning rate over the run.
    """

    schedule: ScheduleSection = ScheduleSection()

    @model_validator(mode="after")
    def _decay_that_shrinks(self) -> OptimSection:
        for key, lr, decay in OPTIMIZERS[self.name].decays(self):
            if lr * decay >= 1:
                raise at(
                    key,
                    f"{decay:g} times the learning rate {lr:g} must be below 1: a step takes that share of a weight",
                )
        return self

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> OptimSection:
        fields = type(self).model_fields
        for other in OPTIMIZERS.values():
            if other.options and other.name != self.name and getattr(self, other.name) != other.options():
                raise ValueError(
                    f"the keys of '{other.name}' have no effect here: set 'name: {other.name}', or remove them"
                )
        for key in OPTIMIZERS[self.name].unused:
            if getattr(self, key) != fields[key].default:
                raise at(key, f"it has no effect with 'name: {self.name}': remove the key")
        for fault in OPTIMIZERS[self.name].faults(self):
            raise ValueError(fault)
        return self

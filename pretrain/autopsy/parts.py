"""The figures of the parts of a model, step by step, and which of them moved most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log, sqrt
from statistics import median

from pretrain.autopsy.recorder import Figures, Norms
from pretrain.model.layout import Weight

Series = dict[str, list[float | None]]  # by part: its figure at each step, None where it is not known


@dataclass(frozen=True)
class Measure:
    """One kind of figure of all parts. backward: whether what is not finite spreads from the head down."""

    name: str
    plural: str
    series: Series
    backward: bool = False


@dataclass(frozen=True)
class Move:
    """How far one part is from where it was.

    before: the median of the steps before, over what was finite and not 0, as updates left out are; None if nothing was.
    """

    part: str
    now: float
    before: float | None

    @property
    def times(self) -> float:
        """How many times `before` it is; not finite where either is nothing to compare."""
        return self.now / self.before if self.before else inf

    @property
    def size(self) -> float:
        """The more, the further it has moved, up or down."""
        if not isfinite(self.now):
            return inf
        return abs(log(self.times)) if self.before and self.now else 0.0


def measures(steps: Sequence[Figures], layout: dict[str, Weight]) -> list[Measure]:
    """Gradient norms, update ratios and activations of the embedding, each block, final norm and head."""
    members: dict[str, list[str]] = {}
    for weight in layout.values():
        members.setdefault(part_of(weight), []).append(weight.name)
    norms = {part: [[step.norms[name] for name in names] for step in steps] for part, names in members.items()}
    gradients = {part: [_length(of.gradient for of in each) for each in series] for part, series in norms.items()}
    ratios = {part: [update_ratio(each) for each in series] for part, series in norms.items()}
    activations = zip(*(step.activations for step in steps), strict=True)
    largest = {f"layer {layer}": list(series) for layer, series in enumerate(activations, start=1)}
    return [
        Measure("gradient norm", "gradient norms", gradients, backward=True),
        Measure("update ratio", "update ratios", ratios),
        Measure("largest activation", "largest activations", largest),
    ]


def part_of(weight: Weight) -> str:
    """`layer 7` for what is in a block, else the name of the weight's module: `embed_tokens`, `norm`, `lm_head`."""
    return f"layer {weight.layer}" if weight.layer else weight.name.split(".")[-2]


def update_ratio(norms: Iterable[Norms]) -> float | None:
    """The length of the step of some weights together against their own."""
    norms = list(norms)
    step, weight = _length(of.step for of in norms), _length(of.weight for of in norms)
    return step / weight if step and weight else step


def moves(measure: Measure) -> list[Move]:
    """Of the parts whose figure is known now, those that moved most first."""
    found = []
    for part, series in measure.series.items():
        *before, now = series
        real = [value for value in before if value and isfinite(value)]
        if now is not None:
            found.append(Move(part, now, median(real) if real else None))
    return sorted(found, key=lambda move: -move.size)


def _length(lengths: Iterable[float | None]) -> float | None:
    """Of all parts of a vector together; None if one of them is not known."""
    lengths = list(lengths)
    return None if None in lengths else sqrt(sum(length**2 for length in lengths))

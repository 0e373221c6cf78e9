"""The figures of the parts of a model at each step, and the parts that moved most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log, sqrt
from statistics import median

from pretrain.autopsy.recorder import Norms, StepFigures
from pretrain.model.layout import Weight

Series = dict[str, list[float | None]]  # the figure of each part at each step, None if it is not known


@dataclass(frozen=True)
class Measure:
    """One kind of figure, of all parts.

    Attributes:
        backward: whether values that are not finite spread from the head down.
    """

    name: str
    plural: str
    series: Series
    backward: bool = False


@dataclass(frozen=True)
class Move:
    """The distance of one part from where it was.

    Attributes:
        before: the median of the steps before, over values that are finite and not 0. (A skipped update is 0.) None if
            there are none.
    """

    part: str
    now: float
    before: float | None

    @property
    def times(self) -> float:
        """The ratio of `now` to `before`. Not finite if one of them cannot be compared."""
        return self.now / self.before if self.before else inf

    @property
    def size(self) -> float:
        """A number that grows with the distance, up or down."""
        if not isfinite(self.now):
            return inf
        return abs(log(self.times)) if self.before and self.now else 0.0


def measures(steps: Sequence[StepFigures], layout: dict[str, Weight]) -> list[Measure]:
    """Return gradient norms, update ratios and activations of the embedding, each block, the final norm and the head."""
    members: dict[str, list[str]] = {}
    for weight in layout.values():
        members.setdefault(part_of(weight), []).append(weight.name)
    norms = {part: [[step.norms[name] for name in names] for step in steps] for part, names in members.items()}
    gradients = {part: [length(of.gradient for of in each) for each in series] for part, series in norms.items()}
    ratios = {part: [update_ratio(each) for each in series] for part, series in norms.items()}
    activations = zip(*(step.activations for step in steps), strict=True)
    largest = {f"layer {layer}": list(series) for layer, series in enumerate(activations, start=1)}
    return [
        Measure("gradient norm", "gradient norms", gradients, backward=True),
        Measure("update ratio", "update ratios", ratios),
        Measure("largest activation", "largest activations", largest),
    ]


def part_of(weight: Weight) -> str:
    """Return `layer 7` for a weight in a block, else the name of its module: `embed_tokens`, `norm`, `lm_head`."""
    return f"layer {weight.layer}" if weight.layer else weight.name.split(".")[-2]


def update_ratio(norms: Iterable[Norms]) -> float | None:
    """Return the length of the step of some weights together over that of the weights. None if it is not known."""
    norms = list(norms)
    step, weight = length(of.step for of in norms), length(of.weight for of in norms)
    return step / weight if step and weight else step


def moves(measure: Measure) -> list[Move]:
    """Return the moves of the parts whose figure is known now, the largest first."""
    found = []
    for part, series in measure.series.items():
        *before, now = series
        real = [value for value in before if value and isfinite(value)]
        if now is not None:
            found.append(Move(part, now, median(real) if real else None))
    return sorted(found, key=lambda move: -move.size)


def length(lengths: Iterable[float | None]) -> float | None:
    """Return the length of a vector from those of its parts. None if one of them is not known."""
    total = 0.0
    for part in lengths:
        if part is None:
            return None
        total += part**2
    return sqrt(total)

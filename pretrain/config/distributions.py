"""The `init` section of a run: the distribution that matrices are drawn from, and their standard deviations by role."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from pretrain.sharded.draws import Draw, GeneralizedGaussian, Normal, TruncatedNormal, Uniform
from pretrain.values import Values

Deviation = Annotated[float, Field(ge=0, le=1e4)]


class DeviationsSection(Values):
    """Standard deviations by role, as a paper's table has them. Roles that are left out have `model.initializer_range`.

    Attributes:
        embed: Of the embedding, also where the head shares its matrix.
        position: Of learned positions.
        q: Of the queries' matrices.
        k: Of the keys'.
        v: Of the values'.
        qkv: Of the one matrix that holds all three in a gpt2.
        o: Of attention's output.
        gate: Of the MLP's gate.
        up: Of the MLP's input.
        down: Of the MLP's output.
        head: Of a head with a matrix of its own.
    """

    embed: Deviation | None = None
    position: Deviation | None = None
    q: Deviation | None = None
    k: Deviation | None = None
    v: Deviation | None = None
    qkv: Deviation | None = None
    o: Deviation | None = None
    gate: Deviation | None = None
    up: Deviation | None = None
    down: Deviation | None = None
    head: Deviation | None = None

    @property
    def given(self) -> dict[str, float]:
        """The deviations that the run file gives, by role."""
        return {role: std for role, std in self if std is not None}


class Init(Values, ABC):
    """A distribution, and standard deviations of its own where the run file gives any.

    Attributes:
        std: Standard deviations by role.
    """

    std: DeviationsSection | None = None

    @property
    def deviations(self) -> dict[str, float]:
        """The standard deviations that the run file gives, by role."""
        return self.std.given if self.std else {}

    @abstractmethod
    def draw(self, std: float) -> Draw:
        """Return the distribution with standard deviation `std`."""


class NormalInit(Init):
    """Normal values."""

    distribution: Literal["normal"] = "normal"

    def draw(self, std: float) -> Draw:
        return Normal(std)


class TruncatedNormalInit(Init):
    """Normal values without the tails.

    Attributes:
        bound: Where the normal is cut, in its deviations before the cut. The weight's deviation is corrected for the cut.
    """

    distribution: Literal["truncated_normal"]
    bound: float = Field(3.0, ge=0.5, le=10)

    def draw(self, std: float) -> Draw:
        return TruncatedNormal(std, self.bound)


class UniformInit(Init):
    """Uniform values."""

    distribution: Literal["uniform"]

    def draw(self, std: float) -> Draw:
        return Uniform(std)


class GeneralizedGaussianInit(Init):
    """Values whose density is proportional to exp(-(|x| / scale)^shape).

    Attributes:
        shape: 2 is the normal, 1 is Laplace's. Smaller values have heavier tails, larger ones approach the uniform.
    """

    distribution: Literal["generalized_gaussian"]
    shape: float = Field(2.0, ge=0.5, le=100)

    def draw(self, std: float) -> Draw:
        return GeneralizedGaussian(std, self.shape)


AnyInit = Annotated[
    NormalInit | TruncatedNormalInit | UniformInit | GeneralizedGaussianInit, Field(discriminator="distribution")
]

"""The `init` section of a run: the distribution that matrices are drawn from. Methods decide its standard deviation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from pretrain.sharded.draws import Draw, GeneralizedGaussian, Normal, TruncatedNormal, Uniform
from pretrain.values import Values


class Init(Values, ABC):
    """A distribution without its standard deviation."""

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

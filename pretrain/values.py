"""Values that a run file may hold: the base of every section, and the types that sections share.

YAML and Python convert values freely: true is 1, "1e-3" is 0.001, infinity is a number. A run that started with such a value
would fail later or mean something else. `Values` refuses them all, so that a new key is safe once it is declared.
"""

from __future__ import annotations

from math import isqrt
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pretrain.paths import expanded, local

_LARGEST_INTEGER = 2**63 - 1  # in an int64 tensor
_SMALLEST_FLOAT, _LARGEST_FLOAT = 2.0**-126, 3.4e38  # in float32; smaller ones, subnormal, count as zero on GPUs


class Values(BaseModel):
    """A mapping of a run file. It is frozen, unknown keys are errors, and every value has the type of its field.

    Numbers are finite and fit into 64 bits (int) or float32. Booleans and texts are no numbers, numbers no texts. A whole
    number may be written 1e9. Lists become tuples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_python_has_it(cls, given: Any) -> Any:
        return {key: _converted(value) for key, value in given.items()} if isinstance(given, dict) else given

    @field_validator("*")
    @classmethod
    def _within_reach(cls, value: Any) -> Any:
        for number in value if isinstance(value, tuple) else (value,):
            _check_reach(number)
        return value


def _converted(given: Any) -> Any:
    """Return lists as tuples, and whole floats as integers, which pydantic takes for either type."""
    if isinstance(given, list):
        return tuple(map(_converted, given))
    if isinstance(given, float) and abs(given) <= _LARGEST_INTEGER and given.is_integer():
        return int(given)
    return given


def _check_reach(number: Any) -> None:
    """Raise ValueError if it is a number that tensors cannot hold."""
    if isinstance(number, int) and abs(number) > _LARGEST_INTEGER:
        raise ValueError("is larger than a 64-bit integer can be")
    if isinstance(number, float) and abs(number) > _LARGEST_FLOAT:
        raise ValueError("is too large for float32")
    if isinstance(number, float) and 0 < abs(number) < _SMALLEST_FLOAT:
        raise ValueError("is so small that float32 takes it for zero")


def at(key: str, message: str) -> PydanticCustomError:
    """Return an error that a section's validator raises about one of its keys."""
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message})


# Expanded when the run file is read, so that the resolved configuration holds the full path.
LocalPath = Annotated[str, AfterValidator(local)]
Location = Annotated[str, AfterValidator(expanded)]

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of a `number` that lies nearest to what was `wanted`, the smaller of two."""
    divisors = {d for small in range(1, isqrt(number) + 1) if number % small == 0 for d in (small, number // small)}
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))

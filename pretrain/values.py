"""What a value of a run file may be: the base of every section, the types that sections share, and how paths are read.

YAML and Python are lenient about what a value is (true is 1, "1e-3" is 0.001, infinity is a number), and a run that
started so would end later or mean something else. `Values` refuses all of it, so that a new key is safe as it is declared.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

_LARGEST_INTEGER = 2**63 - 1  # of an int64 tensor
_LARGEST_FLOAT = 3.4e38  # of float32
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes; Linux takes 255 and 4,095, and files are made below the path
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]+://")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(.*?)\})", re.ASCII)


class Values(BaseModel):
    """A mapping of a run file: frozen, unknown keys are errors, and every value is of the type that its field says.

    Numbers are finite and fit into 64 bits (int) or float32; booleans and texts are no numbers, numbers no texts; a whole
    number may be written 1e9. Lists are tuples.
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
    """Lists as tuples, and whole floats as integers, which pydantic takes for either."""
    if isinstance(given, list):
        return tuple(map(_converted, given))
    if isinstance(given, float) and abs(given) <= _LARGEST_INTEGER and given.is_integer():
        return int(given)
    return given


def _check_reach(number: Any) -> None:
    """ValueError if it is a number that tensors cannot hold."""
    if isinstance(number, int) and abs(number) > _LARGEST_INTEGER:
        raise ValueError("is larger than a 64-bit integer can be")
    if isinstance(number, float) and abs(number) > _LARGEST_FLOAT:
        raise ValueError("is too large for float32")


def at(key: str, message: str) -> PydanticCustomError:
    """An error of a section's validator that is about one of its keys."""
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message})


def expanded(path: str) -> str:
    """`path` with $VAR, ${VAR} and a leading ~ or ~user filled in; a URL as it is.

    Raises ValueError, a sentence, where something is undefined or empty, or the path is none that a file system takes.
    """
    if _URL.match(path):
        return path
    path = os.path.expanduser(_VARIABLE.sub(_variable, path))
    if path.startswith("~"):
        raise ValueError(f"{path.split('/')[0]} stands for a home folder, and there is none: write the path out")
    if not path:
        raise ValueError("is empty: give a path")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        raise ValueError("holds a control character")
    for name in path.split("/"):
        check_name(name)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"is longer than the {_LONGEST_PATH:,} bytes that file systems take")
    return path


def check_name(name: str) -> str:
    """`name`, or ValueError if no file can have it because it is too long."""
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise ValueError(f"'{name[:20]}...' is longer than the {_LONGEST_NAME} bytes that file systems take")
    return name


def _variable(found: re.Match) -> str:
    name = found[1] or found[2]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{found[0]} is no variable: only $NAME and ${{NAME}} are filled in")
    if not (value := os.environ.get(name)):
        raise ValueError(
            f"${name} is {'empty' if name in os.environ else 'not set'} here: set it, or write the path out"
        )
    return value


def _local(path: str) -> str:
    path = expanded(path)
    if _URL.match(path):
        raise ValueError("is a URL; give a folder or file that this machine can open")
    return path


def _can_be_expanded(path: str) -> str:
    _local(path)
    return path


# Expanded as the run file is read, so that the resolved configuration says what was meant.
LocalPath = Annotated[str, AfterValidator(_local)]
Location = Annotated[str, AfterValidator(expanded)]
# Expanded where it is used (`expanded`), because it may be another folder on each node: checked, but kept as written.
NodePath = Annotated[str, AfterValidator(_can_be_expanded)]

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

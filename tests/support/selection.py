"""Which cases of a table are run: some are left to the slow tests, and a fixture runs no case that no test asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def slow_but(fast: Collection[str], cases: Iterable[str]) -> list[Any]:
    """Return pytest's parameters of all cases. Those that are not in `fast` are marked slow."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def asked_for(request: pytest.FixtureRequest, cases: Mapping[str, T], **others: object) -> dict[str, T]:
    """Return the cases that tests of the fixture's file ask for in this session.

    Args:
        request: of the fixture that runs the cases.
        cases: by name. A test asks for one with its parameter `name` or `case`.
        others: further parameters that such a test has, with their values.
    """
    asked = set()
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            given = item.callspec.params
            if all(given.get(key) == value for key, value in others.items()):
                asked.add(given.get("name", given.get("case")))
    return {name: case for name, case in cases.items() if name in asked}

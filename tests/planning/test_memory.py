"""The memory that is predicted for a rank against that of real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.plan import CASES, measure_plan
from tests.support.runs import ENVIRONMENT

FAST = [
    "llama, ZeRO-0, fp32",
    "llama, ZeRO-1, bf16",
    "llama, ZeRO-3, bf16",
    "llama, ZeRO-2, bf16, full",
    "gpt2, ZeRO-3, bf16",
]


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        yield


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("names", [FAST, pytest.param([*CASES], marks=pytest.mark.slow)], ids=["few", "all"])
def test_memory_is_as_predicted(names: list[str]) -> None:
    measured = measure_plan(names)
    assert [row["name"] for row in measured] == names
    for row in measured:
        for part, tolerance in {"states": 1e-3, "kept": 0.05}.items():
            figures = row[part]
            assert figures["predicted"] == pytest.approx(figures["measured"], rel=tolerance), (row["name"], part)

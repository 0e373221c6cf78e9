"""Imports between the parts of the package point one way: from a floor to the floors below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY

# From the ground up. A part is a folder or a module of pretrain/. It may import what stands below it, and nothing beside it.
FLOORS = (
    {"credentials", "quiet", "startup"},
    {"errors", "paths"},
    {"distributed", "files", "processes", "values"},
    {"data", "model", "optional"},
    {"evaluation", "sharded"},
    {"methods", "optimizers"},
    {"config"},
    {"monitor", "optim"},
    {"autopsy", "checkpoints", "report", "resilience"},
    {"starting"},
    {"engine"},
    {"planning"},
    {"export", "trainer"},
    {"cluster", "gpu_check"},
    {"cli"},
    {"train"},
)
# Narrower than the floors: the only parts that these may import.
ONLY = {
    "data": {"credentials", "errors", "files", "paths", "processes"},
    "report": {"errors", "files", "model", "monitor"},
    "sharded": {"errors", "model"},
    "methods": {"errors", "model", "sharded", "values"},
    "optimizers": {"model", "values"},
}
# `distributed` starts its process groups and `optimizers` takes its Muon; the others also reach into its private state.
DEEPSPEED = {"checkpoints", "distributed", "engine", "optimizers", "sharded"}

PACKAGE = REPOSITORY / "pretrain"
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, with dots; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def arrows() -> Iterator[tuple[Path, str]]:
    """Yield each file with each other part of the package that it imports."""
    for path in FILES:
        parts = {name.split(".")[1] for name in imported(path) if name.startswith("pretrain.")} & set(FLOOR_OF)
        yield from ((path, part) for part in sorted(parts - {part_of(path)}))


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} == set(FLOOR_OF)


def test_no_import_points_up_or_sideways() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports pretrain.{part}"
        for path, part in arrows()
        if FLOOR_OF[part] >= FLOOR_OF[part_of(path)]
    ]
    assert not wrong


@pytest.mark.parametrize("part", ONLY)
def test_some_parts_know_few_others(part: str) -> None:
    assert {known for path, known in arrows() if part_of(path) == part} <= ONLY[part]


def test_the_package_imports_neither_benchmarks_nor_tests_nor_tools() -> None:
    outside = {name.split(".")[0] for path in FILES for name in imported(path)} & {"benchmarks", "tests", "tools"}
    assert not outside


def test_deepspeed_is_behind_few_doors() -> None:
    users = {part_of(path) for path in FILES for name in imported(path) if name.split(".")[0] == "deepspeed"}
    assert users <= DEEPSPEED


def test_an_import_that_points_up_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "upward.py"
    file.write_text("def f():\n    from pretrain.trainer import plan\n", encoding="utf-8")
    assert "pretrain.trainer.plan" in set(imported(file))

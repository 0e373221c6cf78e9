"""The runs that the tests over the registry use, started once."""

from collections.abc import Callable

import pytest

from pretrain.methods import REGISTRY
from tests.support.method_suite import METHODS, Case, Run, Runs, cases_of, is_slow


class Lazily:
    """Cases on two ranks, started when one of them is first asked for, together with those of its group."""

    def __init__(self, groups: list[list[Case]], start: Callable[[list[Case]], Runs]) -> None:
        self.groups, self.start = groups, start
        self.started: dict[int, Runs] = {}

    def run(self, name: str) -> Run:
        number = next(n for n, cases in enumerate(self.groups) if any(case.name == name for case in cases))
        if number not in self.started:
            self.started[number] = self.start(self.groups[number])
        return self.started[number].run(name)


@pytest.fixture(scope="session")
def on_two(corpus, tmp_path_factory) -> Lazily:
    def start(cases: list[Case]) -> Runs:
        return Runs(cases, 2, corpus, tmp_path_factory.mktemp("two_ranks"))

    every = [case for method in METHODS for case in cases_of(method)]
    plain = [case for case in every if case.label == "zero3"]
    variants = [case for case in every if case not in plain and not is_slow(case.methods[0], case.label)]
    slow = [
        [case for case in every if case.stage == stage and is_slow(case.methods[0], case.label)] for stage in range(4)
    ]
    return Lazily([plain, variants, *slow], start)


@pytest.fixture(scope="session")
def cut_in_two(corpus, tmp_path_factory) -> Lazily:
    """Return the cases on two tensor-parallel ranks."""

    def start(cases: list[Case]) -> Runs:
        return Runs(cases, 2, corpus, tmp_path_factory.mktemp("cut_in_two"))

    cases = [Case((method,), "cut", stage=1, tensor=2) for method in METHODS if REGISTRY[method].tensor_parallel]
    fast = [case for case in cases if not is_slow(case.methods[0], case.label)]
    return Lazily([fast, [case for case in cases if case not in fast]], start)


@pytest.fixture(scope="session")
def sliced(corpus, tmp_path_factory) -> Lazily:
    """Return the cases on two ranks that share sequences."""

    def start(cases: list[Case]) -> Runs:
        return Runs(cases, 2, corpus, tmp_path_factory.mktemp("sliced"))

    cases = [Case((method,), "sliced", sequence=2) for method in METHODS]
    return Lazily([cases[::2], cases[1::2]], start)


@pytest.fixture(scope="session")
def on_three(corpus, tmp_path_factory) -> Runs:
    return Runs(
        [Case((method,), "zero3", resident=False) for method in METHODS],
        3,
        corpus,
        tmp_path_factory.mktemp("three_ranks"),
    )

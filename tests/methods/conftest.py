"""The runs that the tests over the registry look at, started once."""

import pytest
from suite import METHODS, Case, Runs, cases_of

from pretrain.methods import REGISTRY


@pytest.fixture(scope="session")
def on_two(corpus, tmp_path_factory) -> Runs:
    cases = [case for method in METHODS for case in cases_of(method)]
    return Runs(cases, 2, corpus, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="session")
def cut_in_two(corpus, tmp_path_factory) -> Runs:
    """Two tensor-parallel ranks."""
    cases = [Case((method,), "cut", stage=1, tensor=2) for method in METHODS if REGISTRY[method].tensor_parallel]
    return Runs(cases, 2, corpus, tmp_path_factory.mktemp("cut_in_two"))


@pytest.fixture(scope="session")
def on_three(corpus, tmp_path_factory) -> Runs:
    return Runs([Case((method,), "zero3") for method in METHODS], 3, corpus, tmp_path_factory.mktemp("three_ranks"))

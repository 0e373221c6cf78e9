"""The measurement of methods covers all methods that are asked for; its times are not tested."""

import pytest

from benchmarks import methods
from pretrain.methods import REGISTRY
from tests.support.runs import ENVIRONMENT


@pytest.mark.slow
def test_every_method_is_measured_beside_a_plain_model(monkeypatch):
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(methods, "HIDDEN_SIZE", 64)
    monkeypatch.setattr(methods, "LAYERS", 1)
    table = methods.bench_methods([], ranks=1, rounds=1, tokens=256)
    measured = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")}
    assert measured == {*REGISTRY, "optim.name: muon", "method"}

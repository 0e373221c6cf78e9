"""Compiled blocks are one graph without a break, for every method that does not say otherwise, and train as eager ones.

The reference is the same run with `compile: off`. The back end `aot_eager` traces and partitions a graph as Inductor's
does, and runs it with the eager kernels, so its losses are those of eager ZeRO-1 to the last bits.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pretrain.methods import REGISTRY
from tests.support.method_suite import METHODS
from tests.support.runs import start_ranks
from tests.support.workers.compiled_worker import examine_all

BF16 = {"bf16": {"enabled": True}}
COMPILED = [name for name in METHODS if REGISTRY[name].eager_blocks is None]
FAST = ["wesar"]


def case(stage: int = 3, *methods: str, compiled: bool = True, **more) -> dict:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    deepspeed = {"zero_optimization": zero, **more.pop("deepspeed", {})}
    return {"deepspeed": deepspeed, "methods": methods, "compile": "layers" if compiled else "off", **more}


def pair(name: str, *args, **more) -> dict[str, dict]:
    """Return a compiled case, and the eager one that it must equal."""
    eager = {key: value for key, value in more.items() if key not in ("recomputed", "backend")}
    return {name: case(*args, **more), f"{name} eager": case(*args, compiled=False, **eager)}


# Ranks to start -> the cases that they run one after another.
CASES: dict[str, dict[str, dict]] = {
    "1 rank": {
        **pair("plain"),
        "zero1 eager": case(1, compiled=False),
        **pair("wesar", 3, "wesar"),
        "selective": case(3, recomputed="selective"),
        "full, eager": case(3, recomputed="full", compiled=False),
        "selective, eager": case(3, recomputed="selective", compiled=False),
        "attention_residuals": case(3, "attention_residuals"),
        "sigma_reparam": case(3, "sigma_reparam"),
    },
    "2 ranks": {
        **{name: each for stage in (1, 2) for name, each in pair(f"zero{stage}", stage).items()},
        **pair("zero3"),
        **pair("zero3_bf16", 3, "wesar", deepspeed=BF16),
        **pair("full", 3, recomputed="full"),
        **pair("inductor", 3, backend="inductor"),
        **pair("sliced", 3, sequence=2),
        **pair("sliced_full", 2, sequence=2, recomputed="full"),
        **pair("sliced_inductor", 3, sequence=2, recomputed="selective", backend="inductor"),
        **pair("inductor_bf16", 3, "weight_norm", backend="inductor", deepspeed=BF16),
    },
    "2 tensor-parallel ranks": pair("cut_in_two", 1, tensor=2),
    "1 rank, methods": {name: each for method in COMPILED if method not in FAST for name, each in pair(method, 3, method).items()}
    | pair("gpt2", 3, gpt2=True)
    | pair("gpt2_weight_norm", 3, "weight_norm", gpt2=True)
    | pair("gpt2_selective", 2, gpt2=True, recomputed="selective")
    | pair("weight_norm_selective", 3, "weight_norm", recomputed="selective"),
}  # fmt: skip
SLOW = ("2 ranks", "2 tensor-parallel ranks", "1 rank, methods")


def pairs(*groups: str) -> list:
    return [
        pytest.param(group, name, marks=[pytest.mark.slow] if group in SLOW else [])
        for group in groups
        for name in CASES[group]
        if f"{name} eager" in CASES[group]
    ]


class Seen:
    """The results of sets of ranks, each started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, dict] = {}

    def __call__(self, group: str, name: str) -> dict:
        if group not in self.found:
            out = self.folder / group
            out.mkdir()
            with ExitStack() as stack:
                prepare = partial(examine_all, CASES[group], out)
                job = stack.enter_context(start_ranks([], out / "logs", int(group[0]), prepare=prepare))
                ended = job.wait()
            assert ended.code == 0, ended.stderr[-5000:]
            self.found[group] = json.loads((out / "found.json").read_text())
        return self.found[group][name]

    def weights(self, group: str, name: str) -> dict[str, np.ndarray]:
        self(group, name)
        return dict(np.load(self.folder / group / f"{name}.npz"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize(("group", "name"), pairs(*CASES))
def test_blocks_are_one_graph_without_a_break(seen: Seen, group: str, name: str) -> None:
    """A graph of a block and one of the loss in training. Evaluation adds two, and the probe's shape one of a block."""
    found = seen(group, name)
    assert found["breaks"] == {}
    assert (found["graphs of training"], found["graphs"]) == (2, 5)
    assert seen(group, f"{name} eager")["graphs"] == 0


@pytest.mark.parametrize(("group", "name"), pairs(*CASES))
def test_compiled_blocks_compute_what_eager_ones_do(seen: Seen, group: str, name: str) -> None:
    found, eager = seen(group, name), seen(group, f"{name} eager")
    # Inductor rounds to bf16 once where eager kernels do so after each operation.
    close = 2e-2 if name == "inductor_bf16" else 2e-3 if name.endswith("bf16") else 1e-5
    for key in ("losses", "validation", "activations", "on the probe"):
        assert found[key] == pytest.approx(eager[key], rel=close), key
    assert found["logits"] == pytest.approx(eager["logits"], rel=close, abs=close * max(map(abs, eager["logits"])))


def test_zero_3_with_whole_blocks_sums_gradients_as_zero_1_does(seen: Seen) -> None:
    compiled, zero1 = seen.weights("1 rank", "plain"), seen.weights("1 rank", "zero1 eager")
    assert seen("1 rank", "plain")["losses"] == seen("1 rank", "zero1 eager")["losses"]
    for name, weight in zero1.items():
        assert np.array_equal(compiled[name], weight), name


@pytest.mark.parametrize("name", ["full, eager", "selective, eager"])
def test_what_is_computed_again_changes_no_bit(seen: Seen, name: str) -> None:
    again, kept = seen.weights("1 rank", name), seen.weights("1 rank", "plain eager")
    for weight in kept:
        assert np.array_equal(again[weight], kept[weight]), weight


def test_a_compiled_block_may_be_computed_again(seen: Seen) -> None:
    again, kept = seen.weights("1 rank", "selective"), seen.weights("1 rank", "plain")
    assert seen("1 rank", "selective")["graphs of training"] == 2
    for weight in kept:
        np.testing.assert_allclose(again[weight], kept[weight], rtol=0, atol=1e-6, err_msg=weight)


@pytest.mark.parametrize("method", ["attention_residuals", "sigma_reparam"])
def test_a_method_that_cannot_be_compiled_runs_eagerly(seen: Seen, method: str) -> None:
    found = seen("1 rank", method)
    assert REGISTRY[method].eager_blocks
    assert found["graphs"] == 0
    assert all(np.isfinite(found["losses"]))

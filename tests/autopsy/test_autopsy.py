"""Autopsies: the figures of each step equal those of one process with all weights, and the report names the bad document.

The ranks of autopsy_worker.py run every case. Those of autopsy_run_worker.py train on a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from math import isfinite
from pathlib import Path

import pytest
import yaml

from tests.support.corpus import Corpus, documents_of, make_corpus, tiny
from tests.support.runs import start_ranks
from tests.support.workers.autopsy_run_worker import POISON, examine
from tests.support.workers.autopsy_worker import BROKEN, KEPT, STEPS, examine_all


def zero(stage: int, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage}, **more}


BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 64}}
CPU = {"offload_optimizer": {"device": "cpu"}}
MUON = {"name": "muon", "grad_clip": None}
LION = {"name": "lion"}
CASES = {
    "ranks": {
        "zero3_bf16": {"deepspeed": zero(3, **BF16), "micro_batch_size": 2},
        "zero2_offloaded": {"deepspeed": {"zero_optimization": {"stage": 2, **CPU}}, "micro_batch_size": 2},
        "zero1_bf16": {"deepspeed": zero(1, **BF16, data_types={"grad_accum_dtype": "fp32"}), "micro_batch_size": 2},
        "zero0_fp32": {"deepspeed": zero(0), "micro_batch_size": 2},
        "zero1_muon": {"deepspeed": zero(1), "micro_batch_size": 2, "optim": MUON},
        "zero1_unknown": {"deepspeed": zero(1), "micro_batch_size": 2, "unknown": True},
        "zero2_lion": {"deepspeed": zero(2), "micro_batch_size": 2, "optim": LION},
    },
    "tensor-parallel ranks": {"cut_in_two": {"deepspeed": zero(1), "micro_batch_size": 4, "tensor": 2}},
    "ranks, the other engines": {
        "zero3_fp32": {"deepspeed": zero(3), "micro_batch_size": 4},
        "zero3_slices": {"deepspeed": zero(3), "micro_batch_size": 4, "sequence": 2},
        "zero3_offloaded": {"deepspeed": {"zero_optimization": {"stage": 3, **CPU}}, "micro_batch_size": 2},
        "zero3_muon": {"deepspeed": zero(3), "micro_batch_size": 2, "optim": MUON},
        "zero3_lion": {"deepspeed": zero(3), "micro_batch_size": 2, "optim": LION},
        "zero0_lion": {"deepspeed": zero(0), "micro_batch_size": 2, "optim": LION},
        "zero2_fp32": {"deepspeed": zero(2), "micro_batch_size": 2},
        "zero1_fp32": {"deepspeed": zero(1), "micro_batch_size": 2},
        "zero1_fp16": {"deepspeed": zero(1, **FP16), "micro_batch_size": 2},
        "zero0_bf16": {"deepspeed": zero(0, **BF16, data_types={"grad_accum_dtype": "bf16"}), "micro_batch_size": 2},
    },
}
ALL = [
    pytest.param(group, name, marks=[pytest.mark.slow] * ("other" in group), id=name)
    for group, cases in CASES.items()
    for name in cases
]
REJECTED = [each for each in ALL if "muon" not in each.id and "unknown" not in each.id]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict]:
    """Return a function that gives the results of a case. The two ranks of its group start at the first call."""

    @cache
    def of_group(group: str) -> dict:
        folder = tmp_path_factory.mktemp("ranks")
        with start_ranks([], folder / "logs", 2, prepare=partial(examine_all, CASES[group], folder)) as job:
            ended = job.wait()
        assert ended.code == 0, ended.stderr[-5000:]
        return json.loads((folder / "found.json").read_text())

    return lambda group, name: of_group(group)[name]


def tolerance(name: str) -> float:
    """Return the relative tolerance against a float32 reference of the rounded weights."""
    if "bf16" in name:
        return 0.05
    return 0.02 if "fp16" in name else 1e-4


@pytest.mark.parametrize(("group", "name"), ALL)
def test_gradient_norms_are_those_of_autograd_on_one_process(seen: Callable, group: str, name: str) -> None:
    found = seen(group, name)
    assert [step["step"] for step in found["steps"]] == list(range(STEPS - KEPT, STEPS + 1))
    for step, expected in zip(found["steps"], found["expected"], strict=True):
        if step["factor"]:
            known = {weight: norms["gradient"] for weight, norms in step["norms"].items() if norms["gradient"]}
            assert known == pytest.approx(
                {weight: expected["gradients"][weight] for weight in known}, rel=tolerance(name)
            )
            unknown = step["norms"].keys() - known.keys()
            assert all("_proj" in weight for weight in unknown)
            assert bool(unknown) == (name == "zero1_muon")


@pytest.mark.parametrize(("group", "name"), ALL)
def test_update_ratios_are_those_of_the_weights_before_and_after(seen: Callable, group: str, name: str) -> None:
    found = seen(group, name)
    for step, expected in zip(found["steps"], found["expected"], strict=True):
        for weight, norms in step["norms"].items():
            if norms["step"] is None:
                assert "unknown" in name or ("muon" in name and "_proj" in weight)
                continue
            # The difference of two float32 weights lacks the last digits of a small step.
            assert norms["step"] == pytest.approx(expected["updates"][weight], rel=1e-4)
            ratio = norms["step"] / norms["weight"] if norms["weight"] else 0.0
            assert ratio == pytest.approx(expected["monitored"][weight], rel=1e-4)


@pytest.mark.parametrize(("group", "name"), ALL)
def test_the_largest_activations_and_the_loss_of_each_sequence_are_those_of_one_process(
    seen: Callable, group: str, name: str
) -> None:
    found = seen(group, name)
    for step, expected in zip(found["steps"], found["expected"], strict=True):
        assert step["activations"] == pytest.approx(expected["activations"], rel=tolerance(name))
    assert found["sequences"] == pytest.approx(found["dense_sequences"], rel=tolerance(name) / 5)


@pytest.mark.parametrize(("group", "name"), REJECTED)
def test_a_rejected_step_has_known_gradients_and_no_update(seen: Callable, group: str, name: str) -> None:
    (step,) = (step for step in seen(group, name)["steps"] if step["step"] == BROKEN)
    assert step["factor"] == 0.0
    finite = {weight for weight, norms in step["norms"].items() if isfinite(norms["gradient"])}
    assert finite == {w for w in step["norms"] if ".layers.2." in w or w.startswith(("model.norm", "lm_head"))}
    assert {norms["step"] for norms in step["norms"].values()} == {0.0}


@pytest.fixture(scope="module")
def autopsy(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """Return the autopsy of a step that reads a poisoned document on two ranks, the expected values, and the log."""
    out = tmp_path_factory.mktemp("autopsy")
    documents = documents_of(400)
    documents.insert(200, POISON)
    poisoned = make_corpus(out / "corpus", documents)
    (out / "run.yaml").write_text(yaml.safe_dump(tiny(poisoned), sort_keys=False))
    settings = [f"out={out}", "deepspeed=ds_configs/zero3_bf16.json"]
    with start_ranks([], out / "logs", 2, prepare=partial(examine, out / "run.yaml", settings, out)) as job:
        ended = job.wait()
    assert ended.code == 0, ended.stderr[-5000:]
    return out / "tiny/autopsies/step_00000004", json.loads((out / "found.json").read_text()), ended.stdout


def test_the_report_shows_the_poisoned_document_first_and_where_it_came_from(autopsy: tuple) -> None:
    folder, known, _ = autopsy
    report = (folder / "report.md").read_text()
    assert report.startswith("# Step 4: the loss is 9.1, which is a made-up spike\n")
    content = json.loads((folder / "autopsy.json").read_text())
    worst = content["batch"][0]
    assert worst["sample"] == known["poisoned"]
    assert worst["loss"] == max(sample["loss"] for sample in content["batch"])
    assert worst["top_token_share"] > 0.4
    assert worst["distinct_tokens"] < 10
    assert worst["documents"][0]["source"].endswith("text.jsonl")
    assert isinstance(worst["documents"][0]["source_document"], int)
    texts = report.partition("=== sample ")[2]
    assert texts.startswith(f"{known['poisoned']:,}: loss ")
    assert POISON[:20] in texts.partition("=== sample ")[0]


def test_every_sample_of_the_batch_is_written_in_full(autopsy: tuple) -> None:
    folder, known, _ = autopsy
    content = json.loads((folder / "autopsy.json").read_text())
    assert sorted(sample["sample"] for sample in content["batch"]) == known["samples"]
    text = (folder / "batch.txt").read_text()
    for sample, expected in zip(known["samples"], known["texts"], strict=True):
        shown = text.partition(f"=== sample {sample:,}: ")[2].partition("\n\n=== sample ")[0]
        lines = [line for line in shown.splitlines()[1:] if not line.startswith("--- document ")]
        assert "".join(lines).replace(" ", "") == expected.replace("\n", "").replace(" ", "")


def test_the_steps_before_are_in_the_figures(autopsy: tuple) -> None:
    content = json.loads((autopsy[0] / "autopsy.json").read_text())
    assert [step["step"] for step in content["steps"]] == [1, 2, 3, 4]
    assert [step["samples"][1] - step["samples"][0] + 1 for step in content["steps"]] == [8] * 4
    assert all(0 < step["clip"] <= 1 and step["gradient_norm"] > 0 for step in content["steps"])
    assert {len(series) for parts in content["parts"].values() for series in parts.values()} == {4}


def test_a_spike_that_lasts_has_one_autopsy_and_a_disk_that_takes_none_ends_nothing(autopsy: tuple) -> None:
    folder, known, logged = autopsy
    assert known["paths"] == [str(folder), None, None]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "the autopsy of step 5 could not be written" in logged

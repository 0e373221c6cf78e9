"""A model with NaN or infinity is never saved. Its run ends as diverged and keeps its last good checkpoint."""

from __future__ import annotations

import json
from contextlib import ExitStack
from math import nan
from pathlib import Path

import pytest
import torch
import xxhash

from tests.support.corpus import Corpus
from tests.support.faults import bad_batches, infinite_rate
from tests.support.runs import Ended, arguments, events, launch, run_ranks, start_ranks, status

STEPS, BATCH = 6, 8
BF16 = {"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, "methods": []}
# By name: ranks, settings, fault. Checkpoints at 2, 4 and 6; two skips in a row are one too many; back once.
RUNS = {
    "in_the_middle": (2, BF16, infinite_rate(4)),
    "at_the_end": (1, {"methods": []}, infinite_rate(STEPS)),
    "found_by_tvr": (2, {}, infinite_rate(4)),
    "last_step_skipped": (1, {"methods": []}, bad_batches(BATCH * (STEPS - 1), BATCH * STEPS - 1, nan)),
    "skipped_for_ever": (1, {"methods": []}, bad_batches(BATCH * (STEPS - 1), 100 * BATCH, nan)),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("not_finite")


def settings(out: Path, name: str) -> dict:
    chosen = {"out": str(out), "name": name, "steps": STEPS, "checkpoint.interval_steps": 2, "checkpoint.keep_last": 9}
    return chosen | {"resilience.guard.max_skips": 2, "resilience.guard.max_rollbacks": 1} | RUNS[name][1]


@pytest.fixture(scope="module")
def ended(run_file: Path, out: Path) -> dict[str, Ended]:
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(
                start_ranks(arguments(run_file, settings(out, name)), out / "l" / name, ranks, prepare=fault)
            )
            for name, (ranks, _, fault) in RUNS.items()
        }
        return {name: job.wait() for name, job in jobs.items()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("name", "kept", "why"),
    [
        ("in_the_middle", [2], "going back 1 times has not helped"),
        ("at_the_end", [2, 4], "NaN or infinity in the model"),
        ("found_by_tvr", [2], "NaN or infinity in "),
        ("skipped_for_ever", [2, 4], "the updates of steps 5 to 6 were skipped"),
    ],
)
def test_a_run_that_diverges_ends_with_code_4_and_keeps_good_checkpoints(
    ended: dict, out: Path, name: str, kept: list[int], why: str
) -> None:
    assert ended[name].code == 4, ended[name].stderr
    left = status(out / name)
    assert (left["status"], left["exit_code"]) == ("failed", 4)
    assert why in left["reason"]
    assert checkpoints(out / name) == [f"step_{step:08d}" for step in kept]
    assert "Traceback" not in ended[name].stdout + ended[name].stderr
    files = list((out / name).rglob("*optim_states.pt"))
    assert files
    for file in files:
        masters = torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
        assert all(bool(master.isfinite().all()) for master in masters)


@pytest.mark.parametrize("name", ["in_the_middle", "at_the_end"])
def test_a_refused_save_is_reported_with_the_weight_at_fault(ended: dict, out: Path, name: str) -> None:
    event = events(out / name, "not_saved")[0]
    assert event["step"] == {"in_the_middle": 4, "at_the_end": STEPS}[name]
    assert "NaN or infinity in model." in event["reason"]
    assert f"not saved: {event['reason']}" in ended[name].stdout


def test_a_run_whose_last_step_was_skipped_takes_other_data_before_it_is_finished(ended: dict, out: Path) -> None:
    assert ended["last_step_skipped"].code == 0, ended["last_step_skipped"].stderr
    assert status(out / "last_step_skipped")["status"] == "finished"
    (event,) = events(out / "last_step_skipped", "rolled_back")
    assert (event["step"], event["to_step"]) == (STEPS, 4)
    assert events(out / "last_step_skipped", "checkpoint_saved")[-1]["step"] == STEPS


def spoil(checkpoint: Path) -> str:
    """Make a checkpoint of a model with NaN, as older versions saved them. Return the weight that holds it."""
    moments, manifest = checkpoint / "moments.json", checkpoint / "manifest.json"
    found = json.loads(moments.read_text(encoding="utf-8"))
    weight = list(found)[-1]
    found[weight] |= {"mean": nan, "centred_squares": nan}
    moments.write_text(json.dumps(found), encoding="utf-8")
    listed = json.loads(manifest.read_text(encoding="utf-8"))
    digest = xxhash.xxh3_128(moments.read_bytes()).hexdigest()
    listed["files"]["moments.json"] = {"bytes": moments.stat().st_size, "xxh3_128": digest}
    manifest.write_text(json.dumps(listed), encoding="utf-8")
    return weight


@pytest.mark.slow
def test_a_checkpoint_with_nan_that_an_older_version_saved_is_passed_over(
    ended: dict, out: Path, run_file: Path, corpus: Corpus
) -> None:
    folder = out / "last_step_skipped"
    newest = folder / f"checkpoints/step_{STEPS:08d}"
    weight = spoil(newest)
    words = arguments(run_file, settings(out, folder.name) | {"steps": STEPS})
    again = run_ranks(words, out / "l/again", ranks=1)
    assert again.code == 0, again.stderr
    assert f"skipping a damaged checkpoint: {newest} holds a model that has diverged" in again.stdout
    assert events(folder, "resumed")[-1]["step"] == 4
    weight = spoil(newest)
    refused = launch(["python", "tools/convert_to_hf.py", "--checkpoint", str(newest), "--out", str(out / "hf")])
    assert refused.code == 2
    assert f"error: {newest} holds a model that has diverged: there is NaN or infinity in {weight}." in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (out / "hf").exists()

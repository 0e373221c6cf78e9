"""Steps that would harm a run are skipped. If they do not end, it goes back and continues without their data, or ends."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import ExitStack
from math import nan
from pathlib import Path

import pytest
import xxhash

from tests.support.faults import at_phase, bad_batches, send, together
from tests.support.runs import Ended, arguments, events, last_rows, losses, rows, run_ranks, start_ranks, status

STEPS, BATCH = 14, 8
KILL = send(signal.SIGKILL)


def samples_of(first_step: int, last_step: int) -> tuple[int, int]:
    return BATCH * (first_step - 1), BATCH * last_step - 1


# Checkpoints at 4, 8, 12; two skips in a row are one too many, and the run may go back once.
FAULTS = {
    "one": bad_batches(*samples_of(6, 6), nan),
    "two": bad_batches(*samples_of(6, 7), nan),
    "two_and_killed": together(
        bad_batches(*samples_of(6, 7), nan), at_phase("forward", 5, 1, KILL, after="rolling back")
    ),
    "all": bad_batches(*samples_of(6, 100), nan),
    "from_the_start": bad_batches(*samples_of(2, 100), nan),
    "reported": bad_batches(*samples_of(12, 12), 50.0),
    "skipped": bad_batches(*samples_of(12, 12), 50.0),
}


def settings(out: Path, name: str) -> dict:
    chosen = {"out": str(out), "name": name, "steps": STEPS, "checkpoint.interval_steps": 4, "eval.interval_steps": 8}
    chosen |= {"optim.schedule.name": "constant", "resilience.autopsy_steps": 3, "checkpoint.keep_last": 9}
    guard = {
        "max_skips": 2,
        "max_rollbacks": 1,
        "window_steps": 16,
        "spikes": "report" if name == "reported" else "skip",
    }
    return chosen | {f"resilience.guard.{key}": value for key, value in guard.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("divergence")


@pytest.fixture(scope="module")
def ended(run_file: Path, out: Path) -> dict[str, Ended]:
    """Return how each run ended, and one without faults."""
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(
                start_ranks(arguments(run_file, settings(out, name)), out / "l" / name, prepare=fault)
            )
            for name, fault in {"whole": None, **FAULTS}.items()
        }
        return {name: job.wait() for name, job in jobs.items()}


def test_the_update_of_a_bad_step_is_skipped_and_reported(ended: dict, out: Path) -> None:
    assert ended["one"].code == 0, ended["one"].stderr
    (event,) = events(out / "one", "not_finite")
    assert (event["step"], event["first_sample"], event["last_sample"]) == (6, *samples_of(6, 6))
    assert event["skipped"] is True
    assert "the loss is nan" in event["reason"]
    found, whole = losses(out / "one"), losses(out / "whole")
    assert {step: found[step] for step in range(1, 6)} == {step: whole[step] for step in range(1, 6)}
    assert found[6] is None
    # The weights before step 7 are those before step 6, so its loss is not the whole run's.
    assert found[7] != whole[7]
    assert "update skipped: the loss is nan" in ended["one"].stdout


def test_a_bad_step_gets_an_autopsy_with_its_batch(ended: dict, out: Path) -> None:
    (event,) = events(out / "one", "not_finite")
    folder = Path(event["autopsy"])
    assert folder == out / "one/autopsies/step_00000006"
    found = json.loads((folder / "autopsy.json").read_text())
    assert [step["step"] for step in found["steps"]] == [3, 4, 5, 6]
    assert sorted(sample["sample"] for sample in found["batch"]) == list(range(40, 48))
    assert (folder / "report.md").read_text().strip()


def test_too_many_bad_steps_in_a_row_roll_the_run_back_and_leave_out_their_data(
    ended: dict, out: Path, run_file: Path
) -> None:
    """The run equals one that resumes from the checkpoint of step 4 with its data at sample 56."""
    assert ended["two"].code == 0, ended["two"].stderr
    (event,) = events(out / "two", "rolled_back")
    assert (event["step"], event["to_step"]) == (7, 4)
    assert (event["first_sample"], event["last_sample"]) == (32, 55)
    assert [row["first_sample"] for row in rows(out / "two", "train") if row["step"] == 5] == [32, 56]
    assert last_rows(out / "two", "train")[STEPS]["last_sample"] == BATCH * STEPS + 24 - 1

    reference = Path(shutil.copytree(out / "whole", out / "reference"))
    checkpoint = move_data(reference / "checkpoints/step_00000004", samples=56)
    resumed = settings(out, "reference") | {"checkpoint.resume": str(checkpoint)}
    assert run_ranks(arguments(run_file, resumed), out / "l/reference").code == 0
    assert [event["step"] for event in events(out / "two", "checkpoint_saved")] == [4, 4, 8, 12, 14]
    after, expected = losses(out / "two"), losses(out / "reference")
    assert {step: after[step] for step in range(5, STEPS + 1)} == {step: expected[step] for step in range(5, STEPS + 1)}


def move_data(checkpoint: Path, samples: int) -> Path:
    """Let a run that resumes from `checkpoint` continue with another sample. The manifest is made to agree."""
    state, manifest = checkpoint / "trainer.json", checkpoint / "manifest.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"samples": samples}))
    listed = json.loads(manifest.read_text())
    digest = xxhash.xxh3_128(state.read_bytes()).hexdigest()
    listed["files"]["trainer.json"] = {"bytes": state.stat().st_size, "xxh3_128": digest}
    manifest.write_text(json.dumps(listed))
    return checkpoint


@pytest.mark.slow
def test_a_run_killed_after_a_rollback_continues_as_if_it_had_not_been(ended: dict, out: Path, run_file: Path) -> None:
    assert ended["two_and_killed"].codes[1] == -signal.SIGKILL
    again = run_ranks(
        arguments(run_file, settings(out, "two_and_killed")),
        out / "l/again",
        prepare=bad_batches(*samples_of(6, 7), nan),
    )
    assert again.code == 0
    assert len(events(out / "two_and_killed", "rolled_back")) == 1
    assert losses(out / "two_and_killed") == losses(out / "two")


@pytest.mark.parametrize(
    ("name", "why"),
    [("all", "going back 1 times has not helped"), ("from_the_start", "no checkpoint from before them")],
)
def test_a_run_that_does_not_recover_ends_as_diverged(ended: dict, out: Path, name: str, why: str) -> None:
    assert ended[name].code == 4
    left = status(out / name)
    assert (left["status"], left["exit_code"]) == ("failed", 4)
    assert why in left["reason"]
    assert why in ended[name].stdout
    assert "Traceback" not in ended[name].stdout + ended[name].stderr


@pytest.mark.parametrize("name", ["reported", "skipped"])
def test_a_spike_is_reported_and_skipped_only_if_the_run_file_says_so(ended: dict, out: Path, name: str) -> None:
    assert ended[name].code == 0
    (event,) = [event for event in events(out / name, "spike") if event["step"] == 12]
    assert event["skipped"] is (name == "skipped")
    assert "standard deviations" in event["reason"]
    assert Path(event["autopsy"]).name == "step_00000012"

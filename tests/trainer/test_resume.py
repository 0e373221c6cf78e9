"""A run that is killed or stopped, or whose checkpoints are damaged, resumes as if it had not been, or reports why not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support.corpus import Corpus
from tests.support.runs import (
    Job,
    arguments,
    assert_refused,
    contents,
    events,
    last_rows,
    losses,
    rows,
    run_ranks,
    run_together,
    start_ranks,
    status,
    wait_until,
)
from tests.support.selection import slow_but

STEPS = 12
BF16 = {"bf16": {"enabled": True}}
LAYOUTS = {
    "zero3_fp32": {"zero_optimization": {"stage": 3}},
    "zero3_fp32_nothing_resident": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "zero3_bf16": {"zero_optimization": {"stage": 3}, **BF16},
    "zero2_bf16": {"zero_optimization": {"stage": 2}, **BF16},
    "zero1_fp32": {"zero_optimization": {"stage": 1}},
}
FAST = ("zero3_fp32",)
WITH_DROPOUT = {"model": {"family": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.2}}


def settings(out: Path, name: str, **more: object) -> dict:
    """Return the keys of twelve steps with a checkpoint every third and TVR every second, which must not drift apart."""
    chosen = {"out": str(out), "name": name, "steps": STEPS, "checkpoint.interval_steps": 3}
    return chosen | {"methods.1.interval_steps": 2, "log.weights_interval_steps": 2} | more


def kill_between_saves(job: Job, folder: Path) -> None:
    """Kill every rank after a step that no checkpoint holds."""
    wait_until(lambda: max(losses(folder), default=0) in (4, 5, 7, 8), job)
    job.signal(signal.SIGKILL)


def kill_during_save(job: Job, folder: Path) -> None:
    """Kill every rank while a checkpoint is half written. They are suspended first, to see that it is."""
    while True:
        wait_until(lambda: bool(list(folder.glob("checkpoints/.step_*.incomplete"))), job)
        job.signal(signal.SIGSTOP)
        if list(folder.glob("checkpoints/.step_*.incomplete")):
            break
        job.signal(signal.SIGCONT)
    job.signal(signal.SIGKILL)


@pytest.mark.parametrize("layout", slow_but(FAST, LAYOUTS))
def test_a_run_killed_between_and_during_saves_has_the_losses_of_one_that_was_not(
    run_file: Path, tmp_path: Path, layout: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logs = tmp_path / "logs"
    variant = {"deepspeed": LAYOUTS[layout]} | (WITH_DROPOUT if layout == "zero2_bf16" else {})
    assert run_ranks(arguments(run_file, settings(tmp_path, "whole", **variant)), logs).code == 0

    command = arguments(run_file, settings(tmp_path, "killed", **variant))
    with start_ranks(command, logs) as job:
        kill_between_saves(job, killed)
        assert job.wait().code == -signal.SIGKILL
    first_end = max(losses(killed))
    with start_ranks(command, logs) as job:
        kill_during_save(job, killed)
        assert job.wait().code == -signal.SIGKILL
    assert list(killed.glob("checkpoints/.step_*.incomplete"))
    last = run_ranks(command, logs)
    assert last.code == 0

    resumed = [event["step"] for event in events(killed, "resumed")]
    assert len(resumed) == 2
    assert resumed[0] == first_end // 3 * 3
    assert all(step % 3 == 0 for step in resumed)
    assert f"resumed from {killed / 'checkpoints' / f'step_{resumed[1]:08d}'} at step {resumed[1]}" in last.stdout
    assert losses(killed) == losses(whole)
    assert list(losses(killed)) == list(range(1, STEPS + 1))
    for kind in ("eval", "weights", "activations"):
        assert without_time(last_rows(killed, kind)) == without_time(last_rows(whole, kind))
    assert rescaled_steps(killed) == rescaled_steps(whole) >= {2, 4, 6, 8}
    assert not list(killed.glob("checkpoints/.step_*")), "half-written checkpoints were left behind"
    assert (killed / "checkpoints/latest").read_text() == f"step_{STEPS:08d}\n"
    assert status(killed) == {"status": "finished", "step": STEPS, "reason": "all steps done"}


def without_time(found: dict[int, dict]) -> dict[int, dict]:
    return {step: {key: value for key, value in row.items() if key != "time"} for step, row in found.items()}


def rescaled_steps(folder: Path) -> set[int]:
    """Return the steps at which TVR rescaled something."""
    found = last_rows(folder, "weights")
    return {step for step, row in found.items() if any(values["rescaled"] for values in row["weights"].values())}


@pytest.fixture(scope="module")
def half_done(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with checkpoints of steps 2 and 4, as a run of 4 steps leaves it. Copy it before use."""
    out = tmp_path_factory.mktemp("half_done")
    assert run_ranks(arguments(run_file, go_on(out / "run", steps=4)), out / "logs").code == 0
    return out / "run"


def test_every_rank_draws_random_numbers_of_its_own(half_done: Path) -> None:
    states = [
        torch.load(half_done / f"checkpoints/step_00000002/rng_rank_{rank}.pt", weights_only=True) for rank in range(2)
    ]
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


@pytest.fixture
def folder(half_done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_done, tmp_path / "run"))


def go_on(folder: Path, **more: object) -> dict:
    """Return the keys of the run in `folder` up to step 6. Its learning rate does not depend on its length."""
    run = {"out": str(folder.parent), "name": folder.name, "steps": 6, "checkpoint.interval_steps": 2}
    return run | {"optim.schedule.name": "constant"} | more


def shards_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("deepspeed/*optim_states.pt"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_makes_the_run_resume_from_the_one_before(
    run_file: Path, half_done: Path, tmp_path: Path
) -> None:
    newest = "checkpoints/step_00000004"
    shard = f"{newest}/{shards_of(half_done / newest)[-1].relative_to(half_done / newest)}"
    damages = {"cut": (cut, shard), "flipped": (flip, shard), "lost": (Path.unlink, shard)}
    damages |= {"unlisted": (cut, f"{newest}/manifest.json"), "stateless": (Path.unlink, f"{newest}/trainer.json")}
    commands = {}
    for name, (damage, file) in damages.items():
        folder = Path(shutil.copytree(half_done, tmp_path / name / "run"))
        damage(folder / file)
        commands[name] = (arguments(run_file, go_on(folder)), 2)
    for name, ended in run_together(commands, tmp_path / "logs").items():
        folder = tmp_path / name / "run"
        assert ended.code == 0, name
        assert "skipping a damaged checkpoint" in ended.stdout, name
        assert str(folder / damages[name][1]) in ended.stdout, name
        assert events(folder, "resumed")[0]["step"] == 2, name
        assert status(folder) == {"status": "finished", "step": 6, "reason": "all steps done"}, name
        for step in (3, 4):  # trained a second time, from step 2 on
            assert len([row for row in rows(folder, "train") if row["step"] == step]) == 2, name
            assert losses(folder)[step] == losses(half_done)[step], name


def drop_a_shard(corpus: Corpus, folder: Path) -> str:
    """Return a copy of the training shards without the last one, and with a manifest that agrees."""
    other = shutil.copytree(corpus.train, folder)
    manifest = json.loads((other / "manifest.json").read_text())
    dropped = manifest["shards"].pop()
    for count in ("tokens", "documents"):
        manifest[count] -= dropped[count]
    (other / "manifest.json").write_text(json.dumps(manifest))
    return str(other)


def damage_all(folder: Path) -> None:
    cut(shards_of(folder / "checkpoints/step_00000002")[0])
    flip(shards_of(folder / "checkpoints/step_00000004")[1])


def damage_newest(folder: Path) -> None:
    flip(shards_of(folder / "checkpoints/step_00000004")[1])


OTHER_RUN = ("cannot resume from", "step_00000004")
# name: (what is done to the folder, what is changed in the run, ranks, what the message says)
REFUSALS = {
    "every checkpoint damaged": (damage_all, {}, 2, ("no checkpoint in", "step_00000002", "checkpoint.resume=never")),
    "the named one damaged": (damage_newest, {"checkpoint.resume": "{}/step_00000004"}, 2, ("checksum", "rank_1")),
    "the named one missing": (None, {"checkpoint.resume": "{}/step_00000003"}, 2, ("is not a complete checkpoint",)),
    "other layers": (None, {"model.num_hidden_layers": 3}, 2, (*OTHER_RUN, "another architecture")),
    "other width": (None, {"model.hidden_size": 64}, 2, (*OTHER_RUN, "another architecture", "hidden_size")),
    "other seed": (None, {"seed": 8}, 2, (*OTHER_RUN, "another seed")),
    "other batch": (None, {"data.global_batch_size": 16}, 2, (*OTHER_RUN, "another batch size")),
    "other sequence length": (
        None,
        {"data.seq_len": 16},
        2,
        (*OTHER_RUN, "seq_len 32, this run 16", "Give back data.seq_len"),
    ),
    "other methods": (
        None,
        {"methods": [{"name": "wesar"}]},
        2,
        (
            *OTHER_RUN,
            "methods.lir.name: lir -> absent",
            "methods.wesar.name: absent -> wesar",
            "checkpoint.resume=never",
        ),
    ),
    "a method in forward": (
        None,
        {"methods": [{"name": "layernorm_scaling"}]},
        2,
        (*OTHER_RUN, "methods.layernorm_scaling.name: absent -> layernorm_scaling", "another function"),
    ),
    "other optimizer": (
        None,
        {"optim.name": "muon", "optim.grad_clip": None},
        2,
        (*OTHER_RUN, "optimizer adamw, this run muon", "Give back optim.name"),
    ),
    "other data": (None, {"data.train": "other shards"}, 2, (*OTHER_RUN, "other token shards")),
    "fewer steps than trained": (None, {"steps": 3}, 2, (*OTHER_RUN, "it has trained 4 steps, this run asks for 3")),
}


@pytest.fixture(scope="module")
def refused(run_file: Path, half_done: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return for each refusal the output of the ranks, and the run folder's contents before and after."""
    base = tmp_path_factory.mktemp("refused")
    other_shards = drop_a_shard(corpus, base / "shards")
    commands, folders, before = {}, {}, {}
    for number, (name, (damage, change, ranks, _)) in enumerate(REFUSALS.items()):
        folder = folders[name] = Path(shutil.copytree(half_done, base / str(number) / "run"))
        if damage:
            damage(folder)
        before[name] = contents(folder)
        if "checkpoint.resume" in change:
            change = {"checkpoint.resume": change["checkpoint.resume"].format(folder / "checkpoints")}
        if "data.train" in change:
            change = {"data.train": other_shards}
        commands[name] = (arguments(run_file, go_on(folder, **change)), ranks)
    ended = run_together(commands, base / "logs")
    return {name: (ended[name], before[name], contents(folders[name])) for name in REFUSALS}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_left_unchanged(refused: dict, name: str) -> None:
    ended, before, after = refused[name]
    assert_refused(ended, *REFUSALS[name][-1])
    assert after == before


def test_another_run_can_start_from_a_named_checkpoint(run_file: Path, folder: Path) -> None:
    commands = {
        name: (arguments(run_file, go_on(folder.with_name(name), **{"checkpoint.resume": str(folder / path)})), 2)
        for name, path in {"two": "checkpoints/step_00000002", "four": "checkpoints/latest"}.items()
    }
    for name, ended in run_together(commands, folder.parent / "logs").items():
        step = {"two": 2, "four": 4}[name]
        branch = folder.with_name(name)
        assert ended.code == 0
        assert [event["step"] for event in events(branch, "resumed")] == [step]
        assert list(losses(branch)) == list(range(step + 1, 7))
    assert losses(folder.with_name("two"))[5] == losses(folder.with_name("four"))[5]


def test_changed_options_of_the_optimizer_are_reported_and_used(run_file: Path, folder: Path) -> None:
    """lr x decay is about 0.2 a step: with it instead of the checkpoint's decay of 0.1, weights fade within two steps."""
    names = {"as_before": {}, "fading": {"optim.weight_decay": 50.0}}
    commands = {
        name: (
            arguments(
                run_file,
                go_on(folder.with_name(name), **{"checkpoint.resume": str(folder / "checkpoints/latest")}, **change),
            ),
            2,
        )
        for name, change in names.items()
    }
    ended = run_together(commands, folder.parent / "logs")
    longer = "steps: 4 -> 6"
    for name, expected in {"as_before": [longer], "fading": [longer, "optim.weight_decay: 0.1 -> 50.0"]}.items():
        said = [line.partition("changed since then: ")[2] for line in ended[name].stdout.splitlines()]
        assert [line[: len(key)] for line, key in zip(filter(None, said), expected, strict=True)] == expected
        [resumed] = events(folder.with_name(name), "resumed")
        assert [f"{change['key']}: {change['was']} -> {change['now']}" for change in resumed["changes"]] == expected
        assert "the learning rate of step 5 is 5.00e-03" in resumed["changes"][0]["effect"]
    fading, as_before = (
        json.loads((folder.with_name(name) / "checkpoints/step_00000006/moments.json").read_text())["lm_head.weight"]
        for name in ("fading", "as_before")
    )
    assert fading["centred_squares"] < 0.7 * as_before["centred_squares"]


@pytest.mark.slow
def test_only_the_newest_checkpoints_and_the_chosen_multiples_are_kept(run_file: Path, tmp_path: Path) -> None:
    keep = {"checkpoint.interval_steps": 1, "checkpoint.keep_last": 2, "checkpoint.keep_every_steps": 3}
    words = arguments(run_file, {"out": str(tmp_path), "name": "run", "steps": 8, "data.val": None} | keep)
    assert run_ranks(words, tmp_path / "logs").code == 0
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["latest", *(f"step_{step:08d}" for step in (3, 6, 7, 8))]


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(run_file: Path, folder: Path) -> None:
    damage_newest(folder)
    keep = {"steps": 3, "checkpoint.interval_steps": 1, "checkpoint.keep_last": 2}
    assert run_ranks(arguments(run_file, go_on(folder, **keep)), folder.parent / "logs").code == 0
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000003", "step_00000004"]


@pytest.mark.slow
def test_starting_over_in_a_used_folder_does_not_lose_the_new_checkpoints(run_file: Path, folder: Path) -> None:
    anew = go_on(folder, steps=3, **{"checkpoint.resume": "never", "checkpoint.interval_steps": 1})
    anew |= {"checkpoint.keep_last": 1, "optim.lr": 1e-3}
    assert run_ranks(arguments(run_file, anew), folder.parent / "logs").code == 0
    newest = (folder / "checkpoints/latest").read_text().strip()
    assert newest == "step_00000003"
    assert (folder / "checkpoints" / newest / "manifest.json").exists()
    on = anew | {"checkpoint.resume": "auto", "steps": 5}
    assert run_ranks(arguments(run_file, on), folder.parent / "logs").code == 0
    assert events(folder, "resumed")[-1]["step"] == 3


def test_a_finished_run_started_again_trains_nothing_and_stays_finished(run_file: Path, folder: Path) -> None:
    trained = rows(folder, "train")
    ended = run_ranks(arguments(run_file, go_on(folder, steps=4)), folder.parent / "logs")
    assert ended.code == 0
    assert rows(folder, "train") == trained
    assert status(folder) == {"status": "finished", "step": 4, "reason": "all steps done"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system with room for almost two tiny checkpoints, if the test may mount one."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", str(mounted)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this test needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint_whole(
    run_file: Path, small_disk: Path, tmp_path: Path
) -> None:
    run = {"out": str(small_disk), "name": "run", "steps": 6, "checkpoint.interval_steps": 2}
    ended = run_ranks(arguments(run_file, run), tmp_path / "logs")
    folder = small_disk / "run"
    assert_refused(ended, "GB free", "The older checkpoints are intact")
    assert status(folder)["status"] == "failed"
    assert status(folder)["step"] == 4
    assert "GB free" in status(folder)["reason"]
    assert [path.name for path in folder.glob("checkpoints/*step_*")] == ["step_00000002"]

    moved = Path(shutil.copytree(small_disk, tmp_path / "larger"))
    assert run_ranks(arguments(run_file, run | {"out": str(moved)}), tmp_path / "logs").code == 0
    assert events(moved / "run", "resumed")[0]["step"] == 2


def test_a_write_that_fails_halfway_through_a_save_leaves_the_older_checkpoint_whole(
    run_file: Path, folder: Path
) -> None:
    limits = {resource.RLIMIT_FSIZE: 300_000}  # less than one rank's shard of the optimizer
    assert min(path.stat().st_size for path in shards_of(folder / "checkpoints/step_00000004")) > 300_000
    checkpoints = contents(folder / "checkpoints")
    ended = run_ranks(arguments(run_file, go_on(folder)), folder.parent / "logs", limits=limits)
    assert_refused(ended, "could not write the checkpoint", "step_00000006", "File too large", "checkpoints are intact")
    assert contents(folder / "checkpoints") == checkpoints
    assert status(folder)["status"] == "failed"
    assert run_ranks(arguments(run_file, go_on(folder)), folder.parent / "logs").code == 0
    assert events(folder, "resumed")[-1]["step"] == 4
    assert not list(folder.glob("checkpoints/.*"))


def test_a_run_folder_below_a_file_is_refused(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("I am no folder.")
    words = arguments(run_file, {"out": str(tmp_path / "file/runs"), "name": "run"})
    assert_refused(run_ranks(words, tmp_path / "logs", ranks=1), "cannot write", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "I am no folder."


def test_a_read_only_file_system_is_refused(run_file: Path, small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = arguments(run_file, {"out": str(small_disk), "name": "run"})
    for flags in ([], ["--dry-run"]):
        assert_refused(run_ranks([*words, *flags], tmp_path / "logs", ranks=1), "cannot write", str(small_disk))


def test_a_disk_that_fills_up_between_saves_ends_the_run_at_the_next_with_a_message_and_a_status(
    run_file: Path, small_disk: Path, tmp_path: Path
) -> None:
    run = {"out": str(small_disk), "name": "run", "steps": 100_000, "data.val": None}
    run |= {"checkpoint.interval_steps": 100_000}
    with start_ranks(arguments(run_file, run), tmp_path / "logs", ranks=1) as job:
        wait_until(lambda: bool(losses(small_disk / "run")), job)
        with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        job.signal(signal.SIGTERM)
        ended = job.wait()
    assert_refused(ended, "GB free", str(small_disk))
    left = status(small_disk / "run")
    assert (left["status"], left["exit_code"]) == ("failed", 2)
    assert "GB free" in left["reason"]
    assert not list((small_disk / "run").rglob(".*.tmp"))

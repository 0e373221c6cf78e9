"""A checkpoint from elsewhere: nothing in it is run, nothing outside its folder is opened, and the message says why."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.folders import complete_checkpoints, resolve, retire
from pretrain.checkpoints.manifest import MANIFEST, verify
from pretrain.checkpoints.safe_load import read_safely
from pretrain.checkpoints.stored import open_stored
from pretrain.errors import UserError
from pretrain.export.convert import convert
from pretrain.files import checksum
from tests.support.runs import arguments, assert_refused, contents, launch, run_ranks, run_together

STEPS = {"steps": 2, "checkpoint.interval_steps": 2, "data.val": None}


class Trap:
    """An object that creates `proof` when a pickle of it is loaded."""

    def __init__(self, proof: Path, call: Callable = os.mkdir) -> None:
        self.proof, self.call = proof, call

    def __reduce__(self) -> tuple:
        return (self.call, (str(self.proof),))


class Hidden(dict):
    """A trap among the state of a class that is allowed."""

    def __init__(self, trap: Trap) -> None:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler

        scaler = LossScaler(1.0)
        scaler.__dict__["trap"] = trap
        super().__init__(loss_scaler=scaler)


def relist(checkpoint: Path) -> None:
    """Write a manifest that fits the files, as an attacker would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    manifest["files"] = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)} for path in files
    }
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def trained(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of two steps on one rank."""
    out = tmp_path_factory.mktemp("trained")
    words = arguments(run_file, {"out": str(out), "name": "run", **STEPS})
    assert run_ranks(words, out / "logs", ranks=1).code == 0
    return out / "run"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained run's checkpoint."""
    return Path(shutil.copytree(trained, tmp_path / "run")) / "checkpoints/step_00000002"


@pytest.mark.parametrize("reader", [read_safely, open_stored])
@pytest.mark.parametrize(
    "write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_a_file_that_would_run_something_is_refused_by_whoever_reads_it(
    tmp_path: Path, reader: Callable, write: Callable
) -> None:
    proof, path = tmp_path / "proof", tmp_path / "file.pt"
    for content in ({"module": Trap(proof)}, Hidden(Trap(proof)), [Trap(proof, torch.load)]):
        write(content, path)
        with pytest.raises(UserError, match=r"file\.pt holds something else than tensors"):
            reader(path)
        assert not proof.exists()
    write({"module": Trap(proof)}, path)
    pickle_of_zip = torch.load if write is torch.save else lambda path, weights_only: pickle.loads(path.read_bytes())
    pickle_of_zip(path, weights_only=False)
    assert proof.exists(), "the trap does not work, so this test shows nothing"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02(" * 50, bytes(range(256)) * 4])
def test_rubbish_is_refused_as_rubbish(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"file\.pt holds something else than tensors and plain values"):
        read_safely(tmp_path / "file.pt")


TAMPERED = ("mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt", "rng_rank_0.pt")


def test_a_run_started_from_a_checkpoint_with_a_trap_is_refused_and_runs_nothing(
    run_file: Path, trained: Path, tmp_path: Path
) -> None:
    """The checkpoint is the run's own, or one that the run is started from by name."""
    commands, before = {}, {}
    for name in TAMPERED:
        folder = Path(shutil.copytree(trained, tmp_path / name / "run"))
        tampered = folder / "checkpoints/step_00000002"
        file = next(tampered.rglob(f"*{name}"))
        torch.save(torch.load(file, weights_only=False) | {"extra": Trap(tmp_path / "proof")}, file)
        relist(tampered)
        run = {"out": str(folder.parent), "name": "run", **STEPS, "steps": 4}
        if name == "rng_rank_0.pt":
            run |= {"name": "other", "checkpoint.resume": str(tampered)}
        commands[name], before[name] = (arguments(run_file, run), 1), contents(folder)
    for name, ended in run_together(commands, tmp_path / "logs").items():
        assert_refused(ended, name, "Nothing in it was run")
        assert contents(tmp_path / name / "run") == before[name]
    assert not (tmp_path / "proof").exists()


def test_the_conversion_refuses_a_trap_and_makes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    file = next(checkpoint.rglob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": Trap(tmp_path / "proof")}, file)
    relist(checkpoint)
    out = tmp_path / "hf"
    ended = launch(["python", "tools/convert_to_hf.py", "--checkpoint", str(checkpoint), "--out", str(out)])
    assert_refused(ended, file.name, "Nothing in it was run")
    assert not (tmp_path / "proof").exists()
    assert not out.exists()


def test_the_conversion_takes_no_configuration_that_it_does_not_know_and_no_adapter(
    checkpoint: Path, tmp_path: Path
) -> None:
    configuration = checkpoint / "hf/config.json"
    own = configuration.read_text()
    (checkpoint / "hf/adapter_config.json").write_text('{"base_model_name_or_path": "someone/elses"}')
    configuration.write_text(json.dumps(json.loads(own) | {"model_type": "unheard_of"}))
    relist(checkpoint)
    with pytest.raises(UserError, match=r"hf/config\.json: .*unheard_of.*environment\.json"):
        convert(checkpoint, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    configuration.write_text(own)
    relist(checkpoint)
    convert(checkpoint, tmp_path / "model")
    assert (tmp_path / "model/tokenizer.json").exists()
    assert not (tmp_path / "model/adapter_config.json").exists()


def name_a_file_above(checkpoint: Path, secret: Path) -> None:
    add_to_manifest(checkpoint, f"deepspeed/../../../{secret.name}", secret)


def name_an_absolute_path(checkpoint: Path, secret: Path) -> None:
    add_to_manifest(checkpoint, str(secret), secret)


def link_a_file(checkpoint: Path, secret: Path) -> None:
    (checkpoint / "hf/tokenizer.json").unlink()
    (checkpoint / "hf/tokenizer.json").symlink_to(secret)
    add_to_manifest(checkpoint, "hf/tokenizer.json", secret)


def link_a_folder(checkpoint: Path, secret: Path) -> None:
    shutil.move(checkpoint / "deepspeed", secret.parent / "elsewhere")
    (checkpoint / "deepspeed").symlink_to(secret.parent / "elsewhere")


def link_the_manifest(checkpoint: Path, secret: Path) -> None:
    shutil.move(checkpoint / MANIFEST, secret.parent / MANIFEST)
    (checkpoint / MANIFEST).symlink_to(secret.parent / MANIFEST)


def add_a_file(checkpoint: Path, secret: Path) -> None:
    (checkpoint / "method_state.safetensors").write_bytes(b"no one has listed this")


def add_to_manifest(checkpoint: Path, name: str, file: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


TRICKS = {
    name_a_file_above: r"is no file of this checkpoint",
    name_an_absolute_path: "is no file of this checkpoint",
    link_a_file: "tokenizer.json is a link that leads out",
    link_a_folder: "deepspeed is not listed in manifest.json",
    link_the_manifest: "manifest.json is a link that leads out",
    add_a_file: "method_state.safetensors is not listed in manifest.json",
}


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_files_that_are_not_the_checkpoints_own_are_refused(checkpoint: Path, tmp_path: Path, trick: Callable) -> None:
    """All checksums are right, but a file is at a wrong place."""
    secret = tmp_path / "secret"
    secret.write_text("not for the checkpoint to read")
    verify(checkpoint)
    trick(checkpoint, secret)
    outside = contents(tmp_path)
    with pytest.raises(UserError, match=TRICKS[trick]):
        verify(checkpoint)
    with pytest.raises(UserError, match=TRICKS[trick]):
        convert(checkpoint, tmp_path / "hf")
    assert contents(tmp_path) == outside


def test_a_run_falls_back_from_a_checkpoint_of_its_own_that_leads_out(
    run_file: Path, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    good = folder / "checkpoints/step_00000002"
    bad = Path(shutil.copytree(good, folder / "checkpoints/step_00000004"))
    manifest = json.loads((bad / MANIFEST).read_text())
    (bad / MANIFEST).write_text(json.dumps(manifest | {"saved_at": manifest["saved_at"] + 1}))
    secret = tmp_path / "secret"
    secret.write_text("not for the checkpoint to read")
    link_a_file(bad, secret)
    words = arguments(run_file, {"out": str(tmp_path), "name": "run", **STEPS, "steps": 3})
    ended = run_ranks(words, tmp_path / "logs", ranks=1)
    assert ended.code == 0, ended.stderr
    assert "skipping a damaged checkpoint" in ended.stdout
    assert f"resumed from {good} at step 2" in ended.stdout
    assert bad.exists()
    assert secret.read_text() == "not for the checkpoint to read"


@pytest.mark.parametrize("named", ["../other/step_00000002", "/etc", "", ".", "step_00000002/../../x", "a\0b"])
def test_latest_can_only_name_a_checkpoint_beside_it(checkpoint: Path, tmp_path: Path, named: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "run/other/step_00000002")
    latest = checkpoint.parent / "latest"
    latest.write_text(named)
    with pytest.raises(UserError, match=r"latest names .* which is no checkpoint beside it"):
        resolve(latest)
    latest.write_text("step_00000002\n")
    assert resolve(latest) == checkpoint


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_retired(checkpoint: Path, tmp_path: Path) -> None:
    """A user may move an old checkpoint to a larger disk."""
    moved = shutil.move(checkpoint, tmp_path / "larger_disk")
    checkpoint.symlink_to(moved)
    verify(checkpoint)
    assert complete_checkpoints(checkpoint.parent) == [checkpoint]
    retire(checkpoint)
    assert not checkpoint.is_symlink()
    verify(moved)

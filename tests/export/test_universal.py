"""DeepSpeed universal checkpoints: DeepSpeed's own loader takes what we write, and a run continues from what it writes.

Another trainer is a plain DeepSpeed script (tests/support/workers/universal_worker.py). States are put together by
DeepSpeed's own functions, and its own converter is the reference for files.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import UserError
from pretrain.export.universal import export_universal
from tests.checkpoints.test_elastic import BF16, layout, start
from tests.support.runs import launch, start_ranks
from tests.support.selection import asked_for, slow_but
from tests.support.workers.elastic_worker import BEFORE, Layout
from tests.support.workers.universal_worker import use_all

State = dict[str, dict[str, torch.Tensor]]
Plain = dict[str, Any]
# Our side and theirs, each with its ranks. The first goes out, the second comes in.
PAIRS: dict[str, tuple[tuple[int, Layout], tuple[int, Plain]]] = {
    "ZeRO-3 and 1": ((2, layout(3)), (2, {"stage": 1, "bf16": False})),
    "ZeRO-3 and 3, other ranks": ((3, layout(3)), (2, {"stage": 3, "bf16": False})),
    "ZeRO-1 and 3": ((2, layout(1)), (1, {"stage": 3, "bf16": False})),
    "ZeRO-2 and 2": ((2, layout(2)), (2, {"stage": 2, "bf16": False})),
    "stage 0 and ZeRO-1": ((2, layout(0)), (1, {"stage": 1, "bf16": False})),
    "tensor 2 and ZeRO-1": ((2, layout(1, tensor=2)), (2, {"stage": 1, "bf16": False})),
    "tensor 2 at ZeRO-3 and ZeRO-3": ((4, layout(3, tensor=2)), (2, {"stage": 3, "bf16": False})),
    "bf16": ((2, layout(3, precision=BF16)), (2, {"stage": 3, "bf16": True})),
    "bf16, ZeRO-1": ((2, layout(1, precision=BF16)), (2, {"stage": 1, "bf16": True})),
}
FAST = ("ZeRO-3 and 1",)
# DeepSpeed's converter takes ZeRO checkpoints only. With tensor parallelism at ZeRO-3, its map of a weight that is whole on
# each rank has no elements, and it ends with an error.
NOT_BY_DEEPSPEED = ("stage 0 and ZeRO-1", "tensor 2 at ZeRO-3 and ZeRO-3")


def by_deepspeed(source: Path, out: Path) -> Path:
    """Convert with DeepSpeed's own converter; return the universal checkpoint's folder."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
    sizes = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    ended = launch([*command, "--output_folder", str(out), "--inject_missing_state", *sizes])
    assert ended.code == 0, ended.stderr[-3000:]
    return out


def plain_ranks(out: Path, ranks: int, cases: dict[str, tuple[Plain, Path | None]]) -> None:
    with start_ranks([], out / f"logs_{ranks}_{next(iter(cases))}", ranks, prepare=partial(use_all, cases, out)) as job:
        ended = job.wait()
        assert ended.code == 0, ended.stderr[-5000:]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make both sides' checkpoints, convert them, and load each on the other side."""
    out, pairs = tmp_path_factory.mktemp("universal"), asked_for(request, PAIRS)
    for number, ((our_ranks, ours), (their_ranks, theirs)) in enumerate(pairs.values()):
        start(out / "ours", {f"saved {number}": ((our_ranks, ours), None)})
        plain_ranks(out / "theirs", their_ranks, {f"saved {number}": (theirs, None)})
        export_universal(out / "ours" / f"saved {number}" / f"step_{BEFORE:08d}", out / f"exported {number}", print)
        theirs_folder = out / "theirs" / f"saved {number}"
        converted = by_deepspeed(theirs_folder / "theirs", theirs_folder / "universal")
        plain_ranks(out / "theirs", their_ranks, {f"loaded {number}": (theirs, out / f"exported {number}")})
        start(out / "ours", {f"loaded {number}": ((our_ranks, ours), converted)})
    return out


def number_of(request: pytest.FixtureRequest, name: str) -> int:
    return list(asked_for(request, PAIRS)).index(name)


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys() == {"master", "exp_avg", "exp_avg_sq"}
        for key, tensor in tensors.items():
            assert tensor.abs().sum() > 0
            assert torch.equal(tensor.flatten(), other[name][key].flatten()), (name, key)


@pytest.mark.parametrize("name", slow_but(FAST, PAIRS))
def test_a_plain_deepspeed_script_loads_an_export(request: pytest.FixtureRequest, folder: Path, name: str) -> None:
    number = number_of(request, name)
    saved, loaded = folder / "ours" / f"saved {number}", folder / "theirs" / f"loaded {number}"
    assert_same(torch.load(saved / "state.pt"), torch.load(loaded / "state.pt"))
    found, was = (json.loads((path / "found_0.json").read_text()) for path in (loaded, saved))
    assert (found["steps"], found["samples"]) == (BEFORE, was["samples"])


@pytest.mark.parametrize("name", slow_but(FAST, PAIRS))
def test_another_trainers_run_continues_here(request: pytest.FixtureRequest, folder: Path, name: str) -> None:
    number = number_of(request, name)
    saved, loaded = folder / "theirs" / f"saved {number}", folder / "ours" / f"loaded {number}"
    assert_same(torch.load(saved / "state.pt"), torch.load(loaded / "state.pt"))
    found = json.loads((loaded / "found_0.json").read_text())
    assert found["steps"] == BEFORE
    assert all(loss < 5 for loss in found["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAIRS if name not in NOT_BY_DEEPSPEED])
def test_an_export_holds_what_deepspeeds_converter_writes(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, name: str
) -> None:
    number = number_of(request, name)
    source = folder / "ours" / f"saved {number}" / f"step_{BEFORE:08d}" / "deepspeed"
    [exported] = (folder / f"exported {number}").glob("*/zero")
    reference = by_deepspeed(source, tmp_path / "reference") / "zero"
    files = sorted(reference.glob("*/fp32.pt")) + sorted(reference.glob("*/exp_avg*.pt"))
    assert len({path.parent for path in files}) == len([path for path in exported.iterdir() if path.is_dir()])
    for path in files:
        wanted, found = (torch.load(root / path.relative_to(reference)) for root in (reference, exported))
        wanted = wanted["param"] if isinstance(wanted, dict) else wanted
        assert torch.equal(wanted.flatten(), found["param"].flatten())
    for path in reference.glob("*/step.pt"):
        assert torch.load(path) == torch.load(exported / path.relative_to(reference))


def test_nothing_is_written_where_something_is(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "ours" / "saved 0" / f"step_{BEFORE:08d}"
    with pytest.raises(UserError, match="exists already"):
        export_universal(checkpoint, tmp_path, print)
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    next((damaged / "deepspeed").glob("*optim_states.pt")).write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes"):
        export_universal(damaged, tmp_path / "out", print)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]

"""`deterministic: true`: what it sets, and that a run uses nothing that torch then refuses on a GPU. On a CPU nothing changes."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from pretrain.engine.determinism import compute_deterministically
from pretrain.errors import UserError
from tests.support.faults import replace, together
from tests.support.runs import Ended, arguments, losses, rows, run_together, start_ranks

# Operations that raise, or differ from call to call, on CUDA: the lists in the documentation of
# torch.use_deterministic_algorithms and of torch's attention. cumsum raises for floating point only, median where it also
# gives indices.
REFUSED = re.compile(
    r"put_|histc|bincount|kthvalue|median\.dim|cumsum\.float|nll_loss2d|_ctc_loss|_embedding_bag|scatter_reduce|max_unpool|grid_sampler"
    r"|(adaptive_)?(avg|max)_pool.*backward|upsample.*backward|re(flection|plication)_pad.*backward"
    r"|_scaled_dot_product_cudnn_attention"
)


def note_operations(file: Path) -> None:
    """Write the name of each operation of this rank into `file` once, as it is called first."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
            if name == "cumsum" and result.is_floating_point():
                name = "cumsum.float"
            if name == "median" and function._overloadname.startswith("dim"):
                name = "median.dim"
            if name not in self.seen:
                self.seen.add(name)
                with open(file, "a", encoding="utf-8") as names:
                    names.write(f"{name}\n")
            return result

    Names().__enter__()


def hide_package(name: str) -> None:
    """Let a package look as if it were not installed."""
    import sys
    from importlib import metadata

    version = metadata.version

    def version_unless_hidden(asked: str) -> str:
        if asked == name:
            raise metadata.PackageNotFoundError(name)
        return version(asked)

    replace(metadata, "version", version_unless_hidden)
    sys.modules[name] = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def ran(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, str]:
    """Return the folder of a plain and a deterministic run, the end of the latter, and the operations that it has called."""
    out = tmp_path_factory.mktemp("deterministic")
    common = {"out": str(out), "steps": 4, "eval.interval_steps": 2, "log.activations_interval_steps": 2}
    common |= {"data.document_attention": True, "log.weights_interval_steps": 1}
    plain = arguments(run_file, common | {"name": "plain"})
    chosen = arguments(run_file, common | {"name": "chosen", "deterministic": True})
    prepare = together(partial(note_operations, out / "operations"), partial(hide_package, "datasets"))
    with start_ranks(chosen, out / "logs/chosen", ranks=1, prepare=prepare) as job:
        assert run_together({"plain": (plain, 1)}, out / "logs")["plain"].code == 0
        ended = job.wait()
    return out, ended, (out / "operations").read_text()


def test_on_a_cpu_a_deterministic_run_has_the_losses_of_any_other(ran: tuple) -> None:
    out, ended, _ = ran
    assert ended.code == 0, ended.stderr
    assert losses(out / "chosen") == losses(out / "plain")
    assert [row["loss"] for row in rows(out / "chosen", "eval")] == [row["loss"] for row in rows(out / "plain", "eval")]


def test_a_run_calls_no_operation_that_torch_refuses_on_a_gpu(ran: tuple) -> None:
    *_, operations = ran
    names = operations.split()
    assert {"mm", "embedding_dense_backward"} <= set(names)
    assert [name for name in names if REFUSED.fullmatch(name)] == []


def test_training_needs_no_installed_datasets(ran: tuple) -> None:
    out, ended, _ = ran
    assert ended.code == 0
    assert json.loads((out / "chosen/environment.json").read_text())["packages"]["datasets"] is None


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return the calls to torch, in a process without the variables."""
    calls: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_libraries_are_asked_for_the_same_bits(clean: list[bool]) -> None:
    compute_deterministically()
    assert clean == [True]
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")


def test_variables_that_are_set_are_kept_or_refused(clean: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    compute_deterministically()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Tree")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, and it is :0:0"):
        compute_deterministically()

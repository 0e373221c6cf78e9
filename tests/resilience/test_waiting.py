"""Which ranks the others wait for, by the places where a host waits for its GPU and by what ranks have done together."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from pretrain.resilience.waiting import Progress, furthest_behind, waits_for_others
from tests.support.runs import REPOSITORY


def test_the_rank_that_has_enqueued_or_completed_less_is_behind() -> None:
    def of(world: tuple[int, int, int], pair: tuple[int, int, int]) -> dict[str, Progress]:
        return {"world (0)": Progress(*world, "nccl:all_reduce"), "pair (1)": Progress(*pair, "nccl:broadcast")}

    others = of((7, 7, 6), (3, 3, 3))
    assert furthest_behind({0: others, 1: others, 2: others}) == []
    assert furthest_behind({0: others, 1: of((6, 6, 6), (3, 3, 3)), 2: others}) == [1]
    assert furthest_behind({0: others, 1: others, 2: of((7, 6, 6), (3, 3, 3))}) == [2]  # its GPU has not got to it
    assert furthest_behind({0: {}, 1: others, 2: {"pair (1)": Progress(2, 2, 2, "nccl:broadcast")}}) == [2]
    assert furthest_behind({0: {}, 1: others}) == []


@pytest.mark.parametrize(
    ("file", "function", "waits"),
    [
        ("site-packages/torch/cuda/__init__.py", "synchronize", True),
        ("site-packages/torch/cuda/streams.py", "synchronize", True),
        ("site-packages/deepspeed/utils/timer.py", "start", True),
        ("site-packages/deepspeed/runtime/zero/stage3.py", "scaled_global_norm", True),
        ("site-packages/torch/distributed/distributed_c10d.py", "all_reduce", True),
        (str(REPOSITORY / "pretrain/engine/step_gate.py"), "_as_number", True),
        (str(REPOSITORY / "pretrain/data/batches/feed.py"), "read", False),
        ("site-packages/torch/nn/functional.py", "linear", False),
    ],
)
def test_a_host_that_waits_for_its_gpu_is_recognized(
    monkeypatch: pytest.MonkeyPatch, file: str, function: str, waits: bool
) -> None:
    names: dict = {"sys": sys}
    exec(compile(f"def {function}(): return sys._getframe()", file, "exec"), names)
    frame = names[function]()
    monkeypatch.setattr(sys, "_current_frames", lambda: {threading.main_thread().ident: frame})
    assert waits_for_others() is waits


def test_the_files_that_are_recognized_exist() -> None:
    import deepspeed
    import torch

    for package, names in (
        (torch, ("cuda/__init__.py", "cuda/streams.py", "distributed/distributed_c10d.py", "autograd/graph.py")),
        (deepspeed, ("utils/timer.py", "runtime/zero/stage3.py", "comm/comm.py", "accelerator")),
    ):
        folder = Path(package.__file__).parent
        assert [name for name in names if not (folder / name).exists()] == []

"""Reading a model takes little memory besides the weights that a rank holds: neither the model nor a weight is copied."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.runs import run_ranks
from tests.support.stock_models import saved
from tests.support.workers.starting_worker import measure_reading


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory from /proc")
def test_a_rank_holds_a_block_of_the_file_besides_its_share(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 32768, "num_hidden_layers": 1}
    folder = saved(tmp_path / "model", "llama", torch.bfloat16, attention_bias=False, mlp_bias=False, **sizes)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 24e6
    ended = run_ranks([], tmp_path / "logs", prepare=partial(measure_reading, folder, tmp_path))
    assert ended.code == 0, ended.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["largest weight"] > 16e6
        assert found["grown"] < 8e6, f"rank {rank} needed {found['grown'] / 1e6:.1f} MB more"

"""The command line that predicts a run on a cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config.schema import Config, load_config
from pretrain.planning.run_shape import shape_of
from tests.support.corpus import Corpus, tiny
from tests.support.runs import REPOSITORY
from tests.support.stock_models import stock_model


def plan(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/plan.py", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return what is printed for the 1B model on four nodes, and the run file that is written."""
    written = tmp_path_factory.mktemp("plan") / "fastest.yaml"
    done = plan("--config", "configs/1b_tvr.yaml", "--nodes", "4", "--gpu", "h100", "--search", str(written))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, written


def test_the_parts_of_the_memory_add_up(found: tuple[str, Path]) -> None:
    lines = found[0].splitlines()
    gigabytes = {"GB": 1.0, "MB": 1e-3}
    parts = [float(size) * gigabytes[unit] for size, unit in (line.split()[-2:] for line in lines if line[:2] == "  ")]
    (whole,) = [float(line.split()[1]) for line in lines if line.startswith("memory")]
    assert whole == pytest.approx(sum(parts), rel=0.01)


def test_the_length_and_the_speed_give_the_days(found: tuple[str, Path]) -> None:
    (speed,) = re.findall(r"([\d,]+) tokens/s, ", found[0])
    (days,) = re.findall(r"tokens in ([\d.]+) days", found[0])
    assert float(days) == pytest.approx(100e9 / float(speed.replace(",", "")) / 86400, rel=0.01)


def test_a_run_that_starts_from_a_model_has_its_sizes(tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "max_position_embeddings": 64}
    model = stock_model("llama", **sizes)
    model.save_pretrained(tmp_path / "model")
    content = tiny(Corpus(tmp_path / "none", tmp_path / "none", tmp_path / "none"))
    content |= {"name": "run", "methods": [], "model": {"family": "llama", "init_from": str(tmp_path / "model")}}
    shape = shape_of(Config.model_validate(content), 2)
    assert shape.parameters == model.num_parameters()


def test_layouts_are_listed_from_the_fastest_on_and_the_first_is_written(found: tuple[str, Path]) -> None:
    rows = re.findall(r"^ZeRO-(\d), micro-batch (\d+).* (\d[\d.]*) s ", found[0], re.MULTILINE)
    assert [float(step) for *_, step in rows] == sorted(float(step) for *_, step in rows)
    config = load_config(found[1])
    assert (config.name, config.data.micro_batch_size) == ("fastest", int(rows[0][1]))
    assert config.deepspeed["zero_optimization"]["stage"] == int(rows[0][0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h9"], "--gpu h9 is not known. Known are: a100"),
        (["--nodes", "5"], "is not a multiple of data.micro_batch_size 7 x 40 data-parallel ranks"),
        pytest.param(
            ["--set", "parallel.tensor=3"], "parallel.tensor 3 does not divide the 8 ranks", marks=pytest.mark.slow
        ),
        pytest.param(["--set", "model.vocab_size=null"], "there is no tokenizer at", marks=pytest.mark.slow),
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_paragraph(words: list[str], message: str) -> None:
    done = plan("--config", "configs/1b_tvr.yaml", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

"""The check of a GPU: what becomes of stages that hang or crash, and run files that are right before a GPU is there.

tests/fakecuda/test_gpu_check.py runs every stage.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import load_tokenizer, open_shards
from pretrain.gpu_check import correctness, speed
from pretrain.gpu_check.material import make_material
from pretrain.gpu_check.runner import RESULTS, Step, run_steps, steps
from pretrain.gpu_check.speed import CASES, config_of
from pretrain.gpu_check.stage import SMALL, Stage
from pretrain.gpu_check.table import line_of, table_of

# In the place of a stage's process: does what its order says.
STAND_IN = """
import json, subprocess, sys, time
order = json.loads(sys.stdin.readline())
say = lambda **result: print(json.dumps({"passed": None, "note": "", **result}), flush=True)
say(case="begun", passed=True)
if order["run"] == "hang":
    child = subprocess.Popen(["sleep", "1000"])
    open(order["arguments"]["pid"], "w").write(str(child.pid))
    child.wait()
if order["run"] == "crash":
    sys.exit("the last line of its log")
say(case="done", quick=order["quick"])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return tmp_path


def found(folder: Path, planned: list[Step], minutes: float = 1.0) -> list[dict]:
    python = shlex.join([sys.executable, str(folder / "stand_in.py")])
    return list(run_steps(folder, planned, True, python, minutes))


def test_a_stage_that_crashes_or_hangs_costs_itself_only(folder: Path) -> None:
    pid = folder / "pid"
    planned = [
        Step("first", "crash", 60),
        Step("second", "hang", 5, {"pid": str(pid)}),
        Step("third", "well", 60),
    ]
    results = found(folder, planned)
    assert [(result["stage"], result["case"], result["passed"]) for result in results] == [
        ("first", "begun", True),
        ("first", "", False),
        ("second", "begun", True),
        ("second", "", False),
        ("third", "begun", True),
        ("third", "done", None),
    ]
    assert "ended with code 1: the last line of its log" in results[1]["note"]
    assert "took longer than 5 s" in results[3]["note"]
    child = Path(f"/proc/{pid.read_text()}/stat")
    assert not child.exists() or child.read_text(encoding="utf-8").split()[2] == "Z"
    written = [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines()]
    assert written == results


def test_stages_for_which_no_time_is_left_are_listed(folder: Path) -> None:
    began = time.monotonic()
    planned = [
        Step("first", "hang", 60, {"pid": str(folder / "pid")}),
        Step("second", "well", 60, {"names": ["a", "b"]}),
    ]
    results = found(folder, planned, minutes=3 / 60)
    assert results[-1]["note"] == "not run: no time was left"
    assert results[-1]["case"] == "a, b"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("quick", [True, False])
def test_every_stage_names_a_function_and_every_case_a_valid_run_file(folder: Path, quick: bool) -> None:
    modules = {"correctness": correctness, "speed": speed}
    for step in steps(quick):
        module, function = step.run.split(":")
        assert callable(getattr(modules[module], function))
    measured = [name for step in steps(quick) for name in step.arguments.get("names", ())]
    assert sorted(measured) == sorted(case.name for case in CASES)
    stage = Stage(folder, quick, print)
    for case in CASES:
        config = config_of(stage, case, "case")
        assert all(method.interval_steps == 1 for method in config.methods if method.name == "tvr"), case.name
        assert (config.model.hf_fields["hidden_size"] == 2048) is not quick


def test_the_material_is_a_corpus_of_its_tokenizer_with_every_id(folder: Path) -> None:
    material = make_material(folder / "material", vocabulary=300, tokens=60_000)
    tokenizer = load_tokenizer(material.tokenizer)
    shards = open_shards(str(material.shards))
    tokens = shards.head(shards.tokens)
    assert len(tokenizer) == 300
    assert set(np.unique(tokens)) == set(range(300))
    assert abs(shards.tokens - 60_000) < 6_000
    assert tokens[-1] == tokenizer.eos_token_id


def test_findings_are_lines_and_speeds_a_table() -> None:
    speed_of = {"tokens_per_s": 51234.4, "ms_per_micro_batch": 279.84, "mfu": 0.3331, "peak_gb": 44.96}
    row = {"stage": "speed", "case": "as shipped", "passed": None, "note": "", "seconds": 61.2}
    row |= speed_of | {"methods_share": 0.00412, "last_loss": 11.25, "unknown": 1}
    wrong = {"stage": "same bits", "case": "resumed", "passed": False, "note": "differs", "seconds": 9.0}
    assert line_of(wrong) == "   9.0 s  WRONG  same bits: resumed  differs"
    assert "51,234 tokens/s, 279.8 ms/micro-batch, 33.3% MFU" in line_of(row)
    *_, last = table_of([wrong, row]).splitlines()
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "as shipped",
        "51,234",
        "279.8",
        "33.3%",
        "45.0",
        "0.41%",
        "11.2500",
    ]
    assert table_of([wrong]) == ""

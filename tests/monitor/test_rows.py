"""The types of the rows of metrics.jsonl: what is written, what is read, and the page that lists their fields."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from pydantic import ValidationError

from pretrain.monitor import rows_page
from pretrain.monitor.metrics import Metrics
from pretrain.monitor.rows import AnyRow, CheckpointSaved, EvalRow, WeightsRow, parse_row
from pretrain.monitor.wandb_session import values_of
from tests.support.runs import REPOSITORY, checked_row

NAME = "model.layers.0.mlp.up_proj.weight"
OLD = {"kind": "weights", "step": 3, "time": 1.5, NAME: {"std": 0.5, "rescaled": True}, "lm_head.weight": {"std": None}}
NEW = {
    "kind": "weights",
    "step": 3,
    "time": 1.5,
    "weights": {NAME: {"std": 0.5, "rescaled": True}, "lm_head.weight": {"std": None}},
}


def test_the_page_of_the_fields_is_the_one_that_the_types_give() -> None:
    page = (REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8")
    assert page == rows_page.page(), "run: python -m pretrain.monitor.rows_page > docs/metrics.md"


@pytest.mark.parametrize("row", get_args(AnyRow), ids=lambda row: row.__name__)
def test_every_field_has_a_unit_and_a_meaning(row: type) -> None:
    described = rows_page.fields(row)
    assert set(described) == set(get_type_hints(row)) - {"kind", "event"}
    assert all(meaning for _, _, meaning in described.values())


def test_a_written_row_begins_with_kind_step_and_time_and_fits_its_type(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, enabled=True)
    metrics.write(EvalRow(kind="eval", step=4, loss=nan, perplexity=inf))
    metrics.write(WeightsRow(kind="weights", step=4, weights={NAME: {"std": -inf, "rescaled": False}}))
    metrics.write(
        CheckpointSaved(kind="event", step=4, event="checkpoint_saved", checkpoint="x", seconds=1.0, stall_s=0.5)
    )
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [checked_row(json.loads(line)) for line in lines]
    assert [list(row)[:3] for row in found] == [["kind", "step", "time"]] * 3
    assert (found[0]["loss"], found[0]["perplexity"], found[1]["weights"][NAME]["std"]) == (None, None, None)
    assert lines[2].startswith('{"kind": "event"'), "by which the tracker passes over events"


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "eval", "step": 1, "loss": 1.0},
        {"kind": "eval", "step": 1, "loss": 1.0, "perplexity": 2.0, "accuracy": 0.5},
        {"kind": "event", "step": 1, "event": "unheard_of"},
        OLD,
    ],
    ids=["a field is missing", "an unknown field", "an unknown event", "the older form"],
)
def test_the_tests_refuse_rows_that_fit_no_type(row: dict) -> None:
    with pytest.raises(ValidationError):
        checked_row(row)


def test_weights_that_stand_beside_kind_and_step_are_read_like_those_of_today() -> None:
    assert parse_row(json.dumps(OLD)) == parse_row(json.dumps(NEW)) == NEW


@pytest.mark.parametrize("line", ["[1]", "{}", '{"kind": 1, "step": 2}', '{"kind": "train"}', '{"kind": "tra'])
def test_a_line_that_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        parse_row(line)


@pytest.mark.parametrize("row", [OLD, NEW], ids=["the older form", "the form of today"])
def test_wandb_gets_the_weights_under_the_same_names(row: dict) -> None:
    values = {f"weights/{NAME}/std": 0.5, f"weights/{NAME}/rescaled": True}
    assert values_of(parse_row(json.dumps(row))) == {"step": 3, "_timestamp": 1.5, **values}

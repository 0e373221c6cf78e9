"""The report of an autopsy, from made-up figures and without ranks."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from pretrain.autopsy import autopsies, report_text
from pretrain.autopsy.part_figures import measures, moves, part_of
from pretrain.autopsy.recorder import Norms, StepFigures
from pretrain.model.layout import describe

NAMES = ["model.embed_tokens", *(f"model.layers.{n}.mlp.{m}_proj" for n in range(3) for m in ("up", "down"))]
LAYOUT = {
    weight.name: weight for weight in (describe(f"{name}.weight", (4, 4)) for name in [*NAMES, "model.norm", "lm_head"])
}


def step(number: int, gradients: dict[str, float] | None = None, **changes: Any) -> StepFigures:
    """Return figures with gradients of 1, steps of 0.5 and weights of 10, except the `gradients` of some parts."""
    norms = {
        name: Norms((gradients or {}).get(part_of(weight), 1.0), changes.get("stepped", 0.5), 10.0)
        for name, weight in LAYOUT.items()
    }
    activations = changes.get("activations", [1.0, 2.0, 3.0])
    return StepFigures(number, range(8), {"total": 3.0, "cross_entropy": 3.0}, 1e-3, 1.0, norms, activations)


def text_of(*steps: StepFigures) -> str:
    """Return the sentences about what has moved."""
    return "\n".join(sentence for measure in measures(steps, LAYOUT) for sentence in report_text.sentences(measure))


def test_the_layer_that_moved_is_named_with_its_ratio_and_the_others_are_summarized() -> None:
    text = text_of(*(step(number) for number in range(1, 9)), step(9, {"layer 2": 41.0}))
    assert "layer 2's gradient norm is 41 times its median of the steps before (57.98; it was 1.414)" in text
    assert "the other gradient norms are 1 to 1 times their medians" in text
    assert "the update ratios are where they were: 1 to 1 times" in text
    assert text.count("is 41 times") == 1


def test_the_figure_of_a_layer_is_that_of_all_its_weights_together() -> None:
    gradients, ratios, activations = measures([step(1)], LAYOUT)
    assert gradients.series["layer 1"] == [pytest.approx(2**0.5)]
    assert ratios.series["layer 1"] == [pytest.approx(0.05)]
    assert list(gradients.series) == ["embed_tokens", "layer 1", "layer 2", "layer 3", "norm", "lm_head"]
    assert activations.series == {"layer 1": [1.0], "layer 2": [2.0], "layer 3": [3.0]}


def test_one_bad_step_among_those_before_does_not_hide_a_move() -> None:
    before = [step(1), step(2), step(3, {"layer 2": nan}), step(4, {"layer 2": 1000.0}), step(5)]
    assert "layer 2's gradient norm is 41 times" in text_of(*before, step(6, {"layer 2": 41.0}))


def test_a_skipped_step_is_not_reported_as_one_of_small_updates() -> None:
    assert "update ratio" not in text_of(step(1), step(2), step(3, stepped=0.0))
    assert "the update ratios are where they were: 1 to 1 times" in text_of(step(1), step(2, stepped=0.0), step(3))


def test_a_part_that_falls_has_moved_too() -> None:
    text = text_of(step(1), step(2), step(3, activations=[1.0, 0.2, 3.0]))
    assert "layer 2's largest activation is 1/10 of its median of the steps before (0.2; it was 2)" in text


def test_the_origin_of_values_that_are_not_finite_is_named() -> None:
    broken = dict.fromkeys(("embed_tokens", "layer 1", "layer 2"), nan)
    text = text_of(step(1), step(2, broken, activations=[1.0, inf, nan]))
    assert (
        "the gradient norms of embed_tokens, layer 1, layer 2 are not finite; of these backward comes to first layer 2"
        in text
    )
    assert "the largest activations of layer 2, layer 3 are not finite; of these forward comes to first layer 2" in text
    everything = dict.fromkeys(("embed_tokens", "layer 1", "layer 2", "layer 3", "norm", "lm_head"), nan)
    assert "none of the gradient norms is finite" in text_of(step(1), step(2, everything))


def test_figures_that_are_not_known_are_left_out() -> None:
    assert "update ratio" not in text_of(step(1, stepped=None), step(2, stepped=None))
    gradients, ratios, _ = measures([step(1, stepped=None)], LAYOUT)
    assert ratios.series["layer 1"] == [None]
    assert moves(ratios) == []
    assert gradients.series["layer 1"] != [None]


def test_the_first_step_of_all_has_nothing_to_be_compared_with() -> None:
    assert text_of(step(1, {"layer 2": 41.0})) == ""


def test_a_document_cannot_control_the_terminal() -> None:
    text = "a\x1b[2Jb\r\x9b31mc\u202ed\te\nf"
    assert report_text.shown_safely(text) == "a\\x1b[2Jb\\r\\x9b31mc\\u202ed\te\nf"


def test_numbers_that_json_lacks_can_be_read_back() -> None:
    written = json.dumps(autopsies._as_json({"a": [nan, inf, -inf, 1.5, None, True]}), allow_nan=False)
    found = json.loads(written)["a"]
    assert [float(value) for value in found[1:4]] == [inf, -inf, 1.5]
    assert found[0] == "nan"
    assert found[4:] == [None, True]


def test_a_step_that_a_run_takes_twice_keeps_both_autopsies(tmp_path: Path) -> None:
    wanted = tmp_path / "step_00000007"
    for name in ("step_00000007", "step_00000007_2", "step_00000007_3"):
        assert autopsies._free_name(wanted).name == name
        autopsies._free_name(wanted).mkdir()
    (tmp_path / ".writing").mkdir()
    assert len(autopsies._complete(tmp_path)) == 3

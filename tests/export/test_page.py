"""docs/exports.md shows the table that test_matrix.py proves."""

from __future__ import annotations

from tests.support.peers.expected import CLASSES, CONSUMERS, FAILURES, PAGE, TOKENIZERS, page_with_table


def test_the_page_has_the_table_of_what_is_expected() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), "run: python tests/support/peers/expected.py --write"


def test_every_known_failure_is_of_cells_that_are_there() -> None:
    for known in FAILURES:
        assert known.consumer in CONSUMERS
        assert set(known.classes) <= set(CLASSES)
        assert set(known.tokenizers) <= set(TOKENIZERS)

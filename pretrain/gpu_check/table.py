"""The findings as text: a line for each as it comes, and the speeds as a table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COLUMNS = {
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
    "ms/micro-batch": ("ms_per_micro_batch", "{:,.1f}"),
    "MFU": ("mfu", "{:.1%}"),
    "peak GB": ("peak_gb", "{:.1f}"),
    "methods' share": ("methods_share", "{:.2%}"),
    "last loss": ("last_loss", "{:.4f}"),
}
_MARKS = {True: "ok", False: "WRONG", None: ""}


def line_of(result: dict[str, Any]) -> str:
    """Return a finding as one line."""
    figures = [f"{shown(result, name)} {name}" for name, (key, _) in _COLUMNS.items() if key in result]
    text = result["note"] or ", ".join(figures)
    return f"{result['seconds']:6.1f} s  {_MARKS[result['passed']]:5}  {result['stage']}: {result['case']}  {text}"


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """Return the speeds as a table in Markdown that is aligned too. Empty if none was measured."""
    rows = [result for result in results if "tokens_per_s" in result]
    if not rows:
        return ""
    cells = [["", *_COLUMNS]] + [[row["case"], *(shown(row, name) for name in _COLUMNS)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def shown(result: dict[str, Any], column: str) -> str:
    """Return a figure of a finding as its column shows it."""
    key, form = _COLUMNS[column]
    value = result.get(key)
    return "-" if value is None else form.format(value)

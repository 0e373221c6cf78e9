"""Sets the page: plain HTML and CSS around inline SVG, nothing loaded from anywhere."""

from __future__ import annotations

from html import escape

from pretrain.report.picture import Picture, color_variable, css_colors
from pretrain.report.runs import Run
from pretrain.report.style import run_color
from pretrain.report.stylesheet import stylesheet
from pretrain.report.summary import Fact, facts, method_lines, model_line, resumed_at, status_line


def render_page(runs: list[Run], pictures: list[Picture]) -> str:
    """The whole page as one HTML document."""
    cards = "".join(_card(run, index) for index, run in enumerate(runs))
    figures = _tiles(facts(runs[0])) if len(runs) == 1 else _table(runs)
    body = f"""<main>
<h1>Pretraining report</h1>
<div class="runs">{cards}</div>
{figures}
{"".join(map(_section, pictures))}</main>"""
    names = escape(", ".join(run.label for run in runs))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{names} · pretraining report</title>
<style>{stylesheet(*css_colors(body))}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _card(run: Run, index: int) -> str:
    """Name, status, model and methods of one run, marked with its colour."""
    resumed = ", ".join(f"{step:,}" for step in resumed_at(run))
    lines = [model_line(run), *method_lines(run), f"resumed from step {resumed}" if resumed else ""]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines if line)
    return (
        f'<div class="run" style="{_run_style(index)}"><h2>{escape(run.label)}'
        f'<span class="status">{escape(status_line(run))}</span></h2><ul>{items}</ul></div>'
    )


def _tiles(figures: list[Fact]) -> str:
    """The figures of a single run."""
    tiles = "".join(f"<div><dt>{escape(f.label)}</dt>{_cell('dd', f)}</div>" for f in figures)
    return f'<dl class="tiles">{tiles}</dl>'


def _table(runs: list[Run]) -> str:
    """The figures of several runs, one row each."""
    columns = "".join(f"<th>{escape(fact.label)}</th>" for fact in facts(runs[0]))
    rows = "".join(
        f'<tr><td><span class="chip" style="{_run_style(index)}"></span>{escape(run.label)}</td>'
        f"{''.join(_cell('td', fact) for fact in facts(run))}</tr>"
        for index, run in enumerate(runs)
    )
    head = f"<thead><tr><th>run</th>{columns}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _cell(tag: str, fact: Fact) -> str:
    return f'<{tag} title="{escape(fact.exact)}">{escape(fact.text)}</{tag}>'


def _section(picture: Picture) -> str:
    drawing = picture.svg() if picture.figure else ""
    return (
        f'<section id="{escape(picture.name)}"><h2>{escape(picture.title)}</h2>'
        f"<figure><figcaption>{escape(picture.caption)}</figcaption>{drawing}</figure></section>\n"
    )


def _run_style(index: int) -> str:
    return f"--run:{color_variable(run_color(index))}"

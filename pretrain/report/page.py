"""The page: plain HTML and CSS around inline SVG, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

from pretrain.report.picture import Picture, color_variable, css_colors
from pretrain.report.runs import Run
from pretrain.report.style import run_color
from pretrain.report.stylesheet import stylesheet
from pretrain.report.summary import RunFigure, figures, method_lines, model_line, resumed_at, status_line


def render_page(runs: list[Run], pictures: list[Picture]) -> str:
    """Return the whole page as one HTML document."""
    cards = "".join(_card(run, index) for index, run in enumerate(runs))
    numbers = _tiles(figures(runs[0])) if len(runs) == 1 else _table(runs)
    body = f"""<main>
<h1>Pretraining report</h1>
<div class="runs">{cards}</div>
{numbers}
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
    """Return name, status, model and methods of one run, marked with its colour."""
    resumed = ", ".join(f"{step:,}" for step in resumed_at(run))
    lines = [model_line(run), *method_lines(run), f"resumed from step {resumed}" if resumed else ""]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines if line)
    return (
        f'<div class="run" style="{_run_style(index)}"><h2>{escape(run.label)}'
        f'<span class="status">{escape(status_line(run))}</span></h2><ul>{items}</ul></div>'
    )


def _tiles(shown: list[RunFigure]) -> str:
    """Return the figures of a single run."""
    tiles = "".join(f"<div><dt>{escape(figure.label)}</dt>{_cell('dd', figure)}</div>" for figure in shown)
    return f'<dl class="tiles">{tiles}</dl>'


def _table(runs: list[Run]) -> str:
    """Return the figures of several runs, one row each."""
    columns = "".join(f"<th>{escape(figure.label)}</th>" for figure in figures(runs[0]))
    rows = "".join(
        f'<tr><td><span class="chip" style="{_run_style(index)}"></span>{escape(run.label)}</td>'
        f"{''.join(_cell('td', figure) for figure in figures(run))}</tr>"
        for index, run in enumerate(runs)
    )
    head = f"<thead><tr><th>run</th>{columns}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _cell(tag: str, figure: RunFigure) -> str:
    return f'<{tag} title="{escape(figure.exact)}">{escape(figure.text)}</{tag}>'


def _section(picture: Picture) -> str:
    drawing = picture.svg() if picture.figure else ""
    return (
        f'<section id="{escape(picture.name)}"><h2>{escape(picture.title)}</h2>'
        f"<figure><figcaption>{escape(picture.caption)}</figcaption>{drawing}</figure></section>\n"
    )


def _run_style(index: int) -> str:
    return f"--run:{color_variable(run_color(index))}"

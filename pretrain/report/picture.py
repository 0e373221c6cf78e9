"""One picture of the report, and its two forms: inline SVG for the page, PNG beside it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pretrain.report.style import DARK_OF

_PNG_DPI = 170


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: The name of its PNG and of its place in the page.
        title: Its heading in the page.
        caption: The text below the heading.
        figure: None if the runs hold nothing to draw; the caption says so.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None

    def png(self) -> bytes:
        """Return the picture in its light colours. It must have a figure."""
        return self._saved(format="png", dpi=_PNG_DPI)

    def svg(self) -> str:
        """Return an <svg> element without fixed size, for a page that defines --sans and the colours of `css_colors`.

        The picture must have a figure.
        """
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        # Ids are hashed with the salt: the same on every drawing, different between the pictures of a page.
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            text = self._saved(format="svg", transparent=True, metadata=no_metadata).decode()
        _, attributes, content = re.split(r"<svg ([^>]*)>", text, maxsplit=1)
        view_box = re.findall(r'viewBox="[^"]*"', attributes)[0]
        content = re.sub(r' id="[a-z0-9A-Z]+_\d+"', "", content)
        content = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", content)
        content = re.sub(r"#[0-9a-f]{6}\b", lambda color: color_variable(color[0]), content)
        return f'<svg role="img" aria-label="{escape(self.title)}" {view_box}>{content}'

    def _saved(self, **options: Any) -> bytes:
        assert self.figure is not None
        target = io.BytesIO()
        self.figure.savefig(target, **options)
        return target.getvalue()


def css_colors(svgs: str) -> tuple[str, str]:
    """Return the CSS declarations of the colours that `svgs` use, for a light and for a dark page."""
    used = [color for color in DARK_OF if color_variable(color) in svgs]
    light = "".join(f"{_variable(color)}:{color};" for color in used)
    dark = "".join(f"{_variable(color)}:{DARK_OF[color]};" for color in used)
    return light, dark


def _variable(color: str) -> str:
    return f"--c{color[1:]}"


def color_variable(color: str) -> str:
    """Return the CSS form of a colour of `style`. A colour that has no dark value stays as it is."""
    return f"var({_variable(color)})" if color in DARK_OF else color

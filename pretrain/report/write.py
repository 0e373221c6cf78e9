"""Write the report to disk: the page and, in a folder beside it, a PNG of every picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from pretrain.errors import UserError
from pretrain.files import write_bytes
from pretrain.report import curves
from pretrain.report.page import render_page
from pretrain.report.picture import Picture
from pretrain.report.runs import Run, read_runs
from pretrain.report.style import RC, RUNS
from pretrain.report.weight_pictures import weight_pictures


def write_report(folders: Sequence[str | Path], out: Path) -> list[Path]:
    """Draw runs to a page and to `<out stem>_png/` beside it.

    Args:
        folders: The run folders.
        out: The page.

    Returns:
        The paths of all files written.

    Raises:
        UserError: If a folder holds no usable run, there are more runs than colours, or `out` cannot be written.
    """
    if len(folders) > len(RUNS):
        raise UserError(
            f"{len(folders)} runs were given, but one page can tell at most {len(RUNS)} apart. Give fewer runs, or make "
            "several pages."
        )
    runs = read_runs(folders)
    with matplotlib.rc_context(RC):
        pictures = _draw(runs)
        png_folder = out.with_name(f"{out.stem}_png")
        files = {png_folder / f"{picture.name}.png": picture.png() for picture in pictures if picture.figure}
        files[out] = render_page(runs, pictures).encode()
    try:
        png_folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write_bytes(path, content)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}. Choose another place with --out.") from None
    return list(files)


def _draw(runs: list[Run]) -> list[Picture]:
    return [
        curves.loss_picture(runs),
        *weight_pictures(runs),
        curves.grad_norm_picture(runs),
        curves.learning_rate_picture(runs),
        curves.throughput_picture(runs),
        curves.activations_picture(runs),
    ]

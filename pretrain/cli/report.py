"""Draw one or several runs as one self-contained HTML page with PNGs beside it.

python tools/report.py runs/1b_tvr runs/1b_baseline --out report.html
"""

from __future__ import annotations

from pathlib import Path

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.report.write import write_report


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=argument_types.path, metavar="RUN", help="run folder, as the trainer wrote it"
    )
    parser.add_argument(
        "--out", type=argument_types.path, default=Path("report.html"), help="the page (default: %(default)s)"
    )
    arguments = parser.parse_args()
    for path in write_report(arguments.runs, arguments.out):
        print(path)

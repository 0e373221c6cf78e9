"""Check on one GPU, in ten minutes, that results are right and how fast the 1B model trains.

    python tools/gpu_check.py
    python tools/gpu_check.py --quick --minutes 3

It needs no network and no data. First it compares the GPU with the CPU, TVR with float64, repeated and resumed runs with the
first one, and so on; then it measures configs/1b_tvr.yaml in several ways and profiles a step. Findings are printed and
written to results.jsonl in --out as they come. docs/gpu.md explains them. Exit codes: 0 if nothing is wrong, 1 if something
is, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.errors import UserError
from pretrain.paths import REPOSITORY


def main() -> None:
    options = _parse()
    if not (REPOSITORY / "configs").is_dir():
        raise UserError(
            "configs/ and ds_configs/ are what is checked, and the wheel has neither: run tools/gpu_check.py."
        )
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here.")
    from pretrain.gpu_check.material import make_material
    from pretrain.gpu_check.runner import RESULTS, run_steps, steps
    from pretrain.gpu_check.stage import SMALL, SMALL_VOCABULARY
    from pretrain.gpu_check.table import line_of, table_of

    planned = [
        step for step in steps(options.quick) if not options.only or any(word in step.name for word in options.only)
    ]
    if not planned:
        names = ", ".join(dict.fromkeys(step.name for step in steps(options.quick)))
        raise UserError(f"--only {' '.join(options.only)} names no stage. They are: {names}.")
    folder: Path = options.out or Path("runs") / time.strftime("gpu_check_%Y%m%d_%H%M%S")
    if folder.exists():
        raise UserError(f"{folder} exists: give another --out.")
    folder = folder.absolute()
    (folder / "logs").mkdir(parents=True)
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    make_material(folder / "small", SMALL_VOCABULARY, tokens=60_000)
    if not options.quick:
        make_material(folder / "large", vocabulary=65_536, tokens=2_000_000)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    results = []
    for result in run_steps(folder, planned, options.quick, options.python, options.minutes):
        results.append(result)
        print(line_of(result), flush=True)
    print(f"\n{table_of(results)}\n\nAll findings: {folder / RESULTS}")
    if any(result["passed"] is False for result in results):
        sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--out", type=argument_types.path, help="folder to make (default: runs/gpu_check_DATE_TIME)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model in place of 1B: only whether every stage runs"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="only the stages with one of these words in their name"
    )
    parser.add_argument(
        "--minutes", type=argument_types.number(least=0), default=10.0, help="time for all stages (default: 10)"
    )
    parser.add_argument(
        "--python",
        default=shlex.quote(sys.executable),
        metavar="WORDS",
        help="the words that start Python for each stage on the GPU, such as 'nsys profile python' (default: this Python)",
    )
    return parser.parse_args()

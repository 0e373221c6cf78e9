"""Kill a run at random moments, again and again, and compare its losses with those of a run that was left alone.

python tools/soak.py --config configs/tiny_tvr.yaml --out soak [--set key=value ...] [--kills 50] [--minutes 60]

Give it a short run with checkpoints every few steps. What broke a promise ends the soak with code 2 and a sentence; what
happened to each kill is in OUT/soak.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, whatever else is called so
from pretrain import startup

startup.begin()

import time
from dataclasses import asdict

from benchmarks.soak import Soak, table
from pretrain.cli import argument_types
from pretrain.cli.command import run
from pretrain.cli.parser import tool_parser
from pretrain.errors import UserError
from pretrain.files import write_json


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--config", required=True, type=argument_types.path, help="the run file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    parser.add_argument("--out", required=True, type=argument_types.path, help="folder for the runs; must not exist")
    parser.add_argument(
        "--kills", type=argument_types.whole(1), default=50, help="how many faults (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=argument_types.number(above=0), default=60.0, help="at most so long (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=argument_types.whole(1), default=2, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=argument_types.whole(), default=0, help="of the moments and faults (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists: name a new folder.")
    words = ["--config", str(arguments.config), *(word for setting in arguments.set for word in ("--set", setting))]
    soak = Soak(words, arguments.out.absolute(), arguments.ranks, arguments.seed)
    try:
        soak.run(arguments.kills, time.monotonic() + 60 * arguments.minutes)
    finally:
        write_json(arguments.out / "soak.json", [asdict(trial) for trial in soak.trials])
        print(table(soak.trials))
    if len(soak.trials) < arguments.kills:
        raise UserError(f"only {len(soak.trials)} of {arguments.kills} faults in {arguments.minutes:g} minutes.")
    print(f"\n{len(soak.trials)} faults; every run ended with the losses of one that was left alone, bit for bit")


if __name__ == "__main__":
    run(main)

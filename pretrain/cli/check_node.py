"""Check whether this node is fit to train, before the ranks start, and print one line for each thing that is wrong.

    python tools/check_node.py --folder runs/1b
    srun --ntasks-per-node=1 python tools/check_node.py --folder runs/1b --gpus 8 --min-free-gb 200

It looks at the run folder (writes and reads back data; free space, files, clock), temporary space, memory, the open-file
limit and the GPUs (number, other processes, memory, throttling, memory errors), and multiplies matrices on each device.
It changes nothing. Exit codes: 0 if nothing is wrong, 1 if something is, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.cluster.health import check_node


def main() -> None:
    options = _parse()
    host, healthy = socket.gethostname(), True
    for finding in check_node(options.folder, options.gpus, options.min_free_gb):
        print(f"{host}: {finding}", flush=True)
        healthy = False
    if not healthy:
        sys.exit(1)
    if "SLURM_STEP_ID" not in os.environ:  # of many nodes, only those with a fault are of interest
        print(f"{host}: nothing is wrong")


def _parse() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--folder", type=argument_types.path, required=True, help="run folder; it need not exist yet")
    parser.add_argument(
        "--gpus", type=argument_types.whole(0), help="GPUs that there must be (default: as many as there are)"
    )
    parser.add_argument(
        "--min-free-gb",
        type=argument_types.number(least=0),
        default=10.0,
        help="10^9 bytes that the run folder must have free (default: 10)",
    )
    return parser.parse_args()

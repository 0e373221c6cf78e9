"""Turn a training checkpoint into a DeepSpeed universal checkpoint, for other trainers that use DeepSpeed.

    python tools/convert_checkpoint.py --checkpoint runs/1b_tvr/checkpoints/latest --to universal --out universal/1b_tvr

The folder holds weights and optimizer states. An engine with "checkpoint": {"load_universal": true} loads it at ZeRO 1, 2 or
3 on any number of ranks: engine.load_checkpoint("universal/1b_tvr"). The other way needs no conversion: a run starts from
another trainer's universal checkpoint with checkpoint.resume. For Hugging Face models see tools/convert_to_hf.py.
"""

from __future__ import annotations

import argparse

from pretrain import quiet  # noqa: F401  (before the libraries that it silences)
from pretrain.cli.argument_types import path
from pretrain.cli.parser import tool_parser
from pretrain.export.universal import export_universal


def main() -> None:
    options = _parse()
    made = export_universal(options.checkpoint, options.out, lambda line: print(line, flush=True))
    print(f"complete: {made}. A DeepSpeed engine loads it with load_checkpoint({str(options.out)!r})")


def _parse() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=path, required=True, help="runs/NAME/checkpoints/step_00000500, or .../latest"
    )
    parser.add_argument("--to", choices=["universal"], required=True, help="the format to write")
    parser.add_argument("--out", type=path, required=True, help="folder to make")
    return parser.parse_args()

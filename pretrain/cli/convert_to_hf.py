"""Turn a training checkpoint into a Hugging Face folder, proved to compute what the trainer computed.

    python tools/convert_to_hf.py --checkpoint runs/1b_tvr/checkpoints/latest --out hf/1b_tvr
    python tools/convert_to_hf.py --checkpoint runs/1b_tvr/checkpoints/step_00000500 --out hf/step_500 --dtype float32
    python tools/convert_to_hf.py --checkpoint runs/1b_tvr/checkpoints/latest --out hf/1b_ema --weights ema

The folder loads with `transformers` as it is. Only models that no stock class can hold bring a modelling file and load
with trust_remote_code=True. The folder appears once its logits are proved equal to the trainer's.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers.utils import logging as transformers_logging

from pretrain import quiet  # noqa: F401  (before the libraries that it silences)
from pretrain.cli.argument_types import path
from pretrain.cli.parser import tool_parser
from pretrain.export.card import class_name, is_own
from pretrain.export.convert import Written, convert
from pretrain.export.proof import NotEqualError, name_of

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    options = _parse()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        made = convert(
            options.checkpoint,
            options.out,
            DTYPES[options.dtype],
            ema=options.weights == "ema",
            average=options.average,
        )
    except NotEqualError as error:
        sys.exit(f"error: {error}")
    print(_choice(made.model))
    print(f"proved equal: {made.proof}")
    files = f"{made.model.files} weight files"
    print(f"complete: {options.out} ({made.parameters:,} parameters, {name_of(made.dtype)}, {files})")


def _choice(model: Written) -> str:
    """Return the class of the exported model and the reason for it, a line for each method that affects it."""
    own = is_own(model.hf_config)
    whose = "its own, no stock class holds it: trust_remote_code=True" if own else "stock transformers"
    reasons = [f"  {name}: {reason}" for name, reason in model.reasons.items()]
    if not reasons:
        reasons = ["  nothing to fold: the weights are plain"]
    return "\n".join([f"class: {class_name(model.hf_config)} ({whose})", *reasons])


def _parse() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=path, required=True, help="runs/NAME/checkpoints/step_00000500, or .../latest"
    )
    parser.add_argument("--out", type=path, required=True, help="folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: what the trainer computes in)"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--weights",
        choices=("trained", "ema"),
        default="trained",
        help="those of the last step (default), or the average that a run with 'ema' keeps",
    )
    chosen.add_argument(
        "--average",
        type=path,
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="further checkpoints: the mean of the weights of all is exported",
    )
    return parser.parse_args()

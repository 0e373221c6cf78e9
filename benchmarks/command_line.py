"""Side-by-side figures: rivals interleaved in one run.

python tools/bench.py trainer --config configs/tiny_tvr.yaml
python tools/bench.py tvr
python tools/bench.py trap
python tools/bench.py methods
python tools/bench.py fill
python tools/bench.py convert --checkpoint runs/tiny_tvr/checkpoints/latest
python tools/bench.py tokenize --rivals-python peers/bin/python
python tools/bench.py data --rivals-python peers/bin/python
"""

from __future__ import annotations

import argparse
import os
import sys

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser


def main() -> None:
    parser = tool_parser(__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    trainer = what.add_parser("trainer", help="tokens/s against a plain PyTorch loop")
    trainer.add_argument("--config", type=argument_types.path, default="configs/tiny_tvr.yaml")
    trainer.add_argument("--steps", type=argument_types.whole(1), default=15)
    trainer.add_argument("--rounds", type=argument_types.whole(1), default=3)
    tvr = what.add_parser("tvr", help="cost of one TVR application: Evenkeel's two engines and the release's scheme")
    tvr.add_argument("--ranks", type=argument_types.whole(1), nargs="+", default=[1, 2, 4])
    tvr.add_argument("--rounds", type=argument_types.whole(1), default=5)
    tvr.add_argument(
        "--tokens",
        type=argument_types.whole(1),
        default=4096,
        help="of the training step (default: 4096, as in the demo)",
    )
    tvr.add_argument(
        "--resident-below", type=argument_types.whole(0), default=100_000, help="stage3_param_persistence_threshold"
    )
    what.add_parser("trap", help="what the published TVR callback does under DeepSpeed")
    methods = what.add_parser("methods", help="cost of each method as a share of a step")
    methods.add_argument("--methods", nargs="*", default=[], help="names (default: all, and Muon)")
    methods.add_argument("--ranks", type=argument_types.whole(1), default=1)
    methods.add_argument("--rounds", type=argument_types.whole(1), default=7)
    methods.add_argument("--tokens", type=argument_types.whole(1), default=4096, help="of the training step")
    fill = what.add_parser("fill", help="drawing a 7B model's initial weights, by ranks and distribution")
    fill.add_argument("--ranks", type=argument_types.whole(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    fill.add_argument(
        "--blocks", type=argument_types.whole(1), default=1, help="of the model's 32, filled and counted for all"
    )
    convert = what.add_parser("convert", help="conversion against DeepSpeed's zero_to_fp32")
    convert.add_argument("--checkpoint", required=True, type=argument_types.path)
    convert.add_argument("--rounds", type=argument_types.whole(1), default=3)
    tokenize = what.add_parser("tokenize", help="text to token files: tools/prepare_data.py against other pipelines")
    tokenize.add_argument("--rounds", type=argument_types.whole(1), default=3)
    tokenize.add_argument("--megabytes", type=argument_types.number(above=0), default=50, help="of text (default: 50)")
    tokenize.add_argument(
        "--source",
        nargs="+",
        type=argument_types.location,
        default=["stdlib"],
        help="as tools/prepare_data.py takes it",
    )
    tokenize.add_argument(
        "--tokenizer", type=argument_types.path, help="folder (default: a byte-level BPE trained on the text)"
    )
    tokenize.add_argument("--workers", type=argument_types.whole(1), default=len(os.sched_getaffinity(0)))
    _add_rivals(tokenize)
    data = what.add_parser("data", help="shuffled batches: the loader against others, speed, start-up and memory")
    data.add_argument("--rounds", type=argument_types.whole(1), default=3)
    data.add_argument(
        "--tokens", type=argument_types.number(above=0), default=100e6, help="of the data set (default: 100e6)"
    )
    data.add_argument(
        "--seconds",
        type=argument_types.number(above=0),
        default=4,
        help="of reading, each loader in each round (default: 4)",
    )
    data.add_argument(
        "--workers",
        type=argument_types.whole(0),
        nargs="+",
        default=[0, 2],
        help="the others' worker processes (default: 0 2)",
    )
    _add_rivals(data)
    arguments = parser.parse_args()

    if arguments.what == "trainer":
        from benchmarks.trainer import bench_trainer

        print(bench_trainer(str(arguments.config), arguments.rounds, arguments.steps))
    elif arguments.what == "tvr":
        from benchmarks.tvr import bench_tvr

        print(bench_tvr(arguments.ranks, arguments.rounds, arguments.tokens, arguments.resident_below))
    elif arguments.what == "trap":
        from benchmarks.trap import bench_trap

        print(bench_trap())
    elif arguments.what == "methods":
        from benchmarks.methods import bench_methods

        print(bench_methods(arguments.methods, arguments.ranks, arguments.rounds, arguments.tokens))
    elif arguments.what == "fill":
        from benchmarks.fill import bench_fill

        print(bench_fill(tuple(arguments.ranks), arguments.blocks))
    elif arguments.what == "convert":
        from benchmarks.convert import bench_convert

        print(bench_convert(arguments.checkpoint, arguments.rounds))
    elif arguments.what == "tokenize":
        from benchmarks.rivals import known_rivals
        from benchmarks.tokenize import RIVALS, bench_tokenize

        print(
            bench_tokenize(
                rounds=arguments.rounds,
                megabytes=arguments.megabytes,
                source=arguments.source,
                tokenizer=arguments.tokenizer,
                rivals=known_rivals(arguments.rivals, RIVALS),
                rivals_python=arguments.rivals_python,
                workers=arguments.workers,
            )
        )
    else:
        from benchmarks.data import RIVALS, bench_data
        from benchmarks.rivals import known_rivals

        print(
            bench_data(
                rounds=arguments.rounds,
                tokens=int(arguments.tokens),
                seconds=arguments.seconds,
                rivals=known_rivals(arguments.rivals, RIVALS),
                rivals_python=arguments.rivals_python,
                workers=arguments.workers,
            )
        )


def _add_rivals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rivals", nargs="*", help="names (default: all)")
    parser.add_argument(
        "--rivals-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter of an environment with the rivals installed (default: this one)",
    )

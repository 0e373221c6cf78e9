"""Print side-by-side figures: rivals interleaved in one run. `python -m benchmarks` is the same in the repository.

python tools/bench.py trainer --config configs/tiny_tvr.yaml
python tools/bench.py shares
python tools/bench.py tvr
python tools/bench.py trap
python tools/bench.py methods
python tools/bench.py fill
python tools/bench.py convert --checkpoint runs/tiny_tvr/checkpoints/latest
python tools/bench.py elastic --layers 2
python tools/bench.py plan
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
    options = _parser().parse_args()
    print(_SUBJECTS[options.subject](options))


# The modules of the subjects are imported when they are measured: some take seconds.


def _trainer(options: argparse.Namespace) -> str:
    from benchmarks.trainer import bench_trainer

    return bench_trainer(str(options.config), options.rounds, options.steps, options.set)


def _shares(options: argparse.Namespace) -> str:
    from benchmarks.shares import bench_shares

    return bench_shares(options.ranks, options.rounds)


def _tvr(options: argparse.Namespace) -> str:
    from benchmarks.tvr import bench_tvr

    return bench_tvr(options.ranks, options.rounds, options.tokens, options.resident_below)


def _trap(options: argparse.Namespace) -> str:
    from benchmarks.trap import bench_trap

    return bench_trap()


def _methods(options: argparse.Namespace) -> str:
    from benchmarks.methods import bench_methods

    return bench_methods(options.methods, options.ranks, options.rounds, options.tokens)


def _fill(options: argparse.Namespace) -> str:
    from benchmarks.fill import bench_fill

    return bench_fill(tuple(options.ranks), options.blocks)


def _convert(options: argparse.Namespace) -> str:
    from benchmarks.convert import bench_convert

    return bench_convert(options.checkpoint, options.rounds)


def _elastic(options: argparse.Namespace) -> str:
    from benchmarks.elastic import bench_elastic

    return bench_elastic(options.layers, options.rounds, options.folder)


def _plan(options: argparse.Namespace) -> str:
    from benchmarks.plan import bench_plan

    return bench_plan()


def _tokenize(options: argparse.Namespace) -> str:
    from benchmarks.rivals import known_rivals
    from benchmarks.tokenize import RIVALS, bench_tokenize

    return bench_tokenize(
        rounds=options.rounds,
        megabytes=options.megabytes,
        source=options.source,
        tokenizer=options.tokenizer,
        rivals=known_rivals(options.rivals, RIVALS),
        rivals_python=options.rivals_python,
        workers=options.workers,
    )


def _data(options: argparse.Namespace) -> str:
    from benchmarks.data import RIVALS, bench_data
    from benchmarks.rivals import known_rivals

    return bench_data(
        rounds=options.rounds,
        tokens=int(options.tokens),
        seconds=options.seconds,
        rivals=known_rivals(options.rivals, RIVALS),
        rivals_python=options.rivals_python,
        workers=options.workers,
    )


_SUBJECTS = {
    "trainer": _trainer,
    "shares": _shares,
    "tvr": _tvr,
    "trap": _trap,
    "methods": _methods,
    "fill": _fill,
    "convert": _convert,
    "elastic": _elastic,
    "plan": _plan,
    "tokenize": _tokenize,
    "data": _data,
}


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    trainer = subjects.add_parser("trainer", help="tokens/s against other trainers on the same task")
    trainer.add_argument("--config", type=argument_types.path, default="configs/tiny_tvr.yaml")
    trainer.add_argument("--steps", type=argument_types.whole(1), default=15)
    trainer.add_argument("--rounds", type=argument_types.whole(1), default=5)
    trainer.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the run file, for every trainer: another model"
    )
    shares = subjects.add_parser("shares", help="the recorder of autopsies, the gate and TVR as shares of a step")
    shares.add_argument("--ranks", type=argument_types.whole(1), default=1)
    shares.add_argument("--rounds", type=argument_types.whole(1), default=9)
    tvr = subjects.add_parser(
        "tvr", help="cost of one TVR application: Evenkeel's two engines and the release's scheme"
    )
    tvr.add_argument("--ranks", type=argument_types.whole(1), nargs="+", default=[1, 2, 4])
    tvr.add_argument("--rounds", type=argument_types.whole(1), default=5)
    tvr.add_argument(
        "--tokens",
        type=argument_types.whole(1),
        default=4096,
        help="of the training step (default: 4096, as in configs/tiny_tvr.yaml)",
    )
    tvr.add_argument(
        "--resident-below", type=argument_types.whole(0), default=100_000, help="stage3_param_persistence_threshold"
    )
    subjects.add_parser("trap", help="what the published TVR callback does under DeepSpeed")
    methods = subjects.add_parser("methods", help="cost of each method as a share of a step")
    methods.add_argument("--methods", nargs="*", default=[], help="names (default: all, and Muon)")
    methods.add_argument("--ranks", type=argument_types.whole(1), default=1)
    methods.add_argument("--rounds", type=argument_types.whole(1), default=7)
    methods.add_argument("--tokens", type=argument_types.whole(1), default=4096, help="of the training step")
    fill = subjects.add_parser("fill", help="drawing a 7B model's initial weights, by ranks and distribution")
    fill.add_argument("--ranks", type=argument_types.whole(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    fill.add_argument(
        "--blocks", type=argument_types.whole(1), default=1, help="of the model's 32, filled and counted for all"
    )
    convert = subjects.add_parser("convert", help="conversion against DeepSpeed's zero_to_fp32")
    convert.add_argument("--checkpoint", required=True, type=argument_types.path)
    convert.add_argument("--rounds", type=argument_types.whole(1), default=3)
    elastic = subjects.add_parser("elastic", help="8 ranks' checkpoint loaded on 2, against DeepSpeed's universal path")
    elastic.add_argument("--layers", type=argument_types.whole(1), default=16, help="16 (default): 1B, 45 GB of disk")
    elastic.add_argument("--rounds", type=argument_types.whole(1), default=3)
    elastic.add_argument("--folder", type=argument_types.path, help="for its files (default: the temporary one)")
    subjects.add_parser("plan", help="the memory that tools/plan.py predicts against that of real ranks")
    tokenize = subjects.add_parser(
        "tokenize", help="text to token files: tools/prepare_data.py against other pipelines"
    )
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
    data = subjects.add_parser("data", help="shuffled batches: the loader against others, speed, start-up and memory")
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
    return parser


def _add_rivals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rivals", nargs="*", help="names (default: all)")
    parser.add_argument(
        "--rivals-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter of an environment with the rivals installed (default: this one)",
    )

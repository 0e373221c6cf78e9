"""Side-by-side figures: rivals interleaved in one run.

python tools/bench.py trainer --config configs/tiny_tvr.yaml
python tools/bench.py tvr
python tools/bench.py trap
python tools/bench.py methods
python tools/bench.py fill
python tools/bench.py convert --checkpoint runs/tiny_tvr/checkpoints/latest
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    trainer = what.add_parser("trainer", help="tokens/s against a plain PyTorch loop")
    trainer.add_argument("--config", default="configs/tiny_tvr.yaml")
    trainer.add_argument("--steps", type=int, default=15)
    trainer.add_argument("--rounds", type=int, default=3)
    tvr = what.add_parser("tvr", help="cost of one TVR application: Evenkeel's two engines and the release's scheme")
    tvr.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    tvr.add_argument("--rounds", type=int, default=5)
    tvr.add_argument("--tokens", type=int, default=4096, help="of the training step (default: 4096, as in the demo)")
    tvr.add_argument("--resident-below", type=int, default=100_000, help="stage3_param_persistence_threshold")
    what.add_parser("trap", help="what the published TVR callback does under DeepSpeed")
    methods = what.add_parser("methods", help="cost of each method as a share of a step")
    methods.add_argument("--methods", nargs="*", default=[], help="names (default: all, and Muon)")
    methods.add_argument("--ranks", type=int, default=1)
    methods.add_argument("--rounds", type=int, default=7)
    methods.add_argument("--tokens", type=int, default=4096, help="of the training step")
    fill = what.add_parser("fill", help="drawing a 7B model's initial weights, by ranks and distribution")
    fill.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    fill.add_argument("--blocks", type=int, default=1, help="of the model's 32, filled and counted for all")
    convert = what.add_parser("convert", help="conversion against DeepSpeed's zero_to_fp32")
    convert.add_argument("--checkpoint", required=True, type=Path)
    convert.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    if arguments.what == "trainer":
        from pretrain.bench.trainer import bench_trainer

        print(bench_trainer(arguments.config, arguments.rounds, arguments.steps))
    elif arguments.what == "tvr":
        from pretrain.bench.tvr import bench_tvr

        print(bench_tvr(arguments.ranks, arguments.rounds, arguments.tokens, arguments.resident_below))
    elif arguments.what == "trap":
        from pretrain.bench.trap import bench_trap

        print(bench_trap())
    elif arguments.what == "methods":
        from pretrain.bench.methods import bench_methods

        print(bench_methods(arguments.methods, arguments.ranks, arguments.rounds, arguments.tokens))
    elif arguments.what == "fill":
        from pretrain.bench.fill import bench_fill

        print(bench_fill(tuple(arguments.ranks), arguments.blocks))
    else:
        from pretrain.bench.convert import bench_convert

        print(bench_convert(arguments.checkpoint, arguments.rounds))


if __name__ == "__main__":
    run(main)

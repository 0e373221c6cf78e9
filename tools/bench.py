"""Side-by-side figures: rivals interleaved in one run.

python tools/bench.py trainer --config configs/tiny_tvr.yaml
python tools/bench.py tvr
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
    tvr = what.add_parser("tvr", help="cost of one TVR application, both engines")
    tvr.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    tvr.add_argument("--rounds", type=int, default=7)
    convert = what.add_parser("convert", help="conversion against DeepSpeed's zero_to_fp32")
    convert.add_argument("--checkpoint", required=True, type=Path)
    convert.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    if arguments.what == "trainer":
        from pretrain.bench.trainer import bench_trainer

        print(bench_trainer(arguments.config, arguments.rounds, arguments.steps))
    elif arguments.what == "tvr":
        from pretrain.bench.tvr import bench_tvr

        print(bench_tvr(tuple(arguments.ranks), arguments.rounds))
    else:
        from pretrain.bench.convert import bench_convert

        print(bench_convert(arguments.checkpoint, arguments.rounds))


if __name__ == "__main__":
    run(main)

"""Predict memory, speed and time of a run on a cluster, before it is queued.

    python tools/plan.py --config configs/1b_tvr.yaml --nodes 4 --gpus-per-node 8 --gpu h100
    python tools/plan.py --config configs/7b_tvr.yaml --nodes 8 --gpu h100 --search configs/my_7b.yaml

Only the run file and its DeepSpeed file are read: neither tokenizer nor data need be there, where the run file gives
model.vocab_size. Nothing is measured. docs/scaling.md explains the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pretrain import quiet  # noqa: F401  (before the libraries that it silences)
from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.errors import UserError
from pretrain.files import write_text

if TYPE_CHECKING:
    from pretrain.config.schema import Config

_SHOWN = 8


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--config", type=argument_types.path, required=True, help="a run file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run file")
    parser.add_argument("--nodes", type=argument_types.whole(1), default=1)
    parser.add_argument("--gpus-per-node", type=argument_types.whole(1), default=8)
    parser.add_argument("--gpu", default="h100", help="a100, h100 (default), h200, b200 or mi300x")
    parser.add_argument(
        "--network",
        type=argument_types.number(above=0),
        default=400.0,
        help="between nodes, Gbit/s for each GPU (default 400)",
    )
    parser.add_argument(
        "--search", type=argument_types.path, metavar="FILE", help="write the fastest layout that fits as a run file"
    )
    options = parser.parse_args()

    from pretrain.config.schema import load_config
    from pretrain.planning.cluster import Cluster
    from pretrain.planning.run_shape import shape_of
    from pretrain.planning.search import fastest, largest_micro_batch, predict
    from pretrain.planning.text import assumptions, describe_prediction, table_of

    cluster = Cluster(options.gpu, options.nodes, options.gpus_per_node, options.network)
    _ = cluster.gpu  # an unknown name is found before anything is computed
    if options.search and options.search.exists():
        raise UserError(f"{options.search} exists: give --search another name.")
    shape = shape_of(load_config(options.config, options.set), cluster.gpus)
    prediction = predict(shape, cluster)
    print(describe_prediction(prediction, cluster, largest_micro_batch(shape, cluster)), flush=True)
    found = fastest(shape, cluster)
    if not found:
        raise UserError(
            f"no layout of {shape.config.name} fits {cluster.gpus} {cluster.name.upper()}: take more GPUs, larger ones, or a "
            "smaller model."
        )
    print(
        f"\nLayouts that fit, fastest first ({min(_SHOWN, len(found))} of {len(found)}):\n\n{table_of(found, _SHOWN)}\n"
    )
    print(assumptions(cluster))
    if options.search:
        _write(options.search, options.config, found[0].shape.config, options.set)


def _write(path: Path, base: Path, best: Config, settings: list[str]) -> None:
    """Write a run file that extends `base` by the layout of `best`."""
    content = {
        "extends": str(base.absolute()) if base.parent != path.parent else base.name,
        "name": path.stem,
        "data": {"micro_batch_size": best.data.micro_batch_size},
        "parallel": best.parallel.model_dump(),
        "activation_checkpointing": best.activation_checkpointing,
        "deepspeed": best.deepspeed,
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    more = f", with the same {' '.join(f'--set {each}' for each in settings)}" if settings else ""
    print(f"\nwritten: {path}{more}")

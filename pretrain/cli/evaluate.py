"""Score an exported model on standard tasks, with EleutherAI's lm-evaluation-harness.

    python tools/evaluate.py --model hf/1b_tvr --tasks hellaswag,piqa,lambada_openai
    python tools/evaluate.py --model hf/1b_tvr --tasks my_task --task-dir my_tasks --out scores/my_task

Prints the harness's table and writes results.json. Needs optional packages: pip install 'evenkeel[eval]'. No code of the
model's folder is run; task files may name Python functions, so a --task-dir is code.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pretrain import quiet  # noqa: F401  (before the libraries that it silences)
from pretrain.cli.argument_types import path
from pretrain.cli.parser import tool_parser
from pretrain.data.tokenizer import fingerprint, load_tokenizer
from pretrain.errors import UserError
from pretrain.files import write_json

_PACKAGES = ("evenkeel", "lm_eval", "torch", "transformers", "datasets")


def main() -> None:
    options = _parse()
    try:
        from pretrain.evaluation import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("lm-evaluation-harness is not installed: pip install 'evenkeel[eval]'") from error
    from lm_eval.utils import make_table

    began = time.time()
    file = _results_file(options.out or options.model / "evaluation")
    weights = lm_eval.model_fingerprint(options.model)
    tokenizer = load_tokenizer(options.model)
    tasks = lm_eval.load_tasks(options.tasks, options.task_dir)
    model = lm_eval.load_model(options.model, options.device)
    results = lm_eval.evaluate(model, tokenizer, tasks, options.batch_size, options.limit)

    content = {
        "model": {
            "path": str(options.model),
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "weights": weights,
            "tokenizer": fingerprint(tokenizer),
        },
        "results": lm_eval.scores(results),
        "faults": results["faults"],
        "settings": {"batch_size": options.batch_size, "device": options.device, "limit": options.limit},
        "versions": {package: metadata.version(package) for package in _PACKAGES},
        "began": round(began),
        "seconds": round(time.time() - began, 1),
    }
    try:
        _write(file, content)
    finally:  # a full disk loses only the file, a closed terminal only the table
        print(make_table(results))
        if "groups" in results:
            print(make_table(results, "groups"))
    for fault in results["faults"]:
        lost = fault["metric"] or "its metrics"
        print(f"warning: {fault['task']}: {lost} could not be computed ({fault['reason']})", file=sys.stderr)
    print(f"complete: {file}")


def _results_file(folder: Path) -> Path:
    """Return the path of results.json, its folder made. Raise UserError if the file exists or the folder cannot be made."""
    file = folder / "results.json"
    if file.exists():
        raise UserError(f"{file} is there already. Move it away, or give another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}. Give another --out.") from error
    return file


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        write_json(file, content)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}. The figures are in the table above.") from error


def _parse() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=path, required=True, help="a folder that tools/convert_to_hf.py wrote")
    parser.add_argument("--tasks", type=_names, required=True, metavar="NAME,...", help="`lm_eval ls tasks` lists them")
    parser.add_argument("--task-dir", type=path, help="folder of task files (*.yaml) besides the harness's own")
    parser.add_argument("--out", type=path, help="folder for results.json (default: evaluation/ in the model's)")
    parser.add_argument(
        "--batch-size", type=_batch_size, default=8, help="sequences, or 'auto': what fits into memory (default: 8)"
    )
    parser.add_argument("--limit", type=_count, help="documents of each task, for a trial (default: all)")
    parser.add_argument("--device", default=_device(), help="default: the GPU if there is one (here: %(default)s)")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    if not (names := dict.fromkeys(name.strip() for name in text.split(",") if name.strip())):
        raise argparse.ArgumentTypeError("name at least one task")
    return list(names)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 1 or more")
    return int(text)


def _device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"

"""Run every step once, small: text -> tokenizer -> shards -> variance-controlled training -> HF model -> report.

Each step is a command that you could type yourself; it is printed before it runs. Started again, every step continues
from what is already there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, whatever else is called so
from pretrain import startup

startup.begin()

import os
import shlex
import subprocess
import time

import torch

from pretrain.cli.command import run
from pretrain.cli.parser import tool_parser

REPOSITORY = Path(__file__).resolve().parent.parent
# On a GPU, where Muon would need a compiler and training takes no time, a larger model with AdamW.
NAME = "tiny_tvr" if torch.cuda.is_available() else "demo"
RUN, MODEL = REPOSITORY / "runs" / NAME, REPOSITORY / "hf" / NAME
PROMPT = "def read_lines(path):"


def commands() -> list[tuple[str, str]]:
    """Return each step's purpose and command."""
    deepspeed = f"deepspeed --num_gpus {number_of_ranks()}"
    return [
        (
            "Train a tokenizer on the Python standard library's own text",
            "python tools/train_tokenizer.py --source stdlib --vocab-size 4096 --out data/demo_tokenizer",
        ),
        (
            "Turn that text into token shards",
            "python tools/prepare_data.py --source stdlib --tokenizer data/demo_tokenizer --out data/demo_shards "
            "--val-fraction 0.05",
        ),
        (
            "Train a small LLaMA with LIR and TVR on ZeRO-3 ranks",
            f"{deepspeed} pretrain/train.py --config configs/{NAME}.yaml",
        ),
        (
            "Convert the checkpoint to Hugging Face format and prove it equal",
            f"python tools/convert_to_hf.py --checkpoint runs/{NAME}/checkpoints/latest --out hf/{NAME}",
        ),
        ("Let it write", f"python tools/generate.py --model hf/{NAME} --prompt '{PROMPT}'"),
        ("Draw the report", f"python tools/report.py runs/{NAME} --out report.html"),
    ]


def number_of_ranks() -> int:
    """Return 2 on a CPU; the number of GPUs where there are any, at most 2, as the demo's batch is small."""
    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def main() -> None:
    tool_parser(__doc__).parse_args()
    began = time.monotonic()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if not torch.accelerator.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # else the launcher warns that it looked for others
    for number, (purpose, command) in enumerate(commands(), start=1):
        if "convert_to_hf" in command and MODEL.exists():
            if MODEL.stat().st_mtime < (RUN / "checkpoints/latest").stat().st_mtime:
                sys.exit(
                    f"\nThe demo stopped: {MODEL} was made from an older checkpoint. Remove it, or keep it elsewhere."
                )
            print(f"\n[{number}] {MODEL.relative_to(REPOSITORY)} is there already.", flush=True)
            continue
        print(f"\n[{number}] {purpose}\n    $ {command}\n", flush=True)
        done = subprocess.run(shlex.split(command), cwd=REPOSITORY, env=environment, check=False)
        if done.returncode:
            sys.exit(f"\nThe demo stopped: step {number} ended with exit code {done.returncode}; its message is above.")
    print(
        f"\nDone in {time.monotonic() - began:.0f} s. Look at:\n"
        "  report.html                   loss, weight deviations against the target, gradient norm, throughput\n"
        f"  hf/{NAME:<24}   the model, for transformers and lm-evaluation-harness\n"
        f"  runs/{NAME:<22}   configuration, log, metrics.jsonl, checkpoints\n"
        "  data/demo_tokenizer, data/demo_shards   tokenizer and token shards\n"
        "Next: configs/1b_tvr.yaml and the README's five lines for FineWeb on a cluster."
    )


if __name__ == "__main__":
    run(main)

"""Runs a program on the fake CUDA device.

python -m tests.fakecuda.run [--] SCRIPT [ARGUMENT ...]
python -m tests.fakecuda.run [--] -m MODULE [ARGUMENT ...]

Under a launcher, each rank is started with it: torchrun -m tests.fakecuda.run pretrain/train.py --config FILE.
"""

from __future__ import annotations

import runpy
import sys

from tests.fakecuda.install import install


def main(words: list[str]) -> None:
    """Run the program that `words` name, with the rest of them as its arguments."""
    if words[:1] == ["--"]:
        words = words[1:]
    module = words[:1] == ["-m"]
    words = words[1:] if module else words
    if not words:
        sys.exit(__doc__)
    install()
    sys.argv = words
    if module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

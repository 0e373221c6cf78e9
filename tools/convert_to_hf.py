"""Start pretrain/cli/convert_to_hf.py as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, whatever else is called so
from pretrain.cli.start import convert_to_hf

if __name__ == "__main__":
    convert_to_hf()

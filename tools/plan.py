"""Start pretrain/cli/plan.py as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, whatever else is called so
from pretrain.cli.start import plan

if __name__ == "__main__":
    plan()

"""Print in one line what this machine lacks for `make setup`. Runs on any Python 3."""

import sys

# ruff: noqa: UP031, UP036  (an old Python must be able to read this file)
if sys.version_info < (3, 11):
    found = "%d.%d" % sys.version_info[:2]
    sys.exit("error: Evenkeel needs Python 3.11 or newer, this is %s. Try: make setup PYTHON=python3.11" % found)
try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError as error:
    sys.exit(
        "error: this Python cannot make virtual environments (%s). On Debian: apt-get install python3-venv" % error
    )

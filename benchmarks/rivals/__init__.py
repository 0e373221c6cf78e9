"""Parts that the measurements of the data path share: rivals that may be absent, and the format of figures."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Sequence
from statistics import median

from pretrain.errors import UserError

_FIND = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if not u.find_spec(n.split('.')[0])])"


def missing_modules(python: str, needs: Sequence[tuple[str, str]]) -> str:
    """Return what the interpreter `python` lacks of `needs`, pairs of module and pip's name; "" if it lacks nothing."""
    command = [python, "-c", _FIND, *(module for module, _ in needs)]
    absent = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split()
    names = [pip for module, pip in needs if module in absent]
    return f"not installed (pip install {' '.join(names)})" if names else ""


def known_rivals(asked: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """Return the rivals asked for, all of `known` for None. Raise UserError at a name that is not among them."""
    if unknown := set(asked or ()) - set(known):
        raise UserError(f"--rivals {' '.join(sorted(unknown))}: there are {', '.join(known)}.")
    return list(known if asked is None else asked)


def short_error(error: RuntimeError) -> str:
    return f"failed: {str(error).strip().splitlines()[-1][:120]}"


def spread(values: Sequence[float]) -> str:
    """Return the median, and the range in brackets."""
    return f"{_short(median(values))} ({_short(min(values))}-{_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

"""Numbers in the form in which people read them."""

from __future__ import annotations

from math import floor, log10

_SUFFIXES = ("", "k", "M", "B", "T", "P")


def compact(value: float) -> str:
    """Return three significant digits and a suffix: 99_100_000_000 -> 99.1B, 40_960 -> 41k, 512 -> 512."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    thousands = min(max(floor(log10(abs(rounded)) / 3), 0), len(_SUFFIXES) - 1)
    return f"{rounded / 1000**thousands:g}{_SUFFIXES[thousands]}"


def duration(seconds: float) -> str:
    """Return the two largest units: 41 s, 3 min 20 s, 5 h 12 min, 2 d 4 h."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{days} d {rest_h} h"
    if hours:
        return f"{hours} h {rest_min} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"

"""Reads a file that is one JSON array of records, without holding it in memory as a whole."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator

_BLANK = " \t\r\n"
_RECORD, _NOTHING = "a record", "nothing more"


def is_array(chunks: Iterator[bytes]) -> bool:
    """Return whether the first thing in a file of JSON is an array.

    ValueError if it is one object over several lines, which is no list of records.
    """
    begun = b""
    for chunk in chunks:
        if begun := chunk.removeprefix(codecs.BOM_UTF8).lstrip():
            break
    first, newline, others = begun.partition(b"\n")
    if newline and begun.startswith(b"{") and not others.lstrip().startswith(b"{") and not _is_json(first):
        raise ValueError("it is one JSON object over several lines, neither one object a line nor an array of objects")
    return begun.startswith(b"[")


def elements(chunks: Iterator[bytes], longest: int) -> Iterator[bytes]:
    """Yield the elements of the array, each as JSON on one line.

    Raises:
        ValueError: The content is no JSON, or an element has more than `longest` characters.
        EOFError: The array does not end.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    scan = json.JSONDecoder().raw_decode
    held, place, wanted = "", 0, 0
    awaited: tuple[str, ...] = ("[",)
    for chunk in itertools.chain(chunks, (None,)):
        held, place = held[place:] + decoder.decode(chunk or b"", final=chunk is None), 0
        if len(held) < wanted and chunk is not None:
            continue
        while (place := _after_blank(held, place)) < len(held):
            if held[place] in awaited:
                awaited = {"[": (_RECORD, "]"), ",": (_RECORD,), "]": (_NOTHING,)}[held[place]]
                place += 1
            elif _RECORD not in awaited:
                raise ValueError(f"{held[place]!r} stands where there should be {' or '.join(awaited)}")
            else:
                try:
                    _, stop = scan(held, place)
                except ValueError:
                    if chunk is None or len(held) - place > longest:
                        raise
                    wanted = 2 * (len(held) - place)  # so that a long one is not scanned from its start at each chunk
                    break
                yield held[place:stop].replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogatepass")
                place, awaited = stop, (",", "]")
    if awaited != (_NOTHING,):
        raise EOFError("the file ends within its array")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _after_blank(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANK:
        place += 1
    return place

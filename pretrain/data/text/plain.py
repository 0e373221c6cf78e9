"""Reads files that are one text."""

from __future__ import annotations

import codecs
import tokenize
from collections.abc import Iterator

from pretrain.data.text import compression, long_texts
from pretrain.data.text.blocks import UNREADABLE, Block, TextBlock, Unreadable, unreadable
from pretrain.data.text.selection import Selection
from pretrain.data.text.signatures import refuse_other_content
from pretrain.data.text.source_files import SourceFile, library_folder

TOPICS = "pydoc_data/topics.py"


def read_plain(
    file: SourceFile, number: int, selection: Selection, place: tuple[int, int]
) -> Iterator[tuple[Block, tuple[int, int], int]]:
    """Yield a text file as one text, or several when it is too long to hold in memory; the place counts them.

    The text before damage is yielded before the fault is raised.
    """
    with file.open() as raw:
        pieces = _decoded(compression.content(raw, file.path), file.path)
        for count, text in enumerate(_texts(pieces), start=1):
            if count > place[0]:
                yield TextBlock(number, file.path, text), (count, 0), raw.tell()


def read_python(
    file: SourceFile, number: int, selection: Selection, place: tuple[int, int]
) -> Iterator[tuple[Block, tuple[int, int], int]]:
    """Yield a Python source as one text, in the encoding it declares; pydoc's topics are a text each."""
    for count, text in enumerate(_python_texts(file), start=1):
        if count > place[0]:
            yield TextBlock(number, file.path, text), (count, 0), file.bytes


def _decoded(chunks: Iterator[bytes], path: str) -> Iterator[str]:
    """Yield the text of UTF-8 without a byte order mark; the text before damage comes before the fault is raised."""
    done, waiting = 0, b""  # the count of bytes decoded, and the bytes of a character that a chunk cuts
    try:
        for chunk in chunks:
            if not done:
                refuse_other_content(chunk, path)
            waiting += chunk
            text, used = codecs.utf_8_decode(waiting, "strict", False)
            yield text if done else text.removeprefix("\ufeff")
            waiting, done = waiting[used:], done + used
        codecs.utf_8_decode(waiting, "strict", True)
    except UnicodeDecodeError as error:
        text = waiting[: error.start].decode()
        yield text if done else text.removeprefix("\ufeff")
        reason = f"it is not UTF-8 (byte 0x{waiting[error.start]:02x}: {error.reason})"
        raise Unreadable(f"{path}, from byte {done + error.start}", reason) from error
    except UNREADABLE as error:
        raise unreadable(f"{path}, from byte {done + len(waiting)} of its content", error) from error


def _texts(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the texts into which `long_texts.cut_long` would cut all `pieces`; the text before damage comes first."""
    held = ""
    try:
        for piece in pieces:
            held += piece
            if len(held) > long_texts.MAX_DOCUMENT_CHARACTERS:
                *whole, held = long_texts.cut_long(held)
                yield from whole
    except Unreadable:
        if held:
            yield held
        raise
    if held:
        yield held


def _python_texts(file: SourceFile) -> Iterator[str]:
    if file.path == str(library_folder() / TOPICS):
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        return
    with file.open() as raw:
        encoding, _ = tokenize.detect_encoding(raw.readline)
        raw.seek(0)
        content = raw.read()
    try:
        yield content.decode(encoding)
    except UnicodeDecodeError as error:
        yield content[: error.start].decode(encoding)
        reason = f"it is not {encoding} (byte 0x{content[error.start]:02x}: {error.reason})"
        raise Unreadable(f"{file.path}, from byte {error.start}", reason) from error

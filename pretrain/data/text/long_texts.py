"""Turns texts into documents."""

from __future__ import annotations

MAX_DOCUMENT_CHARACTERS = 4 << 20


def cut_long(text: str) -> list[str]:
    """Return `text` as documents of at most MAX_DOCUMENT_CHARACTERS, cut after line breaks where there are any."""
    documents = []
    start = 0
    while len(text) - start > MAX_DOCUMENT_CHARACTERS:
        stop = start + MAX_DOCUMENT_CHARACTERS
        stop = text.rfind("\n", start, stop) + 1 or stop
        documents.append(text[start:stop])
        start = stop
    return [*documents, text[start:]]

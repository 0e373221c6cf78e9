"""Recognizes a file by its first bytes, where its name says something else.

Otherwise a compressed file without its ending would be read as lines of broken JSON. And a pointer of Git LFS, which a
clone has in place of each large file where `git lfs` is not installed, would be read as a text.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from pretrain.data.text.faults import Unreadable
from pretrain.data.text.source_files import SourceFile

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32's other one begins like the first
_COMPRESSED = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
_OTHER = {"Parquet": b"PAR1\x15", "Arrow": b"ARROW1\0\0", "a ZIP archive": b"PK\x03\x04", "PDF": b"%PDF-"}
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024


def refuse_other_content(start: bytes, path: str) -> None:
    """Raise Unreadable if the content of a file, decompressed if its name says so, begins like no UTF-8 text."""
    if start.startswith(_WIDE):
        advice = f"Convert it: iconv -f UTF-16 -t UTF-8 {Path(path).name}"
        raise Unreadable(path, f"it is UTF-16 or UTF-32, not UTF-8. {advice}")
    for ending, pattern in _COMPRESSED.items():
        if pattern.match(start):
            advice = f"Decompress it, or add {ending} to its name"
            raise Unreadable(path, f"it is compressed, which its name does not say. {advice}")
    for name, signature in _OTHER.items():
        if start.startswith(signature):
            raise Unreadable(path, f"it is {name}, which its name does not say")


def refuse_pointer(file: SourceFile) -> None:
    """Raise Unreadable if a local file is a pointer, which Git LFS leaves in place of the file itself."""
    if file.is_remote or file.bytes > _LONGEST_POINTER:
        return
    with file.open() as raw:
        if raw.read(len(_POINTER)) == _POINTER:
            raise Unreadable(file.path, "it is a pointer of Git LFS, not the file itself. Fetch that: git lfs pull")

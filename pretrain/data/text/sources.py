"""Sources of text: files here or elsewhere, the Python standard library, or a data set of the Hugging Face hub.

Every source is a list of files. It yields their content in blocks in one fixed order. At any moment it has a `cursor`
(JSON), from which another source of the same files can continue (`seek`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.json_files import content_hash
from pretrain.data.text.blocks import UNREADABLE, Block, UnreadableBlock, unreadable
from pretrain.data.text.faults import Fault
from pretrain.data.text.kinds import PLAIN
from pretrain.data.text.listing import Listing, list_files
from pretrain.data.text.plain import TOPICS
from pretrain.data.text.readers import reader_of
from pretrain.data.text.selection import Filter, Selection
from pretrain.data.text.signatures import refuse_pointer
from pretrain.data.text.source_files import SourceFile, library_folder, share
from pretrain.errors import UserError

_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


def open_source(
    spec: Sequence[str],
    *,
    text_field: str,
    subset: str | None,
    split: str,
    filters: Sequence[str] = (),
    part: tuple[int, int] | None = None,
) -> Source:
    """Open the source that a command line names.

    Args:
        spec: `stdlib`, one hf://owner/dataset, or files, folders, globs and URLs.
        text_field: The field of a record that is its text.
        subset: The subset of a data set of the hub; None for the default one.
        split: The split of a data set of the hub.
        filters: Conditions like `language_score>=0.65`, which must all hold.
        part: (number, count), one share of the files: contiguous, about equal in bytes, perhaps empty. The description
            stays that of the whole. None: all files.

    Raises:
        UserError: The source does not exist, cannot be listed, or gives no file to read.
    """
    selection = Selection(text_field, tuple(Filter.parse(condition) for condition in filters))
    if list(spec) == ["stdlib"]:
        origin: dict[str, Any] = {"kind": "stdlib", "python": platform.python_version()}
        return Source(Listing(_library_files()), origin, selection, part, folder=library_folder())
    if len(spec) == 1 and spec[0].startswith("hf://") and not spec[0].startswith("hf://datasets/"):
        from pretrain.data.text.hub import data_files

        files, revision = data_files(spec[0].removeprefix("hf://"), subset=subset, split=split)
        origin = {"kind": "hub", "name": spec[0], "subset": subset, "split": split, "revision": revision}
        return Source(Listing(files), origin, selection, part)
    if subset is not None:
        raise UserError(f"--subset {subset} goes with a source hf://owner/dataset, not with '{' '.join(spec)}'.")
    return Source(list_files(spec), {"kind": "files", "paths": list(spec)}, selection, part)


class Source:
    """The texts of a list of files, one file after the other.

    Attributes:
        description: JSON, equal for sources of the same texts in the same order.
        listing: A sentence on what is read and what is left out of the whole.
        size_bytes: The size of the files of this part.
        files: {"path", "bytes"} of each file of this part.
    """

    def __init__(
        self,
        listing: Listing,
        origin: dict[str, Any],
        selection: Selection,
        part: tuple[int, int] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Read one part of `listing`, whose `origin` goes into the description; paths there are relative to `folder`."""
        files = listing.files
        _refuse_filters_of_plain_text(files, selection)
        names = [file.path if folder is None else Path(file.path).relative_to(folder).as_posix() for file in files]
        self.description = {
            **origin,
            "text_field": selection.text_field,
            "filters": [str(condition) for condition in selection.filters],
            "files": len(files),
            "bytes": sum(file.bytes for file in files),
            "listing": content_hash(
                [[name, file.bytes, file.version] for name, file in zip(names, files, strict=True)]
            ),
        }
        self.listing = f"{_name(origin)} {listing}"
        self._files = list(files) if part is None else share(files, part)
        if part is not None:
            self.listing += f"; this part reads {len(self._files):,} of them"
        self._selection = selection
        self._cursor = [0, 0, 0]
        self._read_bytes = 0
        self.size_bytes = sum(file.bytes for file in self._files)
        self.files: list[dict[str, Any]] = [{"path": file.path, "bytes": file.bytes} for file in self._files]

    def seek(self, cursor: Sequence[int]) -> None:
        """Continue at the `cursor` of another source of the same description and part; only before `blocks`."""
        self._cursor = list(cursor)

    def cursor(self) -> list[int]:
        """Return the place after the block yielded last, JSON: the number of a file, and a place in it of two numbers."""
        return list(self._cursor)

    def read_bytes(self) -> int:
        """Return how much of `size_bytes` has been read."""
        return self._read_bytes

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks from here to the end. Damage to a file is a block that stands for the rest of it.

        Raises:
            UserError: A file cannot be read for another reason, or has changed since it was listed.
        """
        first, *start = self._cursor
        place = (start[0], start[1])
        before = sum(file.bytes for file in self._files[:first])
        for number in range(first, len(self._files)):
            file = self._files[number]
            fault: Fault | None = None
            try:
                refuse_pointer(file)
                for block, after, read in reader_of(file)(file, number, self._selection, place):
                    self._cursor, self._read_bytes = [number, *after], before + read
                    yield block
            except Fault as error:
                fault = error
            except UNREADABLE as error:
                fault = unreadable(file.path, error)
            file.check_unchanged()
            before += file.bytes
            place = (0, 0)
            self._cursor, self._read_bytes = [number + 1, 0, 0], before
            if fault is not None:
                yield UnreadableBlock(number, fault)

    def check_unchanged(self) -> None:
        """Raise UserError if the file that is being read has changed since it was listed."""
        for file in self._files[self._cursor[0] :][:1]:
            file.check_unchanged()

    def texts(self) -> Iterator[str]:
        """Yield the texts from here to the end, some of them empty; `cursor` moves by whole blocks."""
        for block in self.blocks():
            yield from block.texts()


def _name(origin: dict[str, Any]) -> str:
    names = origin.get("paths", [origin.get("name", "stdlib")])
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"--source {' '.join(names[:3])}{more}"


def _refuse_filters_of_plain_text(files: Sequence[SourceFile], selection: Selection) -> None:
    plain = next((file.path for file in files if file.kind in PLAIN), None)
    if selection.filters and plain is not None:
        raise UserError(
            f"--filter '{selection.filters[0]}' asks for a field, and {plain} is plain text, which has none. Leave out "
            f"--filter, or the files that end in {' and '.join(PLAIN)}."
        )


def _library_files() -> list[SourceFile]:
    """Return the standard library's own sources, without tests and installed packages, then the help topics of pydoc."""
    folder = library_folder()
    files = sorted(file for file in folder.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(folder).parts))
    if len(files) < 100:
        raise UserError(
            f"this Python keeps no readable standard library in {folder} (found {len(files)} source files), so there "
            "is no built-in sample. Use a full Python installation, or give --source files of your own."
        )
    # Without versions: Python's own stands for theirs, so that one installation continues where another stopped.
    return [SourceFile(str(file), file.stat().st_size) for file in [*files, *folder.glob(TOPICS)]]

"""Where text comes from: files here or elsewhere, the Python standard library, or a data set of the Hugging Face hub.

Every source is a list of files. It gives their content in blocks in one fixed order, can say at any moment where it is
(`cursor`, JSON), and a new source can go on from there (`seek`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.json_files import content_hash
from pretrain.data.text.blocks import UNREADABLE, Block, UnreadableBlock, unreadable
from pretrain.data.text.faults import Fault
from pretrain.data.text.files import SourceFile, library_folder, share
from pretrain.data.text.kinds import PLAIN
from pretrain.data.text.listing import Listing, list_files
from pretrain.data.text.plain import TOPICS
from pretrain.data.text.readers import reader_of
from pretrain.data.text.selection import Filter, Selection
from pretrain.data.text.signatures import refuse_pointer
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
    """The source that a command line names: `stdlib`, one hf://owner/dataset, or files, folders, globs and URLs.

    `filters` are conditions like `language_score>=0.65` that all must hold. `part` = (number, count) takes one share of
    the files: contiguous, about equal in bytes, perhaps empty; the description stays that of the whole.
    """
    selection = Selection(text_field, tuple(Filter.parse(condition) for condition in filters))
    if list(spec) == ["stdlib"]:
        origin = {"kind": "stdlib", "python": platform.python_version()}
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

    description: JSON, equal for sources of the same texts in the same order; listing: what is read and what is left out
    of the whole, for people; size_bytes: of the files of this part; files: {"path", "bytes"} of each of them. The cursor
    is the number of a file and a place in it.
    """

    def __init__(
        self,
        listing: Listing,
        origin: dict,
        selection: Selection,
        part: tuple[int, int] | None = None,
        folder: Path | None = None,
    ) -> None:
        """`origin` says where the files come from; names within `folder` say which they are, wherever it lies."""
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
        self.files = [{"path": file.path, "bytes": file.bytes} for file in self._files]

    def seek(self, cursor: Sequence[int]) -> None:
        """Go to where another source of the same description and part gave out `cursor`; before `blocks` only."""
        self._cursor = list(cursor)

    def cursor(self) -> list[int]:
        """The place after the block yielded last, JSON."""
        return list(self._cursor)

    def read_bytes(self) -> int:
        """How much of `size_bytes` has been read."""
        return self._read_bytes

    def blocks(self) -> Iterator[Block]:
        """The blocks from here to the end. Damage to a file is a block that stands for the rest of it.

        UserError names a file that cannot be read for another reason, and one that has changed since it was listed.
        """
        first, *place = self._cursor
        before = sum(file.bytes for file in self._files[:first])
        for number in range(first, len(self._files)):
            file = self._files[number]
            fault = None
            try:
                refuse_pointer(file)
                for block, after, read in reader_of(file)(file, number, self._selection, tuple(place)):
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
        """The texts from here to the end, some of them empty; `cursor` is that of whole blocks."""
        for block in self.blocks():
            yield from block.texts()


def _name(origin: dict) -> str:
    names = origin.get("paths", [origin.get("name", "stdlib")])
    return f"--source {' '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}"


def _refuse_filters_of_plain_text(files: Sequence[SourceFile], selection: Selection) -> None:
    plain = next((file.path for file in files if file.kind in PLAIN), None)
    if selection.filters and plain is not None:
        raise UserError(
            f"--filter '{selection.filters[0]}' asks for a field, and {plain} is plain text, which has none. Leave out "
            f"--filter, or the files that end in {' and '.join(PLAIN)}."
        )


def _library_files() -> list[SourceFile]:
    """The standard library's own sources, without tests and installed packages, then the help topics of pydoc."""
    folder = library_folder()
    files = sorted(file for file in folder.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(folder).parts))
    if len(files) < 100:
        raise UserError(
            f"this Python keeps no readable standard library in {folder} (found {len(files)} source files), so there "
            "is no built-in sample. Use a full Python installation, or give --source files of your own."
        )
    # The Python's version stands for theirs, so that one installation takes up where another stopped.
    return [SourceFile(str(file), file.stat().st_size) for file in [*files, *folder.glob(TOPICS)]]

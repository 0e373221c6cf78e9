"""Where text comes from: files, the Python standard library, or a data set streamed from the Hugging Face hub.

Every source is the same thing to its user: it yields texts in one fixed order, can say at any moment where it is
(`cursor`, JSON), and a new source can go on from there (`seek`).
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import platform
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from pretrain.data.contents import content_hash
from pretrain.errors import UserError

MAX_DOCUMENT_CHARACTERS = 4 << 20
_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, zlib.error, zstandard.ZstdError)


class Source(Protocol):
    """Texts in a fixed order."""

    description: dict  # JSON; equal descriptions mean the same texts in the same order
    size_bytes: int | None  # on disk, where that is known

    def seek(self, cursor: object) -> None:
        """Go to where another source of the same description gave out `cursor`; before the first `texts` only."""

    def texts(self) -> Iterator[str]:
        """The texts from here to the end."""

    def cursor(self) -> object:
        """The place after the text yielded last."""

    def read_bytes(self) -> int:
        """How much of `size_bytes` has been read."""


def open_source(spec: Sequence[str], *, text_field: str, subset: str | None, split: str) -> Source:
    """The source that a command line names: `stdlib`, one hf://owner/dataset, or files, folders and globs."""
    if list(spec) == ["stdlib"]:
        return FileSource(_library_files(), {"kind": "stdlib", "python": platform.python_version()}, text_field)
    if len(spec) == 1 and spec[0].startswith("hf://"):
        return HubSource(spec[0].removeprefix("hf://"), text_field=text_field, subset=subset, split=split)
    if subset is not None:
        raise UserError(f"--subset {subset} goes with a source hf://owner/dataset, not with '{' '.join(spec)}'.")
    return FileSource(_matching_files(spec), {"kind": "files", "paths": list(spec)}, text_field)


class FileSource:
    """The texts of a list of files, one after the other; the cursor is [file number, texts taken from it]."""

    def __init__(self, files: list[Path], description: dict, text_field: str) -> None:
        sizes = [file.stat().st_size for file in files]
        names = [file.as_posix() for file in files]
        if description["kind"] == "stdlib":
            names = [file.relative_to(_library_folder()).as_posix() for file in files]
        self.size_bytes = sum(sizes)
        self.description = {
            **description,
            "text_field": text_field,
            "files": len(files),
            "bytes": self.size_bytes,
            "listing": content_hash([names, sizes]),
        }
        self._files = files
        self._sizes = sizes
        self._text_field = text_field
        self._place = (0, 0)
        self._open_file: BinaryIO | None = None

    def seek(self, cursor: object) -> None:
        self._place = tuple(cursor)

    def cursor(self) -> list[int]:
        return list(self._place)

    def read_bytes(self) -> int:
        number, _ = self._place
        within = 0 if self._open_file is None or self._open_file.closed else self._open_file.tell()
        return sum(self._sizes[:number]) + within

    def texts(self) -> Iterator[str]:
        first, skip = self._place
        for number in range(first, len(self._files)):
            for count, text in enumerate(self._texts_of(self._files[number]), start=1):
                if count > skip:
                    self._place = (number, count)
                    yield text
            self._place, skip = (number + 1, 0), 0

    def _texts_of(self, file: Path) -> Iterator[str]:
        try:
            with open(file, "rb") as self._open_file:
                yield from _reader(file)(self._open_file, self._text_field)
        except UserError:
            raise
        except _UNREADABLE as error:
            raise UserError(
                f"cannot read {file}: {type(error).__name__}: {error}. Mend or leave out the file."
            ) from error


class HubSource:
    """A split of a data set, streamed by the `datasets` library; the cursor is that library's own stream state."""

    size_bytes = None

    def __init__(self, name: str, *, text_field: str, subset: str | None, split: str, **options: object) -> None:
        """`options` go to `datasets.load_dataset` (`data_files` for a local folder, say)."""
        import datasets

        self.description = {"kind": "hub", "name": name, "subset": subset, "split": split, "text_field": text_field}
        self._text_field = text_field
        try:
            stream = datasets.load_dataset(name, subset, split=split, streaming=True, **options)
            columns = stream.column_names or list(next(iter(stream), {text_field: ""}))
        except Exception as error:  # `datasets` and the hub client raise dozens of kinds
            raise UserError(
                f"cannot stream hf://{name} (--subset {subset} --split {split}): {type(error).__name__}: {error} "
                "Check the names on huggingface.co, the network, and `hf auth login` for a gated data set."
            ) from error
        if text_field not in columns:
            raise UserError(
                f"hf://{name} has no field '{text_field}'; its fields are {', '.join(columns)}. Set --text-field."
            )
        self._stream = stream.select_columns([text_field])

    def seek(self, cursor: object) -> None:
        self._stream.load_state_dict(cursor)

    def cursor(self) -> object:
        return self._stream.state_dict()

    def read_bytes(self) -> int:
        return 0

    def texts(self) -> Iterator[str]:
        for number, row in enumerate(self._stream, start=1):
            yield _text_in(row, self._text_field, f"row {number} of this stream")


def cut_long(text: str) -> list[str]:
    """`text` in documents of at most MAX_DOCUMENT_CHARACTERS, cut after line breaks where there are any."""
    documents = []
    start = 0
    while len(text) - start > MAX_DOCUMENT_CHARACTERS:
        stop = start + MAX_DOCUMENT_CHARACTERS
        stop = text.rfind("\n", start, stop) + 1 or stop
        documents.append(text[start:stop])
        start = stop
    return [*documents, text[start:]]


def _library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_files() -> list[Path]:
    """The standard library's own sources, without tests and installed packages, then the help topics of pydoc."""
    folder = _library_folder()
    files = sorted(file for file in folder.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(folder).parts))
    if len(files) < 100:
        raise UserError(
            f"this Python keeps no readable standard library in {folder} (found {len(files)} source files), so there "
            "is no built-in sample. Use a full Python installation, or give --source files of your own."
        )
    return [*files, *folder.glob("pydoc_data/topics.py")]


def _matching_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs name: in the order of the patterns, sorted within each, each once."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = [str(path) for path in Path(pattern).rglob("*") if path.is_file() and _kind(path)]
        else:
            found = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not found:
            raise UserError(f"--source '{pattern}' matches no file. Readable are {', '.join(_READERS)}.")
        files |= dict.fromkeys(map(Path, sorted(found)))
    for file in files:
        _reader(file)
    return list(files)


def _kind(file: Path) -> str | None:
    return next((ending for ending in _READERS if file.name.endswith(ending)), None)


def _reader(file: Path) -> Callable[[BinaryIO, str], Iterator[str]]:
    if (kind := _kind(file)) is None:
        raise UserError(f"{file} is of no kind that can be read: {', '.join(_READERS)}. Convert or leave out the file.")
    return _READERS[kind]


def _read_plain(raw: BinaryIO, text_field: str) -> Iterator[str]:
    """A text file is one text, or several when it is too long to hold in memory."""
    stream = io.TextIOWrapper(raw, encoding="utf-8", newline="")
    while text := stream.read(MAX_DOCUMENT_CHARACTERS):
        if len(text) == MAX_DOCUMENT_CHARACTERS:
            text += stream.readline(MAX_DOCUMENT_CHARACTERS)
        yield text


def _read_python(raw: BinaryIO, text_field: str) -> Iterator[str]:
    """A Python source is one text, in the encoding it declares; pydoc's topics are a text each."""
    if Path(raw.name).match("pydoc_data/topics.py"):
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        return
    encoding, _ = tokenize.detect_encoding(raw.readline)
    raw.seek(0)
    yield raw.read().decode(encoding)


def _read_json_lines(raw: BinaryIO, text_field: str) -> Iterator[str]:
    yield from _texts_in_lines(raw, raw.name, text_field)


def _read_gzipped(raw: BinaryIO, text_field: str) -> Iterator[str]:
    with gzip.open(raw) as lines:
        yield from _texts_in_lines(lines, raw.name, text_field)


def _read_zstandard(raw: BinaryIO, text_field: str) -> Iterator[str]:
    yield from _texts_in_lines(_lines_of(_zstandard_blocks(raw)), raw.name, text_field)


def _zstandard_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """The content of all frames; EOFError where the library's own reader would take a cut file for a whole one."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files made with `zstd --long` too
    frame = None
    while block := raw.read(1 << 18):
        while block:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends within a compressed frame")


def _lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _texts_in_lines(lines: Iterable[bytes], file: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number},"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON: {error}. Mend or leave out the file.") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{place} should be a JSON object and is a {type(row).__name__}. Mend or leave out the file."
            )
        yield _text_in(row, text_field, place)


def _read_parquet(raw: BinaryIO, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(raw)
    if text_field not in table.schema_arrow.names:
        raise UserError(_no_field(text_field, table.schema_arrow.names, raw.name))
    for batch in table.iter_batches(batch_size=256, columns=[text_field]):
        for row in batch.to_pylist():
            yield _text_in(row, text_field, raw.name)


def _text_in(row: dict, text_field: str, place: str) -> str:
    """The text of one record; a null is an empty text."""
    if text_field not in row:
        raise UserError(_no_field(text_field, list(row), place))
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place} field '{text_field}' holds a {type(text).__name__}, not text. Set --text-field.")
    return text or ""


def _no_field(text_field: str, fields: list[str], place: str) -> str:
    return f"{place} has no field '{text_field}'; its fields are {', '.join(fields)}. Set --text-field to one of them."


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[str]]] = {
    ".txt": _read_plain,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_gzipped,
    ".jsonl.zst": _read_zstandard,
    ".parquet": _read_parquet,
    ".py": _read_python,
}

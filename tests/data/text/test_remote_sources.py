"""Remote files: the same texts as local ones, through servers that fail, and a clear error when they stay away."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pretrain.data.remote import storage
from pretrain.data.text import open_source, readers
from pretrain.errors import UserError

TEXTS = [f"{number} grün 漢字 " + "x" * (number % 7) for number in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class _Flaky(http.server.BaseHTTPRequestHandler):
    """Serves a folder by ranges; of each three requests for content one is cut short and one is answered with 503."""

    folder: Path
    requests: int
    gone: bool
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        path = type(self).folder / unquote(self.path).lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start, stop = 0, len(content)
        if (asked := self.headers.get("Range")) is not None:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(content))
        type(self).requests += with_content
        if with_content and (type(self).gone or type(self).requests % 3 == 1):
            self.send_error(503)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if with_content:
            short = type(self).requests % 3 == 2
            self.wfile.write(content[start : (start + stop) // 2 if short else stop])
            self.close_connection = short

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a flaky server of tmp_path/served."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    _Flaky.folder, _Flaky.requests, _Flaky.gone = tmp_path / "served", 0, False
    _Flaky.folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Flaky) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def _write(folder: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / name, row_group_size=500)
    elif name.endswith(".arrow"):
        table = pyarrow.table({"text": TEXTS})
        with pyarrow.ipc.new_file(folder / name, table.schema) as file:
            file.write_table(table, max_chunksize=500)
    else:
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        (folder / name).write_bytes(compress(LINES))


def _open(*spec: str):
    return open_source(spec, text_field="text", subset=None, split="train")


@pytest.mark.parametrize("name", ["a.jsonl", "a b=1.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_server_that_fails_now_and_then_gives_the_texts(
    server: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    _write(_Flaky.folder, name)
    source = _open(f"{server}/{name}")
    assert source.size_bytes == (_Flaky.folder / name).stat().st_size
    taken = []
    blocks = source.blocks()
    for _ in range(2):
        taken += next(blocks).texts()
    other = _open(f"{server}/{name}")
    other.seek(source.cursor())
    assert 0 < len(taken) < len(TEXTS)
    assert [*taken, *other.texts()] == TEXTS
    assert _Flaky.requests > 3


def test_a_server_that_stays_away_is_named(server: str) -> None:
    _write(_Flaky.folder, "a.jsonl")
    source = _open(f"{server}/a.jsonl")
    _Flaky.gone = True
    with pytest.raises(UserError, match=rf"{server}/a\.jsonl"):
        list(source.texts())


def test_a_file_that_changes_on_the_server_while_it_is_read_is_named(server: str, monkeypatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    _write(_Flaky.folder, "a.jsonl")
    blocks = _open(f"{server}/a.jsonl").blocks()
    next(blocks)
    with open(_Flaky.folder / "a.jsonl", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"{server}/a\.jsonl has changed while it was read: it had [\d,]+ bytes when"):
        list(blocks)


def test_what_is_not_there_is_refused(server: str) -> None:
    with pytest.raises(UserError, match=rf"{server}/b\.jsonl' matches no file"):
        _open(f"{server}/b.jsonl")
    with pytest.raises(UserError, match=r"matches no file: ClientConnectorError"):
        _open("http://127.0.0.1:1/b.jsonl")


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of a file system that can list, at a URL."""
    files = fsspec.filesystem("memory")
    for number in range(3):
        with files.open(f"/bucket/part={number}/a.jsonl", "wb") as file:
            file.write(json.dumps({"text": f"text {number}"}).encode())
    with files.open("/bucket/notes.md", "wb") as file:
        file.write(b"not asked for")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["", "/", "/*/*.jsonl", "/**/*.jsonl"])
def test_folders_and_globs_elsewhere_give_their_files_in_order(bucket: str, pattern: str) -> None:
    source = _open(bucket + pattern)
    assert list(source.texts()) == ["text 0", "text 1", "text 2"]
    assert [file["path"] for file in source.files] == [f"memory:///bucket/part={number}/a.jsonl" for number in range(3)]


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert _open(f"file://{tmp_path}/*.jsonl").files == _open(f"{tmp_path}/*.jsonl").files


def test_schemes_that_nobody_knows_are_refused() -> None:
    with pytest.raises(UserError, match=r"cannot list --source 'gopher://x/y\.jsonl'"):
        _open("gopher://x/y.jsonl")

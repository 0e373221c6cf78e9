"""hf:// data sets, through a server on loopback that answers the requests that the hub's clients make."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.text import open_source
from pretrain.errors import UserError

TEXTS = [f"text {number}" for number in range(40)]
REVISION = "a" * 40
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: "data/small/train-*"}
  - {split: test, path: "data/small/test-*"}
- config_name: tables
  data_files:
  - {split: train, path: "data/tables.csv"}
---
"""
QUESTIONS = """
import json, sys
from pretrain.data.text import open_source
from pretrain.errors import UserError

def ask(name, subset, split):
    try:
        source = open_source([name], text_field="text", subset=subset, split=split)
        stopped = open_source([name], text_field="text", subset=subset, split=split)
        blocks = stopped.blocks()
        first = next(blocks).texts()
        again = open_source([name], text_field="text", subset=subset, split=split)
        again.seek(stopped.cursor())
        return [source.description, source.files, list(source.texts()), first + list(again.texts())]
    except UserError as error:
        return str(error)

print(json.dumps([ask(*question) for question in json.loads(sys.argv[1])]))
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves the part of the hub's API that reading a data set `me/words` needs: its card, its revision, its tree, its files."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        about = "/api/datasets/me/words"
        if path in (about, f"{about}/revision/main", f"{about}/revision/{REVISION}"):
            siblings = [{"rfilename": str(file.relative_to(self.folder))} for file in self.folder.rglob("*.*")]
            self._send(json.dumps({"id": "me/words", "sha": REVISION, "siblings": siblings}).encode())
        elif path.startswith(f"{about}/tree/{REVISION}"):
            self._send_tree(self.folder / path.removeprefix(f"{about}/tree/{REVISION}").lstrip("/"))
        elif path.startswith("/datasets/me/words/resolve/"):
            self._send_file(self.folder / path.removeprefix("/datasets/me/words/resolve/").partition("/")[2])
        else:
            self._send(b"", 404)

    do_HEAD = do_GET

    def _send_tree(self, folder: Path) -> None:
        entries = [
            {
                "type": "directory" if path.is_dir() else "file",
                "oid": "b" * 40,
                "size": 0 if path.is_dir() else path.stat().st_size,
                "path": str(path.relative_to(self.folder)),
            }
            for path in folder.iterdir()
        ]
        self._send(json.dumps(entries).encode())

    def _send_file(self, file: Path) -> None:
        if not file.is_file():
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        content, status = file.read_bytes(), 200
        headers = {"ETag": f'"{"b" * 40}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._send(content, status, headers)

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Return the answers of a process that uses this hub to the questions below, in order."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data" / "small").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "data" / "tables.csv").write_text("text\nx\n")
    for name, texts in (("train-00000", TEXTS[:30]), ("train-00001", TEXTS[30:]), ("test-00000", ["of the test"])):
        table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, folder / "data" / "small" / f"{name}.parquet", row_group_size=10)
    questions = [
        ("hf://me/words", "small", "train"),
        ("hf://me/words", "small", "test"),
        ("hf://me/words", "small", "dev"),
        ("hf://me/words", "large", "train"),
        ("hf://me/words", "tables", "train"),
        ("hf://me/nothing", None, "train"),
        (f"hf://{folder}", "small", "train"),
    ]
    _Hub.folder = folder
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        command = [sys.executable, "-c", QUESTIONS, json.dumps(questions)]
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{serving.server_port}",
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        serving.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_split_is_its_files_at_the_revision_of_this_moment(answers: list) -> None:
    description, files, texts, _ = answers[0]
    assert texts == TEXTS
    assert (description["revision"], description["subset"], description["split"]) == (REVISION, "small", "train")
    place = f"hf://datasets/me/words@{REVISION}/data/small"
    assert [file["path"] for file in files] == [f"{place}/train-0000{number}.parquet" for number in range(2)]
    assert all(file["bytes"] > 100 for file in files)
    assert answers[1][2] == ["of the test"]


def test_a_stopped_stream_goes_on(answers: list) -> None:
    assert answers[0][3] == TEXTS


def test_a_folder_of_the_same_layout_gives_the_same_texts(answers: list) -> None:
    assert answers[6][2] == TEXTS


def test_what_is_not_there_is_explained(answers: list) -> None:
    assert "hf://me/words has no split 'dev'; it has train, test" in answers[2]
    assert "BuilderConfig 'large' not found" in answers[3]
    assert "tables.csv, which are of no kind that can be read" in answers[4]
    assert "cannot find hf://me/nothing" in answers[5]


def test_an_unreachable_data_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot find hf://nobody/nothing"):
        open_source(["hf://nobody/nothing"], text_field="text", subset=None, split="train")

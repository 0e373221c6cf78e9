"""Models of the hub, from a server on this machine that answers as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from safetensors.torch import load_file

from pretrain.errors import UserError
from pretrain.starting.hub import fetched
from tests.support.stock_models import saved

REVISION = "c" * 40
PROGRAM = """
import json, sys
from huggingface_hub import constants
from pretrain.errors import UserError
from pretrain.starting.source import source_of

def ask(name, weights):
    try:
        source = source_of(name)
        tensors = source.weights() if weights else {}
        files = sorted(path.name for path in source.folder.iterdir())
        return [source.name, files, {name: float(tensor().sum()) for name, tensor in tensors.items()}]
    except UserError as error:
        return str(error)

for constants.HF_HUB_OFFLINE in (False, True):
    print(json.dumps([ask(*question) for question in json.loads(sys.argv[1])]))
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that fetching a model needs."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        about, files = "/api/models/me/tiny", ("/me/tiny/resolve/", f"/api/resolve-cache/models/me/tiny/{REVISION}/")
        if path in (about, f"{about}/revision/main", f"{about}/revision/{REVISION}"):
            siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            self._send(json.dumps({"id": "me/tiny", "sha": REVISION, "siblings": siblings}).encode())
        elif path.startswith(f"{about}/tree/{REVISION}"):
            entries = [
                {"type": "file", "oid": f.name, "size": f.stat().st_size, "path": f.name} for f in self.folder.iterdir()
            ]
            self._send(json.dumps(entries).encode())
        elif path.startswith(files):
            file = self.folder / Path(path).name
            headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
            self._send(file.read_bytes(), 200, headers)
        else:
            self._send(b"", 404)

    do_HEAD = do_GET

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
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, list]:
    """Return the model's folder, and the answers of a process with this hub and then without it, from its cache."""
    base = tmp_path_factory.mktemp("hub")
    _Hub.folder = folder = saved(base / "model", "llama")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    questions = [("hf://me/tiny", False), (f"hf://me/tiny@{REVISION}", True), ("hf://me/absent", False)]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{serving.server_port}",
            "HF_HOME": str(base / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", PROGRAM, json.dumps(questions)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        serving.shutdown()
    assert done.returncode == 0, done.stderr
    online, offline = map(json.loads, done.stdout.splitlines()[-2:])
    return folder, online, offline


@pytest.mark.slow  # a process that loads the libraries
def test_a_model_is_named_by_its_revision_and_described_before_its_weights_are_fetched(answers) -> None:
    _, online, _ = answers
    name, files, _ = online[0]
    assert name == f"hf://me/tiny@{REVISION}"
    assert "config.json" in files
    assert not [file for file in files if file.endswith((".safetensors", ".bin"))]


@pytest.mark.slow  # a process that loads the libraries
def test_only_safetensors_are_fetched_and_read(answers) -> None:
    folder, online, _ = answers
    _, files, sums = online[1]
    assert [file for file in files if file.endswith(".safetensors")] == sorted(
        p.name for p in folder.glob("*.safetensors")
    )
    assert "pytorch_model.bin" not in files
    expected = {n: float(t.sum()) for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow  # a process that loads the libraries
def test_what_was_fetched_is_there_without_the_hub(answers) -> None:
    _, online, offline = answers
    assert offline[1] == online[1]


@pytest.mark.slow  # a process that loads the libraries
def test_a_model_that_is_not_there_is_refused(answers) -> None:
    _, online, offline = answers
    for found in (online[2], offline[2]):
        assert "model.init_from: cannot fetch hf://me/absent" in found
        assert "Check the name" in found


def test_an_unreachable_hub_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot fetch hf://me/nothing"):
        fetched("hf://me/nothing", weights=False)

"""A source reads and leaves out the files that its listing names, and nothing is left out in silence."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from pretrain.data.text import open_source
from pretrain.errors import UserError


def _open(*names: object):
    return open_source([str(name) for name in names], text_field="text", subset=None, split="train")


def _texts(*names: object) -> list[str]:
    return sorted(_open(*names).texts())


def _says(*names: object) -> str:
    return _open(*names).listing.partition(" reads ")[2]


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder like those of the hub: data, a loader, licences, and files about the data."""
    folder = tmp_path / "data set"
    (folder / "en" / ".cache").mkdir(parents=True)
    lines = {"en/a.jsonl": "a", "en/b.JSONL": "b", "c.ndjson": "c"}
    for name, text in lines.items():
        (folder / name).write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
    (folder / "book.txt").write_text("a book", encoding="utf-8")
    about = ["LICENSE.txt", "README_en.txt", "requirements.txt", "dataset_infos.json", "THIRD-PARTY-NOTICES.txt"]
    for name in [*about, "loader.py", "README.md", "LICENSE", "en/old.jsonl.bak", ".gitattributes", "en/.cache/x.txt"]:
        (folder / name).write_text("no text", encoding="utf-8")
    return folder


def test_a_folder_gives_its_texts_and_says_what_it_leaves_out(data_set: Path) -> None:
    assert _texts(data_set) == ["a", "a book", "b", "c"]
    assert _says(data_set) == (
        "4 files (.jsonl 2, .ndjson 1, .txt 1); leaves out 11: README, LICENSE and the like 5, hidden 2, .bak 1, "
        ".md 1, .py (code beside other files; name it, like 'FOLDER/**/*.py', to read it) 1, no ending 1"
    )


def test_what_is_asked_for_is_read_whatever_its_name(data_set: Path) -> None:
    assert _texts(data_set / "*.py") == _texts(data_set / "LICENSE.txt") == ["no text"]
    assert _says(data_set, data_set / "**/*.py").startswith(
        "5 files (.jsonl 2, .ndjson 1, .py 1, .txt 1); leaves out 10:"
    )
    (data_set / "code").mkdir()
    (data_set / "loader.py").rename(data_set / "code" / "loader.py")
    assert _texts(data_set / "code") == ["no text"]
    (data_set / "code" / "README.md").touch()
    assert _texts(data_set / "code") == ["no text"]
    for name in ("data.csv", "shard.tar.gz"):
        (data_set / "code" / name).touch()
        with pytest.raises(UserError, match=r"gives no file to read, but .*\.py \(code beside other files"):
            _open(data_set / "code")
        (data_set / "code" / name).unlink()


def test_folders_that_a_glob_matches_are_read_with_all_below(data_set: Path) -> None:
    (data_set / "part.jsonl").mkdir()
    (data_set / "part.jsonl" / "part-0000.jsonl").write_text('{"text": "part"}', encoding="utf-8")
    assert (
        _texts(data_set / "*")
        == ["a", "a book", "b", "c", "part"]
        == _texts(data_set / "**")
        == _texts(f"{data_set}/**/*")
    )
    assert _texts(data_set / "*.jsonl") == ["part"]
    assert _says(data_set / "e*").startswith("2 files (.jsonl 2); leaves out 2: ")


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*.jsonl", "*/*.jsonl", "gone", "gone/a.jsonl"])
def test_links_that_lead_nowhere_are_refused(data_set: Path, pattern: str) -> None:
    (data_set / "gone").symlink_to("/mnt/not mounted")
    message = "gone is a link to /mnt/not mounted, which is not there"
    with pytest.raises(UserError, match=message):
        _open(data_set / pattern)
    (data_set / "gone").rename(data_set / "v1.0")  # may have been a folder
    if pattern in ("**", "**/*.jsonl"):
        with pytest.raises(UserError, match=message.replace("gone", "v1.0")):
            _open(data_set / pattern)


def test_a_link_to_itself_is_refused_and_a_circle_of_folders_read_once(data_set: Path) -> None:
    (data_set / "en" / "up").symlink_to("..")
    (data_set / "en" / "here").symlink_to(".")
    expected = ["a", "a book", "b", "c"]
    assert _texts(data_set) == _texts(data_set / "**") == expected
    (data_set / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(UserError, match=r"self\.jsonl is a link to self\.jsonl, which is not there or leads round"):
        _open(data_set)


def test_folders_that_may_not_be_listed_are_refused_in_globs_too(data_set: Path, monkeypatch) -> None:
    listed = os.listdir

    def listdir(path: str):
        if str(path).endswith("en"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UserError, match=r"cannot list .*en: Permission denied"):
        _open(data_set / "*/*.jsonl")


def test_a_file_of_several_names_is_read_once_and_that_is_said(data_set: Path, monkeypatch) -> None:
    monkeypatch.chdir(data_set)
    assert _texts("c.ndjson", "./c.ndjson", data_set / "c.ndjson") == ["c"]
    assert _says("c.ndjson", "./c.ndjson") == "1 file (.ndjson 1); leaves out 1: named more than once (read once) 1"


def test_names_that_give_no_file_say_what_there_was(data_set: Path) -> None:
    with pytest.raises(
        UserError, match=r"gives no file to read, but \.md 1; .*README\.md is of no kind that can be read"
    ):
        _open(data_set / "*.md")
    (data_set / "empty").mkdir()
    with pytest.raises(UserError, match="empty' matches no file"):
        _open(data_set / "empty")
    os.mkfifo(data_set / "empty" / "pipe.jsonl")
    with pytest.raises(UserError, match="empty' matches no file"):
        _open(data_set / "empty")
    with pytest.raises(UserError, match=r"pipe\.jsonl' is a pipe or a device, .* Write its content to a file"):
        _open(data_set / "empty" / "pipe.jsonl")


@pytest.fixture(params=["memory", "http"])
def elsewhere(request: pytest.FixtureRequest, data_set: Path) -> Iterator[str]:
    """The URL of a copy of the data set."""
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        files.put(f"{data_set}/", "/data set/", recursive=True)
        yield "memory://data set"
        files.rm("/data set", recursive=True)
        return
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(data_set.parent))
    handler.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/data%20set"
        serving.shutdown()


def test_a_folder_elsewhere_is_read_and_told_like_one_here(elsewhere: str, data_set: Path) -> None:
    assert _texts(f"{elsewhere}/") == _texts(data_set)
    assert _says(f"{elsewhere}/") == _says(data_set)
    assert _texts(f"{elsewhere}/*.py") == ["no text"]
    assert _texts(f"{elsewhere}/**/*.txt") == _texts(data_set / "**/*.txt")


def test_folders_that_a_glob_matches_elsewhere_are_read(elsewhere: str) -> None:
    assert _texts(f"{elsewhere}/e*") == ["a", "b"]

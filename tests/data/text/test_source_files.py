"""The files of a source: each name gives all of its files once, and another version is another file."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from pretrain.data.text import Source, open_source
from pretrain.errors import UserError


def _open(*names: object) -> Source:
    return open_source([str(name) for name in names], text_field="text", subset=None, split="train")


def _texts(*names: object) -> list[str]:
    return list(_open(*names).texts())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a.txt and sub/b.txt, each of which holds its name."""
    (tmp_path / "corpus/sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / "corpus" / name).write_text(name)
    return tmp_path / "corpus"


def test_linked_folders_are_followed_each_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/c.txt").write_text("linked")
    (folder / "link").symlink_to("../elsewhere")
    (folder / "sub/again").symlink_to("../../elsewhere/deep")
    (folder / "sub/up").symlink_to("..")
    assert _texts(folder) == ["a.txt", "linked", "sub/b.txt"]


def test_hidden_names_below_a_folder_are_left_out(folder: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.txt", ".b.txt"):
        (folder / name).write_text("hidden")
    assert _texts(folder) == ["a.txt", "sub/b.txt"] == _texts(folder / "**/*.txt")
    assert _texts(folder / ".b.txt") == ["hidden"]


def test_a_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def scandir(path: str):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot list .*corpus/sub: Permission denied"):
        _open(folder)


def test_a_file_of_many_names_comes_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "z.txt").symlink_to("a.txt")
    monkeypatch.chdir(folder)
    source = _open("sub/../a.txt", folder, "sub/*.txt", folder / "z.txt")
    assert list(source.texts()) == ["a.txt", "sub/b.txt"]
    assert source.files[0] == {"path": "sub/../a.txt", "bytes": 5}


def test_brackets_in_the_name_of_a_file_are_no_glob(tmp_path: Path) -> None:
    (tmp_path / "x1.txt").write_text("another")
    (tmp_path / "x[1].txt").write_text("the file itself")
    assert _texts(tmp_path / "x[1].txt") == ["the file itself"]
    assert _texts(tmp_path / "x[12].txt") == ["another"]


def test_brackets_in_the_name_of_a_file_elsewhere_are_no_glob() -> None:
    files = fsspec.filesystem("memory")
    files.pipe({"/brackets/x1.txt": b"another", "/brackets/x[1].txt": b"the file itself"})
    try:
        assert _texts("memory://brackets/x[1].txt") == ["the file itself"]
        assert _texts("memory://brackets/x[12].txt") == ["another"]
    finally:
        files.rm("/brackets", recursive=True)


def test_a_file_that_changed_and_kept_its_size_is_another(folder: Path) -> None:
    before = _open(folder).description
    status = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("other")
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = _open(folder).description
    assert after["bytes"] == before["bytes"]
    assert after["listing"] != before["listing"]


def test_a_file_named_like_the_help_topics_of_python_is_itself(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("topics = 'mine'\n")
    assert _texts(tmp_path) == ["topics = 'mine'\n"]

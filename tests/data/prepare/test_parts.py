"""Parts and their merge: the same documents as in one piece, even if the merge is killed at any moment."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from pretrain.data import open_shards
from pretrain.data.prepare import merge
from pretrain.data.tokenizer import TokenizerInfo
from pretrain.errors import UserError
from tests.support.prepared import Stopped, contents, documents_of, manifest_of, prepare_files, stop_after

SPLITS = ("train", "val", "held_out")


def _prepare_parts(corpus: str, tokenizer_info: TokenizerInfo, out: Path, count: int, **options: object) -> None:
    for number in range(count):
        prepare_files(corpus, tokenizer_info, out, part=(number, count), **options)


@pytest.mark.parametrize("count", [1, 3, 7])  # of 4 files: 7 parts leave some empty
def test_the_merged_parts_are_the_whole(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, count: int) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "whole")
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", count)
    merged = merge(tmp_path / "out", workers=2)
    for split in SPLITS:
        assert documents_of(tmp_path / "out" / split) == documents_of(tmp_path / "whole" / split)
        manifests = [manifest_of(tmp_path / out / split) for out in ("whole", "out")]
        assert manifests[0] | {"shards": []} == manifests[1] | {"shards": []}
        assert merged[split].tokens == open_shards(tmp_path / "out" / split, verify="full").tokens
    assert not (tmp_path / "out/parts").exists()


def test_shuffled_parts_are_the_shuffled_whole(
    corpus: str,
    tokenizer_info: TokenizerInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("pretrain.data.progress.LINE_INTERVAL_S", 0.0)
    prepare_files(corpus, tokenizer_info, tmp_path / "whole", shuffle_seed=4)
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", 3)
    merge(tmp_path / "out", workers=2, shuffle_seed=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out/parts").exists()
    progress = capsys.readouterr().err
    for verb in ("tokenised", "verified", "shuffled"):
        line = rf"{verb} [\d.]+ of [\d.]+ MB, [\d.]+ MB/s, [\d:]+ left, [\d,]+ documents/s, [\d,]+ tokens/s\n"
        assert re.search(line, progress), verb


@pytest.mark.parametrize("seed", [None, 4])
def test_a_merge_stopped_at_any_moment_ends_the_same(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """Every file appears by a rename: stop before each of them, and before the second one after."""
    monkeypatch.setattr("pretrain.data.prepare.journal.COMMIT_INTERVAL_S", 0.0)
    monkeypatch.setattr("pretrain.data.prepare.shuffle.BLOCK_DOCUMENTS", 40)
    _prepare_parts(corpus, tokenizer_info, tmp_path / "parts", 2, shard_tokens=10_000)
    shutil.copytree(tmp_path / "parts", tmp_path / "whole")
    merge(tmp_path / "whole", workers=1, shuffle_seed=seed)
    for stop in itertools.count():
        out = tmp_path / f"out{stop}"
        shutil.copytree(tmp_path / "parts", out)
        stopped = [_stopped(monkeypatch, out, seed, renames) for renames in (stop, 1)]
        assert bool(list(out.glob("*/manifest.json"))) <= (not (out / "parts").exists() or stop > 3)
        merge(out, workers=1, shuffle_seed=seed)
        assert contents(out) == contents(tmp_path / "whole")
        assert sorted(file.name for file in out.glob("[!.]*")) == ["held_out", "prepare.json", "train", "val"]
        if not stopped[0]:
            break
    assert stop > 5


def test_a_merge_that_is_done_is_left_alone(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", 2)
    merge(tmp_path / "out", workers=1)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.name != ".lock"}
    merge(tmp_path / "out", workers=1)
    assert times == {file: file.stat().st_mtime_ns for file in times}
    with pytest.raises(UserError, match="shuffle was None and is now 4"):
        merge(tmp_path / "out", workers=1, shuffle_seed=4)


def test_a_part_goes_on_after_a_stop(
    corpus: str,
    tokenizer_info: TokenizerInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_units: None,
    eager: None,
) -> None:
    _prepare_parts(corpus, tokenizer_info, tmp_path / "whole", 2)
    stop_after(monkeypatch, 5)
    with pytest.raises(Stopped):
        prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(1, 2))
    with pytest.raises(UserError, match="has no part 0/2"):
        merge(tmp_path / "out", workers=1)
    prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 2))
    with pytest.raises(UserError, match="incomplete parts: part 1/2"):
        merge(tmp_path / "out", workers=1)
    prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(1, 2))
    assert contents(tmp_path / "out/parts/part_0001_of_0002") == contents(tmp_path / "whole/parts/part_0001_of_0002")


def test_parts_that_do_not_belong_together_are_not_merged(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 2))
    prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(1, 2), val_fraction=0.1)
    before = _everything(tmp_path / "out")
    with pytest.raises(UserError, match=r"part 1/2 .* was made with another val_fraction than part 0/2"):
        merge(tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"another number of parts than 3 \(parts 0/2, 1/2\)"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 3))
    assert _everything(tmp_path / "out") == before


def test_parts_of_source_files_that_changed_meanwhile_are_not_merged(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 2))
    with open(tmp_path / "3.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"text": "more"}\n')
    prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(1, 2))
    with pytest.raises(UserError, match=r"part 1/2 .* was made with another source than part 0/2"):
        merge(tmp_path / "out", workers=1)


def test_a_damaged_part_is_not_merged(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", 2)
    shard = tmp_path / "out/parts/part_0001_of_0002/train/shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    before = _everything(tmp_path / "out")
    with pytest.raises(UserError, match=r"part_0001_of_0002/train/shard_00000\.bin .*corrupt"):
        merge(tmp_path / "out", workers=2)
    assert _everything(tmp_path / "out") == before


def test_wholes_and_parts_refuse_each_other(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "whole")
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", 2)
    before = _everything(tmp_path / "out")
    with pytest.raises(UserError, match="holds a preparation that was not made in parts"):
        prepare_files(corpus, tokenizer_info, tmp_path / "whole", part=(0, 2))
    with pytest.raises(UserError, match="was not made in parts, so there is nothing to join"):
        merge(tmp_path / "whole", workers=1)
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="parts"):
            merge(nothing, workers=1)
    with pytest.raises(UserError, match=r"holds parts of a preparation \(parts 0/2, 1/2\)"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")
    with pytest.raises(UserError, match="holds files that no preparation recorded"):
        prepare_files(corpus, tokenizer_info, tmp_path, part=(0, 2))
    assert _everything(tmp_path / "out") == before
    merge(tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="parts that are joined"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 2))
    with pytest.raises(UserError, match="parts was 2 and is now None"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")


def test_a_part_and_a_merge_exclude_each_other(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", 2)
    for lock, kind in (("parts/part_0000_of_0002/.lock", fcntl.LOCK_EX), (".lock", fcntl.LOCK_EX)):
        with open(tmp_path / "out" / lock, "a+", encoding="utf-8") as file:
            fcntl.flock(file, kind)
            with pytest.raises(UserError, match="another preparation is writing"):
                prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 2))
    with open(tmp_path / "out/.lock", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a part does
        prepare_files(corpus, tokenizer_info, tmp_path / "out", part=(0, 2))
        with pytest.raises(UserError, match="another preparation is writing"):
            merge(tmp_path / "out", workers=1)


def test_parts_without_any_text_are_not_merged(tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ""}))
    _prepare_parts(str(tmp_path / "a.jsonl"), tokenizer_info, tmp_path / "out", 2)
    with pytest.raises(UserError, match="hold no text"):
        merge(tmp_path / "out", workers=1)


@pytest.mark.parametrize("seed", [None, 4])
def test_a_merge_neither_removes_nor_overwrites_what_is_not_its_own(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, capsys: pytest.CaptureFixture, seed: int | None
) -> None:
    out = tmp_path / "out"
    _prepare_parts(corpus, tokenizer_info, out, 2)
    (out / "train").mkdir()
    (out / "train/shard_00000.bin").write_text("mine")
    before = _everything(out)
    with pytest.raises(UserError, match=r"holds files that no preparation recorded \(train\)"):
        merge(out, workers=1, shuffle_seed=seed)
    assert _everything(out) == before
    (out / "train").rename(out / "parts/others")
    for _ in range(2):
        merge(out, workers=1, shuffle_seed=seed)
        assert [file.name for file in (out / "parts").rglob("*")] == ["others", "shard_00000.bin"]
        assert f"'{out}/parts' is left as it is: Directory not empty" in capsys.readouterr().err


def test_parts_behind_links_are_joined_on_one_file_system(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    _prepare_parts(corpus, tokenizer_info, tmp_path / "whole", 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    merge(tmp_path / "whole", workers=1)
    (tmp_path / "out/parts").rename(tmp_path / "elsewhere")
    (tmp_path / "out/parts").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/part_0001_of_0002").rename(tmp_path / "farther")
    (tmp_path / "elsewhere/part_0001_of_0002").symlink_to(tmp_path / "farther")
    merge(tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "farther").exists()


def test_parts_on_another_file_system_are_refused_unless_shuffled(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    if not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    _prepare_parts(corpus, tokenizer_info, tmp_path / "out", 2)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        shutil.move(tmp_path / "out/parts", other)
        (tmp_path / "out/parts").symlink_to(f"{other}/parts")
        before = _everything(tmp_path / "out")
        with pytest.raises(UserError, match="lies on another file system than"):
            merge(tmp_path / "out", workers=1)
        assert _everything(tmp_path / "out") == before
        merge(tmp_path / "out", workers=1, shuffle_seed=4)
        assert not list(Path(other).glob("parts/*"))


def _stopped(monkeypatch: pytest.MonkeyPatch, out: Path, seed: int | None, renames: int) -> bool:
    """Run a merge that may rename so many files, and return whether it had more to do."""
    replace, left = os.replace, [renames]

    def some(old: object, new: object) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", some)
        try:
            merge(out, workers=1, shuffle_seed=seed)
        except Stopped:
            return True
    return False


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}

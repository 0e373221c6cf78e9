"""The cache of remote files: one download per node, a hard limit, no damaged file, no endless wait."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
import xxhash

from pretrain.data.remote import cache, shared_folder
from pretrain.data.remote.cache import CachedFiles, CacheSettings
from pretrain.data.remote.shared_folder import SharedFolder
from pretrain.errors import UserError
from tests.support.faulty_server import FaultyServer, StorageFault
from tests.support.runs import REPOSITORY

SIZE = 50_000
NAMES = [f"shard_{number:05d}.bin" for number in range(24)]
A, B, C, D, E, *_ = NAMES
WAIT_S = 30


@pytest.fixture
def corpus(server: FaultyServer, tmp_path: Path) -> dict[str, tuple[int, str]]:
    """Names, sizes and checksums of 24 files that the server has, and that lie in tmp_path/originals too."""
    generator = random.Random(1)
    expected = {}
    (tmp_path / "originals").mkdir()
    for name in NAMES:
        content = generator.randbytes(SIZE)
        server.objects[f"/corpus/{name}"] = content
        (tmp_path / "originals" / name).write_bytes(content)
        expected[name] = (SIZE, xxhash.xxh3_128_hexdigest(content))
    return expected


@pytest.fixture
def open_files(server: FaultyServer, corpus: dict, tmp_path: Path) -> Iterator[Callable[..., CachedFiles]]:
    """open_files(limit=files that fit) -> the corpus through tmp_path/cache."""
    opened = []

    def make(limit: float = 24, downloads: int = 4) -> CachedFiles:
        settings = CacheSettings(tmp_path / "cache", int(limit * SIZE), downloads)
        opened.append(CachedFiles(f"{server.url}/corpus", corpus, settings))
        return opened[-1]

    yield make
    for files in opened:
        files.fetch_ahead([])


@pytest.fixture
def start_reader(server: FaultyServer, corpus: dict, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start_reader(names, limit, ...) -> a process that reads the corpus (cache_reader.py)."""
    readers = []

    def start(names: list[str], limit: float = 24, **options: object) -> subprocess.Popen:
        arguments = {
            "location": f"{server.url}/corpus",
            "expected": corpus,
            "folder": str(tmp_path / "cache"),
            "limit_bytes": int(limit * SIZE),
            "names": names,
            "originals": str(tmp_path / "originals"),
            **options,
        }
        script = REPOSITORY / "tests/support/workers/cache_reader.py"
        command = [sys.executable, str(script), json.dumps(arguments)]
        readers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return readers[-1]

    yield start
    for reader in readers:
        reader.kill()
        reader.communicate()


def test_the_processes_of_a_node_share_one_download(server: FaultyServer, start_reader) -> None:
    server.faults[f"/corpus/{A}"] = StorageFault("delay", delay_s=0.5)
    readers = [start_reader([A]) for _ in range(3)]
    assert [reader.wait(WAIT_S) for reader in readers] == [0, 0, 0]
    assert server.requests == [f"/corpus/{A}"]


def test_processes_that_stream_through_a_small_cache_read_every_byte_and_keep_to_its_limit(
    server: FaultyServer, start_reader, tmp_path: Path
) -> None:
    limit = 7
    started = [0, 0, 9]  # one of them is elsewhere in the corpus
    readers = [start_reader(NAMES[n:] + NAMES[:n], limit, ahead=3, hold_s=0.02) for n in started]
    largest = 0
    while any(reader.poll() is None for reader in readers):
        largest = max(largest, _held(tmp_path / "cache"))
        time.sleep(0.001)
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert [reader.stdout.read().split() for reader in readers] == [NAMES[n:] + NAMES[:n] for n in started]
    assert 4 * SIZE < largest <= limit * SIZE
    assert set(server.requests) == {f"/corpus/{name}" for name in NAMES}


def test_the_least_recently_used_goes_first(open_files, tmp_path: Path) -> None:
    files = open_files(limit=3)
    for name in (A, B, C, A, D):
        files.path(name)
        files.release(name)
    assert _cached(files, tmp_path) == {A, C, D}


def test_what_is_in_use_stays(open_files, tmp_path: Path) -> None:
    files, others = open_files(limit=3), open_files(limit=3)
    files.path(A)
    for name in (B, C, D, E):
        others.path(name)
        others.release(name)
    assert _cached(files, tmp_path) == {A, D, E}


def test_files_of_the_same_content_are_one_and_stay_while_one_is_used(server: FaultyServer, tmp_path: Path) -> None:
    entry = (4, xxhash.xxh3_128_hexdigest(b"same"))
    server.objects.update({"/c/x": b"same", "/c/y": b"same", "/c/z": b"othe"})
    expected = {"x": entry, "y": entry, "z": (4, xxhash.xxh3_128_hexdigest(b"othe"))}
    files = CachedFiles(f"{server.url}/c", expected, CacheSettings(tmp_path / "cache", 4))
    assert files.path("x") == files.path("y")
    files.release("x")
    with pytest.raises(UserError, match="no room"):
        files.path("z")
    files.release("y")
    assert files.path("z").read_bytes() == b"othe"


def test_a_file_of_another_name_is_neither_counted_nor_touched(open_files, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").write_bytes(bytes(10 * SIZE))
    files = open_files(limit=1)
    for name in (A, B):
        files.path(name)
        files.release(name)
    assert (tmp_path / "cache" / "notes.txt").exists()


def test_a_limit_below_one_file_is_told_at_once(open_files) -> None:
    with pytest.raises(UserError, match=rf"{A} \(0.1 MB\): data.cache.limit_gb is 3e-05"):
        open_files(limit=0.6).path(A)


def test_a_limit_that_this_process_has_used_up_is_told_at_once(open_files) -> None:
    files = open_files(limit=2)
    files.path(A)
    files.path(B)
    with pytest.raises(UserError, match=r"data.cache.limit_gb is 0.0001, and this process uses 0.1 MB of it"):
        files.path(C)
    files.release(A)
    files.path(C)


def test_room_that_another_process_holds_is_waited_for(open_files, start_reader, monkeypatch) -> None:
    holder = start_reader([A], 1, wait=True)
    assert holder.stdout.readline() == f"{A}\n"
    files = open_files(limit=1)
    monkeypatch.setattr(cache, "ROOM_WAIT_S", 0.3)
    with pytest.raises(UserError, match=r"0.1 MB of it stayed in use"):
        files.path(B)
    monkeypatch.setattr(cache, "ROOM_WAIT_S", WAIT_S)
    holder.stdin.write("\n")
    holder.stdin.flush()
    files.path(B)


@pytest.mark.usefixtures("impatient")
def test_a_killed_downloader_leaves_nothing_behind(
    server: FaultyServer, open_files, start_reader, tmp_path: Path
) -> None:
    server.faults[f"/corpus/{A}"] = StorageFault("stall", times=1)
    server.faults[f"/corpus/{B}"] = StorageFault("stall", times=1)
    victim = start_reader([A, B], ahead=1)
    _wait_until(lambda: len(server.requests) == 2)
    assert len(list((tmp_path / "cache").glob("*.part"))) == 2
    victim.kill()
    victim.wait()
    files = open_files()
    assert files.path(A).read_bytes() == server.objects[f"/corpus/{A}"]
    assert not list((tmp_path / "cache").glob("*.part"))
    assert len(list((tmp_path / "cache").glob("*.claims"))) == 1


def test_what_a_killed_reader_used_may_go(open_files, start_reader) -> None:
    holder = start_reader([A], 1, wait=True)
    assert holder.stdout.readline() == f"{A}\n"
    holder.kill()
    holder.wait()
    open_files(limit=1).path(B)


def test_a_waiting_process_takes_over_from_a_killed_downloader(server: FaultyServer, start_reader) -> None:
    server.faults[f"/corpus/{A}"] = StorageFault("stall", times=1)
    victim = start_reader([A])
    _wait_until(lambda: len(server.requests) == 1)
    heir = start_reader([A])
    time.sleep(1)
    victim.kill()
    assert heir.wait(WAIT_S) == 0
    assert len(server.requests) == 2


def test_a_corrupt_download_is_fetched_again(server: FaultyServer, open_files) -> None:
    server.faults[f"/corpus/{A}"] = StorageFault("flip", times=2)
    assert open_files().path(A).read_bytes() == server.objects[f"/corpus/{A}"]
    assert len(server.requests) == 3


def test_an_object_that_is_always_corrupt_is_reported_with_both_checksums(
    server: FaultyServer, open_files, corpus: dict, tmp_path: Path
) -> None:
    original = server.objects[f"/corpus/{A}"]
    server.objects[f"/corpus/{A}"] = found = original[:100] + bytes([original[100] ^ 1]) + original[101:]
    files = open_files()
    checksums = f"{xxhash.xxh3_128_hexdigest(found)} in each of 3 downloads.*{corpus[A][1]}"
    with pytest.raises(UserError, match=f"{server.url}/corpus/{A} came with the checksum {checksums}"):
        files.path(A)
    assert len(server.requests) == 3
    assert _held(tmp_path / "cache") == 0
    server.objects[f"/corpus/{A}"] = original
    assert files.path(A).read_bytes() == original


@pytest.mark.usefixtures("impatient")
def test_an_object_that_is_shorter_than_its_manifest_says_is_reported(server: FaultyServer, open_files) -> None:
    server.objects[f"/corpus/{A}"] = server.objects[f"/corpus/{A}"][:30_000]
    with pytest.raises(UserError, match=f"{A} cannot be read: .*30000 bytes came of the 50000"):
        open_files().path(A)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(server: FaultyServer, open_files, damage: str) -> None:
    path = open_files().path(A)
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-1])
    assert open_files().path(A).read_bytes() == server.objects[f"/corpus/{A}"]
    assert len(server.requests) == 2


def test_one_slow_object_does_not_hold_up_the_others(server: FaultyServer, open_files, tmp_path: Path) -> None:
    server.faults[f"/corpus/{B}"] = StorageFault("stall")
    files = open_files(downloads=2)
    files.fetch_ahead(NAMES)
    _wait_until(lambda: _cached(files, tmp_path) == {*NAMES} - {B})
    files.path(D)


@pytest.mark.usefixtures("impatient")
def test_an_object_that_fails_is_an_error_only_when_it_is_needed(
    server: FaultyServer, open_files, tmp_path: Path
) -> None:
    server.faults[f"/corpus/{B}"] = StorageFault("status", status=404)
    files = open_files()
    files.fetch_ahead([A, B, C])
    _wait_until(lambda: _cached(files, tmp_path) == {A, C} and not files._underway)
    files.path(C)
    with pytest.raises(UserError, match=f"{B} cannot be read"):
        files.path(B)
    del server.faults[f"/corpus/{B}"]
    path = files.path(B)
    assert path.read_bytes() == server.objects[f"/corpus/{B}"]
    files.release(B)
    path.unlink()
    files.fetch_ahead([B])
    _wait_until(path.exists)


def test_files_are_fetched_ahead_in_the_order_of_need(server: FaultyServer, open_files, tmp_path: Path) -> None:
    files = open_files(downloads=1)
    files.fetch_ahead(NAMES[::-1])
    _wait_until(lambda: len(_cached(files, tmp_path)) == 24)
    assert server.requests == [f"/corpus/{name}" for name in reversed(NAMES)]


def test_fetching_ahead_waits_for_room_and_goes_on_at_a_release(open_files, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "ROOM_POLL_S", 1000.0)
    files = open_files(limit=2, downloads=1)
    files.path(A)
    files.fetch_ahead([A, B, C])
    _wait_until(lambda: _cached(files, tmp_path) == {A, B} and not files._underway)
    time.sleep(0.2)
    assert _cached(files, tmp_path) == {A, B}
    files.fetch_ahead([B, C])
    files.release(A)
    _wait_until(lambda: _cached(files, tmp_path) == {B, C})


def test_fetching_ahead_evicts_only_what_is_needed_later_and_path_what_is_needed_last(
    open_files, tmp_path: Path
) -> None:
    first, second = open_files(limit=3), open_files(limit=3, downloads=1)
    first.fetch_ahead([A, B, C])
    _wait_until(lambda: _cached(first, tmp_path) == {A, B, C})
    second.fetch_ahead([D, E])
    _wait_until(lambda: _cached(first, tmp_path) == {A, B, D} and not second._underway)
    time.sleep(0.2)
    assert _cached(first, tmp_path) == {A, B, D}
    second.path(E)
    assert _cached(first, tmp_path) == {A, D, E}


def test_path_does_not_wait_for_the_threads_that_fetch_ahead(server: FaultyServer, open_files) -> None:
    server.faults.update({f"/corpus/{name}": StorageFault("stall") for name in (A, B)})
    files = open_files(downloads=2)
    files.fetch_ahead([A, B, C, D])
    _wait_until(lambda: len(server.requests) == 2)
    assert files.path(D).read_bytes() == server.objects[f"/corpus/{D}"]


def test_what_is_here_is_read_without_the_server(server: FaultyServer, open_files) -> None:
    files = open_files()
    files.path(A)
    files.release(A)
    server.stop()
    assert open_files().path(A).read_bytes() == server.objects[f"/corpus/{A}"]


def test_a_part_of_a_file_is_read_without_the_rest(server: FaultyServer, open_files, tmp_path: Path) -> None:
    files = open_files()
    assert files.read(A, 20, 100) == server.objects[f"/corpus/{A}"][20:100]
    assert files.read(A, 0, 10 * SIZE) == server.objects[f"/corpus/{A}"]
    assert _held(tmp_path / "cache") == 0


def test_a_full_disk_is_named(open_files, monkeypatch, tmp_path: Path) -> None:
    files = open_files()
    monkeypatch.setattr(shared_folder, "open", _open_on_a_full_disk, raising=False)
    with pytest.raises(UserError, match=rf"the disk of the cache folder {tmp_path}/cache .* is full: .* MB free"):
        files.path(A)
    monkeypatch.undo()
    files.path(A)


def test_claims_that_a_full_disk_cuts_stay_as_they_were(open_files, monkeypatch) -> None:
    files, others = open_files(), open_files()
    files.path(A)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", _pwrite_on_a_full_disk)
        for ask in (lambda: files.path(B), lambda: files.fetch_ahead(NAMES)):
            with pytest.raises(UserError, match=r"the disk of the cache folder .* is full"):
                ask()
    assert others._folder.claims().used == {files._expected[A][1]}
    assert not others._folder.claims().wanted
    files.fetch_ahead(NAMES)
    files.path(B)
    assert len(others._folder.claims().used) == 2


@pytest.mark.usefixtures("impatient")
def test_a_reader_that_is_dropped_leaves_no_thread_and_no_claim(
    server: FaultyServer, corpus: dict, tmp_path: Path
) -> None:
    before = threading.enumerate()
    server.faults[f"/corpus/{C}"] = StorageFault("status", status=404)

    def opened() -> CachedFiles:
        return CachedFiles(f"{server.url}/corpus", corpus, CacheSettings(tmp_path / "cache", 24 * SIZE))

    def read_some() -> BinaryIO:
        files = opened()
        files.path(A)
        files.fetch_ahead([B, C, D])
        return files._folder._claims

    claims = read_some()

    def collected() -> bool:
        gc.collect()  # fsspec's exception for C is in a cycle with the frames that it went through
        return claims.closed

    _wait_until(collected)
    _wait_until(
        lambda: not [each for each in threading.enumerate() if each not in before and each.name == "fetch-ahead"]
    )
    files = opened()
    assert not files._folder.claims().used
    assert len(list((tmp_path / "cache").glob("*.claims"))) == 1
    assert _cached(files, tmp_path) == {A, B, D}


def test_a_file_that_goes_while_room_is_made_is_gone(open_files, monkeypatch, tmp_path: Path) -> None:
    """A process that finds a file damaged removes it, even while others add up the folder."""
    files = open_files(limit=2)
    a, b = (files.path(name) for name in (A, B))
    for name in (A, B):
        files.release(name)
    parts_bytes, listdir = SharedFolder._parts_bytes, os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [listdir(path), b.unlink(missing_ok=True)][0])
    monkeypatch.setattr(SharedFolder, "_parts_bytes", lambda self: [parts_bytes(self), a.unlink(missing_ok=True)][0])
    files.path(C)
    files.path(D)
    assert _cached(files, tmp_path) == {C, D}


def test_a_cache_folder_that_cannot_be_is_named(open_files, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=rf"the cache folder {tmp_path}/cache \(data.cache.folder\) cannot be used"):
        open_files()


def test_without_locks_files_come_all_the_same(server: FaultyServer, open_files, monkeypatch, tmp_path: Path) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    server.faults[f"/corpus/{A}"] = StorageFault("delay", delay_s=0.3)
    one, other = open_files(limit=2), open_files(limit=2)
    other.fetch_ahead([A])
    _wait_until(lambda: len(server.requests) == 1)
    assert one.path(A).read_bytes() == server.objects[f"/corpus/{A}"]
    _wait_until(lambda: not other._underway)
    for name in (B, C):
        other.path(name)
        other.release(name)
    assert _cached(one, tmp_path) == {A, C}


def test_a_process_ends_though_a_download_hangs(server: FaultyServer, start_reader) -> None:
    server.faults[f"/corpus/{B}"] = StorageFault("stall")
    reader = start_reader([A], wanted=[B], wait=True)
    _wait_until(lambda: f"/corpus/{B}" in server.requests)
    reader.communicate("\n", timeout=WAIT_S)
    assert reader.returncode == 0


def _cached(files: CachedFiles, tmp_path: Path) -> set[str]:
    """Return the names of the whole files in the cache."""
    names = {checksum: name for name, (_, checksum) in files._expected.items()}
    return {names[path.name] for path in (tmp_path / "cache").iterdir() if path.name in names}


def _held(folder: Path) -> int:
    """Return the bytes that the folder's files take, without the claims of readers."""
    sizes = {}
    for path in folder.glob("[0-9a-f]*"):
        with suppress(FileNotFoundError):
            if path.suffix != ".claims":
                stat = path.stat()
                sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _pwrite_on_a_full_disk(descriptor: int, content: bytes, offset: int, pwrite=os.pwrite) -> int:
    """Do as `os.pwrite`, but the file cannot grow by more than ten bytes."""
    return pwrite(descriptor, content[: os.fstat(descriptor).st_size + 10], offset)


class _FullDisk(io.FileIO):
    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def _open_on_a_full_disk(path: Path, mode: str, **options: object):
    """Do as `open`, but a part takes no byte."""
    if "opener" in options:
        return _FullDisk(path, "r+", opener=options["opener"])
    return open(path, mode, **options)

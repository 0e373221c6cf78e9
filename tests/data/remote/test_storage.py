"""Remote objects: every byte right or an error that names the URL, over HTTP and S3."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import fsspec
import pytest

from pretrain.data.remote import storage
from pretrain.data.remote.storage import ATTEMPTS, ATTEMPTS_AT_FIRST, Storage, is_remote
from pretrain.errors import UserError
from tests.support.faulty_server import FaultyServer, StorageFault

CONTENT = random.Random(0).randbytes(100_000)
PATH = "/corpus/part/shard_00000.bin"
NAME = "part/shard_00000.bin"


@pytest.fixture(autouse=True)
def _served(server: FaultyServer) -> None:
    server.objects[PATH] = CONTENT


def test_the_whole_and_ranges_of_an_object_come_as_they_are(location: str, monkeypatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 30_000)
    files = Storage(location + "/")
    assert files.read_bytes(NAME) == CONTENT
    assert files.read_bytes(NAME, 0, 10) == CONTENT[:10]
    assert files.read_bytes(NAME, 99_999, 100_000) == CONTENT[99_999:]
    assert [len(block) for block in files.read_blocks(NAME, 100_000)] == [30_000] * 3 + [10_000]
    assert b"".join(files.read_blocks(NAME, 100_000)) == CONTENT


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "fault",
    [
        StorageFault("status", status=500),
        StorageFault("status", status=503),
        StorageFault("status", status=429),
        StorageFault("reset"),
        StorageFault("cut"),
        StorageFault("short"),
        StorageFault("stall"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}",
)
def test_a_failure_that_passes_is_tried_again(
    server: FaultyServer, location: str, fault: StorageFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.kind == "stall":
        monkeypatch.setattr(storage, "TIMEOUT_S", 0.5)
    server.faults[PATH] = StorageFault(fault.kind, status=fault.status, times=2)
    assert Storage(location).read_bytes(NAME, 10, 90_000) == CONTENT[10:90_000]
    assert server.faults[PATH].times == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("status", "503"),
        ("short", "50000 bytes came of the 100000 from byte 0 on"),
        ("reset", "Connection"),
        ("stall", "no answer in time"),
    ],
)
def test_what_keeps_failing_is_given_up_with_what_was_seen(
    server: FaultyServer, location: str, kind: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults[PATH] = StorageFault(kind)
    if kind == "stall":
        monkeypatch.setattr(storage, "TIMEOUT_S", 0.05)
    with pytest.raises(
        UserError, match=f"(?s){location}/{NAME} cannot be read: .*{seen}.* {ATTEMPTS_AT_FIRST} attempts"
    ):
        Storage(location).read_bytes(NAME, 0, 100_000)
    if kind in ("status", "short"):  # aiohttp itself makes up for some resets
        assert len(server.requests) == ATTEMPTS_AT_FIRST


def test_more_patience_is_had_with_what_has_once_answered_and_every_attempt_is_logged(
    server: FaultyServer, location: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 1e-4)
    there = Storage(location)
    there.read_bytes(NAME, 0, 10)
    server.faults[PATH] = StorageFault("status", times=ATTEMPTS - 1)
    with caplog.at_level("WARNING", logger="evenkeel"):
        assert there.read_bytes(NAME, 0, 10) == server.objects[PATH][:10]
    assert len(server.requests) == 1 + ATTEMPTS
    assert [record.message.split("; ")[1].split(",")[0] for record in caplog.records] == [
        f"attempt {number} of {ATTEMPTS}" for number in range(1, ATTEMPTS)
    ]


@pytest.mark.parametrize(("status", "advice"), [(404, "no such object"), (403, "credentials"), (401, "credentials")])
def test_what_stays_as_it_is_is_told_at_once(server: FaultyServer, location: str, status: int, advice: str) -> None:
    server.faults[PATH] = StorageFault("status", status=status)
    with pytest.raises(UserError, match=f"{location}/{NAME} cannot be read: .*{advice}"):
        Storage(location).read_bytes(NAME, 0, 10)
    assert len(server.requests) == 1


def test_a_part_beyond_the_end_of_an_object_is_told_at_once(server: FaultyServer, location: str) -> None:
    with pytest.raises(UserError, match=f"{location}/{NAME} cannot be read: .*416"):
        Storage(location).read_bytes(NAME, 100_000, 100_010)
    assert len(server.requests) == 1


def test_a_server_that_sends_the_whole_for_a_part_is_refused(server: FaultyServer) -> None:
    server.faults[PATH] = StorageFault("whole")
    with pytest.raises(UserError, match=r"came as a whole \(100000 bytes\).*ranges"):
        Storage(f"{server.url}/corpus").read_bytes(NAME, 0, 10)


def test_missing_credentials_are_told_at_once(server: FaultyServer, monkeypatch, tmp_path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"s3://corpus/.*Unable to locate credentials.*FSSPEC_S3_ANON"):
        Storage("s3://corpus").read_bytes(NAME)
    assert server.requests == []


def test_other_file_systems_are_read_the_same_way(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/corpus/x.bin", CONTENT)
    (tmp_path / "x.bin").write_bytes(CONTENT)
    for location in ("memory://corpus", f"file://{tmp_path}"):
        assert Storage(location).read_bytes("x.bin", 10, 20) == CONTENT[10:20]
        with pytest.raises(UserError, match=f"{location}/y.bin cannot be read: .*no such object"):
            Storage(location).read_bytes("y.bin")


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/corpus needs a library that is not installed: pip install gcsfs"):
        Storage("gs://bucket/corpus")


@pytest.mark.parametrize("scheme", ["nfs9", "ftp"])
def test_a_scheme_that_cannot_be_opened_is_named(scheme: str) -> None:
    with pytest.raises(UserError, match=rf"{scheme}://host/corpus cannot be opened: .*Known are s3://"):
        Storage(f"{scheme}://host/corpus")


@pytest.mark.parametrize(
    "name", ["../other/secret", "/etc/passwd", "a/../../b", "a//b", "", "a?b", "a#b", "a%2e", "a\\b"]
)
def test_a_manifest_cannot_name_what_is_not_below_it(server: FaultyServer, name: str) -> None:
    with pytest.raises(UserError, match="no name below it"):
        Storage(f"{server.url}/corpus").read_bytes(name)
    assert server.requests == []


def test_which_locations_are_remote() -> None:
    assert all(map(is_remote, ["s3://b/c", "gs://b", "hf://datasets/a/b", "https://host/c", "memory://c"]))
    assert not any(map(is_remote, ["data/train", "/data/train", "file:///data/train", "C:/data", "a:b", "s3:/b"]))

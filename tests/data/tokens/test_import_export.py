"""Other trainers' token files become shards and come out again byte for byte."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.tokenizer import TokenizerInfo
from pretrain.data.tokens import ShardWriter, external_files, external_shards, import_export, open_shards
from pretrain.data.tokens.atomic_folder import atomic_folder
from pretrain.data.tokens.formats import EXPORTED
from pretrain.data.tokens.import_export import export_tokens, import_tokens
from pretrain.errors import UserError
from tests.support.token_formats import documents, write_datatrove, write_llmc, write_megatron

LENGTHS = [0, 5, 0, 0, 300, 1, 44, 0, 1200, 2, 0, 0]


def tokenizer_of(vocab_size: int, bos_id: int | None = None) -> TokenizerInfo:
    return TokenizerInfo(backend="", vocab_size=vocab_size, eos_id=0, bos_id=bos_id, first_ids=(), fingerprint="abc")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, indexes and empty documents that lie across blocks."""
    monkeypatch.setattr(import_export, "_BLOCK_TOKENS", 250)
    for module in (external_files, import_export):
        monkeypatch.setattr(module, "INDEX_BLOCK", 3)


def write(format: str, folder: Path, vocab_size: int, dtype: str) -> list[np.ndarray]:
    """Two files of one format (nanogpt: one) in `folder`; their documents."""
    folder.mkdir()
    parts = [documents(seed, vocab_size, LENGTHS) for seed in range(2)]
    for number, part in enumerate(parts):
        if format == "megatron":
            write_megatron(folder / f"{number}_text_document", part, dtype)
        elif format == "datatrove":
            write_datatrove(folder / f"{number}.ds", part, np.dtype(dtype).itemsize)
        elif format == "llmc":
            write_llmc(folder / f"train_{number}.bin", part, dtype)
        elif format == "olmo":
            np.concatenate(part).astype(dtype).tofile(folder / f"part-{number}.npy")
        elif number == 0:
            np.concatenate(part).astype(dtype).tofile(folder / "train.bin")
    return parts[0] if format == "nanogpt" else [*parts[0], *parts[1]]


@pytest.mark.parametrize(
    ("format", "vocab_size", "dtype"),
    [
        ("megatron", 50_000, "uint16"),
        ("megatron", 50_000, "int32"),  # wider than it had to be
        ("megatron", 100_000, "int32"),
        ("datatrove", 50_000, "uint16"),
        ("datatrove", 100_000, "uint32"),
        ("nanogpt", 50_000, "uint16"),
        ("nanogpt", 100_000, "uint16"),  # its ids happen to be small
        ("llmc", 50_000, "uint16"),
        ("llmc", 100_000, "uint32"),
        ("olmo", 50_000, "uint16"),
        ("olmo", 100_000, "uint32"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_what_was_imported_is_exported_byte_for_byte(tmp_path: Path, format: str, vocab_size: int, dtype: str) -> None:
    written = write(format, tmp_path / "theirs", min(vocab_size, np.iinfo(dtype).max), dtype)
    location = tmp_path / "theirs" / ("train.bin" if format == "nanogpt" else "")
    import_tokens(format, location, tmp_path / "ours", tokenizer_of(vocab_size), shard_tokens=100)

    shards = open_shards(tmp_path / "ours")
    assert len(shards.shards) >= 3
    tokens = np.concatenate([shards.open_tokens(number) for number in range(len(shards.shards))])
    assert np.array_equal(tokens, np.concatenate(written))
    found = [ends for number in range(len(shards.shards)) for ends in np.diff(shards.open_ends(number), prepend=0)]
    assert found == [len(document) for document in written if len(document)]
    assert (shards.vocab_size, shards.eos_id, shards.tokenizer_fingerprint) == (vocab_size, 0, "abc")
    assert [source["tokens"] for source in shards.manifest["sources"]] == [1552] * (1 if format == "nanogpt" else 2)

    export_tokens(format, shards, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "theirs")


@pytest.mark.parametrize("source", ["megatron", "datatrove", "ours"])
@pytest.mark.usefixtures("small_blocks")
def test_any_format_becomes_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(external_shards, "SHARD_TOKENS", 400)
    written = [document for document in write("megatron", tmp_path / "megatron", 1000, "int32") if len(document)]
    write("datatrove", tmp_path / "datatrove", 1000, "uint32")
    import_tokens("megatron", tmp_path / "megatron", tmp_path / "ours", tokenizer_of(1000), shard_tokens=500)
    shards = open_shards(tmp_path / source)
    for format in EXPORTED:
        if (format, source) != ("megatron", "ours"):
            export_tokens(format, shards, tmp_path / f"as_{format}")

    if source != "ours":
        write_megatron(tmp_path / "expected", written, "int32")
        for suffix in ("bin", "idx"):
            assert (tmp_path / f"as_megatron/tokens.{suffix}").read_bytes() == (
                tmp_path / f"expected.{suffix}"
            ).read_bytes()
    headers = [np.fromfile(file, "<i4", 256) for file in sorted((tmp_path / "as_llmc").glob("*.bin"))]
    kind = [20240520, 1] if source == "ours" else [20240801, 7]
    assert [header[:2].tolist() for header in headers] == [kind] * len(headers)
    assert sum(int(header[2]) for header in headers) == sum(map(len, written))
    raw = {name: [np.concatenate(written)] for name in ("olmo", "datatrove", "nanogpt")}
    for name, pattern, dtype in (("olmo", "*.npy", None), ("datatrove", "*.ds", None), ("nanogpt", "*.bin", "<u2")):
        dtype = dtype or ("<u2" if source == "ours" else "<u4")
        files = sorted((tmp_path / f"as_{name}").glob(pattern))
        assert np.array_equal(np.concatenate([np.fromfile(file, dtype) for file in files]), raw[name][0])
    lengths = [
        np.diff(np.fromfile(file, "<u8"), prepend=np.uint64(0))
        for file in sorted((tmp_path / "as_datatrove").glob("*.index"))
    ]
    assert np.concatenate(lengths).tolist() == [len(document) for document in written]


@pytest.mark.parametrize("marks", [[], [np.empty(0)] * 3])
def test_a_megatron_file_without_tokens_is_kept(tmp_path: Path, marks: list[np.ndarray]) -> None:
    write("megatron", tmp_path / "theirs", 1000, "uint16")
    write_megatron(tmp_path / "theirs" / "0_worker", [np.empty(0), *marks], "uint16")
    import_tokens("megatron", tmp_path / "theirs", tmp_path / "ours", tokenizer_of(1000))
    shards = open_shards(tmp_path / "ours")
    assert [Path(source["path"]).name for source in shards.manifest["sources"]] == [
        "0_text_document.bin",
        "1_text_document.bin",
    ]
    export_tokens("megatron", shards, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "theirs")
    (tmp_path / "none").mkdir()
    write_megatron(tmp_path / "none" / "x", [np.empty(0)], "uint16")
    with pytest.raises(UserError, match="no megatron files with tokens"):
        import_tokens("megatron", tmp_path / "none", tmp_path / "nothing", tokenizer_of(1000))


def test_documents_of_raw_tokens_end_with_separators_and_with_the_file(tmp_path: Path) -> None:
    np.array([5, 6, 0, 0, 7, 8], "<u2").tofile(tmp_path / "train.bin")
    import_tokens("nanogpt", tmp_path / "train.bin", tmp_path / "ours", tokenizer_of(1000))
    assert open_shards(tmp_path / "ours").open_ends(0).tolist() == [3, 4, 6]


def test_documents_that_olmo_lists_are_taken_as_listed(tmp_path: Path) -> None:
    np.array([5, 0, 6, 0, 7, 8], "<u2").tofile(tmp_path / "part.npy")
    with gzip.open(tmp_path / "part.csv.gz", "wt") as file:
        file.write("0,4,id-1,a.jsonl.gz,1\n4,6,id-2,a.jsonl.gz,2\n")
    import_tokens("olmo", tmp_path, tmp_path / "ours", tokenizer_of(1000))
    assert open_shards(tmp_path / "ours").open_ends(0).tolist() == [4, 6]
    with gzip.open(tmp_path / "part.csv.gz", "wt") as file:
        file.write("0,4\n5,6\n")
    with pytest.raises(UserError, match=r"line 2 of .*part\.csv\.gz leaves a gap"):
        import_tokens("olmo", tmp_path, tmp_path / "again", tokenizer_of(1000))


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("nanogpt", b"", "has 0 bytes"),
        ("nanogpt", b"\1\0\2", "has 3 bytes"),
        (
            "nanogpt",
            (20240520).to_bytes(4, "little") + bytes(1020),
            "looks like files of the format llmc: use --import llmc",
        ),
        ("nanogpt", np.arange(1, 50, dtype="<u4").tobytes(), "are uint32, not uint16"),
        ("olmo", b"\x93NUMPY\1\0" + bytes(200), "has a NumPy header"),
        ("nanogpt", np.array([3, 999, 1000, 4], "<u2").tobytes(), r"has the id 1000 at token 2 \(byte 4\)"),
    ],
)
def test_raw_files_that_are_something_else_are_refused(
    tmp_path: Path, format: str, content: bytes, message: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_tokens(format, tmp_path / "x", tmp_path / "ours", tokenizer_of(1000))
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_megatron_documents_of_several_sequences_are_not_imported(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", documents(0, 1000, [10, 20]), "int32", sequences=[[10], [3, 17]])
    with pytest.raises(UserError, match=r"document 1 of .*x\.idx is 2 sequences"):
        import_tokens("megatron", tmp_path / "x", tmp_path / "ours", tokenizer_of(1000))
    write_megatron(tmp_path / "x", documents(0, 1000, [10, 0]), "int32", sequences=[[10], [0]])
    with pytest.raises(UserError, match=r"sequence 1 of .*x\.idx has no tokens"):
        import_tokens("megatron", tmp_path / "x", tmp_path / "ours", tokenizer_of(1000))


def test_ids_that_do_not_fit_the_other_format_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "ours", np.dtype("<u4"), 100)
    writer.append(np.array([1, 70_000, 0], "<u4"), np.array([3]))
    writer.finish({"vocab_size": 100_000, "eos_id": 0, "tokenizer_fingerprint": "abc", "text_bytes": 0})
    with pytest.raises(UserError, match="the id 70000 does not fit in the uint16 tokens of the format nanogpt"):
        export_tokens("nanogpt", open_shards(tmp_path / "ours"), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    write("megatron", tmp_path / "theirs", 1000, "uint16")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        import_tokens("megatron", tmp_path / "theirs", tmp_path / "out", tokenizer_of(1000))
    (tmp_path / "out" / "note").unlink()
    import_tokens(
        "megatron", tmp_path / "theirs", tmp_path / "out", tokenizer_of(1000)
    )  # an empty folder is no content
    with pytest.raises(UserError, match="exists already"):
        export_tokens("megatron", open_shards(tmp_path / "out"), tmp_path / "theirs")


def test_a_link_to_an_empty_folder_leads_to_the_result(tmp_path: Path) -> None:
    write("megatron", tmp_path / "theirs", 1000, "uint16")
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to("large_disk")
    import_tokens("megatron", tmp_path / "theirs", tmp_path / "out", tokenizer_of(1000))
    assert (tmp_path / "out").is_symlink()
    assert open_shards(tmp_path / "large_disk").tokens == open_shards(tmp_path / "out").tokens == 3104


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("megatron", tmp_path / "theirs", 1000, "uint16")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "disk")
    monkeypatch.setattr(import_export, "ShardWriter", None)
    with pytest.raises(UserError, match="is a mount point"):
        import_tokens("megatron", tmp_path / "theirs", tmp_path / "disk", tokenizer_of(1000))


def test_two_imports_cannot_make_one_folder(tmp_path: Path) -> None:
    write("megatron", tmp_path / "theirs", 1000, "uint16")
    with atomic_folder(tmp_path / "ours") as aside:
        (aside / "note").write_text("first")
        with pytest.raises(UserError, match="another process is writing"):
            import_tokens("megatron", tmp_path / "theirs", tmp_path / "ours", tokenizer_of(1000))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "theirs"]
    assert (tmp_path / "ours" / "note").read_text() == "first"


def test_a_killed_import_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    np.ones(20_000_000, "<u2").tofile(tmp_path / "train.bin")
    program = (
        "from types import SimpleNamespace as Tokenizer; from pretrain.data.tokens.import_export import import_tokens;"
        "import_tokens('nanogpt', 'train.bin', 'ours', Tokenizer(vocab_size=2, eos_id=1, bos_id=None, fingerprint='abc'))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    while process.poll() is None and not any(file.stat().st_size for file in tmp_path.glob(".ours.*/*.bin")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert open_shards(tmp_path / "ours").documents == 20_000_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "train.bin"]


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in `folder` but datatrove's metadata, whose tokenizer's name is not kept."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".metadata"}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("first", "found"), [((7, 7, 7), 7), ((7, 8, 7), None)], ids=["all", "not all"])
@pytest.mark.parametrize("format", ["megatron", "nanogpt"])
def test_an_import_finds_out_whether_all_documents_begin_with_bos(
    tmp_path: Path, capsys, format: str, first: tuple[int, ...], found: int | None
) -> None:
    parts = [np.array([token, *range(10, 10 + length), 0]) for token, length in zip(first, (3, 600, 40), strict=True)]
    source = tmp_path / ("tokens" if format == "megatron" else "tokens.bin")
    if format == "megatron":
        write_megatron(source, parts, "uint16")
    else:
        np.concatenate(parts).astype("uint16").tofile(source)
    import_tokens(format, source, tmp_path / "shards", tokenizer_of(1000, bos_id=7))
    shards = open_shards(tmp_path / "shards")
    assert shards.bos_before_documents(7, 0) == shards.manifest["bos_id"] == found
    said = "2 of 3 documents begin with the tokenizer's bos_token (id 7). Since not all do, the manifest says"
    assert (said in capsys.readouterr().err) is (found is None)


def test_where_no_manifest_says_so_the_first_document_tells_what_it_begins_with(tmp_path: Path) -> None:
    write_megatron(tmp_path / "tokens", [np.array([7, 10, 0]), np.array([7, 11, 0])], "uint16")
    shards = open_shards(tmp_path / "tokens")
    assert [shards.bos_before_documents(bos_id, 0) for bos_id in (7, 8, None)] == [7, None, None]
    assert (
        shards.bos_before_documents(7, 7) is None
    )  # the separator begins the first document, it does not stand before

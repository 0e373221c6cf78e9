"""tools/inspect_data.py as a user runs it: its output for a run against the loader, for a corpus against numpy."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from pretrain.config.schema import load_config
from pretrain.data import load_tokenizer
from pretrain.data.batches.loader import Loader
from pretrain.data.prepare import prepare
from pretrain.data.text.sources import open_source
from pretrain.data.tokenizer import load_tokenizer_info
from pretrain.data.tokens import ShardWriter, open_shards
from pretrain.data.tokens.checksums import BLOCK_BYTES
from pretrain.data.tokens.import_export import export_tokens
from pretrain.trainer.corpora import open_corpora
from tests.support.corpus import Corpus, tiny
from tests.support.faulty_server import FaultyServer, StorageFault

TOOL = Path(__file__).parents[2] / "tools/inspect_data.py"


@pytest.fixture(scope="module")
def numbers(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a second corpus of the same tokenizer, shuffled: 240 documents of three files that share no part."""
    folder = tmp_path_factory.mktemp("numbers")
    for file in range(3):
        texts = [" ".join(f"{i}.{j}" for j in range(9 + i % 23)) for i in range(80 * file, 80 * file + 80)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = open_source([str(folder / "*.jsonl")], text_field="text", subset=None, split="train")
    tokenizer = load_tokenizer_info(corpus.tokenizer)
    prepare(source, tokenizer, folder / "out", val_fraction=0.1, shard_tokens=2000, workers=1, shuffle_seed=3)
    return folder / "out/train"


@pytest.fixture(scope="module")
def run_config(corpus: Corpus, numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the configuration of a run on both corpora, as in its folder; it reads the second one more than twice."""
    content = tiny(corpus)
    content["data"]["train"] = [{"path": str(corpus.train), "weight": 0.3}, {"path": str(numbers), "weight": 0.7}]
    content |= {"steps": 300}
    written = tmp_path_factory.mktemp("runs") / "run.yaml"
    written.write_text(yaml.safe_dump(content))
    resolved = written.with_name("config.yaml")
    resolved.write_text(load_config(written).to_yaml())
    return resolved


VARIANTS = {
    "plain": {"seq_len": 64},
    "within documents": {"document_attention": True, "shuffle": {"scope": "windowed", "window_shards": 2}},
    "packed": {"packing": "best_fit", "seq_len": 200, "shuffle": {"scope": "windowed", "window_shards": 3}},
    "packed, within documents": {"packing": "best_fit", "seq_len": 100, "document_attention": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_listed_tokens_are_those_that_the_loader_gives(
    run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, variant: str
) -> None:
    settings = _settings(VARIANTS[variant], tmp_path)
    config = load_config(run_config, settings)
    corpora = open_corpora(config, load_tokenizer(config.tokenizer), data_ranks=4)
    seen, epochs, padded = set(), set(), 0
    for step, rank, ranks in ((1, 0, 1), (7, 1, 2), (7, 3, 4), (300, 0, 2)):
        words = ["--config", run_config, *_set(settings), "--step", step, "--rank", rank, "--ranks", ranks]
        traced = _inside(capsys, *words)["samples"]
        sizes = {"global_batch_size": 8, "micro_batch_size": 2, "rank": rank, "world_size": ranks}
        with closing(Loader(corpora.feed(), **sizes, position=8 * (step - 1))) as loader:
            batches = loader.next_batch()
        assert len(traced) == 8 // ranks
        for number, sample in enumerate(traced):
            assert sample["sample"] == 8 * (step - 1) + rank * 8 // ranks + number
            _compare(sample, batches[number // 2], number % 2)
        seen |= {sample["corpus"] for sample in traced}
        epochs |= {sample["epoch"] for sample in traced}
        padded += sum(sample["padding"] for sample in traced)
    assert len(seen) == 2
    assert max(epochs) > 1
    assert (padded > 0) == variant.startswith("packed")


def _compare(sample: dict, batch, row: int) -> None:
    """Compare a traced sample with the tokens that numpy reads from the files, and those with the loader's row."""
    folder = Path(sample["corpus"])
    tokens = np.fromfile(folder / sample["file"], dtype="<u2")
    ends = np.fromfile((folder / sample["file"]).with_suffix(".ends"), dtype="<u8").tolist()
    listed, starts = [], []
    for document in sample["documents"]:
        shard, number = map(int, document["document"].split(":"))
        first, stop = document["tokens"]
        assert sample["file"] == f"shard_{shard:05d}.bin"
        assert ([0, *ends])[number] <= first < stop <= ends[number]
        starts.append(len(listed))
        listed += tokens[first:stop].tolist()
    inputs = batch.inputs[row].tolist()
    assert listed == inputs[: len(inputs) - sample["padding"]]
    if sample["padding"]:
        starts.append(len(listed))
        assert not batch.counted[row, len(listed) :].any()
    if batch.positions is not None:
        assert starts == np.flatnonzero(batch.positions[row].numpy() == 0).tolist()


@pytest.mark.slow
def test_a_decoded_sample_is_a_part_of_the_documents_that_it_is_said_to_come_from(
    corpus: Corpus, numbers: Path, run_config: Path, tmp_path: Path
) -> None:
    """The trace goes through the shuffle of the preparation and is compared with the texts of the files themselves."""
    settings = _settings(VARIANTS["within documents"], tmp_path)
    words = ["--config", run_config, *_set(settings), "--step", 3, "--text"]
    traced = json.loads(_run(*words, "--json").stdout)
    of_file = _texts_by_file(corpus, corpus.train) | _texts_by_file(corpus, numbers)
    pieces = [document for sample in traced["samples"] for document in sample["documents"]]
    assert traced["step"] == 3
    assert {Path(piece["source"]).parent for piece in pieces} == {corpus.train.parents[1], numbers.parents[1]}
    for piece in pieces:
        assert piece["text"].removesuffix("</s>") in of_file[piece["source"]][piece["source_document"]]


def test_every_document_of_a_shuffled_corpus_is_traced_to_its_file(
    corpus: Corpus, numbers: Path, capsys: pytest.CaptureFixture
) -> None:
    of_file = _texts_by_file(corpus, numbers)
    found = [
        _inside(capsys, "--corpus", numbers, "--tokenizer", corpus.tokenizer, "--document", number)
        for number in range(0, open_shards(numbers).documents, 5)
    ]
    for document in found:
        assert document["text"].removesuffix("</s>") == of_file[document["source"]][document["source_document"]]
    assert len({document["source"] for document in found}) == 3
    assert len({document["file"] for document in found}) > 3
    again = _inside(capsys, "--corpus", numbers, "--tokenizer", corpus.tokenizer, "--document", found[-1]["document"])
    assert again == found[-1]


def test_one_sample_is_shown_as_its_step_shows_it(run_config: Path, capsys: pytest.CaptureFixture) -> None:
    step = _inside(capsys, "--config", run_config, "--step", 40)
    one = _inside(capsys, "--config", run_config, "--sample", 8 * 39 + 5)
    assert one == {"step": 40, "samples": [step["samples"][5]]}
    table = _print(capsys, "--config", run_config, "--step", 40)
    for sample in step["samples"]:
        assert any(
            line.split()[:1] == [str(sample["sample"])] and sample["file"] in line for line in table.splitlines()
        )
    text = _print(capsys, "--config", run_config, "--sample", 3, "--text", "--max-characters", 4)
    assert text.startswith("step 1 of 300: sample 3 of the run\n\n=== sample 3: ")
    assert "more characters]" in text


def test_a_run_that_went_back_reads_other_samples_at_a_step(
    run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At step 7 it went back to step 4 and continued with sample 56."""
    config = Path(shutil.copy(run_config, tmp_path / "config.yaml"))
    events = [
        {"kind": "event", "step": 0, "event": "started"},
        {"kind": "event", "step": 7, "event": "rolled_back", "to_step": 4, "first_sample": 32, "last_sample": 55},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "hal')

    def samples(step: int) -> list[int]:
        return [sample["sample"] for sample in _inside(capsys, "--config", config, "--step", step)["samples"]]

    assert samples(4) == list(range(24, 32))
    assert samples(5) == list(range(56, 64))
    assert samples(300) == list(range(56 + 295 * 8, 56 + 296 * 8))
    for sample, step in ((31, 4), (32, None), (55, None), (56, 5)):
        assert _inside(capsys, "--config", config, "--sample", sample)["step"] == step


def test_statistics_are_those_of_the_files(corpus: Corpus, numbers: Path) -> None:
    tokens, documents = _tokens_of(numbers), _documents_of(numbers)
    lengths = np.array(list(map(len, documents)))
    statistics = json.loads(_run("--corpus", numbers, "--tokenizer", corpus.tokenizer, "--json").stdout)

    shares = {"min": 0, "p25": 25, "median": 50, "p75": 75, "p99": 99, "max": 100}
    expected = {name: np.percentile(lengths, share, method="inverted_cdf") for name, share in shares.items()}
    assert {name: statistics["lengths"][name] for name in shares} == expected
    assert statistics["lengths"]["mean"] == pytest.approx(lengths.mean())
    assert [statistics[key] for key in ("tokens", "documents", "dtype", "format")] == [
        len(tokens),
        len(documents),
        "uint16",
        "evenkeel",
    ]
    for row in statistics["histogram"]:
        here = (row["from"] <= lengths) & (lengths <= row["to"])
        assert (row["documents"], row["tokens"]) == (here.sum(), lengths[here].sum())
    assert sum(row["documents"] for row in statistics["histogram"]) == len(documents)

    counts = Counter(tokens.tolist())
    assert statistics["ids_used"] == len(counts)
    assert [token["count"] for token in statistics["top_tokens"]] == [count for _, count in counts.most_common(20)]
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    for token in statistics["top_tokens"]:
        assert token["count"] == counts[token["id"]]
        assert token["text"] == tokenizer.decode([token["id"]], skip_special_tokens=False)
    assert statistics["source_files"] == 3
    assert sum(source["documents"] for source in statistics["largest_sources"]) == len(documents)


def test_long_documents_count_by_their_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lengths = np.array([1, 2048, 2049, 8193, 3])
    writer = ShardWriter(tmp_path / "long", np.dtype("<u4"), 2000)
    writer.append(np.full(lengths.sum(), 70_000, "<u4"), np.cumsum(lengths))
    writer.finish({"vocab_size": 70_001, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": None})
    statistics = _inside(capsys, "--corpus", tmp_path / "long")
    assert statistics["lengths"]["share_of_tokens_over_2048"] == pytest.approx((2049 + 8193) / lengths.sum())
    assert statistics["lengths"]["share_of_tokens_over_8192"] == pytest.approx(8193 / lengths.sum())
    assert statistics["top_tokens"] == [{"id": 70_000, "count": lengths.sum()}]
    assert "text       unknown" in _print(capsys, "--corpus", tmp_path / "long")


def test_a_corpus_without_documents_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    writer = ShardWriter(tmp_path / "empty", np.dtype("<u2"), 2000)
    writer.finish({"vocab_size": 9, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 0})
    assert "documents  0\n" in _print(capsys, "--corpus", tmp_path / "empty")
    assert _print(capsys, "--corpus", tmp_path / "empty", "--verify").startswith("whole: 0 shards")


@pytest.mark.parametrize("format", ["megatron", "datatrove"])
def test_files_of_other_trainers_have_the_same_statistics(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture, format: str
) -> None:
    export_tokens(format, open_shards(corpus.train), tmp_path / format)
    own, theirs = (_inside(capsys, "--corpus", location) for location in (corpus.train, tmp_path / format))
    for key in ("tokens", "documents", "dtype", "lengths", "histogram", "ids_used", "top_tokens"):
        assert theirs[key] == own[key], key
    assert (theirs["format"], theirs["tokenizer_fingerprint"], theirs["source_files"]) == (format, None, 0)

    assert "no checksums" in _print(capsys, "--corpus", tmp_path / format, "--verify")
    file = next(path for path in (tmp_path / format).iterdir() if path.suffix in (".bin", ".ds"))
    _overwrite(file, 2 * 321, b"\x40\x01")  # token 321 becomes 320, one more than there are
    words = ["--corpus", tmp_path / format, "--tokenizer", corpus.tokenizer]
    for refusal in (_refused(capsys, *words, "--verify"), _refused(capsys, *words)):
        assert "has the id 320 at token 321 (byte 642)" in refusal


def test_a_remote_corpus_is_read_through_the_cache(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    objects = {f"/train/{path.name}": path.read_bytes() for path in corpus.train.iterdir()}
    with FaultyServer(objects) as server:
        words = ["--corpus", f"{server.url}/train", "--cache-folder"]
        statistics = _inside(capsys, *words, tmp_path / "one")
        assert statistics | {"location": str(corpus.train)} == _inside(capsys, "--corpus", corpus.train)
        server.faults |= {f"/train/shard_0000{number}.bin": StorageFault("flip") for number in (1, 4)}
        refusal = _refused(capsys, *words, tmp_path / "two", "--verify")
        assert refusal.count("came with the checksum") == 2
        for number in (1, 4):
            assert f"  shard_0000{number}.bin: " in refusal
        assert _print(capsys, *words, tmp_path / "one", "--verify").startswith("whole: ")  # it was fetched undamaged


def test_every_damaged_file_is_listed_with_its_place(corpus: Corpus, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus.train, tmp_path / "train")
    whole = _run("--corpus", folder, "--verify", "--tokenizer", corpus.tokenizer)
    assert whole.stdout.startswith(f"whole: {len(list(folder.glob('*.bin')))} shards")
    size = (folder / "shard_00003.bin").stat().st_size
    _overwrite(folder / "shard_00001.bin", 4001, b"\x03")
    with open(folder / "shard_00003.bin", "r+b") as file:
        file.truncate(100)
    (folder / "shard_00004.bin").unlink()
    _overwrite(folder / "shard_00004.ends", 16, b"\x00" * 8)

    done = _run("--corpus", folder, "--verify", "--json", code=2)
    damaged = {entry["file"]: entry for entry in json.loads(done.stdout)["damaged"]}
    last = (folder / "shard_00001.bin").stat().st_size - 1
    assert {file: entry["bytes"] for file, entry in damaged.items()} == {
        "shard_00001.bin": [[0, last]],
        "shard_00003.bin": [[100, size - 1]],
        "shard_00004.bin": [],
        "shard_00004.ends": [],
    }
    assert "document 2 ends at token 0" in damaged["shard_00004.ends"]["fault"]
    assert done.stderr.count("error: ") == 1
    for file, entry in damaged.items():
        assert f"  {file}: {entry['fault']}" in done.stderr


def test_damage_in_a_large_file_is_found_to_within_a_block(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokens = 2 * BLOCK_BYTES + BLOCK_BYTES // 4  # of two bytes: four blocks and a half
    writer = ShardWriter(tmp_path, np.dtype("<u2"), tokens)
    writer.append(np.zeros(tokens, "<u2"), np.array([tokens]))
    writer.finish({"vocab_size": 9, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 0})
    for block in (1, 2, 4):
        _overwrite(tmp_path / "shard_00000.bin", block * BLOCK_BYTES + 77, b"\x01")
    stretches = f"{BLOCK_BYTES:,}-{3 * BLOCK_BYTES - 1:,}, {4 * BLOCK_BYTES:,}-{2 * tokens - 1:,}"
    refusal = _refused(capsys, "--corpus", tmp_path, "--verify")
    assert f"shard_00000.bin: differs from its checksum, bytes {stretches}\n" in refusal


def test_a_corpus_is_looked_at_without_loading_torch(corpus: Corpus) -> None:
    words = [str(TOOL), "--corpus", str(corpus.train), "--tokenizer", str(corpus.tokenizer), "--document", "5"]
    code = (
        f"import runpy, sys; sys.argv = {words}; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_mistakes_end_with_code_2_and_one_paragraph(
    corpus: Corpus, run_config: Path, capsys: pytest.CaptureFixture
) -> None:
    corpus_words = ["--corpus", corpus.train]
    for message, words in {
        "--document goes with --tokenizer": [*corpus_words, "--document", 3],
        "--verify goes with --corpus": ["--config", run_config, "--step", 1, "--verify"],
        "--rank goes with --ranks": ["--config", run_config, "--step", 1, "--rank", 0],
        "go with --step": ["--config", run_config, "--sample", 1, "--rank", 0, "--ranks", 2],
        "--config goes with --step or --sample": ["--config", run_config],
        "--step 0: the run has 1 to 300": ["--config", run_config, "--step", 0],
        "--sample 2400: the run has 0 to 2399": ["--config", run_config, "--sample", 2400],
        "--rank 2: of 2 ranks there are 0 to 1": ["--config", run_config, "--step", 1, "--rank", 2, "--ranks", 2],
        "is not a multiple of": ["--config", run_config, "--step", 1, "--rank", 2, "--ranks", 3],
        "name one of them": ["--corpus", corpus.train.parent, "--verify"],
        "is not a folder of finished token shards": ["--corpus", corpus.tokenizer],
        "documents, numbered from 0": [*corpus_words, "--tokenizer", corpus.tokenizer, "--document", "0:9999"],
        "give a number such as 7": [*corpus_words, "--tokenizer", corpus.tokenizer, "--document", "a:b"],
        "--max-characters 0 is too small": [*corpus_words, "--max-characters", 0],
    }.items():
        error = _refused(capsys, *words)
        assert message in error
        assert error.count("\n") == 1


def test_a_corpus_of_another_tokenizer_is_not_decoded(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(corpus.train, tmp_path / "train")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_fingerprint": "0" * 32}))
    refusal = _refused(capsys, "--corpus", folder, "--tokenizer", corpus.tokenizer, "--document", 1)
    assert "were made with another tokenizer" in refusal


def _settings(data: dict, cache: Path) -> list[str]:
    return [f"data.{key}={json.dumps(value)}" for key, value in data.items()] + [f"data.cache.folder={cache}"]


def _set(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _run(*words: object, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def _print(capsys: pytest.CaptureFixture, *words: object) -> str:
    """Return the output of the tool, run in this process, which has loaded torch already."""
    arguments = sys.argv
    sys.argv = [str(TOOL), *map(str, words)]
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = arguments
    return capsys.readouterr().out


def _inside(capsys: pytest.CaptureFixture, *words: object) -> dict:
    return json.loads(_print(capsys, *words, "--json"))


def _refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        _print(capsys, *words)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def _tokens_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted(folder.glob("*.bin"))])


def _documents_of(folder: Path) -> list[np.ndarray]:
    documents = []
    for path in sorted(folder.glob("*.bin")):
        ends = np.fromfile(path.with_suffix(".ends"), dtype="<u8").astype(int)
        documents += np.split(np.fromfile(path, dtype="<u2"), ends[:-1])
    return documents


def _texts_by_file(corpus: Corpus, folder: Path) -> dict[str, list[str]]:
    """Return the texts of each .jsonl file beside the shards, in their order, that are in the split `folder`."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    held = {tokenizer.decode(document[:-1].tolist()) for document in _documents_of(folder)}
    found = {}
    for path in folder.parents[1].glob("*.jsonl"):
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        found[str(path)] = [text for text in texts if text in held]
    return found


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        assert file.read(len(content)) != content
        file.seek(offset)
        file.write(content)

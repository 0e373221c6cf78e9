"""Compare pipelines from text to token files: tools/prepare_data.py and others, on the same files, interleaved.

Every pipeline is a command of its own (rivals/pipelines.py for the others). The cost of its whole process tree is counted,
imports included. Each runs on all documents and on the first few of them; the difference is net of start-up.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.rivals import missing_modules, short_error, spread
from benchmarks.table import render
from benchmarks.usage import Usage, measure
from pretrain.errors import UserError
from pretrain.paths import REPOSITORY

PIPELINES = Path(__file__).with_name("rivals") / "pipelines.py"
FEW_DOCUMENTS = 20
VOCAB_SIZE = 32_000
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Pipeline:
    """A way from text to token files.

    Attributes:
        label: Its name in the table.
        needs: The modules that it imports, each with pip's name of the package.
        output: A pattern of the token files, which are in order by name.
    """

    label: str
    needs: tuple[tuple[str, str], ...]
    output: str


@dataclass(frozen=True)
class TextFiles:
    """The same documents by kind of file.

    Attributes:
        files: All documents, in a file for each worker.
        few: The first documents alone.
        text_bytes: Size of all texts in UTF-8.
        documents: How many there are.
    """

    files: dict[str, list[str]]
    few: dict[str, list[str]]
    text_bytes: int
    documents: int


@dataclass(frozen=True)
class Result:
    """One run of a pipeline: its cost on all documents and on a few, and its tokens' digest and number."""

    whole: Usage
    few: Usage
    digest: str
    tokens: int


OURS = {
    f"evenkeel-{kind}": Pipeline(f"Evenkeel, .{kind}", (), "train/*.bin") for kind in ("jsonl", "jsonl.zst", "parquet")
}
RIVALS = {
    "gigatoken": Pipeline("gigatoken alone", (("gigatoken", "gigatoken"), ("awkward", "awkward")), "tokens.bin"),
    "megatron_gigatoken": Pipeline(
        "gigatoken and megatron-core's writer",
        (("megatron.core", "megatron-core"), ("gigatoken", "gigatoken"), ("transformers", "transformers")),
        "text.bin",
    ),
    "megatron": Pipeline(
        "Megatron's preprocess_data loop",
        (("megatron.core", "megatron-core"), ("transformers", "transformers")),
        "text.bin",
    ),
    "tokenizers": Pipeline("tokenizers encode_batch_fast", (("tokenizers", "tokenizers"),), "tokens.bin"),
    "datasets": Pipeline("HF datasets.map and a memmap", (("datasets", "datasets"),), "tokens.bin"),
    "datatrove": Pipeline("datatrove DocumentTokenizer", (("datatrove", "datatrove"), ("orjson", "orjson")), "*.ds"),
}


def bench_tokenize(
    *,
    rounds: int,
    megabytes: float,
    source: Sequence[str],
    tokenizer: Path | None,
    rivals: Sequence[str],
    rivals_python: str,
    workers: int,
) -> str:
    """Return a table of CPU time, speed, memory and the tokens' digest by pipeline, medians over interleaved rounds.

    A rival that `rivals_python` cannot import, or that fails, is in the table with the reason.

    Args:
        rounds: How often each pipeline is measured.
        megabytes: 10^6 bytes of text: the source's first, or its texts over and over.
        source: As tools/prepare_data.py takes it.
        tokenizer: A folder with tokenizer.json; None trains a byte-level BPE of 32,000 on the text.
        rivals: Keys of RIVALS.
        rivals_python: The interpreter that runs them.
        workers: Processes or threads of each pipeline.

    Raises:
        RuntimeError: If Evenkeel's own command fails.
        UserError: If the source has no text, or the tokenizer no tokenizer.json.
    """
    with tempfile.TemporaryDirectory(prefix="bench_tokenize_") as name:
        folder = Path(name)
        corpus = _write_corpus(_texts(source, int(megabytes * 1e6)), folder / "text", workers)
        bench = _PipelineBench(
            folder, corpus, tokenizer or _train(corpus, folder / "tokenizer"), rivals_python, workers
        )
        left_out = {rival: missing_modules(rivals_python, RIVALS[rival].needs) for rival in rivals}
        results: dict[str, list[Result]] = {key: [] for key in (*OURS, *rivals)}
        for number in range(rounds):
            for key, measured in results.items():
                if left_out.get(key):
                    continue
                try:
                    measured.append(bench.run(key))
                except RuntimeError as error:
                    if key in OURS:
                        raise
                    left_out[key] = short_error(error)
                    continue
                print(f"round {number + 1}: {key}: {measured[-1].whole.cpu_s:.2f} CPU-s", file=sys.stderr)
        return _report(results, left_out, corpus, workers, rounds)


class _PipelineBench:
    def __init__(self, folder: Path, corpus: TextFiles, tokenizer: Path, rivals_python: str, workers: int) -> None:
        from pretrain.data.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        if not (tokenizer / "tokenizer.json").is_file():
            raise UserError(f"the rivals read tokenizer.json, which is not in --tokenizer {tokenizer}.")
        self._folder, self._corpus, self._rivals_python, self._workers = folder, corpus, rivals_python, workers
        self._tokenizer = tokenizer
        self._dtype = "uint16" if len(loaded) <= 1 << 16 else "uint32"
        self._eos = {"eos": loaded.eos_token, "eos_id": loaded.eos_token_id}

    def run(self, key: str) -> Result:
        kind = key.removeprefix("evenkeel-") if key in OURS else "jsonl"
        few, _ = self._measure(key, self._corpus.few[kind])
        whole, (digest, tokens) = self._measure(key, self._corpus.files[kind])
        return Result(whole, few, digest, tokens)

    def _measure(self, key: str, files: list[str]) -> tuple[Usage, tuple[str, int]]:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            out = Path(name) / "out"
            usage = measure(self._command(key, files, out), self._environment(Path(name)))
            output = (OURS.get(key) or RIVALS[key]).output
            return usage, self._digest(sorted(out.glob(output)))

    def _command(self, key: str, files: list[str], out: Path) -> list[str]:
        if key in OURS:
            words = ["--tokenizer", str(self._tokenizer), "--out", str(out)]
            words += ["--val-fraction", "0", "--workers", str(self._workers)]
            return [sys.executable, str(REPOSITORY / "tools/prepare_data.py"), "--source", *files, *words]
        out.mkdir()
        asked = {
            **{"rival": key, "tokenizer": str(self._tokenizer), "files": files, "out": str(out)},
            **{"dtype": self._dtype, "workers": self._workers, **self._eos},
        }
        return [self._rivals_python, str(PIPELINES), json.dumps(asked)]

    def _environment(self, folder: Path) -> dict[str, str]:
        """Return variables: as many threads as workers, no network, and caches in a temporary folder."""
        threads = {name: str(self._workers) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
        return {**threads, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder)}

    def _digest(self, files: list[Path]) -> tuple[str, int]:
        """Return the first digits of the SHA-1 of all tokens in order, and how many there are."""
        digest, size = hashlib.sha1(), 0
        for file in files:
            digest.update(file.read_bytes())
            size += file.stat().st_size
        return digest.hexdigest()[:10], size // (int(self._dtype[4:]) // 8)


def _texts(source: Sequence[str], size: int) -> Iterator[str]:
    """Yield the source's texts, again from the start at its end, until they hold `size` bytes of UTF-8."""
    from pretrain.data.text.sources import open_source

    taken = 0
    while taken < size:
        before = taken
        for text in open_source(source, text_field="text", subset=None, split="train").texts():
            text = text.encode("utf-8", "replace").decode()
            if text:  # some pipelines make a document of no text, others leave it out
                yield text
            taken += len(text.encode())
            if taken >= size:
                return
        if taken == before:
            raise UserError(f"there is no text in {' '.join(source)}.")


def _write_corpus(texts: Iterator[str], folder: Path, workers: int) -> TextFiles:
    """Write the documents in stretches of equal bytes, a file for each worker, as .jsonl, .jsonl.zst and .parquet."""
    documents = list(texts)
    sizes = [len(text.encode()) for text in documents]
    parts: list[list[str]] = [[] for _ in range(workers)]
    share, taken = sum(sizes) / workers, 0
    for text, size in zip(documents, sizes, strict=True):
        parts[min(int(taken / share), workers - 1)].append(text)
        taken += size
    files = _write_kinds(parts, folder / "whole")
    few = _write_kinds([documents[:FEW_DOCUMENTS]], folder / "few")
    return TextFiles(files, few, sum(sizes), len(documents))


def _write_kinds(parts: list[list[str]], folder: Path) -> dict[str, list[str]]:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    files: dict[str, list[str]] = {"jsonl": [], "jsonl.zst": [], "parquet": []}
    for kind in files:
        (folder / kind).mkdir(parents=True)
    for number, texts in enumerate(parts):
        for kind, names in files.items():
            names.append(str(folder / kind / f"text_{number:05}.{kind}"))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
        Path(files["jsonl"][-1]).write_bytes(lines)
        Path(files["jsonl.zst"][-1]).write_bytes(zstandard.compress(lines))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), files["parquet"][-1], compression="zstd")
    return files


def _train(corpus: TextFiles, folder: Path) -> Path:
    """Train a byte-level BPE like GPT-2's, the kind that all of the rivals are made for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    with ExitStack() as stack:
        files = [stack.enter_context(open(file, encoding="utf-8")) for file in corpus.files["jsonl"]]
        tokenizer.train_from_iterator((json.loads(line)["text"] for lines in files for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR).save_pretrained(folder)
    return folder


def _report(results: dict[str, list[Result]], left_out: dict, corpus: TextFiles, workers: int, rounds: int) -> str:
    megabytes = corpus.text_bytes / 1e6
    reference = results["evenkeel-jsonl"]
    rows: list[tuple[object, ...]] = []
    for key, measured in results.items():
        label = (OURS.get(key) or RIVALS[key]).label
        if left_out.get(key):
            rows.append((label, left_out[key], *[""] * 9))
            continue
        cpu = [result.whole.cpu_s for result in measured]
        net = [result.whole.cpu_s - result.few.cpu_s for result in measured]
        pairs = list(zip(reference, measured, strict=True))
        net_ratios = [
            (theirs.whole.cpu_s - theirs.few.cpu_s) / (ours.whole.cpu_s - ours.few.cpu_s) for ours, theirs in pairs
        ]
        rows.append(
            (
                label,
                spread(cpu),
                spread([megabytes / seconds for seconds in cpu]),
                median(theirs.whole.cpu_s / ours.whole.cpu_s for ours, theirs in pairs),
                median(result.few.cpu_s for result in measured),
                spread([megabytes / seconds for seconds in net]),
                median(net_ratios),
                median(result.whole.wall_s for result in measured),
                median(result.whole.peak_bytes for result in measured) / 1e6,
                f"{measured[0].tokens:,}",
                "/".join(dict.fromkeys(result.digest for result in measured)),
            )
        )
    header = [
        *("pipeline", "CPU-s (range)", "MB per CPU-s", "CPU-s / Evenkeel's", "start-up CPU-s", "net MB per CPU-s"),
        *("net / Evenkeel's", "wall s", "peak MB", "tokens", "SHA-1 of tokens"),
    ]
    explanation = (
        f"{megabytes:.1f} MB of text in {corpus.documents:,} documents, {workers} worker(s), {os.cpu_count()} cores; "
        f"medians over {rounds} round(s), interleaved. CPU-s: the whole process tree, imports included. "
        f"Start-up: the same command on {FEW_DOCUMENTS} documents; net is less that."
    )
    return f"{explanation}\n\n{render(header, rows)}"

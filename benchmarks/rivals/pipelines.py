"""Other pipelines from .jsonl files to token files: one a run, started by benchmarks/tokenize.py.

    python pipelines.py '{"rival": "datatrove", "tokenizer": "folder", "files": [...], ...}'

Imports nothing of Evenkeel, so that any Python with the rivals installed can run it. Every pipeline writes raw tokens,
each document followed by the end-of-sequence token.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

BATCH = 1000  # documents that go to an encoder at a time


def main() -> None:
    asked = json.loads(sys.argv[1])
    rival = asked.pop("rival")
    globals()[f"run_{rival}"](**{**asked, "out": Path(asked["out"])})


def run_tokenizers(tokenizer: str, files: list[str], out: Path, dtype: str, eos_id: int, **_: object) -> None:
    """Encode in one process; the library encodes a batch in threads."""
    import numpy as np
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    with open(out / "tokens.bin", "wb") as file:
        for texts in _batches(files):
            for encoded in encoder.encode_batch_fast(texts, add_special_tokens=False):
                file.write(np.array([*encoded.ids, eos_id], dtype).tobytes())


def run_datasets(
    tokenizer: str, files: list[str], out: Path, dtype: str, eos_id: int, workers: int, **_: object
) -> None:
    """Encode as nanoGPT does: `map` in processes, then the Arrow table into one memory map."""
    import numpy as np
    from datasets import load_dataset
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")

    def encode(batch: dict) -> dict:
        ids = [[*encoded.ids, eos_id] for encoded in encoder.encode_batch_fast(batch["text"], add_special_tokens=False)]
        return {"ids": ids, "count": [len(each) for each in ids]}

    texts = load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"))
    encoded = texts.map(encode, batched=True, num_proc=workers, remove_columns=texts.column_names)
    tokens = np.memmap(out / "tokens.bin", dtype, mode="w+", shape=(int(np.sum(encoded["count"])),))
    at = 0
    for batch in encoded.with_format("numpy").iter(BATCH):
        ids = np.concatenate(batch["ids"])
        tokens[at : at + len(ids)] = ids
        at += len(ids)
    tokens.flush()


def run_datatrove(tokenizer: str, files: list[str], out: Path, eos: str, workers: int, **_: object) -> None:
    """Run DocumentTokenizer without shuffling, one task a file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(Path(files[0]).parent), glob_pattern="*.jsonl")
    writer = DocumentTokenizer(str(out), f"{tokenizer}/tokenizer.json", eos_token=eos, shuffle_documents=False)
    pipeline = [reader, writer]
    LocalPipelineExecutor(pipeline, tasks=len(files), workers=workers, logging_dir=str(out / "logs")).run()


def run_megatron(
    tokenizer: str, files: list[str], out: Path, dtype: str, eos_id: int, workers: int, **_: object
) -> None:
    """Encode as Megatron-LM's tools/preprocess_data.py, which is not in megatron-core's package.

    It takes transformers' tokenizer in a pool, lines by 32, and megatron-core's writer. The script itself imports more of
    Megatron-LM before it starts.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(out / "text.bin"), np.dtype(dtype).type)
    with multiprocessing.Pool(workers, _load_encoder, (tokenizer,)) as pool:
        for file in files:
            with open(file, encoding="utf-8") as lines:
                for ids in pool.imap(_encode_line, lines, 32):
                    builder.add_document([*ids, eos_id], [len(ids) + 1])
        pool.close()
        pool.join()
    builder.finalize(str(out / "text.idx"))


def run_megatron_gigatoken(tokenizer: str, files: list[str], out: Path, dtype: str, eos_id: int, **_: object) -> None:
    """Encode as that script's --use-gigatoken: whole files in gigatoken's threads, megatron-core's writer."""
    import numpy as np
    import transformers  # noqa: F401 - the script loads its tokenizer for the vocabulary; here it costs the same import
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(out / "text.bin"), np.dtype(dtype).type)
    tokens, ends = _gigatoken(tokenizer, files, dtype, eos_id)
    for document in np.split(tokens, ends[:-1]):
        builder.add_document(document, [len(document)])
    builder.finalize(str(out / "text.idx"))


def run_gigatoken(tokenizer: str, files: list[str], out: Path, dtype: str, eos_id: int, **_: object) -> None:
    """Run the encoder alone, straight from the files; everything in memory at once, no document ends kept."""
    tokens, _ends = _gigatoken(tokenizer, files, dtype, eos_id)
    tokens.tofile(out / "tokens.bin")


def _gigatoken(tokenizer: str, files: list[str], dtype: str, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all tokens of the files, separators included, and where each document ends."""
    import awkward
    import gigatoken
    import numpy as np

    encoded = gigatoken.Tokenizer(tokenizer).encode_files(gigatoken.JsonlFileSource([*files]))
    ends = np.cumsum(awkward.to_numpy(awkward.num(encoded)) + 1)
    tokens = np.full(int(ends[-1]), eos_id, dtype)
    inside = np.ones(len(tokens), bool)
    inside[ends - 1] = False
    tokens[inside] = awkward.to_numpy(awkward.flatten(encoded))
    return tokens, ends


def _batches(files: list[str]) -> Iterator[list[str]]:
    texts = []
    for path in files:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                texts.append(json.loads(line)["text"])
                if len(texts) == BATCH:
                    yield texts
                    texts = []
    yield texts


_encoder: Callable[..., Any]  # of a process of the pool


def _load_encoder(tokenizer: str) -> None:
    global _encoder
    from transformers import AutoTokenizer

    _encoder = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)


def _encode_line(line: str) -> list[int]:
    return _encoder(json.loads(line)["text"], add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()

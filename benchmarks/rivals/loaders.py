"""Other loaders of shuffled token sequences: one a run, started by benchmarks/data.py.

    python loaders.py '{"do": "read", "loader": "litdata", "folder": "made/by/write", "batch_size": 8, ...}'

Imports nothing of Evenkeel, so that any Python with the loaders installed can run it. For every loader there are three
functions: write_ makes its data set of (samples, seq_len) uint16 tokens, grow_ makes that look as large as asked without
the disk it would take, and read_ yields epoch after epoch in shuffled batches, (batch_size, seq_len) int64 tensors.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 1
CHUNK = "64MB"


def main() -> None:
    asked = json.loads(sys.argv[1])
    do, loader = asked.pop("do"), asked.pop("loader")
    torch.set_num_threads(1)
    if do == "write":
        tokens = np.memmap(asked["tokens"], np.uint16, mode="r").reshape(-1, asked["seq_len"])
        globals()[f"write_{loader}"](tokens, Path(asked["folder"]))
    elif do == "grow":
        globals()[f"grow_{loader}"](Path(asked["folder"]), asked["samples"], asked["seq_len"])
    else:
        report(do, globals()[f"read_{loader}"], asked)


def report(do: str, read: Callable[..., Iterator[torch.Tensor]], asked: dict[str, Any]) -> None:
    """Print what `reading` or `starting` measures of `read`, as the last line of output."""
    measure = reading if do == "read" else starting
    print(json.dumps(measure(read, **asked)))


def reading(
    read: Callable[..., Iterator[torch.Tensor]], *, folder: str, seconds: float, **options: Any
) -> dict[str, float]:
    """Read for `seconds` after the first batch; measure the CPU time of this process and its worker processes."""
    began = time.perf_counter()
    batches = read(Path(folder), **options)
    next(batches)
    first_s, own, workers = time.perf_counter() - began, _cpu(resource.RUSAGE_SELF), _cpu(resource.RUSAGE_CHILDREN)
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        batch = next(batches)
        count += batch.numel()
    wall, own = time.perf_counter() - began, _cpu(resource.RUSAGE_SELF) - own
    assert batch.dtype == torch.int64, batch.dtype
    del batches
    gc.collect()  # worker processes end, and their time counts only then
    return {
        "tokens": count,
        "cpu_s": own + _cpu(resource.RUSAGE_CHILDREN) - workers,
        "wall_s": wall,
        "first_s": first_s,
    }


def starting(
    read: Callable[..., Iterator[torch.Tensor]], *, small: str, folder: str, **options: Any
) -> dict[str, float]:
    """Measure the CPU time to the first batch of the data set in `folder`, after one from `small` has loaded the libraries."""
    next(read(Path(small), **{**options, "position": 0}))
    gc.collect()
    cpu = _cpu(resource.RUSAGE_SELF)
    batches = read(Path(folder), **options)
    next(batches)
    return {"cpu_s": _cpu(resource.RUSAGE_SELF) - cpu}


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def write_gather(tokens: np.ndarray, folder: Path) -> None:
    tokens.tofile(folder / "tokens.bin")


def grow_gather(folder: Path, samples: int, seq_len: int) -> None:
    os.truncate(folder / "tokens.bin", samples * seq_len * 2)


def read_gather(folder: Path, *, seq_len: int, batch_size: int, **_: object) -> Iterator[torch.Tensor]:
    """Gather each batch from a memory map by a permutation in memory: NumPy alone, the limit."""
    tokens = np.memmap(folder / "tokens.bin", np.uint16, mode="r").reshape(-1, seq_len)
    random = np.random.default_rng(SEED)
    while True:
        order = random.permutation(len(tokens))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield torch.from_numpy(tokens[order[start : start + batch_size]].astype(np.int64))


write_memmap, grow_memmap = write_gather, grow_gather


class MappedSequences(torch.utils.data.Dataset):
    def __init__(self, folder: Path, seq_len: int) -> None:
        self._tokens = np.memmap(folder / "tokens.bin", np.uint16, mode="r").reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._tokens[index].astype(np.int64))


def read_memmap(folder: Path, *, seq_len: int, batch_size: int, workers: int, **_: object) -> Iterator[torch.Tensor]:
    yield from _data_loader(MappedSequences(folder, seq_len), batch_size, workers)


def write_datatrove(tokens: np.ndarray, folder: Path) -> None:
    tokens.tofile(folder / "00000.ds")


def grow_datatrove(folder: Path, samples: int, seq_len: int) -> None:
    os.truncate(folder / "00000.ds", samples * seq_len * 2)


def read_datatrove(folder: Path, *, seq_len: int, batch_size: int, workers: int, **_: object) -> Iterator[torch.Tensor]:
    from datatrove.utils.dataset import DatatroveFolderDataset

    # Its windows are seq_len + 1 long.
    dataset = DatatroveFolderDataset(str(folder), seq_len - 1, filename_pattern="*.ds", token_size=2)
    for batch in _data_loader(dataset, batch_size, workers):
        yield batch["input_ids"]


def write_datasets(tokens: np.ndarray, folder: Path) -> None:
    import datasets
    import pyarrow

    flat = pyarrow.array(tokens.reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, tokens.shape[1])
    datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table({"input_ids": column}))).save_to_disk(str(folder))


def grow_datasets(folder: Path, samples: int, seq_len: int) -> None:
    import datasets

    copies = -(-samples // len(datasets.load_from_disk(str(folder))))
    state = json.loads((folder / "state.json").read_bytes())
    state["_data_files"] *= copies
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def read_datasets(folder: Path, *, batch_size: int, workers: int, **_: object) -> Iterator[torch.Tensor]:
    import datasets

    for batch in _data_loader(datasets.load_from_disk(str(folder)).with_format("torch"), batch_size, workers):
        yield batch["input_ids"]


def write_mosaicml(tokens: np.ndarray, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{tokens.shape[1]}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK) as out:
        for sample in tokens:
            out.write({"tokens": np.ascontiguousarray(sample)})


def grow_mosaicml(folder: Path, samples: int, seq_len: int) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    shard = index["shards"][0]
    file = shard["raw_data"]["basename"]
    index["shards"] = []
    for number in range(-(-samples // shard["samples"])):
        name = f"copy.{number:07}.mds"
        (folder / name).symlink_to(file)
        index["shards"].append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def read_mosaicml(
    folder: Path, *, batch_size: int, workers: int, position: int = 0, **_: object
) -> Iterator[torch.Tensor]:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size, shuffle_seed=SEED)
    if position:
        dataset.load_state_dict(dataset.state_dict(position, from_beginning=True))
    # Its default collation keeps uint16, which no embedding takes.
    yield from _epochs(StreamingDataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate))


def _collate(samples: list[dict]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def write_litdata(tokens: np.memmap, folder: Path) -> None:
    # `optimize` deletes the folders `data` and `chunks` of the temporary folder unless it is given others.
    for name in ("CACHE", "DATA_CACHE"):
        os.environ[f"DATA_OPTIMIZER_{name}_FOLDER"] = str(folder.parent / f"litdata_{name.lower()}")
    import litdata

    step = 256
    litdata.optimize(
        fn=_Stretch(str(tokens.filename), tokens.shape[1] * step),
        inputs=list(range(len(tokens) // step)),
        output_dir=str(folder),
        chunk_bytes=CHUNK,
        num_workers=1,
        item_loader=litdata.TokensLoader(block_size=tokens.shape[1]),
        verbose=False,
    )


class _Stretch:
    """A function from a number to that stretch of the tokens. It is a class because it is sent to a worker process."""

    def __init__(self, file: str, tokens: int) -> None:
        self._file, self._tokens = file, tokens

    def __call__(self, number: int) -> Iterator[torch.Tensor]:
        mapped = np.memmap(self._file, np.uint16, mode="r")
        yield torch.from_numpy(mapped[number * self._tokens : (number + 1) * self._tokens].copy())


def grow_litdata(folder: Path, samples: int, seq_len: int) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    chunk = max(index["chunks"], key=lambda chunk: chunk["dim"])
    index["chunks"] = []
    for number in range(-(-samples * seq_len // chunk["dim"])):
        name = f"chunk-0-{number + 1_000_000}.bin"
        (folder / name).symlink_to(chunk["filename"])
        index["chunks"].append({**chunk, "filename": name})
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def read_litdata(
    folder: Path, *, seq_len: int, batch_size: int, workers: int, position: int = 0, **_: object
) -> Iterator[torch.Tensor]:
    import litdata

    loader = litdata.TokensLoader(block_size=seq_len)
    dataset = litdata.StreamingDataset(str(folder), item_loader=loader, shuffle=True, seed=SEED)
    batches = litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers)
    if position:
        state = {"current_epoch": 1, "num_samples_yielded": position, "latest_worker_idx": 0}
        dataset.current_epoch = 1
        batches.load_state_dict({**state, "dataset": dataset.state_dict(position, workers, batch_size)})
    for batch in _epochs(batches):
        yield batch.to(torch.int64)


def _data_loader(dataset: torch.utils.data.Dataset, batch_size: int, workers: int) -> Iterator:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        generator=torch.Generator().manual_seed(SEED),
        persistent_workers=workers > 0,
    )
    return _epochs(loader)


def _epochs(loader: Iterable) -> Iterator:
    return itertools.chain.from_iterable(itertools.repeat(loader))


if __name__ == "__main__":
    main()

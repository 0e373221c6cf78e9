"""A process that reads files through the cache, as a rank does: python cache_reader.py '<JSON of the arguments>'.

It reads `names` in order, holds each for `hold_s` seconds while the next `ahead` of them are fetched, compares them with
the files in `originals`, and prints a line for each. With `wait`, it holds the last one until a line comes in. `wanted`
are fetched ahead and not read.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pretrain.data.remote.cache import CachedFiles, CacheSettings


def read(
    location: str,
    expected: dict[str, tuple[int, str]],
    folder: str,
    limit_bytes: int,
    names: list[str],
    originals: str,
    ahead: int = 0,
    hold_s: float = 0.0,
    wait: bool = False,
    wanted: tuple[str, ...] = (),
) -> None:
    files = CachedFiles(location, expected, CacheSettings(Path(folder), limit_bytes))
    files.fetch_ahead(wanted)
    for number, name in enumerate(names):
        if ahead:
            files.fetch_ahead(names[number : number + 1 + ahead])
        path = files.path(name)
        assert path.read_bytes() == (Path(originals) / name).read_bytes(), name
        time.sleep(hold_s)
        assert path.read_bytes() == (Path(originals) / name).read_bytes(), f"{name}, after a while"
        print(name, flush=True)
        if wait and number == len(names) - 1:
            sys.stdin.readline()
        files.release(name)


if __name__ == "__main__":
    read(**json.loads(sys.argv[1]))

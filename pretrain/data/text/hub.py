"""Data sets of the Hugging Face hub, as the files that they consist of.

`datasets` says which files a subset and split are, at the revision of this moment; they are then read like any others.
So a stream stops and goes on within a file, shares between tasks, and notices that its owner changed it.
"""

from __future__ import annotations

import re

from pretrain.data.text.files import SourceFile, is_url, local_file
from pretrain.data.text.kinds import READABLE, kind_of
from pretrain.data.text.listing import listed_files
from pretrain.errors import UserError

_REVISION = re.compile(r"^hf://datasets/[^/]+/[^/@]+@(?P<revision>[^/]+)/")


def data_files(name: str, *, subset: str | None, split: str) -> tuple[list[SourceFile], str | None]:
    """The files of a split of the data set `name` (owner/dataset, or a local folder of its layout), and its revision.

    UserError if there is no such data set, subset or split, or if its files are of a kind that cannot be read.
    """
    import datasets

    try:
        splits = datasets.load_dataset_builder(name, subset).config.data_files
    except Exception as error:  # `datasets` and the hub client raise dozens of kinds
        raise _unreachable(name, error) from error
    if not splits or split not in splits:
        raise UserError(f"hf://{name} has no split '{split}'; it has {', '.join(splits or {}) or 'none'}. Set --split.")
    paths = list(splits[split])
    if other := [path for path in paths if kind_of(path) is None]:
        raise UserError(
            f"hf://{name} holds files like {other[0]}, which are of no kind that can be read: {READABLE}. "
            "Convert them, or name a data set that holds its Parquet conversion."
        )
    if not is_url(paths[0]):
        return [local_file(path) for path in paths], None
    try:
        return listed_files(paths), _REVISION.match(paths[0])["revision"]
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(
        f"cannot find hf://{name}: {type(error).__name__}: {error} Check the names on huggingface.co, --subset, the "
        "network, and `hf auth login` for a gated data set."
    )

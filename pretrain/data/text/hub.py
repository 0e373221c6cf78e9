"""Data sets of the Hugging Face hub, read as the files that they consist of.

`datasets` lists the files of a subset and split, at the current revision; they are then read like any others. So a
preparation can stop and continue within a file, divides the files among tasks, and notices when they change.
"""

from __future__ import annotations

import re

from pretrain.data.text.kinds import READABLE, kind_of
from pretrain.data.text.listing import listed_files
from pretrain.data.text.source_files import SourceFile, is_url, local_file
from pretrain.errors import UserError

_REVISION = re.compile(r"^hf://datasets/[^/]+/[^/@]+@(?P<revision>[^/]+)/")


def data_files(name: str, *, subset: str | None, split: str) -> tuple[list[SourceFile], str | None]:
    """Return the files of a split of a data set, and the revision they are at; None for a local folder.

    Args:
        name: owner/dataset, or a local folder of its layout.
        subset: The subset; None for the default one.
        split: The split.

    Raises:
        UserError: There is no such data set, subset or split, or its files are of a kind that cannot be read.
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
        return listed_files(paths), _revision_in(paths[0])
    except Exception as error:
        raise _unreachable(name, error) from error


def _revision_in(url: str) -> str:
    if (match := _REVISION.match(url)) is None:
        raise ValueError(f"{url} names no revision")
    return match["revision"]


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(
        f"cannot find hf://{name}: {type(error).__name__}: {error} Check the names on huggingface.co, --subset, the "
        "network, and `hf auth login` for a gated data set."
    )

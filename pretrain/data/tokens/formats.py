"""The formats of other trainers' token files: a new one is a module with a `TokenFormat`, and its entry here.

Everything that names formats asks this registry: opening a corpus, import, export, command lines and errors.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.data.tokens import datatrove, litdata, llmc, mds, megatron, raw

FORMATS = {
    format.name: format
    for format in (
        megatron.MEGATRON,
        datatrove.DATATROVE,
        raw.NANOGPT,
        llmc.LLMC,
        raw.OLMO,
        mds.MDS,
        litdata.LITDATA,
    )
}
EXPORTED = tuple(name for name, format in FORMATS.items() if format.writer)


def format_of(location: Path) -> str | None:
    """Return the name of the format that the files at `location` seem to have, None for none that is known."""
    return next((name for name, format in FORMATS.items() if format.recognizes(location)), None)

"""The formats of other trainers' token files: a new one is a module with a `TokenFormat`, and its entry here."""

from __future__ import annotations

from pretrain.data.tokens import datatrove, megatron, raw

FORMATS = {format.name: format for format in (megatron.MEGATRON, datatrove.DATATROVE, raw.NANOGPT, raw.OLMO)}

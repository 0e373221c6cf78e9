"""Text in: where it comes from, in one fixed order, file by file."""

from pretrain.data.text.sources import Source, open_source

__all__ = ["Source", "open_source"]

"""Text in: where it comes from, in one fixed order, file by file.

A source is a list of files (`files`, found by `listing`), here or elsewhere (`remote`). Its reader (`readers`) cuts them
into blocks, which other processes can turn into texts (`blocks`), choosing among records (`selection`) and cutting long
ones (`documents`). What gives no text is told and counted (`faults`, `omissions`).
"""

from pretrain.data.text.sources import Source, open_source

__all__ = ["Source", "open_source"]

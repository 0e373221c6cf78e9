"""Text in: where it comes from, in one fixed order, file by file.

A source is a list of files (`files`, found by `listing`), here or elsewhere (`remote`). Its reader (`readers`) cuts them
into blocks. Other processes can turn blocks into texts (`blocks`): they choose among records (`selection`) and cut long
ones (`documents`). Records without text are printed and counted (`faults`, `omissions`).
"""

from pretrain.data.text.sources import Source, open_source

__all__ = ["Source", "open_source"]

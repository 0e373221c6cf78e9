"""The text of a source, in one fixed order, file by file.

A source is a list of files (`source_files`, found by `listing`), here or elsewhere (`remote_files`). Its reader
(`readers`) cuts them into blocks. Other processes can turn blocks into texts (`blocks`): they choose among records
(`selection`) and cut long ones (`long_texts`). Records without text are printed and counted (`faults`, `omissions`).
"""

from pretrain.data.text.sources import Source, open_source

__all__ = ["Source", "open_source"]

"""Bring runs up to date in wandb from their metrics.jsonl: send what a live tracker could not send, or never tried to.

    python tools/sync_wandb.py runs/1b_tvr [runs/1b_lir ...]

Rows are added to the wandb run that the trainer uses, after the rows that are there already. Started twice, the command
sends nothing twice. With WANDB_MODE=offline the rows go into files below the run folder, for `wandb sync`.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.errors import UserError
from pretrain.monitor.wandb_session import Session, alone, asked_mode, reason_of


def bring_up_to_date(folder: Path, mode: str) -> None:
    """Send the rows of one run folder that wandb lacks.

    Args:
        folder: The run folder, which stays as it is.
        mode: As in WANDB_MODE.

    Raises:
        UserError: If `folder` is no run folder, or wandb does not take the rows.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no run folder: it has no {name}.")
    with alone(folder, patience_s=0):
        try:
            session = Session(folder, mode)
            sent = session.send()
            session.finish()
        except Exception as error:
            raise UserError(f"wandb does not take the rows of {folder}: {reason_of(error)}.") from error
    print(f"{folder}: {sent:,} rows sent, {session.first:,} were there already; {session.place}")


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=argument_types.path, metavar="RUN_FOLDER")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        bring_up_to_date(folder, asked_mode("online"))

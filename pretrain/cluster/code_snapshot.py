"""A copy of the code and the environment of a job in its run folder, so that later edits do not change the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pretrain.config.schema import Config
from pretrain.engine.deepspeed_config import read_deepspeed
from pretrain.errors import UserError
from pretrain.files import sync_folder, unfinished, write_json, write_text
from pretrain.paths import REPOSITORY
from pretrain.trainer.environment import RECORD, code_version, installed_packages

RUN_FILE = "run.yaml"
_PARTS = ("pretrain", "tools", "configs", "ds_configs", "slurm", "pyproject.toml", "constraints.txt")


def take_snapshot(folder: Path, config: Config, job: dict[str, str]) -> None:
    """Make `folder` with this code, `config` (with the content of its DeepSpeed file) as `run.yaml`, and `snapshot.json`.

    `snapshot.json` holds the git revision, the installed packages and `job`. It holds nothing else of the environment,
    which has secrets.

    Args:
        job: Slurm's variables of the job.

    Raises:
        UserError: the folder cannot be written. Then it does not exist.
    """
    _, deepspeed = read_deepspeed(config)
    frozen = config.model_copy(update={"deepspeed": deepspeed})
    try:
        with unfinished(folder.with_name(f".{folder.name}.{os.getpid()}.incomplete")) as incomplete:
            incomplete.mkdir(parents=True)
            for part in filter(Path.exists, (REPOSITORY / name for name in _PARTS)):
                _copy(part, incomplete / part.name)
            write_text(incomplete / RUN_FILE, frozen.to_yaml())
            write_json(incomplete / RECORD, {**code_version(), **installed_packages(), "job": job})
            incomplete.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write the snapshot of the code to {folder}: {error.strerror or error}.") from error


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy2(source, target)

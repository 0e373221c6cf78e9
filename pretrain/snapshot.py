"""The code and the environment of a job, kept in its run folder: what is edited later does not change a run under way."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.deepspeed_config import read_deepspeed
from pretrain.errors import UserError
from pretrain.files import sync_folder, unfinished, write_json, write_text

RUN_FILE = "run.yaml"
_RECORD = "snapshot.json"
_GIT_S = 20.0  # that git may take to answer
_CODE = Path(__file__).resolve().parent.parent
_PARTS = ("pretrain", "tools", "configs", "ds_configs", "slurm", "pyproject.toml", "constraints.txt")


def take_snapshot(folder: Path, config: Config, job: dict[str, str]) -> None:
    """Make `folder`: this code, `config` with its DeepSpeed file's content as `run.yaml`, and `snapshot.json`.

    snapshot.json: the git revision, the installed packages and the facts about the `job`; nothing else of the
    environment, which holds secrets. UserError if it cannot be written; then there is no `folder`.
    """
    _, deepspeed = read_deepspeed(config)
    frozen = config.model_copy(update={"deepspeed": deepspeed})
    try:
        with unfinished(folder.with_name(f".{folder.name}.{os.getpid()}.incomplete")) as aside:
            aside.mkdir(parents=True)
            for part in filter(Path.exists, (_CODE / name for name in _PARTS)):
                _copy(part, aside / part.name)
            write_text(aside / RUN_FILE, frozen.to_yaml())
            write_json(aside / _RECORD, {**code_version(), **_environment(), "job": job})
            aside.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write the snapshot of the code to {folder}: {error.strerror or error}.") from error


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it was put there without saying."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_version() -> dict[str, Any]:
    """`git_revision` and `git_changed_files` of this very code: of a snapshot, those it was taken from."""
    record = _CODE / _RECORD
    if record.is_file():
        stored = json.loads(record.read_bytes())
        return {key: stored[key] for key in ("git_revision", "git_changed_files")}
    return {
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain") or "").splitlines(),
    }


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy2(source, target)


def _environment() -> dict[str, Any]:
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
    }


def _git(*arguments: str) -> str | None:
    """git's answer about this code, or None outside a checkout, and where git is not there or does not answer."""
    try:
        done = subprocess.run(["git", "-C", str(_CODE), *arguments], capture_output=True, check=True, timeout=_GIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()

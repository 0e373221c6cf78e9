"""The wheel: what it holds, and its console scripts in an environment of their own, outside of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from pretrain import __version__
from tests.support.runs import ENVIRONMENT, REPOSITORY

SCRIPTS = (
    "evenkeel-check-node",
    "evenkeel-convert-checkpoint",
    "evenkeel-convert-to-hf",
    "evenkeel-evaluate",
    "evenkeel-generate",
    "evenkeel-gpu-check",
    "evenkeel-inspect-data",
    "evenkeel-plan",
    "evenkeel-prepare-data",
    "evenkeel-report",
    "evenkeel-sync-wandb",
    "evenkeel-train",
    "evenkeel-train-tokenizer",
)


def run(command: list[str | Path], cwd: Path) -> str:
    """Run `command` in `cwd` as if nothing were set up for this repository, and return its standard output."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        command, cwd=cwd, env=inherited | ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built in a copy because setuptools leaves its folders where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in REPOSITORY.iterdir():
        if path.name in ("pretrain", "benchmarks", "tests", "tools"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy2(path, source)
    words = ["wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    run([sys.executable, "-m", "pip", *words], source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel) as opened:
        yield opened


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, archive: zipfile.ZipFile) -> None:
    held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "pretrain").rglob("*.py")}
    assert wheel.name == f"evenkeel-{__version__}-py3-none-any.whl"
    assert held == package | {"pretrain/py.typed"}


def test_the_wheel_names_its_license_and_its_scripts(archive: zipfile.ZipFile) -> None:
    about = f"evenkeel-{__version__}.dist-info"
    metadata = archive.read(f"{about}/METADATA").decode()
    entry_points = ConfigParser()
    entry_points.read_string(archive.read(f"{about}/entry_points.txt").decode())
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert archive.read(f"{about}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    assert tuple(sorted(entry_points["console_scripts"])) == SCRIPTS


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel alone, and borrows the packages it needs from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    words = ["install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", python, *words], folder)
    packages = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # A path in a .pth file is searched, but the .pth files there are not read: one of them leads to this repository.
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_scripts_of_the_wheel_run_its_own_package(environment: Path, tmp_path: Path) -> None:
    found = run([environment / "bin/python", "-c", "import pretrain; print(pretrain.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(environment)
    assert run([environment / "bin/evenkeel-train", "--version"], tmp_path) == f"evenkeel {__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_of_the_wheel_start(script: str, environment: Path, tmp_path: Path) -> None:
    assert run([environment / "bin" / script, "--help"], tmp_path).startswith(f"usage: {script} ")

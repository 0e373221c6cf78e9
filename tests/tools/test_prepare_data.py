"""tools/prepare_data.py and slurm/prepare_data.sbatch as a user runs them, also killed with SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli import prepare_data
from pretrain.data import check_tokenizer, fingerprint, load_tokenizer, open_shards
from pretrain.errors import UserError

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
TEXT = ROOT / "pretrain/cli"
SPLITS = ("train", "val", "held_out")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    command = [TOOLS / "train_tokenizer.py", "--source", TEXT, "--vocab-size", "600", "--out", folder]
    subprocess.run([sys.executable, *command], check=True, timeout=120)
    return folder


# The tool as it is, except that it records its progress after every unit of work, and then waits to be killed.
EAGER = """
import runpy, sys, time
from pretrain.data.prepare import journal, shuffle
commit = journal.Journal.commit
journal.Journal.commit = lambda self: commit(self) or time.sleep(0.05)
journal.COMMIT_INTERVAL_S = 0.0
shuffle.BLOCK_DOCUMENTS = 100
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _command(tokenizer_folder: Path, out: Path, *options: object) -> list[str]:
    fixed = ["--source", "stdlib", "--tokenizer", tokenizer_folder, "--out", out]
    return [sys.executable, *map(str, [TOOLS / "prepare_data.py", *fixed, *options])]


def _run(*command: object, **environment: object) -> subprocess.CompletedProcess:
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    """It is killed while it tokenises and while it shuffles, and its terminal closes."""
    options = ("--shard-tokens", 700_000, "--max-tokens", 3_000_000, "--held-out-fraction", 0.05, "--shuffle", 9)
    whole = _run(*_command(tokenizer_folder, tmp_path / "whole", *options, "--workers", 1))
    assert whole.returncode == 0, whole.stderr

    out = tmp_path / "killed"
    command = _command(tokenizer_folder, out, *options, "--workers", 2)
    eager = [command[0], "-c", EAGER, *command[1:]]
    reached = [_end_after_progress(eager, out / ".unshuffled", how) for how in (signal.SIGKILL, signal.SIGHUP)]
    assert 0 < reached[0] < reached[1], "the second attempt did not continue the first"
    _end_after_progress(eager, out, signal.SIGKILL)
    assert (out / ".unshuffled/train/manifest.json").exists()

    last = _run(*command)
    assert last.returncode == 0, last.stderr
    assert last.stdout == whole.stdout.replace(str(tmp_path / "whole"), str(out))
    assert _contents(out) == _contents(tmp_path / "whole")
    again = _run(*command)
    assert (again.returncode, again.stdout) == (0, last.stdout)

    shards = open_shards(out / "train")
    assert len(shards.shards) > 3
    check_tokenizer(shards, fingerprint(load_tokenizer(tokenizer_folder)), tmp_path)


def test_an_array_job_and_its_merge_make_what_one_process_makes(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a corpus"
    folder.mkdir()
    for number, file in enumerate(sorted(TEXT.glob("*.py"))):
        lines = [json.dumps({"body": part}) for part in file.read_text().split("\n\n")]
        (folder / f"{number} of them.jsonl").write_text("\n".join(lines))
    options = ["--source", folder / "*.jsonl", "--text-field", "body", "--tokenizer", tokenizer_folder]
    options += ["--held-out-fraction", 0.1, "--val-fraction", 0.1]
    whole = _run(sys.executable, TOOLS / "prepare_data.py", *options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    array = {"SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_MAX": 3, "SLURM_ARRAY_TASK_COUNT": 3}
    script, out = ("bash", ROOT / "slurm/prepare_data.sbatch"), tmp_path / "an out"
    job = {"SLURM_SUBMIT_DIR": ROOT, "PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": 1}
    for task in (3, 1, 2):
        done = _run(*script, *options, "--out", out, **job, **array, SLURM_ARRAY_TASK_ID=task)
        assert done.returncode == 0, done.stderr
    shutil.copytree(out, tmp_path / "killed")
    merged = _run(*script, "--merge", "--out", out, **job)
    assert merged.returncode == 0, merged.stderr
    for split in SPLITS:
        assert _tokens(out / split).tobytes() == _tokens(tmp_path / "whole" / split).tobytes()
    assert merged.stdout.splitlines()[1].split()[:4] == whole.stdout.splitlines()[1].split()[:4]

    shuffled = _run(sys.executable, TOOLS / "prepare_data.py", *options, "--out", tmp_path / "shuffled", "--shuffle", 3)
    assert shuffled.returncode == 0, shuffled.stderr
    merge = [TOOLS / "prepare_data.py", "--merge", "--shuffle", 3, "--out", tmp_path / "killed"]
    _end_after_progress([sys.executable, "-c", EAGER, *map(str, merge)], tmp_path / "killed", signal.SIGTERM)
    assert _run(sys.executable, *merge).returncode == 0
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "shuffled")


def test_an_array_with_gaps_is_refused(tmp_path: Path) -> None:
    array = {
        "SLURM_ARRAY_TASK_MIN": 1,
        "SLURM_ARRAY_TASK_MAX": 3,
        "SLURM_ARRAY_TASK_COUNT": 2,
        "SLURM_ARRAY_TASK_ID": 3,
    }
    done = _run("bash", ROOT / "slurm/prepare_data.sbatch", "--out", tmp_path, **array, SLURM_SUBMIT_DIR=ROOT)
    assert done.returncode == 2
    assert "the array has gaps" in done.stderr


def test_mistakes_end_with_code_2_and_one_paragraph(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for options, message in [
        (("--source", tmp_path / "a.csv"), "a.csv is of no kind that can be read"),
        (("--tokenizer", tmp_path / "nowhere"), "there is no tokenizer at"),
        (("--out", TOOLS), "holds files that no preparation recorded"),
    ]:
        done = _run(*_command(tokenizer_folder, tmp_path / "out", *options))
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--source a --tokenizer t --out o --val-fraction 1.5", "--val-fraction 1.5 is not a share"),
        ("--source a --tokenizer t --out o --held-out-fraction -1", "--held-out-fraction -1.0 is not a share"),
        ("--source a --tokenizer t --out o --val-fraction .5 --held-out-fraction .5", "leave nothing for train"),
        ("--source a --tokenizer t --out o --shard-tokens 0", "--shard-tokens 0 is too small"),
        ("--source a --tokenizer t", "--out must be given"),
        ("--out o", "--source, --tokenizer must be given"),
        ("--merge", "--out must be given with --merge"),
        ("--merge --out o --source a", "--merge does not go with --source"),
        ("--merge --out o --export megatron", "--export, --merge are different things to do"),
        ("--import megatron --source a --out o", "--tokenizer must be given with --import"),
        ("--import nanogpt --source a --tokenizer t --out o --shuffle 3", "--import does not go with --shuffle"),
        ("--export olmo --source a --out o --tokenizer t", "--export does not go with --tokenizer"),
        ("--source a --tokenizer t --out o --part 0/2 --max-tokens 9", "--part does not go with --max-tokens"),
        ("--source a --tokenizer t --out o --part 0/2 --shuffle 0", "--part does not go with --shuffle: give it to"),
        ("--merge --out o --part 0/2 --filter a=b", "--merge does not go with --filter, --part"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *options.split()])
    with pytest.raises(UserError, match=message):
        prepare_data.main()


@pytest.mark.parametrize("part", ["2/2", "1", "-1/2", "0/0", "a/b"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    done = _run(sys.executable, TOOLS / "prepare_data.py", "--part", part)
    assert done.returncode == 2
    assert "--part" in done.stderr


def test_the_tool_starts_without_the_heavy_libraries() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "deepspeed"}
    program = f"import sys; import pretrain.cli.prepare_data; print({heavy!r} & sys.modules.keys())"
    assert _run(sys.executable, "-c", program).stdout == "set()\n"


def _end_after_progress(command: list[str], folder: Path, how: signal.Signals) -> int:
    """Run `command`, end it once it has recorded progress in `folder`, and return the documents that it had recorded."""
    before = _recorded(folder)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: process.poll() is not None or _recorded(folder) > before)
        workers = _descendants(process.pid)
        assert process.poll() is None, "it ended before the signal"
        process.send_signal(how)
        assert process.wait(60) == (-how if how == signal.SIGKILL else 128 + how)
    finally:
        process.kill()
        process.wait()
    _wait_until(lambda: not any(map(_is_running, workers)))
    return _recorded(folder)


def _recorded(folder: Path) -> int:
    """Return the documents of train that the journal in `folder` has."""
    if not (folder / "prepare.json").exists():
        return 0
    train = json.loads((folder / "prepare.json").read_text()).get("writers", {}).get("train")
    return 1000 * train["shards"] + train["open_documents"] if train else 0


def _descendants(process: int) -> list[int]:
    children = [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    ]
    return [*children, *(below for child in children for below in _descendants(child))]


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _tokens(folder: Path) -> np.ndarray:
    """Return all tokens of a shard folder, by numpy and the names in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in manifest["shards"]])


def _contents(out: Path) -> dict[str, bytes]:
    files = [file for split in SPLITS for file in (out / split).iterdir()]
    return {os.fspath(file.relative_to(out)): file.read_bytes() for file in files}

"""Command lines in hostile environments: foreign modules, locales, closed streams, an odd TMPDIR."""

from __future__ import annotations

import ast
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.processes import own_package
from tests.support.corpus import Corpus
from tests.support.runs import ENVIRONMENT, REPOSITORY, launch

INSPECT = REPOSITORY / "tools/inspect_data.py"
TRAIN = REPOSITORY / "pretrain/train.py"
# The one that is left out works without the package.
SCRIPTS = [TRAIN, *(path for path in (REPOSITORY / "tools").glob("*.py") if path.stem != "check_python")]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def run(command: list, cwd: Path, variables: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | (variables or {}),
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        **options,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_its_package_before_any_library_loads(script: Path) -> None:
    lines = [ast.unparse(node) for node in ast.parse(script.read_text(encoding="utf-8")).body[1:]]
    lines = [line for line in lines if line != "from __future__ import annotations"]
    insert = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    assert lines[:2] == ["import sys", "from pathlib import Path"]
    assert lines[2] in (insert, f"if not __package__:\n    {insert}")
    begun = next(n for n, line in enumerate(lines) if "startup.begin()" in line or "from pretrain.cli.start" in line)
    assert set(lines[3:begun]) <= {"from pretrain import startup", "from pretrain.distributed import signals"}


def test_the_start_of_command_lines_loads_no_library(tmp_path: Path) -> None:
    asked = "import sys; before = {*sys.modules}; import pretrain.cli.start; print(*{*sys.modules} - before)"
    ended = run(["-c", asked], tmp_path, own_package())
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"pretrain"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for PYTHONPATH with foreign modules of the names of ours, which are imported at the end."""
    folder = tmp_path_factory.mktemp("foreign path")
    (folder / "pretrain.py").write_text("raise SystemExit('foreign pretrain')", encoding="utf-8")
    for name in ("distributed", "config", "report"):
        (folder / f"{name}.py").touch()
    (folder / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "def tell():\n"
        "    import config, distributed, report\n"
        "    print(*(module.__file__ for module in (sys.modules['pretrain'], config, distributed, report)), sep='\\n')\n"
        "atexit.register(tell)\n",
        encoding="utf-8",
    )
    return folder


@pytest.mark.parametrize(("script", "safe_path"), [(TRAIN, ""), (REPOSITORY / "tools/report.py", "1")])
def test_modules_of_others_are_not_mixed_up_with_ours(script: Path, safe_path: str, foreign: Path) -> None:
    """Neither is our package confused with another of its name, nor are theirs with files of our folders."""
    ended = run([script, "--help"], foreign, {"PYTHONPATH": str(foreign), "PYTHONSAFEPATH": safe_path})
    assert ended.returncode == 0, ended.stderr
    ours, *theirs = ended.stdout.splitlines()[-4:]
    assert ours == str(REPOSITORY / "pretrain/__init__.py")
    assert theirs == [str(foreign / f"{name}.py") for name in ("config", "distributed", "report")]


WORKERS = """
import sys
sys.path.insert(0, {repository!r})
from pretrain.data.prepare import workers
def shout(text, attempt):
    return text.upper()
if __name__ == "__main__":
    workers.ALONE_CPU_S = 0.0
    print(*(found for _, found in workers.map_in_order(shout, "abcd", 2, place_of=str)))
"""


def test_workers_start_below_a_long_tmpdir_and_beside_foreign_modules(tmp_path: Path) -> None:
    """The path of a socket has at most 107 bytes, and the server of the workers starts with `python -c`."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ("random", "struct", "queue", "pretrain"):
        (beside / f"{name}.py").write_text(f"raise SystemExit('foreign {name}')", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(WORKERS.format(repository=str(REPOSITORY)), encoding="utf-8")
    temporary = tmp_path / "/".join(["job_directory_of_the_scheduler"] * 4)
    temporary.mkdir(parents=True)
    for folder in (temporary, tmp_path / "missing"):
        ended = run([script], beside, {"TMPDIR": str(folder)})
        assert (ended.returncode, ended.stdout) == (0, "A B C D\n"), ended.stderr
    assert not list(temporary.iterdir())
    asked = [sys.executable, "-c", "import random, pretrain; print(pretrain.__path__[0])"]
    told = subprocess.run(asked, cwd=beside, env=os.environ | own_package(), capture_output=True, encoding="utf-8")
    assert told.stdout == f"{REPOSITORY / 'pretrain'}\n", told.stderr


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_arguments_are_utf_8_in_any_locale(locale: str, tmp_path: Path) -> None:
    variables = ASCII | {"LC_ALL": locale, "PYTHONIOENCODING": "utf-8"}
    ended = run([INSPECT, "--corpus", "σ"], tmp_path, variables)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: 'σ' is not a folder of finished token shards")


@pytest.fixture(scope="module")
def document(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list:
    """Return the command that prints many lines in Greek letters, which the tiny tokenizer has byte by byte."""
    folder = tmp_path_factory.mktemp("greek")
    (folder / "text.txt").write_text("σ·–\n" * 20_000, encoding="utf-8")
    prepare = [REPOSITORY / "tools/prepare_data.py", "--source", folder / "text.txt", "--val-fraction", 0]
    ended = run([*prepare, "--tokenizer", corpus.tokenizer, "--out", folder / "shards"], folder)
    assert ended.returncode == 0, ended.stderr
    return [INSPECT, "--corpus", folder / "shards/train", "--tokenizer", corpus.tokenizer, "--document", "0"]


def test_what_the_terminal_cannot_show_is_escaped(document: list, tmp_path: Path) -> None:
    plain, escaped = run(document, tmp_path), run(document, tmp_path, ASCII)
    assert (plain.returncode, escaped.returncode) == (0, 0), escaped.stderr
    assert "σ·–" in plain.stdout
    assert escaped.stdout == plain.stdout.encode("ascii", "backslashreplace").decode("ascii")


@pytest.mark.parametrize(
    ("redirection", "codes", "said"),
    [
        ("| head -n 1", "0 0", ""),
        ("<&- >&- 2>&-", "0", ""),
        ("> /dev/full", "1", "error: standard output takes no more: No space left on device."),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_goes_away(
    redirection: str, codes: str, said: str, unbuffered: str, document: list, tmp_path: Path
) -> None:
    words = " ".join(map(str, [sys.executable, *document]))
    ended = subprocess.run(
        ["bash", "-c", f"{words} {redirection}; echo ${{PIPESTATUS[@]}} > {tmp_path}/codes"],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert (tmp_path / "codes").read_text(encoding="utf-8").strip() == codes
    assert ended.stderr.startswith(said)
    assert bool(ended.stderr) == bool(said)


# As in a container whose user has no entry.
WITHOUT_HOME = "import os, pwd\npwd.getpwuid = {}.__getitem__\nos.environ.pop('HOME', None)\n"
SAY_HOME = "print(os.path.expanduser('~'), os.path.isdir(os.path.expanduser('~')))"


def test_a_process_without_a_home_gets_one_that_ends_with_it() -> None:
    begin = "from pretrain import startup\nstartup.begin()\n"
    before = launch([sys.executable, "-c", WITHOUT_HOME + SAY_HOME])
    assert before.stdout == "~ False\n", before.stderr
    ended = launch([sys.executable, "-c", WITHOUT_HOME + begin + SAY_HOME])
    home, exists = ended.stdout.split()
    assert exists == "True", ended.stderr
    assert Path(home).is_absolute()
    assert not Path(home).exists()


def test_no_path_leads_into_a_home_that_ends_with_its_process() -> None:
    ask = (
        "from pretrain import paths, startup\nstartup.begin()\n"
        "for path in ('~/runs', '$HOME/runs', '~root/x'):\n"
        "    try:\n        print(paths.expanded(path))\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    refused = (
        "~ stands for a home folder, and there is none: write the path out\n"
        "$HOME is not set here: set it, or write the path out\n"
    )
    ended = launch([sys.executable, "-c", WITHOUT_HOME + ask])
    assert ended.stdout.startswith(refused), ended.stderr
    empty = launch([sys.executable, "-c", ask], {"HOME": ""})  # Python would give /runs
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert empty.stdout.splitlines()[0] == f"{home}/runs", empty.stderr


def test_a_home_that_is_there_stays(tmp_path: Path) -> None:
    ask = "import os\nfrom pretrain import startup\nstartup.begin()\nprint(os.environ['HOME'])"
    assert launch([sys.executable, "-c", ask], {"HOME": str(tmp_path)}).stdout == f"{tmp_path}\n"


@pytest.mark.slow
def test_a_run_goes_to_its_end_where_everything_around_it_is_odd(run_file: Path, tmp_path: Path) -> None:
    """Libraries read their own files in the locale's encoding, warn, ask for a home and for user names, and print."""
    (tmp_path / "odd.yaml").write_text(run_file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    temporary = tmp_path / "/".join(["job_directory_of_the_scheduler"] * 4)
    temporary.mkdir(parents=True)
    variables = ASCII | {
        "TMPDIR": str(temporary),
        "TZ": "Nowhere/Bad",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    variables |= {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    words = f"{sys.executable} {TRAIN} --config odd.yaml --set name=σ --set out=runs --set steps=2"
    ended = subprocess.run(
        ["bash", "-c", f"umask 077; ulimit -n 64; {words} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        timeout=480,
    )
    said, code = ended.stdout.splitlines()
    assert said.startswith("rank 0 of 1 on ")
    assert code == "0", ended.stderr[-3000:]
    status = json.loads((tmp_path / "runs/σ/status.json").read_bytes())
    assert (status["status"], status["step"]) == ("finished", 2)
    assert "finished at step 2" in (tmp_path / "runs/σ/log.txt").read_text(encoding="utf-8")

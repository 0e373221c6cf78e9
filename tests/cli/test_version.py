"""`--version`, which every command line has."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import pretrain.cli
from pretrain import __version__

SHARED = {"__init__", "argument_types", "command", "parser", "start"}
TOOLS = sorted(path.stem for path in Path(pretrain.cli.__file__).parent.glob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize(
    "module", [*(f"pretrain.cli.{tool}" for tool in TOOLS), "pretrain.train", "benchmarks.command_line"]
)
def test_each_tool_says_its_version(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [module, "--version"])
    with pytest.raises(SystemExit) as ended:
        import_module(module).main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"evenkeel {__version__}\n"

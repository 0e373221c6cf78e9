"""A run that compiles is refused where there is nothing to compile with."""

from __future__ import annotations

import socket
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from pretrain.config.schema import Config
from pretrain.engine.compiled_blocks import why_eager
from pretrain.engine.compiler_checks import check_compiler, kind_of_attention, missing_for_cpu, missing_for_gpu
from pretrain.errors import UserError
from tests.support.tiny_engines import tiny_config

MUON = {"name": "muon", "lr": 1e-3, "grad_clip": None}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder of PATH, with no compiler in it, on a machine that has Python's headers and triton."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr("pretrain.engine.compiler_checks.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tmp_path


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\n", encoding="utf-8")
    path.chmod(0o755)


def config(optim: dict) -> Config:
    model = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return tiny_config({"deepspeed": {}}, model=model, sequences=2, micro_batch_size=2, steps=2, optim=optim)


def test_muon_is_refused_on_a_gpu_node_without_a_compiler(tools: Path) -> None:
    with pytest.raises(UserError, match=rf"optim.name: muon compiles .*{socket.gethostname()} lacks a C compiler"):
        check_compiler(config(MUON))
    check_compiler(config({"lr": 1e-3}))
    program(tools / "gcc")
    check_compiler(config(MUON))
    (tools / "Python.h").unlink()
    with pytest.raises(UserError, match=r"lacks Python's headers .*python3-dev"):
        check_compiler(config(MUON))


def test_compiling_blocks_is_refused_without_a_compiler_and_left_out_where_nobody_asked(tools: Path) -> None:
    plain = config({"lr": 1e-3})
    asked, forbidden = (plain.model_copy(update={"compile": value}) for value in ("layers", "off"))
    with pytest.raises(UserError, match=r"compile: layers compiles kernels .* or set compile: off"):
        check_compiler(asked)
    assert "lacks a C compiler" in str(why_eager(plain))
    program(tools / "gcc")
    check_compiler(asked)
    assert why_eager(asked) is why_eager(plain) is None
    assert why_eager(forbidden) == "compile is off"


def test_a_node_without_a_compiler_keeps_documents_apart_by_a_mask(tools: Path) -> None:
    plain = config({"lr": 1e-3})
    packed = plain.model_copy(update={"data": plain.data.model_copy(update={"document_attention": True})})
    assert kind_of_attention(plain) == "causal"
    assert kind_of_attention(packed) == "mask"
    program(tools / "gcc")
    assert kind_of_attention(packed) == "blocks"


def test_blocks_are_eager_on_a_cpu_unless_they_are_to_be_compiled(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = config({"lr": 1e-3})
    assert why_eager(plain) == "no GPU, and compile is not set"
    assert why_eager(plain.model_copy(update={"compile": "layers"})) is None


def test_muon_needs_no_compiler_on_a_cpu(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_compiler(config(MUON))


def test_the_compiler_that_a_variable_names_counts(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tools / "mine")
    program(tools / "clang++")
    assert missing_for_cpu() == []
    monkeypatch.setenv("CC", "mine -m64")
    monkeypatch.setenv("CXX", "not_there")
    assert missing_for_gpu() == []
    assert missing_for_cpu() == ["a C++ compiler (g++ or clang++ on PATH, or CXX)"]


def test_triton_is_missed(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tools / "gcc")
    monkeypatch.setattr("pretrain.engine.compiler_checks.find_spec", lambda name: None)
    assert missing_for_gpu() == ["the package triton"]


def test_the_headers_are_found_where_a_compiler_is_asked_to_include_them(tmp_path: Path) -> None:
    """Independent of the check: what the compiler itself says, where there is one."""
    include = sysconfig.get_path("include")
    source = tmp_path / "includes.c"
    source.write_text("#include <Python.h>\n")
    try:
        compiled = subprocess.run(
            ["gcc", f"-I{include}", "-fsyntax-only", str(source)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no gcc here")
    headers = [part for part in missing_for_cpu() if part.startswith("Python's headers")]
    assert (compiled.returncode == 0) == (not headers)

"""Startup facts: what every rank of a run must have in common before it trains, as this rank finds it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import pretrain
from pretrain.checkpoints.stored import is_universal
from pretrain.config.schema import Config
from pretrain.data.json_files import content_hash, read_json
from pretrain.engine.compiled_blocks import form_of_blocks
from pretrain.engine.compiler_checks import kind_of_attention
from pretrain.files import checksum
from pretrain.trainer.environment import version_of
from pretrain.trainer.plan import Plan

_LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors")
# Environment variables that change what is computed, or which collectives a rank joins.
_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "SLURM_RESTART_COUNT")

Facts = dict[str, Any]


def facts_of_process(config: Config) -> Facts:
    """Return the facts that are known before any data is opened: configuration, code, libraries, device and arithmetic."""
    return {
        "configuration": config.model_dump(mode="json"),
        "order of methods": [method.name for method in config.methods],
        "file": digests_of_code(Path(pretrain.__file__).parent),
        "version of": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in _LIBRARIES},
            "cuda": torch.version.cuda,
        },
        "device": _device(),
        "arithmetic": _arithmetic(),
        "variable": {name: os.environ.get(name) for name in _VARIABLES},
    }


def facts_of_plan(plan: Plan) -> Facts:
    """Return the facts of what this rank has read: data, tokenizer, model and the complete DeepSpeed configuration."""
    corpora = plan.corpora
    sources = {source.path: held for source, held in zip(plan.config.data.train, corpora.sources, strict=True)}
    return {
        "training data": {path: held.shards.fingerprint for path, held in sources.items()},
        "validation data": corpora.val.shards.fingerprint if corpora.val else None,
        "tokenizer": corpora.tokenizer_fingerprint,
        "model": plan.model_config.to_diff_dict(),
        "model to start from": plan.start and plan.start.source.name,
        "DeepSpeed": plan.ds_config,
        "blocks": form_of_blocks(plan.config),
        "attention": kind_of_attention(plan.config),
    }


def facts_of_checkpoint(path: Path | None) -> Facts:
    """Return the checkpoint that this rank resumes from, and its content. UserError if it cannot be read."""
    content = None
    if path is not None and is_universal(path):  # without a manifest
        content = content_hash(
            {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*.pt"))}
        )
    elif path is not None:
        content = content_hash(read_json(path / "manifest.json"))
    return {"checkpoint": str(path), "content of the checkpoint": content}


def digests_of_code(package: Path) -> dict[str, str]:
    """Return a digest of every Python file of `package`, by its path."""
    return {f"{package.name}/{path.relative_to(package)}": checksum(path) for path in sorted(package.rglob("*.py"))}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def _arithmetic() -> Facts:
    """Return the settings of torch that change the results of the same operations."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda.matmul.allow_tf32": cuda.allow_tf32,
        "cuda.matmul.allow_bf16_reduced_precision_reduction": cuda.allow_bf16_reduced_precision_reduction,
        "cuda.matmul.allow_fp16_reduced_precision_reduction": cuda.allow_fp16_reduced_precision_reduction,
        "cudnn.allow_tf32": cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": str(torch.get_default_dtype()),
    }

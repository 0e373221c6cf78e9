"""A conversion, top to bottom: verify the checkpoint, read the masters, fold the methods, write, prove, publish."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from pretrain.checkpoints.finite import refuse_unless_finite
from pretrain.checkpoints.folders import resolve
from pretrain.checkpoints.logit_probe import load_probe
from pretrain.checkpoints.manifest import verify
from pretrain.checkpoints.method_state import read_method_state
from pretrain.config.schema import Config, load_config
from pretrain.data.json_files import read_json
from pretrain.data.tokenizer import load_tokenizer, separator_id
from pretrain.data.tokenizer_files import trained_files, write_files
from pretrain.engine.build_model import bind_methods
from pretrain.errors import UserError, first_line
from pretrain.export.card import class_name, model_card
from pretrain.export.proof import Proof, prove
from pretrain.export.safetensors_files import Shapes, write_weights
from pretrain.export.sources import Source, source_of, trainer_logits
from pretrain.files import require_utf8, unfinished, write_text
from pretrain.methods import Method
from pretrain.model.config_json import save_config
from pretrain.model.evenkeel_llama import bring_modeling_file
from pretrain.model.export_edits import LazyTensors, as_lazy, change
from pretrain.model.layout import role_and_layer


@dataclass(frozen=True)
class Written:
    """A model without its tokenizer and card.

    Attributes:
        hf_config: The configuration of the class that holds it.
        files: The number of files of weights.
        reasons: By method, the change of the weights with which this class computes what the trainer did, or why no stock
            class does. Methods that leave plain weights are not in it.
        bos_id: The token before every document in training; None if only the separator of the document before stood there.
        probe: The input ids of the proof, and the logits that the trainer's model has for these weights.
    """

    hf_config: PreTrainedConfig
    files: int
    reasons: dict[str, str]
    bos_id: int | None
    probe: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Exported:
    """The result of a conversion: the model, its number of parameters, the stored dtype and the proof."""

    model: Written
    parameters: int
    dtype: torch.dtype
    proof: Proof


def convert(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = False,
    average: Sequence[Path] = (),
) -> Exported:
    """Turn a training checkpoint into a Hugging Face folder.

    Everything is made in a folder beside `out` that takes its name once the logits are proved equal.

    Args:
        checkpoint: The checkpoint's folder, or a link such as `latest`.
        out: The folder to make.
        dtype: The stored dtype; None for the precision that the trainer computed in.
        ema: Export the average of the weights that the trainer has kept.
        average: Further checkpoints. The mean of all is exported.

    Raises:
        UserError: If `out` holds anything, the checkpoint is damaged, or the disk is full.
        NotEqualError: If the proof fails.
    """
    _refuse_existing(out)
    require_utf8(out, "--out")
    require_utf8(checkpoint, "--checkpoint")
    checkpoint = verified(checkpoint)
    source = source_of(checkpoint, ema=ema, others=[verified(other) for other in average])
    dtype = dtype or load_probe(checkpoint)[1].dtype
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(out.with_name(f".{out.name}.{os.getpid()}.tmp")) as temporary:
            folder = temporary / "model"
            folder.mkdir(parents=True)
            exported = _export(checkpoint, source, folder, dtype)
            os.replace(folder, out)
    except OSError as error:
        raise UserError(
            f"cannot convert {checkpoint} to {out}: {error}. Free disk space, or correct the permissions of the file it names."
        ) from error
    return exported


def verified(path: Path) -> Path:
    """Return the folder of the checkpoint at `path`, each file compared with its manifest.

    Raises:
        UserError: If a file differs, or the model has diverged.
    """
    checkpoint = resolve(path)
    verify(checkpoint)
    refuse_unless_finite(checkpoint)
    return checkpoint


def write_model(checkpoint: Path, source: Source, folder: Path, config: Config, dtype: torch.dtype) -> Written:
    """Write the weights, folded into a stock architecture, and its configuration.

    If no stock architecture can hold the model, it is Evenkeel's own, and its modelling file is written as well.

    Args:
        checkpoint: A verified checkpoint.
        source: Its weights, or an average of such.
        folder: An existing folder for the files.
        config: The configuration of the run.
        dtype: The stored dtype.

    Raises:
        UserError: If the checkpoint cannot be read.
        NotEqualError: If a weight is not the trainer's.
    """
    hf_config = _configuration(checkpoint / "hf")
    bos_id = _bos_id(checkpoint, hf_config)
    separator = separator_id(load_tokenizer(checkpoint / "hf"))
    hf_config.bos_token_id = separator if bos_id is None else bos_id
    config = bind_methods(config, hf_config)
    tensors, probe = dict(source.tensors), source.probe or trainer_logits(checkpoint, config, hf_config, source.tensors)
    folding = [method for method in config.methods if type(method).fold is not Method.fold]
    if folding:
        as_forward_saw_them(tensors, load_probe(checkpoint)[1].dtype)
        tensors.update(as_lazy(read_method_state(checkpoint)))
    for method in sorted(folding, key=lambda method: method.fold_order):
        hf_config = method.fold(tensors, hf_config)
    shapes = shapes_of(hf_config)
    if shapes.keys() != tensors.keys():
        raise RuntimeError(
            f"a {class_name(hf_config)} cannot hold these weights: it lacks {sorted(tensors.keys() - shapes)} "
            f"and needs {sorted(shapes.keys() - tensors)}; a method that changes the architecture must fold its change"
        )
    files = write_weights(folder, tensors, shapes, dtype)
    hf_config.dtype = dtype
    bring_modeling_file(hf_config, folder)
    save_config(hf_config, folder)
    GenerationConfig(bos_token_id=hf_config.bos_token_id, eos_token_id=hf_config.eos_token_id).save_pretrained(folder)
    reasons = {method.name: note for method in config.methods if (note := method.fold_note())}
    return Written(hf_config, files, reasons, bos_id, probe)


def as_forward_saw_them(tensors: LazyTensors, precision: torch.dtype) -> None:
    """Round every master to the precision of forward, except trained factors, which forward took in float32."""
    for name in tensors:
        if role_and_layer(name)[0] != "scale":
            change(tensors, name, lambda master: master.to(precision).float())


def shapes_of(hf_config: PreTrainedConfig) -> Shapes:
    """Return name and shape of every weight of an empty model, a tied weight once; note its class in `hf_config`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    hf_config.architectures = [type(model).__name__]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _export(checkpoint: Path, source: Source, folder: Path, dtype: torch.dtype) -> Exported:
    """Fill `folder` and prove its model."""
    config = load_config(checkpoint / "config.yaml")
    model = write_model(checkpoint, source, folder, config, dtype)
    write_files(trained_files(load_tokenizer(checkpoint / "hf"), checkpoint / "hf", model.bos_id), folder)
    proof = prove(folder, model.probe, dtype)
    parameters = sum(map(prod, shapes_of(model.hf_config).values()))
    step = read_json(checkpoint / "trainer.json")["step"]
    write_text(
        folder / "README.md",
        model_card(config, model.hf_config, model.reasons, step, source.words, parameters, dtype, proof),
    )
    return Exported(model, parameters, dtype, proof)


def _configuration(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise UserError(
            f"cannot read the model's configuration {folder / 'config.json'}: {first_line(error)}. It is not as the "
            "trainer saved it, or the installed transformers is another version: see environment.json of the run."
        ) from error


def _bos_id(checkpoint: Path, hf_config: PreTrainedConfig) -> int | None:
    """Return the token before every document in training; from the probe's first token if an older trainer did not note it."""
    state = read_json(checkpoint / "trainer.json")
    if "bos_id" in state:
        return state["bos_id"]
    first = int(load_probe(checkpoint)[0][0, 0])
    return first if first == hf_config.bos_token_id != hf_config.eos_token_id else None


def _refuse_existing(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already and is left as it is. Give --out another folder, or remove it first.")

"""Proof of an export by its weights and its logits.

Every weight that is read must have the mean and deviation of the trainer's, to nine digits. And transformers must give the
logits that the trainer gave on the checkpoint's probe.

The tolerance depends on the model: the same weights give other last digits on other hardware, and depth amplifies them. So
it is measured with the model itself. Its logits are computed twice, in the trainer's precision and in a higher one. Their
difference is the effect of rounding on this model, and the trainer's logits may differ by a few times that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from math import isclose
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoints.logit_probe import load_moments, probe_logits
from pretrain.data.json_files import read_json
from pretrain.model.evenkeel_llama import MODELING_FILE, EvenkeelLlamaConfig, EvenkeelLlamaForCausalLM
from pretrain.model.export_edits import LazyTensors
from pretrain.sharded import Moments

# Other kernels sum in another order, and round somewhat more or less. docs/conversion.md has measurements.
ROOM = 2.0
# A model in float32 rounds so little that the kernels' differences count: the least tolerance.
FLOOR = 5e-6
# Means and deviations are computed in float64 on both sides, in another order.
DIGITS = 1e-9

_HIGHER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class NotEqualError(RuntimeError):
    """The exported model does not compute what the trainer computed."""


@dataclass(frozen=True)
class Proof:
    """A comparison of the trainer's logits with the exported model's.

    Attributes:
        precision: In which both sides computed the differences below.
        largest_difference: Absolute.
        largest_logit: Absolute.
        error: Root mean square of the trainer's logits less the exported model's in higher precision, as a share of the
            logits' own.
        tolerance: The largest error that rounding explains.
    """

    precision: torch.dtype
    largest_difference: float
    largest_logit: float
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """True if rounding explains the error; False as well if a logit is not a number."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"largest |difference| {self.largest_difference:.2e} of largest |logit| {self.largest_logit:.3g} in "
            f"{name_of(self.precision)}; relative error {self.error:.2e}, at most {self.tolerance:.2e} is rounding"
        )


def prove(folder: Path, probe: tuple[torch.Tensor, torch.Tensor], exported: torch.dtype) -> Proof:
    """Load `folder` as a user would and compare its logits with the trainer's.

    Args:
        folder: The exported model.
        probe: Input ids, and the logits that the trainer's model has for these weights.
        exported: The stored dtype. The model computes in it if it is coarser than the trainer's precision, else in that.

    Raises:
        NotEqualError: If the logits differ by more than rounding.
    """
    input_ids, trained = probe
    precision = max(trained.dtype, exported, key=lambda dtype: torch.finfo(dtype).eps)
    model = model_class_of(folder).from_pretrained(
        folder, dtype=precision, local_files_only=True, trust_remote_code=False
    )
    found = probe_logits(model, input_ids).double()
    with computing_in(_HIGHER[precision], model):
        exact = probe_logits(model, input_ids).double()
    trained = trained.double()
    proof = Proof(
        precision=precision,
        largest_difference=float((trained - found).abs().max()),
        largest_logit=float(trained.abs().max()),
        error=float((trained - exact).norm() / exact.norm()),
        tolerance=max(FLOOR, ROOM * float((found - exact).norm() / exact.norm())),
    )
    if not proof.holds:
        raise NotEqualError(
            f"the exported model does not give the trainer's logits: {proof}. Nothing was exported. The checkpoint's "
            "files are as they were written, so the way its weights are read or its methods folded is wrong."
        )
    return proof


def model_class_of(folder: Path) -> type[Any]:
    """Return the class that loads the model in `folder`: an Auto class, or our own from the exported modelling file.

    The Auto classes would take our class from the trainer's registry and leave the exported file untested. Any other class
    that the checkpoint's configuration names is not loaded: it would be code of an unknown author.
    """
    if read_json(folder / "config.json").get("model_type") != EvenkeelLlamaConfig.model_type:
        return AutoModelForCausalLM
    return getattr(_imported(folder / MODELING_FILE.name), EvenkeelLlamaForCausalLM.__name__)


def _imported(file: Path) -> ModuleType:
    """Import the module in `file` where it lies.

    transformers would copy it to its module cache first, which must be writable, and which is a folder called ~ if there is
    no home.
    """
    name = f"exported_{file.stem}"
    loader = _WithoutBytecode(name, str(file))
    spec = spec_from_loader(name, loader)
    assert spec is not None  # as the file is no package
    module = sys.modules[name] = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _WithoutBytecode(SourceFileLoader):
    """Python's own loader, without a __pycache__ in the exported folder."""

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        pass


def checked(tensors: LazyTensors, checkpoint: Path) -> LazyTensors:
    """Return the same weights, each compared with the moments of the trainer's full fp32 weight when it is loaded.

    Raises:
        NotEqualError: If a name is missing or too many; later, if a loaded weight differs.
    """
    moments = load_moments(checkpoint)
    if tensors.keys() != moments.keys():
        raise NotEqualError(
            f"the weights found in {checkpoint} are not those that the trainer had: "
            f"{', '.join(sorted(tensors.keys() ^ moments.keys()))}. Nothing was exported."
        )
    return {name: partial(_load_checked, name, load, moments[name]) for name, load in tensors.items()}


def _load_checked(name: str, load: Callable[[], torch.Tensor], trained: Moments) -> torch.Tensor:
    tensor = load()
    read = Moments.of(tensor)
    same_norm = isclose(read.squared_norm, trained.squared_norm, rel_tol=DIGITS)
    if not (read.count == trained.count and same_norm and isclose(read.std, trained.std, rel_tol=DIGITS)):
        raise NotEqualError(
            f"{name} as it was read has mean {read.mean:.9g} and deviation {read.std:.9g}, the trainer's had "
            f"{trained.mean:.9g} and {trained.std:.9g}. Nothing was exported. The checkpoint's files are as they were "
            "written, so the way its weights are read is wrong."
        )
    return tensor


@contextmanager
def computing_in(dtype: torch.dtype, model: torch.nn.Module) -> Iterator[None]:
    """Cast each module's parameters during its own forward: like `model.to(dtype)`, one module at a time."""
    own: dict[torch.nn.Parameter, torch.Tensor] = {}

    def lift(module: torch.nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            own[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype)

    def lower(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = own.pop(parameter)

    hooks = []
    for module in model.modules():
        hooks += [module.register_forward_pre_hook(lift), module.register_forward_hook(lower)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name as the command line has it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")

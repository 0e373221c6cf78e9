"""Proves an export: every weight as it is read must have the mean and deviation that the trainer's had, to nine digits,
and transformers must give the logits that the trainer gave on the checkpoint's probe.

How equal is equal depends on the model: the same weights give other last digits on other hardware, and depth amplifies
them. So the measuring rod is the model itself. Its logits are computed twice here, in the trainer's precision and in a
higher one; the difference is what rounding does to this model, and the trainer's logits may be off by a few times that.
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

import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoints.logit_probe import load_moments, load_probe, probe_logits
from pretrain.data.json_files import read_json
from pretrain.model.evenkeel_llama import MODELING_FILE, EvenkeelLlamaConfig, EvenkeelLlamaForCausalLM
from pretrain.model.export_edits import LazyTensors
from pretrain.sharded import Moments

# Other kernels than these sum in another order, and round somewhat more or less. docs/conversion.md has measurements.
ROOM = 2.0
# A model in float32 rounds so little that the kernels' differences count: never ask for less than this.
FLOOR = 5e-6
# Means and deviations are computed in float64 on both sides, in another order.
DIGITS = 1e-9

_HIGHER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class NotEqualError(RuntimeError):
    """The exported model does not compute what the trainer computed."""


@dataclass(frozen=True)
class Proof:
    """The trainer's logits against the exported model's.

    largest_difference, largest_logit: absolute, both sides in `precision`. error: root mean square of the trainer's
    logits less the exported model's in higher precision, as a share of the logits' own. tolerance: the largest error
    that rounding explains.
    """

    precision: torch.dtype
    largest_difference: float
    largest_logit: float
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False as well where a logit is not a number."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"largest |difference| {self.largest_difference:.2e} of largest |logit| {self.largest_logit:.3g} in "
            f"{name_of(self.precision)}; relative error {self.error:.2e}, at most {self.tolerance:.2e} is rounding"
        )


def prove(folder: Path, checkpoint: Path, exported: torch.dtype) -> Proof:
    """Load `folder` as a user would and compare its logits with those in the checkpoint's probe.

    It computes in the trainer's precision, or in the `exported` one where that is coarser. Raises NotEqualError if the
    logits differ by more than rounding.
    """
    input_ids, trained = load_probe(checkpoint)
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


def model_class_of(folder: Path) -> type:
    """What loads the model in `folder`: an Auto class, or our own from the modelling file that the conversion put there.

    (The Auto classes would take the one that the trainer has registered, and leave the exported file untried. A class
    that the checkpoint's configuration names besides would be code of whoever made the checkpoint.)
    """
    if read_json(folder / "config.json").get("model_type") != EvenkeelLlamaConfig.model_type:
        return AutoModelForCausalLM
    return getattr(_imported(folder / MODELING_FILE.name), EvenkeelLlamaForCausalLM.__name__)


def _imported(file: Path) -> ModuleType:
    """The module in `file`, imported where it lies.

    transformers would copy it to its module cache first, which must be writable, and which is a folder called ~ where there
    is no home.
    """
    name = f"exported_{file.stem}"
    spec = spec_from_loader(name, _WithoutBytecode(name, str(file)))
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _WithoutBytecode(SourceFileLoader):
    """Python's own loader, but it leaves no __pycache__ in the exported folder."""

    def set_data(self, path: str, data: bytes, *, _mode: int = 0o666) -> None:
        pass


def checked(tensors: LazyTensors, checkpoint: Path) -> LazyTensors:
    """The same weights, each compared with the moments of the trainer's full fp32 weight when it is loaded.

    Loading one that differs raises NotEqualError with its name.
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
    found = Moments.of(tensor)
    same_norm = isclose(found.squared_norm, trained.squared_norm, rel_tol=DIGITS)
    if not (found.count == trained.count and same_norm and isclose(found.std, trained.std, rel_tol=DIGITS)):
        raise NotEqualError(
            f"{name} as it was read has mean {found.mean:.9g} and deviation {found.std:.9g}, the trainer's had "
            f"{trained.mean:.9g} and {trained.std:.9g}. Nothing was exported. The checkpoint's files are as they were "
            "written, so the way its weights are read is wrong."
        )
    return tensor


@contextmanager
def computing_in(dtype: torch.dtype, model: torch.nn.Module) -> Iterator[None]:
    """Cast each module's parameters for the time of its own forward: as `model.to(dtype)`, one module at a time."""
    own: dict[torch.nn.Parameter, torch.Tensor] = {}

    def lift(module: torch.nn.Module, _) -> None:
        for parameter in module.parameters(recurse=False):
            own[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype)

    def lower(module: torch.nn.Module, *_) -> None:
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
    """As the command line spells it."""
    return str(dtype).removeprefix("torch.")

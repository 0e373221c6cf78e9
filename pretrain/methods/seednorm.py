"""SeeDNorm: each RMSNorm's gain depends on the token, so that a norm need not forget how large its input was.

    y = [tanh(x·β) α + γ] ⊙ x / RMS(x)      α, β, γ vectors of the hidden size, x·β one number for each token

It replaces the norms of the blocks and the final norm, not those of q and k. α starts at 1, β at 0, γ at 1, so at first
it is RMSNorm. α and β decay like matrices, γ does not. tanh bounds the gain: without it training diverges in the paper.

Source: Cai et al. 2025, "SeeDNorm: Self-Rescaled Dynamic Normalization" (arXiv 2510.22777).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from pretrain.methods.base import NORMALIZATION, Method
from pretrain.model.evenkeel_llama import UNLIKE_SOFTCAP, evenkeel_llama
from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.model.norms import is_stream_norm
from pretrain.sharded import ShardedWeights
from pretrain.sharded.draws import Constant, Draw


class SeeDNormMethod(Method):
    """SeeDNorm. Its gains depend on the token, so nothing can be folded and the export has its own modelling file.

    Attributes:
        alpha_init: The initial α. At OLMoE-1.3B's size 1 gave 2.900, 0.1 gave 2.912 and 10 gave 3.154 (the paper's losses).
    """

    decides: ClassVar[frozenset[str]] = frozenset({NORMALIZATION})
    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(UNLIKE_SOFTCAP)
    needs: ClassVar[frozenset[Need]] = frozenset({"llama_block"})

    name: Literal["seednorm"] = "seednorm"
    alpha_init: float = Field(1.0, gt=0)

    def configure(self, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        return evenkeel_llama(hf_config, seednorm=True)

    def init_draw(self, weight: Weight) -> Draw | None:
        start = {"alpha": self.alpha_init, "beta": 0.0}.get(weight.role)
        return None if start is None else Constant(start)

    def take_over(self, weights: ShardedWeights) -> None:
        """Do nothing: β is 0 at the start, so the norms are the loaded RMSNorms."""

    def decays(self, weight: Weight) -> bool | None:
        return True if weight.role in ("alpha", "beta") else None

    def fold_note(self) -> str | None:
        return "no stock class has norms whose gain depends on the token"

    def training_rule(self, weight: Weight) -> str | None:
        if is_stream_norm(weight.name.removesuffix(".weight")):
            return "seednorm: + tanh(x . beta) alpha"
        return {
            "alpha": "seednorm: times tanh(x . beta)",
            "beta": "seednorm: tanh(x . beta)",
        }.get(weight.role)

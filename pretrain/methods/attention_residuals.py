"""Attention Residuals: a sub-layer reads a weighted mean of the outputs of earlier ones, instead of their sum.

    h_l = Σ_i a_i v_i,    a = softmax_i(w_l · RMSNorm(v_i))      computed in float32 for each token

v_0 is the embedding's output, and v_1, v_2, ... are those of the attentions and MLPs so far. h_l is the input of the norm
of sub-layer l. The final norm reads in the same way. w_l is one trained vector for each reader, 0 at first. So training
starts from the plain average, which is the sum divided by the number of terms. RMSNorm keeps large outputs from winning
by their size.

With `blocks` there are N blocks of consecutive sub-layers, within which outputs are summed as usual. A sub-layer reads
v_0, the sums of the blocks before its own, and the sum of its own block so far: at most N + 1 tensors, instead of up to
2 x layers + 1. (Where N does not divide the sub-layers, the first blocks have one more.)

Source: Kimi Team 2026, "Attention Residuals" (arXiv 2603.15031), equations 2 to 6, with about 8 blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from pretrain.errors import UserError
from pretrain.methods.base import RESIDUAL_STREAM, Method
from pretrain.model.evenkeel_llama import UNLIKE_SOFTCAP, evenkeel_llama
from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.sharded.draws import Constant, Draw


class AttentionResiduals(Method):
    """Attention Residuals. The mixture depends on the token, so nothing can be folded and the export has its own file.

    Attributes:
        blocks: N. Null reads every output separately.
    """

    decides: ClassVar[frozenset[str]] = frozenset({RESIDUAL_STREAM})
    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **UNLIKE_SOFTCAP,
            "pre_ln": "pre_ln's export takes the mean out of what each sub-layer writes, which the RMSNorm that "
            "attention_residuals compares the outputs by would see",
        }
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"llama_block"})
    eager_blocks: ClassVar[str | None] = (
        "its blocks hand on several tensors, which DeepSpeed cannot take for a whole block"
    )

    name: Literal["attention_residuals"] = "attention_residuals"
    blocks: int | None = Field(None, gt=0)

    def configure(self, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        return evenkeel_llama(hf_config, attention_residuals=True, attention_residual_blocks=self.blocks)

    def check(self, weights: list[Weight]) -> None:
        sublayers = 2 * self.run.layers
        if self.blocks is not None and self.blocks > sublayers:
            raise UserError(
                f"methods: attention_residuals.blocks is {self.blocks}, but the model has {sublayers} sub-layers "
                f"(an attention and an MLP in each of {self.run.layers} layers). Give at most {sublayers}, or null to "
                "read each for itself."
            )

    def init_draw(self, weight: Weight) -> Draw | None:
        return Constant(0.0) if weight.role == "query" else None

    def fold_note(self) -> str | None:
        return "no stock class has sub-layers that weigh what earlier ones wrote"

    def training_rule(self, weight: Weight) -> str | None:
        return "attention_residuals: scores what is read" if weight.role == "query" else None

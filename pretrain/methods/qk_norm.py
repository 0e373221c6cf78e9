"""qk-norm: queries and keys are normalized, so that attention logits cannot grow without bound.

    q, k ← RMSNorm(q), RMSNorm(k)    over each head's own values, before the rotary embedding

There is one gain vector of a head's size for all query heads of a block, and one for all its key heads. The scale of W_q
and W_k then has no effect in forward. It only sets how large their relative updates are.

Source: Henry et al. 2020 (arXiv 2010.04245), Dehghani et al. 2023 (arXiv 2302.05442), and Wortsman et al. 2023
(arXiv 2309.14322) with LayerNorm. This is the RMS form of Qwen3, whose stock class is trained and exported.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from transformers import PreTrainedConfig, Qwen3Config

from pretrain.errors import UserError
from pretrain.methods.base import Method
from pretrain.model.evenkeel_llama import EvenkeelLlamaConfig, evenkeel_llama
from pretrain.model.export_edits import as_config
from pretrain.model.families import Need
from pretrain.model.layout import Weight


class QKNorm(Method):
    """qk-norm. The model is a Qwen3 from the start, so nothing is left to fold.

    With a method that needs Evenkeel's own class, it is that class with Qwen3's attention.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"llama_block"})
    tensor_parallel: ClassVar[bool] = False

    name: Literal["qk_norm"] = "qk_norm"

    def configure(self, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        if isinstance(hf_config, EvenkeelLlamaConfig):
            return evenkeel_llama(hf_config, qk_norm=True)
        return as_config(Qwen3Config, hf_config)

    def check(self, weights: list[Weight]) -> None:
        wanted = getattr(self.run.model_config, "mlp_bias", False)
        if wanted and not any(weight.role == "bias" and ".mlp." in weight.name for weight in weights):
            raise UserError(
                "methods: qk_norm makes the model a Qwen3, whose MLPs have no biases. Set model.mlp_bias to false."
            )

    def fold_note(self) -> str | None:
        return "queries and keys are normalized per head, as Qwen3's attention does"

    def training_rule(self, weight: Weight) -> str | None:
        if weight.role in ("q", "k"):
            return "qk_norm: outputs normalized, whatever its scale"
        is_gain = weight.name.endswith(("q_norm.weight", "k_norm.weight"))
        return "qk_norm: RMS of each head's values" if is_gain else None

"""Pre-LN: LayerNorm in place of RMSNorm, in the blocks and at the end, as before RMSNorm became usual.

    LayerNorm(x) = γ (x - mean(x)) / sqrt(var(x) + eps)      without a bias, and eps is the model's rms_norm_eps

Such a model is the same function as an RMSNorm model whose residual stream has mean 0. LayerNorm does not depend on that
mean, and var(x) = mean(x²) where it is 0, so eps stays. Hence the export subtracts the mean from everything that is added
to the stream: from each row of the embedding, and over the outputs of o and down. A tied model is exported untied,
because with the final norm's gain the mean of its rows has an effect on the head.

Source: Ba et al. 2016 (arXiv 1607.06450) and Xiong et al. 2020 (arXiv 2002.04745). The equivalence: Jiang et al. 2023,
"Pre-RMSNorm and Pre-CRMSNorm Transformers" (arXiv 2305.14858). A bias of the norms would fold into biases of q, k, v,
gate and up, but the final norm's into none that Llama has. Recent LayerNorm models have no bias either.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedConfig

from pretrain.methods.base import NORMALIZATION, Method
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.model.norms import change_norm, is_stream_norm, stream_norms

_EMBEDDING = "model.embed_tokens.weight"
_TO_THE_STREAM = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")


class PreLN(Method):
    """LayerNorm. Folds into the stock RMSNorm class by centring what is added to the residual stream."""

    decides: ClassVar[frozenset[str]] = frozenset({NORMALIZATION})
    needs: ClassVar[frozenset[Need]] = frozenset({"pre_norm", "rms_norm", "direct_branches"})
    fold_order: ClassVar[int] = 2  # once the embedding is what enters the stream

    name: Literal["pre_ln"] = "pre_ln"

    def transform(self, model: torch.nn.Module) -> None:
        for name in stream_norms(model):
            change_norm(model, name, centred=True)

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        if hf_config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors[_EMBEDDING]
            hf_config.tie_word_embeddings = False
        change(tensors, _EMBEDDING, partial(_centred, dim=1))
        for name in tensors:
            if name.endswith(_TO_THE_STREAM):
                change(tensors, name, partial(_centred, dim=0))
        return hf_config

    def fold_note(self) -> str | None:
        untied = "; the head keeps the embedding as it was trained, so the two are no longer tied"
        return (
            "the mean over the hidden channels is taken out of the embedding and of the outputs of o and down, after "
            "which RMSNorm gives what LayerNorm gave" + (untied if self.run.tied else "")
        )

    def training_rule(self, weight: Weight) -> str | None:
        return "pre_ln: gain of a LayerNorm" if is_stream_norm(weight.name.removesuffix(".weight")) else None


def _centred(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the tensor minus its mean over the hidden channels, which are dimension `dim`."""
    return tensor - tensor.mean(dim, keepdim=True)

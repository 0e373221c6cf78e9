"""Outlier-Safe Pre-Training (OSP): no channel has a privileged place, so that none grows into an outlier.

    SSNorm     y = γ x / RMS(x)      one trained γ for all channels of a norm, in the blocks and at the end
    EmbProj    x_0 = E[token] R_1,  logits = (h R_2) Uᵀ      R_1, R_2 trained, full matrices, orthogonal at the start

Activations without outliers survive quantization to 4 bits. A gain for each channel lets single channels grow. Adam's
division by each element's own size makes the axes special. Therefore the paper steps the matrices with Muon
(`optim.name: muon` in the run file), and embedding and head with Adam. EmbProj keeps the effect of Adam on the embeddings
out of the residual stream's axes.

Source: Park et al. 2025, "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models"
(arXiv 2506.19697). Both parts are on, as in the paper. The norm is that of the release, RMS with a scalar, not the l2
norm of the paper's formula. The projections have no bias (one after R_2 would be a bias of the logits, which Llama
lacks). The release's Muon orthogonalizes q, k and v head by head and steps the norms' gains too. Here it takes whole
matrices.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import model_validator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pretrain.errors import UserError
from pretrain.methods.base import EMBEDDING, NORMALIZATION, Method
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.model.norms import change_norm, is_stream_norm, stream_norms
from pretrain.sharded.draws import Draw, Orthogonal

_EMBED_PROJECTION = "model.embed_projection.weight"  # R_1ᵀ: nn.Linear stores (outputs, inputs)
_HEAD_PROJECTION = "model.head_projection.weight"  # R_2ᵀ
_ROWS = 4096  # of the vocabulary that are multiplied at once


class OSP(Method):
    """OSP's architecture. Folds into the stock class by γ ← γ 1, E ← E R_1, U ← U R_2ᵀ.

    Attributes:
        single_scale_norm: SSNorm.
        embedding_projection: EmbProj. The model's embeddings must not be tied.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"pre_norm", "rms_norm"})
    tensor_parallel: ClassVar[bool] = False

    name: Literal["osp"] = "osp"
    single_scale_norm: bool = True
    embedding_projection: bool = True

    @property
    def decides(self) -> frozenset[str]:
        parts = {NORMALIZATION: self.single_scale_norm, EMBEDDING: self.embedding_projection}
        return frozenset(part for part, chosen in parts.items() if chosen)

    @model_validator(mode="after")
    def _does_something(self) -> OSP:
        if not self.decides:
            raise ValueError(
                "both of its parts are off: turn single_scale_norm or embedding_projection on, or remove it"
            )
        return self

    def transform(self, model: PreTrainedModel) -> None:
        if self.single_scale_norm:
            for name in stream_norms(model):
                change_norm(model, name, gains=1)
        if self.embedding_projection:
            base, size = cast("PreTrainedModel", model.base_model), self.run.hidden_size
            base.embed_projection = nn.Linear(size, size, bias=False)
            base.head_projection = nn.Linear(size, size, bias=False)
            base.register_forward_pre_hook(_project_embedding, with_kwargs=True)
            base.register_forward_hook(_project_output)

    def check(self, weights: list[Weight]) -> None:
        if self.embedding_projection and self.run.tied:
            raise UserError(
                "methods: osp.embedding_projection needs an embedding and a head of their own, because each is multiplied "
                "by another matrix. Set model.tie_word_embeddings to false, or osp.embedding_projection."
            )

    def init_draw(self, weight: Weight) -> Draw | None:
        return Orthogonal(self.run.hidden_size) if weight.role == "projection" else None

    def init_rule(self, weight: Weight) -> str | None:
        return "osp" if weight.role == "projection" else None

    def training_rule(self, weight: Weight) -> str | None:
        if weight.role == "projection":
            return f"osp: times the {'embedding' if weight.name == _EMBED_PROJECTION else 'head'}"
        if self.embedding_projection and weight.role in ("embed", "head"):
            return "osp: times its projection"
        return "osp: one gain for all channels" if weight.role == "norm" and weight.shape == (1,) else None

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        if self.single_scale_norm:
            for name in tensors:
                if is_stream_norm(name.removesuffix(".weight")):
                    change(tensors, name, lambda gain: gain.repeat(hf_config.hidden_size))
        if self.embedding_projection:
            by_input, by_output = tensors.pop(_EMBED_PROJECTION), tensors.pop(_HEAD_PROJECTION)
            change(tensors, "model.embed_tokens.weight", lambda rows: _product(rows, by_input().T))
            change(tensors, "lm_head.weight", lambda rows: _product(rows, by_output()))
        return hf_config

    def fold_note(self) -> str | None:
        parts = {
            "each norm's one gain is written for every channel": self.single_scale_norm,
            "embedding and head are multiplied by their projections": self.embedding_projection,
        }
        return "; ".join(part for part, chosen in parts.items() if chosen)


def _project_embedding(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Replace the tokens by their projected embeddings, before the decoder."""
    ids = kwargs.pop("input_ids")
    return args, {**kwargs, "inputs_embeds": base.embed_projection(base.embed_tokens(ids))}


def _project_output(base: Any, args: tuple[Any, ...], output: BaseModelOutputWithPast) -> None:
    """Project the input of the head, after the decoder."""
    output.last_hidden_state = base.head_projection(output.last_hidden_state)


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return rows @ matrix, summed in float64, some rows at a time, because float64 takes twice the memory."""
    matrix = matrix.double()
    return torch.cat([(some.double() @ matrix).float() for some in rows.split(_ROWS)])

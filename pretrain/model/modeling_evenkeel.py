"""A LLaMA with parts that no class of transformers has: dynamic gains in its norms, attention over depth.

This one file is the model. It needs only torch and transformers, so it is copied beside exported weights:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. Without any of its parts it is a stock LLaMA.

    seednorm             RMSNorm(x) gets the gain  tanh(x·β) α + γ,  which depends on the token
    attention_residuals  a sub-layer reads  Σ_i softmax_i(w · RMSNorm(v_i)) v_i  of the outputs of earlier ones, not Σ_i v_i
    qk_norm              RMSNorm over the values of each head of q and k, before the rotation (as in Qwen3)

Sources: Cai et al. 2025, "SeeDNorm" (arXiv 2510.22777); Kimi Team 2026, "Attention Residuals" (arXiv 2603.15031).
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

# The tensors that later sub-layers read: the newest source, and those before it from the oldest on.
Sources = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


class EvenkeelLlamaConfig(LlamaConfig):
    """A LLaMA's configuration and the additional parts of the model.

    Attributes:
        seednorm: SeeDNorm in place of RMSNorm.
        qk_norm: RMSNorm of queries and keys.
        attention_residuals: attention over depth.
        attention_residual_blocks: the number of blocks of consecutive sub-layers within which outputs are summed before
            later ones read them. None: each output is read separately.
    """

    model_type = "evenkeel_llama"

    seednorm: bool = False
    qk_norm: bool = False
    attention_residuals: bool = False
    attention_residual_blocks: int | None = None

    def opens_block(self, sublayer: int) -> bool:
        """Return whether a sub-layer, 0 to 2N - 1 (attention, MLP, attention, ...), is the first of its block.

        Where the blocks cannot all have the same size, the first ones are one sub-layer larger.
        """
        sublayers = 2 * self.num_hidden_layers
        size, larger = divmod(sublayers, self.attention_residual_blocks or sublayers)
        in_larger = larger * (size + 1)
        return sublayer % (size + 1) == 0 if sublayer < in_larger else (sublayer - in_larger) % size == 0


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class SeeDNorm(nn.Module):
    """y = [tanh(x·β) α + γ] ⊙ x / RMS(x), with γ (`weight`), α and β vectors of `hidden_size`.

    It is computed in float32. x / RMS(x) and the gain are rounded before they are multiplied, as in the stock RMSNorm.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.alpha = nn.Parameter(torch.ones(hidden_size))
        self.beta = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = _at_least_float32(hidden_states)
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        share = torch.tanh((wide * self.beta).sum(-1, keepdim=True))
        return self.gain(share).to(hidden_states.dtype) * normal.to(hidden_states.dtype)

    def gain(self, share: torch.Tensor) -> torch.Tensor:
        """Return the gain for tanh(x·β), which is (..., 1)."""
        return share * self.alpha + self.weight


class DepthRead(nn.Module):
    """The input of one sub-layer: Σ_i a_i v_i over the sources v_i, with a = softmax_i(query · RMSNorm(v_i)).

    The query, (hidden_size,), is 0 at first, so that a plain average is read. RMSNorm has no gain, because it would only
    multiply the query.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, sources: Sources) -> torch.Tensor:
        newest, earlier = sources
        return _Mixture.apply(self.eps, self.query, *earlier, newest)


class _Mixture(torch.autograd.Function):
    """The mixture of `DepthRead`, computed in float32. It keeps the sources for backward and nothing else of their size.

    Autograd alone would keep float32 copies of all sources of a half precision model, once for every sub-layer.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, query: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        ctx.eps = eps
        ctx.save_for_backward(query, *sources)
        return _mixture(eps, query, *sources)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            mixed = _mixture(ctx.eps, *leaves)
        return None, *torch.autograd.grad(mixed, leaves, gradient)


def _mixture(eps: float, query: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    wide = [_at_least_float32(source) for source in sources]
    scores = [(each * query).sum(-1) * torch.rsqrt(each.square().mean(-1) + eps) for each in wide]
    shares = torch.stack(scores).softmax(0).unsqueeze(-1)
    return sum(share * each for share, each in zip(shares, wide, strict=True)).to(sources[0].dtype)


class EvenkeelLlamaDecoderLayer(LlamaDecoderLayer):
    """A LLaMA's block with the attention and the norms of the configuration."""

    def __init__(self, config: EvenkeelLlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        attention: Any = Qwen3Attention if config.qk_norm else LlamaAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)


class DepthReadingLayer(EvenkeelLlamaDecoderLayer):
    """A block with attention over depth. It takes and returns `Sources`. The last one returns the final norm's input."""

    def __init__(self, config: EvenkeelLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attn_read = DepthRead(config.hidden_size, config.rms_norm_eps)
        self.mlp_read = DepthRead(config.hidden_size, config.rms_norm_eps)
        last = layer_idx == config.num_hidden_layers - 1
        self.output_read = DepthRead(config.hidden_size, config.rms_norm_eps) if last else None
        self.attn_opens_block = config.opens_block(2 * layer_idx)
        self.mlp_opens_block = config.opens_block(2 * layer_idx + 1)

    def forward(  # type: ignore[override]  # LLaMA's decoder passes on whatever a block returns
        self, hidden_states: torch.Tensor | Sources, **kwargs: Any
    ) -> torch.Tensor | Sources:
        """Return the sources after this block.

        Args:
            hidden_states: the embedding's output in the first block, the result of the block before in the others.
            kwargs: the arguments of the attention.
        """
        sources = (hidden_states, ()) if isinstance(hidden_states, torch.Tensor) else hidden_states
        read = self.input_layernorm(self.attn_read(sources))
        written, _ = self.self_attn(hidden_states=read, **kwargs)
        sources = _written(sources, written, self.attn_opens_block)
        read = self.post_attention_layernorm(self.mlp_read(sources))
        sources = _written(sources, self.mlp(read), self.mlp_opens_block)
        return sources if self.output_read is None else self.output_read(sources)


def _written(sources: Sources, output: torch.Tensor, opens_block: bool) -> Sources:
    """Return the sources after a sub-layer: with its output as one more, or added to the newest."""
    newest, earlier = sources
    return (output, (*earlier, newest)) if opens_block else (newest + output, earlier)


def _norm(config: EvenkeelLlamaConfig) -> Any:
    return (SeeDNorm if config.seednorm else LlamaRMSNorm)(config.hidden_size, eps=config.rms_norm_eps)


class EvenkeelLlamaPreTrainedModel(LlamaPreTrainedModel):
    """The declarations that transformers reads."""

    config: EvenkeelLlamaConfig
    config_class = EvenkeelLlamaConfig
    # transformers declares these two as instance variables.
    _no_split_modules: ClassVar = ["EvenkeelLlamaDecoderLayer", "DepthReadingLayer"]  # type: ignore[misc]
    _can_record_outputs: ClassVar = {  # type: ignore[misc]
        "hidden_states": EvenkeelLlamaDecoderLayer,
        "attentions": [LlamaAttention, Qwen3Attention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SeeDNorm):
            nn.init.ones_(module.weight)
            nn.init.ones_(module.alpha)
            nn.init.zeros_(module.beta)
        elif isinstance(module, DepthRead):
            nn.init.zeros_(module.query)


class EvenkeelLlamaModel(EvenkeelLlamaPreTrainedModel, LlamaModel):
    """Embedding, blocks and final norm. LLaMA's forward passes on whatever a block returns."""

    def __init__(self, config: EvenkeelLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layer = DepthReadingLayer if config.attention_residuals else EvenkeelLlamaDecoderLayer
        self.layers = nn.ModuleList([layer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = _norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class EvenkeelLlamaForCausalLM(EvenkeelLlamaPreTrainedModel, LlamaForCausalLM):
    """The language model. It generates with the stock KV cache, because depth is read again for every token."""

    def __init__(self, config: EvenkeelLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = EvenkeelLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

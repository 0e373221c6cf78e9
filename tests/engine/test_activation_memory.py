"""The bytes that a block keeps for its backward pass: the formula of docs/performance.md."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from pretrain.engine.build_model import model_class
from pretrain.model.attention import choose_attention

TOKENS = 64


def kept(hidden: int, mlp: int, heads: int, layers: int) -> float:
    """Return the bytes per token that autograd keeps of a bf16 decoder, besides its weights. Each storage counts once."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    model = model_class(config)(config).bfloat16().train()
    choose_attention(model, documents=False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        result = model.base_model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    assert result.last_hidden_state.requires_grad
    return sum(size for address, size in storages.items() if address not in weights) / TOKENS


@pytest.mark.parametrize(("hidden", "mlp", "heads"), [(64, 128, 4), (128, 96, 8)])
def test_a_block_keeps_as_much_as_stated(hidden: int, mlp: int, heads: int) -> None:
    of_one_block = kept(hidden, mlp, heads, layers=3) - kept(hidden, mlp, heads, layers=2)
    assert of_one_block == 24 * hidden + 8 * mlp + 4 * heads + 8

"""The norms that methods train with, against the stock norms that they are exported to."""

from itertools import permutations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pretrain.model.norms import Norm, NormKind, ScaledLayerNorm, change_norm, is_stream_norm, scaled

SIZE, EPS = 24, 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def hidden(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(3, 7, SIZE, generator=torch.Generator().manual_seed(0)) + 0.3).to(dtype)


def with_gain(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = (1 + 0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return norm


@DTYPES
@pytest.mark.parametrize("gains", [SIZE, 1])
@pytest.mark.parametrize("factor", [1.0, 3**-0.5])
def test_an_rms_norm_is_llamas_with_the_folded_gain_to_the_bit(dtype, gains, factor):
    norm = with_gain(Norm(NormKind(EPS, gains, factor=factor)), dtype)
    stock = LlamaRMSNorm(SIZE, EPS)
    stock.weight.data = scaled(norm.weight.data.float(), factor).expand(SIZE).to(dtype)
    assert torch.equal(norm(hidden(dtype)), stock(hidden(dtype)))


def test_a_centred_norm_is_layer_norm_and_rms_norm_of_what_has_mean_0():
    x = hidden(torch.float32)
    norm = with_gain(Norm(NormKind(EPS, SIZE, centred=True)), torch.float32)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (SIZE,), norm.weight, eps=EPS))
    stock = LlamaRMSNorm(SIZE, EPS)
    stock.weight = norm.weight
    torch.testing.assert_close(norm(x), stock(x - x.mean(-1, keepdim=True)))


@DTYPES
def test_a_scaled_layer_norm_is_the_stock_one_with_folded_gain_and_bias_to_the_bit(dtype):
    norm = with_gain(ScaledLayerNorm(SIZE, EPS, 3**-0.5), dtype)
    gain, bias = (scaled(each.data.float(), 3**-0.5).to(dtype) for each in (norm.weight, norm.bias))
    assert torch.equal(norm(hidden(dtype)), F.layer_norm(hidden(dtype), (SIZE,), gain, bias, EPS))


@DTYPES
@pytest.mark.parametrize(
    "make", [lambda: Norm(NormKind(EPS, SIZE, factor=3**-0.5)), lambda: ScaledLayerNorm(SIZE, EPS, 0.7)]
)
def test_a_factor_that_is_held_as_a_tensor_changes_no_bit(dtype, make):
    norm = with_gain(make(), dtype)
    expected = norm(hidden(dtype))
    norm.take_factor_as_tensor(torch.device("cpu"))
    assert torch.equal(norm(hidden(dtype)), expected)


@pytest.mark.parametrize("stock", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("changes", permutations([{"gains": 1}, {"factor": 0.5}, {"centred": True}]))
def test_changes_add_up_in_any_order(stock, changes):
    model = nn.ModuleDict({"norm": stock(SIZE, EPS)})
    for change in changes:
        change_norm(model, "norm", **change)
    assert model["norm"].kind == NormKind(EPS, gains=1, centred=True, factor=0.5)
    assert model["norm"].weight.shape == (1,)


def test_what_is_no_rms_norm_is_not_changed():
    with pytest.raises(TypeError, match="norm is a LayerNorm"):
        change_norm(nn.ModuleDict({"norm": nn.LayerNorm(SIZE)}), "norm", factor=0.5)


def test_norms_of_heads_are_none_of_the_stream():
    assert is_stream_norm("model.layers.3.post_attention_layernorm")
    assert is_stream_norm("model.norm")
    assert not is_stream_norm("model.layers.3.self_attn.q_norm")
    assert not is_stream_norm("model.embed_tokens")

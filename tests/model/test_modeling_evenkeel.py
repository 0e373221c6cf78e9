"""Evenkeel's own model class, used as a Hugging Face model."""

from __future__ import annotations

import ast
import sys
from itertools import permutations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from pretrain.methods.attention_residuals import AttentionResiduals
from pretrain.methods.qk_norm import QKNorm
from pretrain.methods.seednorm import SeeDNormMethod
from pretrain.model.evenkeel_llama import MODELING_FILE, EvenkeelLlamaConfig, EvenkeelLlamaForCausalLM, evenkeel_llama

LLAMA = LlamaConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
PARTS = {
    "seednorm": {"seednorm": True},
    "full": {"attention_residuals": True},
    "blocks": {"attention_residuals": True, "attention_residual_blocks": 2},
    "all": {"seednorm": True, "qk_norm": True, "attention_residuals": True, "attention_residual_blocks": 4},
}


def random_model(**parts) -> EvenkeelLlamaForCausalLM:
    """Move every weight away from its initial value."""
    model = EvenkeelLlamaForCausalLM(evenkeel_llama(LLAMA, **parts))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(params=PARTS)
def model(request: pytest.FixtureRequest) -> EvenkeelLlamaForCausalLM:
    return random_model(**PARTS[request.param])


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(3))


def test_the_file_needs_torch_and_transformers_alone() -> None:
    nodes = list(ast.walk(ast.parse(MODELING_FILE.read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.parametrize("stock_class", [LlamaForCausalLM, Qwen3ForCausalLM])
def test_without_parts_of_its_own_it_is_the_stock_model_to_the_bit(stock_class: type) -> None:
    config = QKNorm().configure(LLAMA) if stock_class is Qwen3ForCausalLM else LLAMA
    stock, own = stock_class(config).eval(), EvenkeelLlamaForCausalLM(evenkeel_llama(config)).eval()
    own.load_state_dict(stock.state_dict())
    assert torch.equal(own(ids(2, 30)).logits, stock(ids(2, 30)).logits)


def test_the_cache_changes_no_generated_token(model: EvenkeelLlamaForCausalLM) -> None:
    fixed = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(ids(2, 5), **fixed, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    assert len(set(cached.flatten().tolist())) > 5


def test_padding_on_the_left_changes_nothing_behind_it(model: EvenkeelLlamaForCausalLM) -> None:
    text = ids(1, 9)
    padded, mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), text], 1), torch.ones(1, 13, dtype=torch.long)
    mask[:, :4] = 0
    found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 4:]
    torch.testing.assert_close(found, model(text).logits, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions_can_be_asked_for(model: EvenkeelLlamaForCausalLM) -> None:
    model.set_attn_implementation("eager")
    found = model(ids(2, 8), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in found.hidden_states] == [(2, 8, 48)] * 4
    assert [share.shape for share in found.attentions] == [(2, 4, 8, 8)] * 3


def test_saving_and_loading_changes_nothing(model: EvenkeelLlamaForCausalLM, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(AutoConfig.from_pretrained(tmp_path)) is EvenkeelLlamaConfig
    assert torch.equal(again(ids(2, 20)).logits, model(ids(2, 20)).logits)


def test_a_fresh_model_starts_as_the_methods_start() -> None:
    parts = AutoModelForCausalLM.from_config(evenkeel_llama(LLAMA, **PARTS["all"])).state_dict()
    starts = {"alpha": 1.0, "beta": 0.0, "query": 0.0}
    for name, value in parts.items():
        start = starts.get(name.rpartition(".")[2], 1.0 if "norm" in name else None)
        if start is not None:
            assert torch.equal(value, torch.full_like(value, start)), name


def test_checkpointing_activations_changes_no_gradient(model: EvenkeelLlamaForCausalLM) -> None:
    def gradients() -> list[torch.Tensor]:
        loss = model(ids(2, 16), labels=ids(2, 16), use_cache=False).loss
        return list(torch.autograd.grad(loss, list(model.parameters())))

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(found, expected) for found, expected in zip(gradients(), plain, strict=True))


def test_bf16_keeps_the_sources_of_a_read_for_backward_and_no_wider_copies() -> None:
    model = random_model(**PARTS["full"]).bfloat16()
    kept: list[torch.Tensor] = []
    sources = [torch.randn(2, 8, 48, dtype=torch.bfloat16, requires_grad=True) for _ in range(5)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.model.layers[2].mlp_read((sources[-1], tuple(sources[:-1])))
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert {tensor.data_ptr() for tensor in kept if tensor.dim() == 3} == {source.data_ptr() for source in sources}


@pytest.mark.parametrize("order", list(permutations((SeeDNormMethod(), QKNorm(), AttentionResiduals(blocks=3)))))
def test_methods_set_their_parts_in_any_order(order) -> None:
    config = LLAMA
    for method in order:
        config = method.configure(config)
    assert type(config) is EvenkeelLlamaConfig
    assert (config.seednorm, config.qk_norm, config.attention_residuals) == (True, True, True)
    assert config.attention_residual_blocks == 3
    assert config.hidden_size == 48


@pytest.mark.parametrize(
    ("blocks", "sizes"), [(None, [1] * 6), (6, [1] * 6), (4, [2, 2, 1, 1]), (3, [2] * 3), (1, [6])]
)
def test_blocks_cover_the_sublayers(blocks: int | None, sizes: list[int]) -> None:
    config = evenkeel_llama(LLAMA, attention_residuals=True, attention_residual_blocks=blocks)
    opened = [sublayer for sublayer in range(6) if config.opens_block(sublayer)]
    assert [after - before for before, after in zip(opened, [*opened[1:], 6], strict=True)] == sizes

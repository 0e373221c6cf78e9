"""The fold of softcap: gains minus 1 without losing digits, and models that VaultGemma cannot hold."""

import pytest
import torch
from transformers import GraniteConfig, LlamaConfig

from pretrain.errors import UserError
from pretrain.methods import REGISTRY, decisions_that_clash
from pretrain.methods.softcap import Softcap
from pretrain.model.export_edits import as_lazy
from pretrain.model.layout import describe

BLOCK = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
# of all signs and sizes: 0.1 - 1 has lost three of bf16's eight bits
GAINS = torch.tensor([1.0, 0.5, 2.0, 1.9, 0.1, 3e-3, 7.0, 40.0, -0.3, -1.0, 0.0, 0.77, 1.23, 0.49, 2.1, -9.0])


def llama(**fields) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, **fields,
    )  # fmt: skip


def tensors_of(tied: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (11, 16)} | ({} if tied else {"lm_head.weight": (11, 16)})
    shapes |= {f"model.layers.0.{module}.weight": shape for module, shape in BLOCK.items()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made |= {f"model.layers.0.{norm}.weight": GAINS for norm in NORMS} | {"model.norm.weight": GAINS.roll(3)}
    return {name: tensor.bfloat16().float() for name, tensor in made.items()}


def folded(config, tied: bool):
    lazy = as_lazy(tensors_of(tied))
    config = Softcap(cap=9.0).fold(lazy, config)
    return {name: load() for name, load in lazy.items()}, config


def test_every_gain_survives_in_bf16_together_with_what_reads_it():
    before, (after, _) = tensors_of(tied=False), folded(llama(), tied=False)
    pairs = {
        "layers.0.input_layernorm": ("layers.0.input_layernorm", "layers.0.self_attn.k_proj"),
        "layers.0.post_attention_layernorm": ("layers.0.pre_feedforward_layernorm", "layers.0.mlp.up_proj"),
    }
    for old, (new, reader) in pairs.items():
        gain = 1.0 + after[f"model.{new}.weight"].bfloat16().float()
        matrix = after[f"model.{reader}.weight"].bfloat16().float()
        expected = before[f"model.{reader}.weight"] * before[f"model.{old}.weight"]
        assert torch.equal(matrix * gain, expected)
    gain, head = 1.0 + after["model.norm.weight"].bfloat16().float(), after["lm_head.weight"].bfloat16().float()
    assert torch.equal(head * gain, before["lm_head.weight"] * before["model.norm.weight"])


def test_a_tied_head_sees_what_it_saw():
    before, (after, config) = tensors_of(tied=True), folded(llama(tie_word_embeddings=True), tied=True)
    assert config.tie_word_embeddings
    torch.testing.assert_close(4.0 * after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    head = after["model.embed_tokens.weight"] * (1.0 + after["model.norm.weight"])
    torch.testing.assert_close(head, before["model.embed_tokens.weight"] * before["model.norm.weight"])


def test_granites_embedding_multiplier_is_kept():
    shared = {key: value for key, value in llama(tie_word_embeddings=True).to_dict().items() if key != "model_type"}
    config = GraniteConfig(**shared, embedding_multiplier=6.0)
    before, (after, _) = tensors_of(tied=True), folded(config, tied=True)
    torch.testing.assert_close(4.0 * after["model.embed_tokens.weight"], 6.0 * before["model.embed_tokens.weight"])
    head = after["model.embed_tokens.weight"] * (1.0 + after["model.norm.weight"])
    torch.testing.assert_close(head, before["model.embed_tokens.weight"] * before["model.norm.weight"])


def test_nothing_of_googles_defaults_is_left_in_the_configuration():
    given = llama(head_dim=6, rms_norm_eps=3e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config = Softcap(cap=9.0).fold(as_lazy(tensors_of(tied=False)), given)
    assert config.hidden_activation == "silu"
    assert (config.head_dim, config.query_pre_attn_scalar) == (6, 6)
    assert (config.final_logit_softcapping, config.attn_logit_softcapping) == (9.0, None)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (3e-5, 5e5)
    assert (config.layer_types, config.tie_word_embeddings) == (["full_attention"], False)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, 1, 2)


def test_a_bias_of_an_mlp_is_refused():
    with pytest.raises(UserError, match="mlp_bias"):
        Softcap().check([describe("model.layers.0.mlp.up_proj.bias", (24,))])


@pytest.mark.parametrize(
    ("other", "reason"),
    [("qk_norm", "normalized queries"), ("mu_centering", "capped softmax"), ("seednorm", "VaultGemma")],
)
def test_what_it_cannot_be_combined_with(other, reason):
    (clash,) = decisions_that_clash((Softcap(), REGISTRY[other]()))
    assert reason in clash

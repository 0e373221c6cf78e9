"""Several documents in one sequence, against each of them computed alone: losses of all tokens, and all gradients."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GraniteConfig, LlamaConfig, Qwen3Config

from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.engine.build_model import bind_methods, hf_config, model_class, transformed
from pretrain.methods import REGISTRY, Method
from pretrain.model.attention import DOCUMENTS
from pretrain.model.evenkeel_llama import EvenkeelLlamaConfig
from pretrain.model.families import missing
from tests.support.tiny_engines import TinyTokenizer

VOCABULARY, SEQ_LEN = 61, 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": SEQ_LEN,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": SEQ_LEN, "initializer_range": 0.3}
GPT2 |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
FAMILIES = {"llama": {key: value for key, value in SIZES.items() if key != "vocab_size"}, "gpt2": GPT2}
BACKBONES = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, **GPT2),
    "qwen3": Qwen3Config(**SIZES),
    "granite": GraniteConfig(**SIZES, attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0),
    "evenkeel_llama": EvenkeelLlamaConfig(**SIZES, seednorm=True, qk_norm=True, attention_residuals=True),
}
# Tokens of the documents in each sequence of inputs: one that fills it, one of a single token, equal ones side by side.
LENGTHS = [[9, 1, 7, 7], [SEQ_LEN], [1, 1, 20, 2]]


@pytest.fixture(params=BACKBONES)
def model(request):
    torch.manual_seed(0)
    config = deepcopy(BACKBONES[request.param])
    return model_class(config)(config).double().train()


def batch() -> MicroBatch:
    """The last token of each document has no target, as when the next one is another document's first."""
    tokens = torch.randint(0, VOCABULARY, (len(LENGTHS), SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    counted = torch.ones(len(LENGTHS), SEQ_LEN, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        counted[row, torch.tensor(lengths).cumsum(0) - 1] = False
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    return MicroBatch(tokens, counted, positions)


def token_losses(model, tokens: torch.Tensor, targets: torch.Tensor, **more) -> torch.Tensor:
    logits = model(tokens, use_cache=False, **more).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def alone(model) -> torch.Tensor:
    """Return (sequences, seq_len) losses, each document in a forward pass of its own, without positions."""
    found = torch.zeros(len(LENGTHS), SEQ_LEN, dtype=torch.float64)
    together = batch()
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            inside = (slice(row, row + 1), slice(first, first + length))
            found[inside] = token_losses(model, together.inputs[inside], together.targets[inside])
            first += length
    return found


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


CLOSE = {"rtol": 1e-9, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}  # the precision of `LossHead`, and of the softmax of eager attention


@pytest.mark.parametrize("attention", ["sdpa", "eager", DOCUMENTS])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_documents_do_not_see_each_other(
    model, attention: str, checkpointing: bool, flex_attention_with_gradients: None
) -> None:
    expected = alone(model)
    expected_gradients = gradients(model, expected.sum() / batch().counted.sum())
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    given = batch()
    found = token_losses(model, given.inputs, given.targets, position_ids=given.positions)
    torch.testing.assert_close(found, expected, **(FLOAT32 if attention == "eager" else CLOSE))
    loss = model(given.inputs, given.targets, position_ids=given.positions)["total"]
    assert loss.item() == pytest.approx((expected.sum() / given.counted.sum()).item(), rel=1e-5)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], **FLOAT32, msg=lambda text, name=name: name + text
        )


def test_without_positions_they_do(model) -> None:
    expected, given = alone(model), batch()
    found = token_losses(model, given.inputs, given.targets)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    assert (found - expected)[0, 10:].abs().max() > 0.01


def changes_the_model(method: type[Method]) -> bool:
    return any(getattr(method, hook) is not getattr(Method, hook) for hook in ("configure", "transform"))


@pytest.mark.parametrize(
    ("method", "family"),
    [
        (name, family)
        for name, cls in REGISTRY.items()
        if changes_the_model(cls)
        for family in FAMILIES
        if not missing(family, cls.needs)
    ],
)
def test_no_method_lets_documents_see_each_other(method: str, family: str) -> None:
    config = Config.model_validate(
        {
            "name": "case",
            "model": {"family": family, **FAMILIES[family]},
            "tokenizer": "none",
            "data": {"train": "none", "seq_len": SEQ_LEN, "global_batch_size": 1, "micro_batch_size": 1},
            "steps": 1,
            "optim": {"lr": 1e-3},
            "methods": [{"name": method}],
            "deepspeed": {"zero_optimization": {"stage": 0}},
        }
    )
    model_config = hf_config(config, TinyTokenizer(VOCABULARY))
    trained = model_class(model_config)(model_config)
    model = transformed(trained, bind_methods(config, model_config)).double().train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given = batch()
    found = token_losses(model, given.inputs, given.targets, position_ids=given.positions)
    torch.testing.assert_close(found, alone(model), **CLOSE)

"""Terms on hidden states against stock transformers' own hidden states, with targets that do not count, and recomputed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.engine.recomputation import checkpoint_options
from pretrain.model.hidden_terms import HiddenTerm
from pretrain.model.loss import hidden_terms_of, with_loss_head

LAYERS, VOCABULARY = 3, 50
CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    vocab_size=VOCABULARY,
    attn_implementation="eager",
)


def of_all_but_the_last(layer: int, states: torch.Tensor) -> torch.Tensor:
    """Return a term that differs by layer. transformers has no state after the last block, so that one has none."""
    return states.square().sum(-1) * (10.0 * layer if layer < LAYERS else 0.0)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))
    targets = tokens[:, 1:].clone()
    targets[0, 3:7] = targets[1, 0] = -100
    return tokens[:, :-1], targets


def stock() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def expected(inputs: torch.Tensor, targets: torch.Tensor, divisor: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the term and the gradients of the whole loss from the hidden states that transformers itself returns."""
    model = stock()
    output = model(inputs, output_hidden_states=True)
    counts = targets != -100
    term = sum(
        (10.0 * layer * output.hidden_states[layer].square().sum(-1))[counts].sum() for layer in range(1, LAYERS)
    )
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    ((cross_entropy + term) / divisor).backward()
    return (term / divisor).item(), gradients(model)


@pytest.mark.parametrize("recomputed", ["off", "full", "selective"])
@pytest.mark.parametrize("divisor", [None, 7.0])
def test_a_term_counts_what_the_cross_entropy_counts_and_has_its_gradients(
    batch: tuple[torch.Tensor, torch.Tensor], recomputed: str, divisor: float | None
) -> None:
    inputs, targets = batch
    model = with_loss_head(LlamaForCausalLM)(CONFIG)
    model.load_state_dict(stock().state_dict())
    hidden_terms_of(model)["by_hand"] = HiddenTerm(of_all_but_the_last)
    if recomputed != "off":
        model.gradient_checkpointing_enable(checkpoint_options(recomputed))
    losses = model.train()(inputs, targets, None if divisor is None else torch.tensor(divisor))
    losses["total"].backward()
    value, grads = expected(inputs, targets, divisor or int((targets != -100).sum()))
    assert losses["by_hand"].item() == pytest.approx(value, rel=1e-5)
    assert not losses["by_hand"].requires_grad
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, grads[name], rtol=2e-4, atol=1e-5)


def test_nothing_is_watched_after_the_pass_or_without_terms(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = with_loss_head(LlamaForCausalLM)(CONFIG)
    assert set(model(*batch)) == {"total", "cross_entropy"}
    hidden_terms_of(model)["by_hand"] = HiddenTerm(of_all_but_the_last)
    assert set(model(*batch)) == {"total", "cross_entropy", "by_hand"}
    assert not any(block._forward_hooks for block in model.model.layers)


def test_states_are_not_kept_twice_for_the_backward_pass(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Without the term being computed again, the square of each state in float32 would be kept beside the state."""

    def kept_bytes(terms: dict[str, HiddenTerm]) -> int:
        model = with_loss_head(LlamaForCausalLM)(CONFIG).train()
        hidden_terms_of(model).update(terms)
        sizes: dict[int, int] = {}
        alive = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            alive.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(*batch)["total"]
        assert total.requires_grad
        return sum(sizes.values())

    a_state = 4 * batch[0].numel() * CONFIG.hidden_size
    cubed = HiddenTerm(lambda layer, states: (states.exp().square() * states).sum(-1))
    assert kept_bytes({"cubed": cubed}) - kept_bytes({}) < a_state

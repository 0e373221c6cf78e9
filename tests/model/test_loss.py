"""The chunked loss and the terms that methods add, against torch's own cross-entropy on the full logits."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model import loss as loss_module
from pretrain.model.loss import HeadTerm, LossHead, TokenTerm


@pytest.fixture(params=[1, 7, 1 << 25], ids=["one token a chunk", "ragged chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(LossHead, "chunk_logits", request.param * 53 if request.param < 100 else request.param)


def head_and_input(dtype: torch.dtype) -> tuple[LossHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = LossHead(12, 53).to(dtype)
    hidden = torch.randn(2, 10, 12).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, 53, (2, 10))


def test_loss_and_gradients_equal_those_of_the_full_logits(chunk):
    head, hidden, targets = head_and_input(torch.float64)
    targets[0, 3] = -100
    expected = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1).float(), targets.flatten())
    expected_gradients = torch.autograd.grad(3.0 * expected, (hidden, head.weight))
    loss = head(hidden, targets)["total"]
    gradients = torch.autograd.grad(3.0 * loss, (hidden, head.weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_no_gradient_is_computed_where_none_is_wanted(chunk, monkeypatch):
    head, hidden, targets = head_and_input(torch.float32)
    hidden = hidden.detach()  # as under no_grad
    expected = head(hidden, targets)["total"].detach()
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        assert torch.equal(head(hidden, targets)["total"], expected)


def test_the_loss_of_a_bf16_model_keeps_float32_digits(chunk):
    head, hidden, targets = head_and_input(torch.bfloat16)
    expected = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1).float(), targets.flatten())
    loss = head(hidden, targets)["cross_entropy"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss.item() != loss.bfloat16().item()


def test_small_fp16_gradients_survive_at_the_loss_scale_and_only_there():
    torch.manual_seed(0)
    weight, hidden, targets = 2e-4 * torch.randn(53, 12), torch.randn(1, 4000, 12), torch.randint(0, 53, (1, 4000))
    scale = 2.0**14

    def gradient(dtype: torch.dtype, gradient_scale: float) -> torch.Tensor:
        head = LossHead(12, 53).to(dtype)
        head.gradient_scale = gradient_scale
        head.weight.data.copy_(weight)
        given = hidden.to(dtype).requires_grad_()
        (head(given, targets)["total"] * scale).backward()
        return given.grad.double() / scale

    exact = gradient(torch.float64, 1.0)
    torch.testing.assert_close(gradient(torch.float64, scale), exact)
    assert (gradient(torch.float16, scale) - exact).norm() < 0.01 * exact.norm()
    assert (gradient(torch.float16, 1.0) - exact).norm() > 0.1 * exact.norm()


def test_without_gradients_nothing_is_kept(chunk):
    head, hidden, targets = head_and_input(torch.float32)
    with torch.no_grad():
        loss = head(hidden, targets)["total"]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, head(hidden, targets)["total"].detach())


def test_all_targets_ignored_gives_zero():
    head, hidden, targets = head_and_input(torch.float32)
    assert head(hidden, torch.full_like(targets, -100))["total"].item() == 0.0


TERMS = {
    "spread": TokenTerm(lambda logits: 0.3 * logits.std(-1)),
    "size": HeadTerm(lambda weight: 0.7 * weight.square().mean()),
    "peak": TokenTerm(lambda logits: 0.1 * logits.amax(-1)),
}


@pytest.mark.parametrize("cap", [None, 2.0])
def test_terms_are_means_over_the_tokens_that_count_and_reported_apart(chunk, cap):
    head, hidden, targets = head_and_input(torch.float64)
    head.terms, head.cap = TERMS, cap
    targets[:, ::3] = -100
    logits = F.linear(hidden, head.weight).flatten(0, 1)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    counts = targets.flatten() != -100
    expected = {
        "cross_entropy": F.cross_entropy(logits[counts], targets.flatten()[counts]),
        "spread": 0.3 * logits[counts].std(-1).mean(),
        "peak": 0.1 * logits[counts].amax(-1).mean(),
        "size": 0.7 * head.weight.square().mean(),
    }
    expected_gradients = torch.autograd.grad(sum(expected.values()), (hidden, head.weight), retain_graph=True)
    found = head(hidden, targets)
    gradients = torch.autograd.grad(found["total"], (hidden, head.weight))
    assert found["total"].item() == pytest.approx(sum(expected.values()).item(), rel=1e-6)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6)
        assert not found[name].requires_grad
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_parts_of_a_batch_add_to_the_whole_whichever_part_holds_the_targets(chunk):
    """Each part is divided by the average number of targets. The second part has none."""
    head, hidden, targets = head_and_input(torch.float64)
    head.terms = TERMS
    hidden, targets = hidden.detach().view(4, 5, 12).requires_grad_(), targets.view(4, 5)
    targets[0, 1:], targets[1], targets[3, 2] = -100, -100, -100
    whole = head(hidden, targets)
    divisor = ((targets != -100).sum() / 4).double()
    parts = [head(hidden[n : n + 1], targets[n : n + 1], divisor) for n in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 4, value, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(whole["total"], (hidden, head.weight))
    found = torch.autograd.grad(sum(part["total"] for part in parts) / 4, (hidden, head.weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_capped_logits_come_out_where_no_targets_go_in():
    head, hidden, _ = head_and_input(torch.float32)
    plain = head(hidden)
    head.cap = 1.5
    torch.testing.assert_close(head(hidden), 1.5 * torch.tanh(plain / 1.5))


def test_a_device_that_cannot_add_a_product_unrounded_adds_the_rounded_one():
    torch.manual_seed(0)
    left, right = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    total = torch.randn(5, 3)
    expected = total.double() + (left.double() @ right.double()).bfloat16().double()
    loss_module._add_product(total, left, right)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=0.05)
    assert not loss_module._adds_unrounded(total.device, torch.bfloat16)

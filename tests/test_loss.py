"""The chunked loss against torch's own cross-entropy on the full logits."""

import pytest
import torch
from torch.nn import functional as F

from pretrain import loss as loss_module
from pretrain.loss import LossHead


@pytest.fixture(params=[1, 7, 1 << 25], ids=["one token a chunk", "ragged chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", request.param * 53 if request.param < 100 else request.param)


def head_and_input(dtype: torch.dtype) -> tuple[LossHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = LossHead(12, 53, bias=False).to(dtype)
    hidden = torch.randn(2, 10, 12).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, 53, (2, 10))


def test_loss_and_gradients_equal_those_of_the_full_logits(chunk):
    head, hidden, targets = head_and_input(torch.float64)
    targets[0, 3] = -100
    expected = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1).float(), targets.flatten())
    expected_gradients = torch.autograd.grad(3.0 * expected, (hidden, head.weight))
    loss = head(hidden, targets)
    gradients = torch.autograd.grad(3.0 * loss, (hidden, head.weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_the_loss_of_a_bf16_model_keeps_float32_digits(chunk):
    head, hidden, targets = head_and_input(torch.bfloat16)
    expected = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1).float(), targets.flatten())
    loss = head(hidden, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss.item() != loss.bfloat16().item()


def test_small_fp16_gradients_survive_at_the_loss_scale_and_only_there():
    torch.manual_seed(0)
    weight, hidden, targets = 2e-4 * torch.randn(53, 12), torch.randn(1, 4000, 12), torch.randint(0, 53, (1, 4000))
    scale = 2.0**14

    def gradient(dtype: torch.dtype, gradient_scale: float) -> torch.Tensor:
        head = LossHead(12, 53, bias=False).to(dtype)
        head.gradient_scale = gradient_scale
        head.weight.data.copy_(weight)
        given = hidden.to(dtype).requires_grad_()
        (head(given, targets) * scale).backward()
        return given.grad.double() / scale

    exact = gradient(torch.float64, 1.0)
    torch.testing.assert_close(gradient(torch.float64, scale), exact)
    assert (gradient(torch.float16, scale) - exact).norm() < 0.01 * exact.norm()
    assert (gradient(torch.float16, 1.0) - exact).norm() > 0.1 * exact.norm()


def test_without_gradients_nothing_is_kept(chunk):
    head, hidden, targets = head_and_input(torch.float32)
    with torch.no_grad():
        loss = head(hidden, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, head(hidden, targets).detach())


def test_all_targets_ignored_gives_zero():
    head, hidden, targets = head_and_input(torch.float32)
    assert head(hidden, torch.full_like(targets, -100)).item() == 0.0

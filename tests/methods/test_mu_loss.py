"""The gradient of mu-loss: the same for every row, and not lost among the cross-entropy's in bf16."""

import pytest
import torch

from pretrain.methods.mu_loss import MuLoss
from pretrain.model.loss import LossHead

ROWS, COLUMNS = 4096, 16


def head_of(dtype: torch.dtype, coefficient: float | None) -> LossHead:
    head = LossHead(COLUMNS, ROWS).to(dtype)
    generator = torch.Generator().manual_seed(0)
    head.weight.data.copy_(0.02 * torch.randn(ROWS, COLUMNS, generator=generator) + 0.1)
    if coefficient is not None:
        head.terms.update(MuLoss(coefficient=coefficient).loss_terms())
    return head


def gradient(head: LossHead, tokens: int = 2048) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, tokens, COLUMNS, generator=generator).to(head.weight.dtype)
    targets = torch.randint(0, ROWS, (1, tokens), generator=generator)
    head(hidden, targets)["total"].backward()
    return head.weight.grad.double()


def test_value_and_gradient_are_those_of_the_formula():
    head = head_of(torch.float64, coefficient=3.0)
    mean = head.weight.detach().mean(0)
    losses = head(torch.zeros(1, 1, COLUMNS, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long))
    assert losses["mu_loss"].item() == pytest.approx(3.0 * float(mean @ mean))
    assert losses["total"].item() == pytest.approx(losses["cross_entropy"].item() + losses["mu_loss"].item())
    losses["total"].backward()
    expected = (2 * 3.0 / ROWS * mean).expand(ROWS, -1)
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-6, atol=1e-12)


def test_in_bf16_the_small_gradient_survives_beside_the_cross_entropys(monkeypatch):
    """It is below the rounding of a row and visible over all rows. Added to the other in bf16, a third would be lost."""
    monkeypatch.setattr(LossHead, "chunk_logits", 32 * ROWS)
    coefficient = 3e-3
    found = gradient(head_of(torch.bfloat16, coefficient)) - gradient(head_of(torch.bfloat16, None))
    expected = 2 * coefficient * head_of(torch.bfloat16, None).weight.detach().double().mean(0)
    share = float(found.sum(0) @ expected / (expected @ expected))
    assert share == pytest.approx(1.0, abs=0.1)

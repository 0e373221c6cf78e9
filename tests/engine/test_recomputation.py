"""The bytes that a block keeps for its backward pass: those that are still in memory after its forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from pretrain.engine.recomputation import checkpoint_options

BATCH, LENGTH, HIDDEN, INTERMEDIATE = 2, 16, 32, 48
STREAM = BATCH * LENGTH * HIDDEN * 4  # bytes of the residual stream


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that an operation makes, and its bytes. Views of what was `there` are none."""

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self.there = {tensor.untyped_storage().data_ptr() for tensor in there}
        self.seen: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() in self.there:
                    continue
                self.seen[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes_left(self) -> int:
        return sum(size for storage, size in self.seen.items() if not storage.expired())


def run(kind: str) -> tuple[int, list[torch.Tensor]]:
    """Return the bytes of what a block keeps, its input left out, and the gradients of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=4,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(config, 0).train()
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    rotations = LlamaRotaryEmbedding(config)(hidden, torch.arange(LENGTH)[None])
    with Made([hidden, *rotations, *block.parameters()]) as made:
        if kind == "off":
            out = block(hidden, position_embeddings=rotations)
        else:
            options = checkpoint_options("full" if kind == "full" else "selective")
            out = checkpoint(block, hidden, position_embeddings=rotations, **options)
    kept = made.bytes_left() - out.untyped_storage().nbytes()
    out.square().sum().backward()
    return kept, [parameter.grad for parameter in block.parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, list[torch.Tensor]]]:
    return {kind: run(kind) for kind in ("off", "selective", "full")}


def test_a_block_keeps_matrix_products_and_attention_only(found) -> None:
    """q, k, v, o, down and the output of attention have the size of the stream, gate and up that of the MLP."""
    of_mlp = BATCH * LENGTH * INTERMEDIATE * 4
    log_sums = BATCH * LENGTH * 4 * 4  # of attention's softmax, for each of 4 heads
    kept, _ = found["selective"]
    assert kept == 6 * STREAM + 2 * of_mlp + log_sums
    assert kept < 0.7 * found["off"][0]


def test_a_block_that_is_computed_again_in_full_keeps_nothing_but_its_input(found) -> None:
    assert found["full"][0] == 0


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit(found, kind: str) -> None:
    kept, again = found["off"][1], found[kind][1]
    assert len(kept) == len(again) == 9
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))

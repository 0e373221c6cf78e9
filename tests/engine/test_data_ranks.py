"""Tensor and sequence parallelism: the batch that each rank reads, and the models that cannot be cut."""

import pytest
from pydantic import ValidationError
from transformers import AutoConfig

from pretrain.config.schema import Config
from pretrain.engine.sequence_parallel import check_heads
from pretrain.engine.tensor_parallel import check_model, data_rank, data_ranks, elements_per_rank
from pretrain.errors import UserError
from pretrain.model.layout import describe
from tests.support.corpus import TINY

MODEL = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def config(tensor: int, family: str = "llama", sequence: int = 1) -> Config:
    model = {"family": family}
    data = {"train": "none", **TINY["data"]}
    return Config.model_validate(
        {
            **TINY,
            "model": model,
            "tokenizer": "none",
            "data": data,
            "parallel": {"tensor": tensor, "sequence": sequence},
        }
    )


@pytest.mark.parametrize(("tensor", "readers"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (4, [0, 0, 0, 0])])
def test_consecutive_ranks_read_the_same_batch(tensor: int, readers: list[int]) -> None:
    assert [data_rank(config(tensor), rank) for rank in range(4)] == readers
    assert data_ranks(config(tensor), 4) == 4 // tensor


def test_a_model_that_every_rank_can_take_an_equal_share_of_is_accepted() -> None:
    check_model(config(2), AutoConfig.for_model("llama", **MODEL))


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", 3), ("num_key_value_heads", 1), ("intermediate_size", 91)]
)
def test_what_the_ranks_cannot_share_evenly_is_refused_by_its_key(field: str, value: int) -> None:
    model = AutoConfig.for_model("llama", **MODEL | {field: value})
    with pytest.raises(UserError, match=f"parallel.tensor 2 does not divide model.{field} {value}"):
        check_model(config(2), model)
    check_model(config(1), model)


def test_gpt2_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor 2 cannot cut a gpt2"):
        check_model(config(2, "gpt2"), AutoConfig.for_model("gpt2"))
    check_model(config(1, "gpt2"), AutoConfig.for_model("gpt2"))


def test_block_matrices_are_shared_and_everything_else_is_whole_on_each_rank() -> None:
    weights = [
        describe("model.embed_tokens.weight", (10, 4)),
        describe("model.layers.0.self_attn.q_proj.weight", (4, 4)),
        describe("model.layers.0.input_layernorm.weight", (4,)),
    ]
    assert elements_per_rank(weights, 1) == 40 + 16 + 4
    assert elements_per_rank(weights, 2) == 40 + 8 + 4


def test_ranks_of_one_sequence_and_their_tensor_parallel_groups_read_the_same_batch() -> None:
    assert [data_rank(config(2, sequence=2), rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert data_ranks(config(2, sequence=2), 8) == 2


def test_sizes_that_do_not_divide_the_ranks_are_refused_with_the_nearest_that_do() -> None:
    said = (
        r"parallel\.tensor 2 x parallel\.sequence 4 = 8 does not divide the 12 ranks .* set parallel\.sequence to 3\."
    )
    with pytest.raises(UserError, match=said):
        data_ranks(config(2, sequence=4), 12)


@pytest.mark.parametrize(("tensor", "sequence", "nearest"), [(1, 8, 4), (2, 4, 2), (4, 2, 1)])
def test_more_slices_than_heads_are_refused_with_the_nearest_number(tensor: int, sequence: int, nearest: int) -> None:
    said = rf"parallel\.sequence {sequence} does not divide model\.num_attention_heads 4.* that does is {nearest}\."
    with pytest.raises(UserError, match=said):
        check_heads(config(tensor, sequence=sequence), AutoConfig.for_model("llama", **MODEL))
    check_heads(config(tensor, sequence=nearest), AutoConfig.for_model("llama", **MODEL))


def test_a_sequence_that_cannot_be_cut_in_equal_slices_is_refused_with_the_nearest_number() -> None:
    length = TINY["data"]["seq_len"]
    with pytest.raises(ValidationError, match=f"3 does not divide data.seq_len {length}, .* that does is 2"):
        config(1, sequence=3)

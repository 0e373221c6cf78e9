"""The row of an embedding that stands for padding starts and trains as in transformers.

What is compared with is transformers' own initialization, and its own classes stepped by torch's AdamW.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.support.runs import run_ranks
from tests.support.tiny_engines import LENGTH, VOCABULARY
from tests.support.workers.padding_worker import GPT2, LLAMA, LR, PADDING, STD, STEPS, batch, examine_all

EMBEDDING = "model.embed_tokens.weight"
CASES = {
    "plain": {"stage": 3},
    "tied": {"stage": 3, "tied": True},
    "gpt2": {"stage": 3, "gpt2": True},
    "zero1": {"stage": 1},
    "without": {"stage": 3, "padding": False},
    "lir": {"stage": 3, "methods": [{"name": "lir", "initializer_range": 0.006}]},
    "wesar": {"stage": 3, "methods": [{"name": "wesar"}]},
    "gg_init": {"stage": 3, "methods": [{"name": "gg_init", "shape": 1.0}]},
    "embedding_layernorm": {"stage": 3, "methods": [{"name": "embedding_layernorm"}]},
    "inverse_std": {"stage": 3, "methods": [{"name": "embedding_scale", "rule": "inverse_std"}]},
}
TRAINED_BY_TRANSFORMERS = ("plain", "tied", "gpt2", "zero1")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_ranks([], folder / "logs", 2, prepare=partial(examine_all, CASES, folder))
    assert ended.code == 0, ended.stderr[-5000:]
    return {case: dict(np.load(folder / f"{case}.npz")) for case in CASES}


def stock(case: str) -> torch.nn.Module:
    """Return transformers' model of a case, initialized by transformers."""
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
    if case == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**shared, **GPT2, n_positions=LENGTH))
    tied = {"tie_word_embeddings": case == "tied", "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**shared, **LLAMA, **tied, initializer_range=STD))


def zero_rows(table: np.ndarray) -> list[int]:
    return np.flatnonzero((table == 0).all(1)).tolist()


@pytest.mark.parametrize("case", TRAINED_BY_TRANSFORMERS)
def test_the_same_rows_start_at_zero_as_in_transformers(seen, case):
    own = {name: value.detach().numpy() for name, value in stock(case).named_parameters() if value.dim() == 2}
    rows = {name: zero_rows(seen[case][f"start/{name}"]) for name in own}
    assert rows == {name: zero_rows(value) for name, value in own.items()}
    assert rows.get(EMBEDDING, [PADDING]) == [PADDING]  # GPT-2 has none: it makes its embedding without `padding_idx`


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("gpt2", "without")])
def test_every_way_to_start_leaves_it_at_zero(seen, case):
    assert zero_rows(seen[case][f"start/{EMBEDDING}"]) == [PADDING]


def test_everything_else_starts_with_the_bits_of_a_model_without_padding(seen):
    for name, expected in seen["without"].items():
        if name.startswith("start/"):
            found = seen["plain"][name].copy()
            if name == f"start/{EMBEDDING}":
                assert expected[PADDING].std() == pytest.approx(STD, rel=0.5)
                found[PADDING] = expected[PADDING]
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", TRAINED_BY_TRANSFORMERS)
def test_it_trains_as_in_transformers(seen, case):
    model = stock(case)
    start = {key.removeprefix("start/"): torch.from_numpy(w) for key, w in seen[case].items() if key[0] == "s"}
    model.load_state_dict(start, strict=False)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    for number in range(1, STEPS + 1):
        logits = model((whole := batch(number))[:, :-1], use_cache=False).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten()).backward()
        optimizer.step()
    embedding = "transformer.wte.weight" if case == "gpt2" else EMBEDDING
    expected, found = model.get_parameter(embedding).detach().numpy(), seen[case][f"end/{embedding}"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert zero_rows(found) == ([PADDING] if case in ("plain", "zero1") else [])  # a head that shares it moves it

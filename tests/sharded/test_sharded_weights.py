"""Real ranks against dense arithmetic: the effect of `pretrain.sharded` and of TVR on sharded weights.

The ranks are started once per world size and go through every case (sharded_worker.py); 37 divides by nothing.
"""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.support.runs import Ended, run_ranks
from tests.support.selection import asked_for
from tests.support.sharded_cases import SHAPE, cases, half, zero
from tests.support.workers.sharded_worker import SHAPES, examine_all

# (ranks, ranks that share a tensor-parallel cut). DeepSpeed keeps the cut for the life of a process
WORLDS = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 3), (4, 2), (4, 4)]
FAST_WORLDS = [(3, 1), (2, 2)]  # (3, 1) divides nothing evenly, (2, 2) is cut
# In the fast worlds these cases are slow: others of the same stage and precision take the same paths.
SLOW_CASES = {"zero1_fp32", "zero2_fp16", "zero1_bf16_accumulated", "zero2_bf16_accumulated", "zero1_offloaded"}
SLOW_CASES |= {"zero2_offloaded", "zero3_fp32_offloaded", "zero0_tied", "zero2_tied", "zero1_gpt2", "four_zero3"}
SLOW_CASES |= {
    "zero2_aligned",
    "zero3_fp32_nothing_resident",
    "zero0_fp16",
    "zero3_sub_groups",
    "train_llama_zero2_sharded",
}


MISUSED = {"misuse": {**half("bf16", 3), "layers": 2, "misuse": True}}

METHODS = [
    {"name": "lir", "initializer_range": 0.03},
    {"name": "tvr", "target_std": 0.02, "ratio_threshold": 1.05, "interval_steps": 2},
]
TRAINED = {
    f"train_{family}_zero{stage}_{engine}": {
        "zero": {"stage": stage},
        "family": family,
        "shape": "odd",
        "layers": 2,
        "train": True,
        "methods": [METHODS[0], {**METHODS[1], "engine": engine}],
    }
    for family, stage, engine in (
        ("llama", 3, "sharded"),
        ("llama", 3, "gathered"),
        ("llama", 2, "sharded"),
        ("llama", 0, "sharded"),
        ("gpt2", 3, "sharded"),
    )
}


def trained(world: tuple[int, int]) -> dict[str, dict]:
    """Return the runs that are compared with a dense one, by name."""
    _, tensor = world
    if tensor == 1:
        return TRAINED
    more = {"tensor": tensor, "shape": SHAPE[tensor], "layers": 2, "train": True, "methods": METHODS}
    return {f"train_zero{stage}": {**zero(stage), **more} for stage in (0, 1, 3)}


def start(ranks: int, todo: dict[str, dict], out: Path) -> Ended:
    return run_ranks([], out.parent / "logs", ranks, prepare=partial(examine_all, todo, out))


def examined(ranks: int, todo: dict[str, dict], out: Path) -> dict:
    """Return the results of the cases `todo` on so many ranks."""
    done = start(ranks, todo, out)
    assert done.code == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    """Return a function of the world: results by case, and a function that gives the path of a trained case's arrays."""
    finished = {}

    def at(world: tuple[int, int]):
        if world not in finished:
            ranks, tensor = world
            out = tmp_path_factory.mktemp(f"ranks_{ranks}_{tensor}") / "seen.json"
            todo = asked_for(request, cases(world) | trained(world), world=world) | (MISUSED if tensor == 1 else {})
            finished[world] = (examined(ranks, todo, out), lambda case: f"{out}.{case}.npz")
        return finished[world]

    return at


def is_fast(world: tuple[int, int], case: str) -> bool:
    return world in FAST_WORLDS and case not in SLOW_CASES


def every(of) -> list:
    """Return one parameter for each case of each world."""
    name = "{}_ranks-{}_cut-{}".format
    return [
        pytest.param(world, case, id=name(*world, case), marks=[] if is_fast(world, case) else [pytest.mark.slow])
        for world in WORLDS
        for case in of(world)
    ]


every_case = pytest.mark.parametrize(("world", "case"), every(cases))


@every_case
def test_moments_equal_float64_statistics_of_the_dense_weight(seen, world, case):
    found = seen(world)[0][case]
    assert found["counts_right"]
    assert found["constants_exact"]
    assert found["std_error"] < 1e-12
    assert found["mean_error"] < 1e-12
    assert found["change_error"] < 1e-12


@every_case
def test_tails_equal_float64_statistics_of_the_dense_weight(seen, world, case):
    found = seen(world)[0][case]
    assert found["kurtosis_error"] < 1e-12
    assert found["maximum_exact"]
    assert found["statistics_agree"]


@every_case
def test_initial_values_are_in_both_copies(seen, world, case):
    assert seen(world)[0][case]["working_filled"]


@every_case
def test_rescaling_changes_both_copies_as_the_dense_formula_and_survives_the_next_step(seen, world, case):
    found = seen(world)[0][case]
    assert found["rescale_exact"]
    assert found["working_follows"]
    assert found["survives_step"]
    assert found["working_follows_after_step"]
    before, after, after_step = found["losses"]
    assert after != before, "forward does not see the change"
    assert after == after_step, "forward sees other weights before the next step than after it"


@pytest.mark.parametrize(
    ("world", "case"), every(lambda world: [n for n, case in cases(world).items() if case.get("gathered", True)])
)
def test_the_gathered_engine_agrees_with_the_sharded_one(seen, world, case):
    found = seen(world)[0][case]
    assert found["engines_agree_on_std"] < 1e-12
    assert found["gathered_exact"]
    assert found["gathered_survives"]
    assert found["gathered_working_follows"]


@every_case
def test_the_hook_gives_the_full_weight_and_keeps_what_is_written_to_it(seen, world, case):
    found = seen(world)[0][case]
    assert found["hook_saw_the_full_weight"]
    assert found["hook_exact"]
    assert found["hook_working_follows"]
    assert found["hook_left_early"]
    assert found["hook_left_early_working_follows"]
    assert found["hook_survives"]
    assert found["hook_working_follows_after_step"]


@every_case
def test_centring_rows_changes_every_copy_as_the_dense_formula_and_survives_the_next_step(seen, world, case):
    found = seen(world)[0][case]
    assert found["centered_exact"]
    assert found["centered_working_follows"]
    assert found["centered_survives"]
    assert found["centered_working_follows_after_step"]


def untied_in_fp32(world: tuple[int, int]) -> list[str]:
    """Return the names of the cases in fp32 whose head is a matrix of its own."""
    plain = {"precision": "fp32", "tied": False, "family": "llama"}
    return [name for name, case in cases(world).items() if plain.items() <= (plain | case).items()]


@pytest.mark.parametrize(("world", "case"), every(untied_in_fp32))
def test_centring_the_rows_of_an_untied_head_shifts_all_logits_of_a_token_equally(seen, world, case):
    found = seen(world)[0][case]
    assert found["logits_moved"] > 0.1
    assert found["probabilities_moved"] < 3e-5


@pytest.mark.parametrize("world_size", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4))])
def test_a_bad_call_raises_the_same_error_on_every_rank_and_changes_nothing(seen, world_size):
    expected = {
        "unknown weight": r"ValueError: .*no weight 'model\.layers\.0\.mlp\.upp_proj\.weight'; did you mean",
        "factor not finite": r"ValueError: weight 'model\.layers\.0\.mlp\.up_proj\.weight' cannot be rescaled",
        "factor too large": r"ValueError: weight .*up_proj\.weight' cannot be rescaled .*1e\+300",
        "unknown piece": r"ValueError: .*no weight .*up_proj\.weightx'; did you mean",
        "mid accumulation": "RuntimeError: .*gradient accumulation",
        "changed": "False",
        "unknown weight on one rank": rf"ValueError: .*up_proj\.weightx'.*\(rank {world_size - 1}\)",
    }
    if world_size > 1:
        expected["different lists"] = r"ValueError: rank 0 and rank \d .*model\.layers\.1\.mlp\.up_proj\.weight"
        expected["different weights to fill"] = rf"ValueError: .*up_proj\.weightx'.*\(rank {world_size - 1}\)"
        expected["different shrinking"] = "ValueError: rank 0 and rank .*perturb_ .*other values"
        expected["different factors"] = "ValueError: rank 0 and rank .*rescale_ .*other values"
        expected["different calls"] = r"ValueError: rank 0 called moments and rank \d called rescale_"
        expected["different seeds"] = r"ValueError: rank 0 and rank \d called fill_ .*other values"
    for what, pattern in expected.items():
        messages = {raised[what] for raised in seen((world_size, 1))[0]["misuse"]}
        assert len(messages) == 1, messages
        assert re.search(pattern, messages.pop()), what


@pytest.mark.parametrize("stage", [2, 3])
def test_an_exception_of_one_rank_inside_the_hook_ends_the_run(tmp_path, stage):
    done = start(2, {"raise": {**zero(stage), "raise": True}}, tmp_path / "seen.json")
    assert done.code != 0
    assert "ArithmeticError: a method failed on the last rank" in done.stderr


def test_one_seed_gives_the_same_weights_wherever_the_pieces_are(seen):
    digests: dict[tuple, set[str]] = {}
    for world in FAST_WORLDS:
        for name, case in cases(world).items():
            if not is_fast(world, name):
                continue
            model = (case.get("family"), case.get("shape", "odd"), case.get("tied", False))
            digests.setdefault(model, set()).add(seen(world)[0][name]["digest"])
    assert {model: len(found) for model, found in digests.items()} == dict.fromkeys(digests, 1)
    assert len(set.union(*digests.values())) == len(digests), "models of different shapes cannot agree"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_optimizer_offloaded_to_nvme_is_within_reach(tmp_path, precision):
    """The first run on a machine compiles DeepSpeed's async_io operator, which takes minutes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io operator cannot be built here: it needs libaio's headers and a C++ compiler")
    AsyncIOBuilder().load(verbose=False)
    case = half(precision, 3) if precision != "fp32" else zero(3)
    todo = {"nvme": {**case, "shape": "large", "layers": 2, "nvme_path": str(tmp_path / "nvme"), "gathered": False}}
    found = examined(2, todo, tmp_path / "seen.json")["nvme"]
    assert all(value for value in found.values() if isinstance(value, bool)), found
    assert max(value for key, value in found.items() if key.endswith("_error")) < 1e-12


@pytest.mark.parametrize(("world", "case"), every(trained))
def test_training_with_lir_and_tvr_equals_a_dense_single_process(seen, world, case):
    _, path_of = seen(world)
    arrays = np.load(path_of(case))
    start = {key.removeprefix("start/"): arrays[key] for key in arrays if key.startswith("start/")}
    losses, rescaled, end = dense_training("gpt2" if "gpt2" in case else trained(world)[case]["shape"], start)
    assert rescaled, "the reference never rescales: the test would show nothing"
    assert sorted(arrays["rescaled"].tolist()) == sorted(rescaled)
    np.testing.assert_allclose(arrays["losses"], losses, rtol=2e-6)
    for name, expected in end.items():
        error = np.linalg.norm(arrays[f"end/{name}"] - expected) / np.linalg.norm(expected)
        assert error < 2e-5, f"{name} differs by {error:.1e}"


def dense_training(model_shape: str, start: dict[str, np.ndarray]):
    """Train four steps of stock transformers and torch, with TVR from the paper's formula, on one process."""
    if model_shape != "gpt2":
        shape = {"num_hidden_layers": 2, **SHAPES[model_shape]}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=101, max_position_embeddings=16, **shape))
        blocks = "model.layers."
    else:
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_embd": 36, "n_layer": 2, "n_head": 2, "n_inner": 55, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=101, **shape, **dropout, bos_token_id=1, eos_token_id=2))
        blocks = "transformer.h."
    model.load_state_dict({name: torch.from_numpy(w) for name, w in start.items()}, strict=False)
    model.train()
    # Adam's eps of 1e-6 keeps it from blowing up the rounding noise that is the whole gradient of a key's bias
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    losses, rescaled = [], []
    for number in range(1, 5):
        tokens = torch.randint(0, 101, (12, 17), generator=torch.Generator().manual_seed(number))
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if number % 2 == 0:
            for name, parameter in model.named_parameters():
                if name.startswith(blocks) and parameter.ndim == 2:
                    weight = parameter.data.numpy().astype(np.float64)
                    mean, std = weight.mean(), weight.std(ddof=1)
                    if std / 0.02 > 1.05:
                        parameter.data.copy_(torch.from_numpy((weight - mean) * 0.02 / std + mean))
                        rescaled.append(f"{number} {name}")
    return losses, rescaled, {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

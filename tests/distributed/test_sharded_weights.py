"""Real ranks against dense arithmetic: what `pretrain.sharded` and TVR do to sharded weights is what they should.

The ranks are started once per world size and go through every case (sharded_worker.py); 37 divides by nothing.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import free_port, launch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("sharded_worker.py")
WORLD_SIZES = (1, 2, 3)

EXAMINED = {
    "zero0_fp32": {"zero": {"stage": 0}, "bf16": False},
    **{
        f"zero{stage}_{'bf16' if bf16 else 'fp32'}": {"zero": {"stage": stage}, "bf16": bf16}
        for stage in (1, 2, 3)
        for bf16 in (False, True)
    },
    "zero3_fp32_nothing_resident": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": False},
    "zero3_bf16_nothing_resident": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": True},
    "zero3_bf16_offloaded": {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "bf16": True},
    "zero3_fp32_sub_groups": {"zero": {"stage": 3, "sub_group_size": 2000}, "bf16": False},
    "zero3_fp32_tied": {"zero": {"stage": 3}, "bf16": False, "tied": True},
    "zero2_fp32_tied": {"zero": {"stage": 2}, "bf16": False, "tied": True},
    "zero3_bf16_gpt2": {"zero": {"stage": 3}, "bf16": True, "family": "gpt2"},
    "zero1_fp32_gpt2": {"zero": {"stage": 1}, "bf16": False, "family": "gpt2"},
}

MISUSED = {"misuse": {"zero": {"stage": 3}, "bf16": True, "misuse": True}}

METHODS = [
    {"name": "lir", "initializer_range": 0.03},
    {"name": "tvr", "target_std": 0.02, "ratio_threshold": 1.05, "interval_steps": 2},
]
TRAINED = {
    f"train_{family}_zero{stage}_{engine}": {
        "zero": {"stage": stage},
        "bf16": False,
        "family": family,
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


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the ranks wrote down: seen(world_size) -> (results by case, path of a trained case's arrays)."""
    finished = {}

    def at(world_size: int):
        if world_size not in finished:
            out = tmp_path_factory.mktemp(f"ranks_{world_size}") / "seen.json"
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
            command += [f"--master-port={free_port()}", str(WORKER), json.dumps(EXAMINED | TRAINED | MISUSED), str(out)]
            done = launch(command)
            assert done.code == 0, done.stdout[-3000:] + done.stderr[-5000:]
            finished[world_size] = (json.loads(out.read_text()), lambda case: f"{out}.{case}.npz")
        return finished[world_size]

    return at


every_case = pytest.mark.parametrize(
    ("world_size", "case"), [(world_size, case) for world_size in WORLD_SIZES for case in EXAMINED]
)


@every_case
def test_moments_equal_float64_statistics_of_the_dense_weight(seen, world_size, case):
    found = seen(world_size)[0][case]
    assert found["counts_right"]
    assert found["std_error"] < 1e-12
    assert found["mean_error"] < 1e-12
    assert found["change_error"] < 1e-12


@every_case
def test_rescaling_changes_both_copies_as_the_dense_formula_and_survives_the_next_step(seen, world_size, case):
    found = seen(world_size)[0][case]
    assert found["rescale_exact"]
    assert found["working_follows"]
    assert found["survives_step"]
    assert found["working_follows_after_step"]
    assert found["loss_moved"][0] != found["loss_moved"][1]


@every_case
def test_the_gathered_engine_agrees_with_the_sharded_one(seen, world_size, case):
    found = seen(world_size)[0][case]
    assert found["engines_agree_on_std"] < 1e-12
    assert found["gathered_exact"]
    assert found["gathered_survives"]
    assert found["gathered_working_follows"]


@every_case
def test_the_hook_gives_the_full_weight_and_keeps_what_is_written_to_it(seen, world_size, case):
    found = seen(world_size)[0][case]
    assert found["hook_saw_the_full_weight"]
    assert found["hook_survives"]
    assert found["hook_working_follows"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_bad_call_raises_the_same_error_on_every_rank_and_changes_nothing(seen, world_size):
    expected = {
        "unknown weight": r"ValueError: .*no weight 'model\.layers\.0\.mlp\.upp_proj\.weight'; did you mean",
        "factor not finite": r"ValueError: weight 'model\.layers\.0\.mlp\.up_proj\.weight' cannot be rescaled",
        "mid accumulation": "RuntimeError: .*gradient accumulation",
        "changed": "False",
        "unknown weight on one rank": rf"ValueError: .*up_proj\.weightx'.*\(rank {world_size - 1}\)",
    }
    if world_size > 1:
        expected["different lists"] = r"ValueError: rank 0 and rank \d .*model\.layers\.1\.mlp\.up_proj\.weight"
        expected["different factors"] = "ValueError: rank 0 and rank .*other factors"
    for what, pattern in expected.items():
        messages = {raised[what] for raised in seen(world_size)[0]["misuse"]}
        assert len(messages) == 1, messages
        assert re.search(pattern, messages.pop()), what


def test_one_seed_gives_the_same_weights_for_every_world_size_stage_and_precision(seen):
    digests = {
        (case, world_size): seen(world_size)[0][case]["digest"]
        for world_size in WORLD_SIZES
        for case in EXAMINED
        if "tied" not in case and "gpt2" not in case
    }
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_with_lir_and_tvr_equals_a_dense_single_process(seen, world_size, case):
    _, path_of = seen(world_size)
    arrays = np.load(path_of(case))
    start = {key.removeprefix("start/"): arrays[key] for key in arrays if key.startswith("start/")}
    losses, rescaled, end = dense_training("gpt2" if "gpt2" in case else "llama", start)
    assert rescaled, "the reference never rescales: the test would show nothing"
    assert sorted(arrays["rescaled"].tolist()) == sorted(rescaled)
    np.testing.assert_allclose(arrays["losses"], losses, rtol=2e-6)
    for name, expected in end.items():
        error = np.linalg.norm(arrays[f"end/{name}"] - expected) / np.linalg.norm(expected)
        assert error < 2e-5, f"{name} differs by {error:.1e}"


def dense_training(family: str, start: dict[str, np.ndarray]):
    """Four steps of stock transformers and torch with TVR written out from the paper's formula, on one process."""
    if family == "llama":
        shape = {"hidden_size": 37, "intermediate_size": 77, "num_hidden_layers": 2, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=101, head_dim=6, max_position_embeddings=16, **shape))
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

"""DeepSpeed's configuration: "auto" is filled in, defaults are written out, contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.config.schema import Config
from pretrain.engine.deepspeed_config import REPOSITORY, accumulation_steps, deepspeed_config, read_deepspeed
from pretrain.errors import UserError
from tests.support.corpus import TINY

ZERO3 = {"zero_optimization": {"stage": 3}}


def config(deepspeed: str | dict, **more: object) -> Config:
    data = {"train": "none", **TINY["data"]}
    return Config.model_validate({**TINY, "tokenizer": "none", "data": data, "deepspeed": deepspeed, **more})


def test_auto_becomes_what_the_run_file_makes_it() -> None:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    resolved = deepspeed_config(config(dict.fromkeys(auto, "auto") | {"zero_optimization": {"stage": 3}}), 2)
    assert [resolved[key] for key in auto] == [8, 2, 2, 1.0]


def test_keys_that_are_left_out_are_filled_in_like_auto() -> None:
    assert deepspeed_config(config({}), 4) == deepspeed_config(config({"train_batch_size": "auto"}), 4)
    assert deepspeed_config(config({}), 4)["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("optim", [{"lr": 1e-3, "grad_clip": None}, {"lr": 1e-3, "grad_clip": 0.5}])
def test_clipping_is_written_out_even_when_it_is_off(optim: dict) -> None:
    assert deepspeed_config(config({}, optim=optim), 1)["gradient_clipping"] == (optim["grad_clip"] or 0.0)


def test_the_defaults_that_bite_are_written_out() -> None:
    resolved = deepspeed_config(config({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}), 1)
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert resolved["fp16"]["enabled"] is False
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["prescale_gradients"] is False
    assert resolved["timers"] == {"throughput": {"enabled": False}}


def test_what_the_file_sets_wins_over_those_defaults() -> None:
    given = {
        "communication_data_type": "bf16",
        "steps_per_print": 5,
        "timers": {},
        "data_types": {"grad_accum_dtype": "bf16"},
    }
    given |= {"bf16": {"enabled": True, "check_grad_overflow": True}, "zero_optimization": {"stage": 2}}
    resolved = deepspeed_config(config(given), 1)
    assert {key: resolved[key] for key in given} == given


def test_fp16_keeps_the_users_loss_scaling_and_says_what_it_scales() -> None:
    chosen = {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 50, "hysteresis": 1}
    resolved = deepspeed_config(config({"zero_optimization": {"stage": 3}, "fp16": chosen}), 1)
    assert resolved["fp16"] == chosen | {"loss_scale": 0, "auto_cast": False, "fp16_master_weights_and_grads": False}
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["bf16"]["enabled"] is False


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_zero_accumulates_in_that_precision_if_the_file_says_so(precision: str) -> None:
    resolved = deepspeed_config(
        config({precision: {"enabled": True}, "data_types": {"grad_accum_dtype": precision}}), 1
    )
    assert resolved["data_types"] == {"grad_accum_dtype": precision}
    assert "stage" not in resolved["zero_optimization"]


def test_tensor_parallel_ranks_count_once_and_the_batch_is_given_by_micro_batches_alone() -> None:
    resolved = deepspeed_config(config({"train_batch_size": "auto"}, parallel={"tensor": 2}), 4)
    assert resolved["tensor_parallel"] == {"autotp_size": 2, "vocab_parallel_lm_head": False}
    assert "train_batch_size" not in resolved
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (2, 2)
    assert "tensor_parallel" not in deepspeed_config(config({}), 4)


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_tensor_parallelism_does_not_divide_are_refused(ranks: int) -> None:
    with pytest.raises(UserError, match=f"parallel.tensor 2 does not divide the {ranks} ranks"):
        deepspeed_config(config({}, parallel={"tensor": 2}), ranks)


def test_tensor_parallel_ranks_do_not_stretch_a_batch_that_is_too_small() -> None:
    with pytest.raises(UserError, match=r"data\.micro_batch_size 2 x 8 data-parallel ranks = 16"):
        deepspeed_config(config({}, parallel={"tensor": 2}), 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "needs ZeRO stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
    ],
)
def test_what_does_not_go_with_tensor_parallelism_is_refused(given: dict, message: str) -> None:
    deepspeed_config(config(given), 4)
    with pytest.raises(UserError, match=r"parallel\.tensor 2 with") as caught:
        deepspeed_config(config(given, parallel={"tensor": 2}), 4)
    assert message in str(caught.value)


def test_auto_inside_zero_optimization_is_left_to_deepspeed() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True}
    assert deepspeed_config(config({"zero_optimization": zero}), 1)["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
    }


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_file_resolves_and_deepspeed_reads_it(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved = deepspeed_config(config(f"ds_configs/{path.name}"), 1)
    assert '"auto"' not in json.dumps(resolved)
    read = DeepSpeedConfig(resolved)
    assert str(read.zero_optimization_stage) in path.stem
    assert read.bfloat16_config.enabled is ("fp32" not in path.stem)


def test_a_path_counts_from_the_working_directory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3_fp32.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed(config("ds_configs/zero3_fp32.json"))[1] == {"zero_optimization": {"stage": 1}}
    assert read_deepspeed(config("ds_configs/zero2_bf16.json"))[1]["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size to 16, but the run file makes it 8"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps to 1, but the run file makes it 4"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'"),
        ({"scheduler": {}}, "'scheduler' block"),
        ({"tensor_parallel": {"autotp_size": 2}}, "set parallel.tensor in the run file"),
        ({"fp16": {"enabled": True}}, 'Set data_types.grad_accum_dtype to "fp16", or use ZeRO stage 1'),
        (ZERO3 | {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}}, "cannot accumulate in fp16"),
        (ZERO3 | {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both bf16 and fp16"),
        (ZERO3 | {"fp16": {"enabled": "auto"}}, "fp16.enabled"),
        (ZERO3 | {"fp16": {"enabled": True, "initial_scale": 4}}, "fp16.initial_scale"),
        (ZERO3 | {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "master weights are fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'Set data_types.grad_accum_dtype to "fp32", or leave it out'),
        ({"zero_optimization": 3}, "zero_optimization must be a block of keys, not 3"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stagee": 3}}, "zero_optimization.stagee"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
        ({"bf16": {"enabled": True}}, 'grad_accum_dtype to "bf16", or use ZeRO stage 1'),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "fp32"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "unknown key 'data_types.grad_acum_dtype'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_contradicts_or_does_not_exist_is_refused(given: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config(given), 1)
    assert message in str(caught.value)
    assert str(caught.value).startswith("the run file's 'deepspeed'")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_quantized_weights": True}, "zero_quantized_weights is not supported: forward would read"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights is not supported"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow is not supported"),
        ({"mics_shard_size": 2}, "zero_optimization.mics_shard_size"),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients is not supported"),
        ({"load_from_fp32_weights": False}, "load_from_fp32_weights false is not supported: a resumed run"),
        ({"stage": 1, "compute_grad_norm": False}, "compute_grad_norm false is not supported"),
        ({"stage": 1, "offload_param": {"device": "cpu"}}, "offload_param has no effect at stage 1"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer has no effect at stage 0"),
        ({"elastic_checkpoint": True}, "elastic_checkpoint is not supported"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload is not supported"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.4}}, "ratio 0.4 is not supported"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/"}}, "offload_param.device nvme is not supported"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/"}}, "offload_optimizer.device nvme is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_whose_change_is_not_tested_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config({"zero_optimization": {"stage": 3, **keys}}), 1)
    assert message in str(caught.value)


def test_untested_keys_may_be_given_their_neutral_values() -> None:
    neutral = {"zero_quantized_weights": False, "elastic_checkpoint": False, "zenflow": None}
    deepspeed_config(config({"zero_optimization": {"stage": 3, **neutral}}), 1)


def test_a_key_that_stands_twice_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match="zero_optimization stands twice"):
        deepspeed_config(config(str(tmp_path / "ds.json")), 1)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_shares_the_global_batch_among_the_ranks(ranks: int, steps: int) -> None:
    assert accumulation_steps(config({}), ranks) == steps


@pytest.mark.parametrize("ranks", [3, 8])
def test_ranks_that_cannot_share_the_global_batch_are_refused(ranks: int) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        accumulation_steps(config({}), ranks)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps_per_print": "often"}, "steps_per_print must be a number, not 'often'"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown must be true or false, not 1"),
        ({"comms_logger": True}, "comms_logger must be a block of keys, not True"),
        ({"communication_data_type": "fp8"}, "communication_data_type must be 'fp32' or 'bf16' or 'fp16', not 'fp8'"),
        ({"gradient_predivide_factor": float("inf")}, "gradient_predivide_factor must be a finite number, not inf"),
        ({"flops_profiler": {"profile_step": float("nan")}}, "flops_profiler: profile_step must be a finite number"),
        ({"gradient_clipping": True}, "gradient_clipping must be a number, not True"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be a number, not True"),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm must be true or false, not 1"),
        ({"fp16": {"enabled": True, "initial_scale_power": -1}}, "fp16.initial_scale_power must be 0 or more, not -1"),
        ({"fp16": {"enabled": True, "initial_scale_power": 999}}, "initial_scale_power must be 127 or less, not 999"),
        ({"fp16": {"enabled": True, "loss_scale": 1e39}}, "fp16.loss_scale must be 1.70141e+38 or less, not 1e+39"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor must be more than 0, not 0"),
        ({"checkpoint": {"tag_validation": "x"}}, "tag_validation must be Warn, Ignore or Fail, not 'x'"),
        ({"steps_per_print": 0}, "steps_per_print must be more than 0, not 0"),
        ({"zero_optimization": {1: 2}}, "zero_optimization has the key 1, which is no text"),
    ],
)
def test_a_value_of_another_kind_is_refused(given: dict, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config(deepspeed={"zero_optimization": {"stage": 1}, **given}), world_size=1)
    assert expected in str(caught.value)


def test_a_file_with_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_predivide_factor": NaN}')
    with pytest.raises(UserError, match="gradient_predivide_factor must be a finite number, not nan"):
        deepspeed_config(config(deepspeed=str(tmp_path / "ds.json")), world_size=1)

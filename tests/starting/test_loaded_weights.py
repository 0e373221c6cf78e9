"""Real ranks start from models that transformers has saved: the same bits in every layout, and the same function.

Expected weights are read with the safetensors library, expected logits are those of transformers' own classes.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pretrain.methods import REGISTRY, Method, clashes_of
from pretrain.model.families import FAMILIES, missing
from tests.support.runs import run_ranks
from tests.support.selection import slow_but
from tests.support.stock_models import saved
from tests.support.tiny_engines import tokens
from tests.support.workers.starting_worker import examine_all, results

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
NOTHING_RESIDENT = {"stage3_param_persistence_threshold": 0}
IDS = tokens(1, 2)[:, :-1]


def layout(stage: int, *, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    accumulate = {"data_types": {"grad_accum_dtype": "bf16"}} if bf16 and stage == 0 else {}
    return {"deepspeed": {"zero_optimization": {"stage": stage, **zero}, **(BF16 if bf16 else {}), **accumulate}}


LAYOUTS = {
    **{f"zero{stage}": layout(stage) for stage in range(4)},
    **{f"zero{stage}_bf16": layout(stage, bf16=True) for stage in range(4)},
    "zero3_nothing_resident": layout(3, **NOTHING_RESIDENT),
    "sequence2_zero3": {**layout(3), "sequence": 2},
    "zero2_offloaded": layout(2, offload_optimizer={"device": "cpu"}),
}
LAYOUTS["zero2_fp16"] = {"deepspeed": {"zero_optimization": {"stage": 2}, **FP16}}
CUT = {f"tensor2_zero{stage}": {**layout(stage), "tensor": 2} for stage in (0, 1, 3)}
CUT["tensor2_zero3_bf16"] = {**layout(3, bf16=True), "tensor": 2}
FORWARD = sorted(name for name, cls in REGISTRY.items() if not missing("llama", cls.needs))
OPTIONS = {
    "wesar frozen": {"name": "wesar", "frozen": True},
    "wesar small": {"name": "wesar", "backbone": "small"},
    "sigma_reparam as its release": {"name": "sigma_reparam", "initial_scale": "spectral_norm"},
    "embedding_scale by a number": {"name": "embedding_scale", "multiplier": 7.0},
}
HALVES = ("llama in bf16", "llama in fp16")
# Methods that change the weights when they take them over, with every other family that has what they need.
TAKING = sorted(name for name, cls in REGISTRY.items() if cls.take_over is not Method.take_over)
OTHER_FAMILIES = {
    f"{family} with {name}": (family, name)
    for family in FAMILIES
    for name in TAKING
    if family != "llama" and not missing(family, REGISTRY[name].needs) and (family, name) != ("gpt2", "embedding_scale")
}
PAIRS = [pair for pair in combinations(TAKING, 2) if not clashes_of([REGISTRY[name]() for name in pair])]
ON_CUT = tuple(name for name in TAKING if REGISTRY[name].tensor_parallel)
TIED = ("wesar", "embedding_scale")
GROWN = {"doubled": [0, 0, 1, 1, 2, 2], "cut": [2], "turned": [2, 1, 0]}
SHRINK = {"shrink": 0.8, "noise": 0.01}
# Cases that tests name without a parameter.
OTHERS = ("wesar in bf16", "tied embedding_scale", "tied wesar frozen", "tied wesar", "untied from tied", "shrunk")
OTHERS += ("shrunk plain", "shrunk wesar", "NaN", "large values")
# The rest is slow: others take the same paths.
FAST = {"zero2", "zero3", "zero1_bf16", "tensor2_zero3_bf16", "gpt2", "granite", "olmo2", "llama in fp16", "doubled"}
FAST |= {
    "wesar frozen",
    "gpt2 with weight_norm",
    "qwen3 with sigma_reparam",
    "embedding_scale + weight_norm",
    "shrunk, cut",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a saved model of each family, and of a few more llamas."""
    base = tmp_path_factory.mktemp("models")
    folders = {family: saved(base / family, family) for family in FAMILIES}
    folders["llama in bf16"] = saved(base / "bf16", "llama", torch.bfloat16)
    folders["llama in fp16"] = saved(base / "fp16", "llama", torch.float16)
    folders["plain llama"] = saved(base / "plain", "llama", attention_bias=False, mlp_bias=False)
    for kind, value in {"NaN": float("nan"), "large values": 1e5}.items():
        folders[kind] = saved(base / kind, "llama")
        file = next(path for path in folders[kind].glob("*.safetensors") if "lm_head.weight" in load_file(path))
        tensors = load_file(file)
        tensors["lm_head.weight"][3, 4] = value
        save_file(tensors, file)
    folders["tied llama"] = saved(base / "tied", "llama", tie_word_embeddings=True)
    return folders


def start(folder: Path, family: str = "llama", keys: dict[str, Any] | None = None, **case: Any) -> dict[str, Any]:
    """Return a case that starts from a folder, on ZeRO-3 in fp32 unless it says otherwise."""
    return {**layout(3), "model": {"family": family, "init_from": str(folder), **(keys or {})}, **case}


def cases_of_two_ranks(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    llama, plain, tied = (models[name] for name in ("llama", "plain llama", "tied llama"))
    cases = {name: start(llama, **case) for name, case in LAYOUTS.items()}
    cases |= {family: start(models[family], family) for family in FAMILIES}
    cases |= {kind: start(models[kind]) for kind in HALVES}
    cases |= {name: start(plain, methods=[{"name": name}]) for name in FORWARD}
    cases |= {name: start(plain, methods=[method]) for name, method in OPTIONS.items()}
    cases |= {
        pair: start(models[family], family, methods=[{"name": name}]) for pair, (family, name) in OTHER_FAMILIES.items()
    }
    cases |= {f"tied {name}": start(tied, methods=[{"name": name}]) for name in TIED}
    cases["tied wesar frozen"] = start(tied, methods=[OPTIONS["wesar frozen"]])
    cases["wesar in bf16"] = start(plain, **layout(3, bf16=True), methods=[{"name": "wesar"}])
    cases |= {" + ".join(pair): start(plain, methods=[{"name": name} for name in pair]) for pair in PAIRS}
    cases["untied from tied"] = start(tied, keys={"tie_word_embeddings": False})
    cases |= {
        name: start(llama, keys={"init_from": {"path": str(llama), "layers": layers}}) for name, layers in GROWN.items()
    }
    cases["NaN"] = start(models["NaN"])
    cases["large values"] = start(models["large values"], **LAYOUTS["zero2_fp16"])
    cases["shrunk"] = start(llama, warm_start=SHRINK)
    cases["shrunk on zero1"] = start(llama, **layout(1), warm_start=SHRINK)
    cases["shrunk with another seed"] = start(llama, warm_start=SHRINK, seed=5)
    cases["shrunk wesar"] = start(plain, warm_start=SHRINK, methods=[{"name": "wesar"}])
    cases["shrunk plain"] = start(plain, warm_start=SHRINK)
    return cases


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return what the ranks hold and compute in each case that a test asks for, by name."""
    asked = {
        value
        for item in request.session.items
        if item.path == request.path and isinstance(item, pytest.Function)
        for value in [*(item.callspec.params.values() if hasattr(item, "callspec") else ()), *OTHERS]
        if isinstance(value, str)
    }
    cut = {name: start(models["llama"], **case) for name, case in CUT.items()}
    cut |= {
        f"{name}, cut": start(models["plain llama"], **CUT["tensor2_zero3"], methods=[{"name": name}])
        for name in ON_CUT
    }
    cut["shrunk, cut"] = start(models["llama"], **CUT["tensor2_zero3_bf16"], warm_start=SHRINK)
    worlds = (
        (2, cases_of_two_ranks(models)),
        (2, cut),  # DeepSpeed keeps the cut for the life of a process
        (1, {"shrunk on one rank": start(models["llama"], warm_start=SHRINK)}),
    )
    together: dict[str, dict[str, Any]] = {}
    for ranks, all_cases in worlds:
        if cases := {name: case for name, case in all_cases.items() if name in asked}:
            out = tmp_path_factory.mktemp("world")
            ended = run_ranks([], out / "logs", ranks, prepare=partial(examine_all, cases, out))
            assert ended.code == 0, ended.stderr[-5000:]
            together |= results(out)
    return together


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a folder, float32."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert len(files) > 1, "the folder should have an index"
    return {name: tensor.float() for file in files for name, tensor in file.items()}


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        positions = torch.linspace(0, IDS.shape[1] - 1, 8).long()
        return model(IDS, use_cache=False).logits[:, positions]


def loss_of(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(IDS[:, :-1], use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


def assert_same_function(found: dict[str, Any], folder: Path, tolerance: float = 2e-5) -> None:
    assert "refused" not in found, found.get("refused")
    expected = logits_of(folder)
    error = (found["logits"].float() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"logits differ by {error:.2e} of the largest"
    if found["loss"] is not None:
        assert found["loss"] == pytest.approx(loss_of(folder), rel=tolerance)


@pytest.mark.parametrize("name", slow_but(FAST, [*LAYOUTS, *CUT]))
def test_every_layout_holds_the_bits_of_the_file(found, models, name):
    expected = weights_in(models["llama"])
    assert found[name]["masters"].keys() == expected.keys()
    for weight, master in found[name]["masters"].items():
        assert torch.equal(master.view(expected[weight].shape), expected[weight]), weight
        working = found[name]["working"][weight]
        assert torch.equal(working, expected[weight].to(working.dtype)), weight
    assert_same_function(found[name], models["llama"], 0.05 if "16" in name else 2e-5)


@pytest.mark.parametrize("family", slow_but(FAST, FAMILIES))
def test_every_family_computes_what_the_loaded_model_does(found, models, family):
    expected = weights_in(models[family])
    for weight, master in found[family]["masters"].items():
        assert torch.equal(master.view(expected[weight].shape), expected[weight]), weight
    assert_same_function(found[family], models[family])


@pytest.mark.parametrize("kind", slow_but(FAST, HALVES))
def test_files_in_half_precision_are_read_exactly(found, models, kind):
    expected = weights_in(models[kind])
    for weight, master in found[kind]["masters"].items():
        assert torch.equal(master.view(expected[weight].shape), expected[weight]), weight


# Methods that cannot start from a plain model, with words of the reason. New ones say for themselves.
REFUSED = {
    **dict.fromkeys(
        ("lir", "he_init", "small_init", "xavier_init", "residual_init", "depth_scaled_init", "gg_init"),
        "decides initial values",
    ),
    **dict.fromkeys(
        ("osp", "pre_ln", "qk_norm", "softcap", "attention_residuals", "embedding_layernorm"),
        "changes what the model computes",
    ),
}


@pytest.mark.parametrize("method", slow_but({*TAKING, *REFUSED, "tvr"}, FORWARD))
def test_every_method_starts_from_an_equal_function_or_is_refused(found, models, method):
    refused = found[method].get("refused", "")
    if method in REFUSED or refused:
        assert REFUSED.get(method, "") in refused
        assert method in refused
        assert len(refused.split()) > 8
    else:
        assert_same_function(found[method], models["plain llama"])


@pytest.mark.parametrize(
    "name", slow_but(FAST, [*OPTIONS, *map(" + ".join, PAIRS), *(f"{name}, cut" for name in ON_CUT)])
)
def test_options_pairs_and_cut_matrices_start_from_an_equal_function_too(found, models, name):
    assert_same_function(found[name], models["plain llama"])


@pytest.mark.parametrize("pair", slow_but(FAST, OTHER_FAMILIES))
def test_every_family_starts_with_every_method_from_an_equal_function(found, models, pair):
    assert_same_function(found[pair], models[OTHER_FAMILIES[pair][0]])


def test_a_tied_model_starts_from_an_equal_function(found, models):
    assert_same_function(found["tied wesar"], models["tied llama"])


def test_half_precision_starts_from_an_equal_function_up_to_its_rounding(found, models):
    assert_same_function(found["wesar in bf16"], models["plain llama"], 0.05)


def test_all_methods_that_change_the_form_of_matrices_take_them_over():
    assert {"wesar", "weight_norm", "sigma_reparam", "residual_scaling"} <= set(TAKING)
    assert not REFUSED.keys() & set(TAKING)


@pytest.mark.parametrize("name", ["wesar", "weight_norm", "sigma_reparam"])
def test_stored_matrices_have_the_deviation_of_the_method(found, name):
    std = REGISTRY[name]().variance ** 0.5
    matrices = [(weight, m) for weight, m in found[name]["masters"].items() if weight.endswith("_proj.weight")]
    assert len(matrices) == 21
    for weight, master in matrices:
        assert float(master.double().std()) == pytest.approx(std, rel=1e-6), weight


def test_a_trained_factor_holds_what_was_divided_out(found, models):
    expected = weights_in(models["plain llama"])
    masters = found["wesar"]["masters"]
    for weight, value in expected.items():
        if value.dim() == 2:
            product = masters[weight].view(value.shape) * masters[f"{weight}_scale"]
            torch.testing.assert_close(product, value, rtol=1e-6, atol=0)
    lengths = expected["model.layers.1.mlp.down_proj.weight"].double().norm(dim=1)
    gains = found["weight_norm"]["masters"]["model.layers.1.mlp.down_proj.weight_scale"].double()
    torch.testing.assert_close(gains, lengths, rtol=1e-6, atol=0)


def test_what_a_tied_model_cannot_take_is_refused(found):
    assert "share one matrix" in found["tied embedding_scale"]["refused"]
    assert "by two of them" in found["tied wesar frozen"]["refused"]


def test_values_that_no_run_can_train_on_are_refused(found):
    assert "holds NaN or infinity in lm_head.weight" in found["NaN"]["refused"]
    assert "holds values up to 100000 in lm_head.weight, and fp16 ends at 65,504" in found["large values"]["refused"]


def test_a_head_of_its_own_starts_as_the_embedding_that_the_model_shares(found, models):
    masters = found["untied from tied"]["masters"]
    assert torch.equal(masters["lm_head.weight"], masters["model.embed_tokens.weight"])
    assert_same_function(found["untied from tied"], models["tied llama"])


@pytest.mark.parametrize("name", slow_but(FAST, GROWN))
def test_blocks_start_from_the_listed_ones(found, models, name):
    layers = GROWN[name]
    expected, masters = weights_in(models["llama"]), found[name]["masters"]
    blocks = {int(weight.split(".")[2]) for weight in masters if weight.startswith("model.layers.")}
    assert blocks == set(range(len(layers)))
    for weight, master in masters.items():
        parts = weight.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])])
        source = expected[".".join(parts)]
        assert torch.equal(master.view(source.shape), source), weight


def test_shrink_and_perturb_changes_matrices_only(found, models):
    expected = weights_in(models["llama"])
    noise = {}
    for weight, master in found["shrunk"]["masters"].items():
        value = expected[weight]
        if value.dim() == 1:
            assert torch.equal(master.view(-1), value), weight
        else:
            noise[weight] = (master.view(value.shape).double() - SHRINK["shrink"] * value.double()).flatten()
    for weight, values in noise.items():
        assert abs(float(values.mean())) < 5 * SHRINK["noise"] / len(values) ** 0.5, weight
        assert float(values.std()) == pytest.approx(SHRINK["noise"], rel=5 / (2 * len(values)) ** 0.5), weight
    one, other = (noise[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.2


@pytest.mark.parametrize("name", slow_but(FAST, ["shrunk on zero1", "shrunk on one rank", "shrunk, cut"]))
def test_the_perturbation_is_the_same_in_every_layout(found, name):
    for weight, master in found["shrunk"]["masters"].items():
        assert torch.equal(found[name]["masters"][weight].flatten(), master.flatten()), weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shrunk with another seed"])
def test_another_seed_perturbs_otherwise(found, name):
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[name]["masters"][weight], found["shrunk"]["masters"][weight])


def test_methods_take_over_what_was_perturbed(found):
    one, other = (found[name]["logits"] for name in ("shrunk wesar", "shrunk plain"))
    assert float((one - other).abs().max() / other.abs().max()) < 2e-5

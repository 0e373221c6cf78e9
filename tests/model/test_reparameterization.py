"""Modules that multiply by a function of their weight: values and gradients of the plain formula, and what they keep."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from pretrain.checkpoints.method_state import load_method_state, save_method_state
from pretrain.config.schema import Config
from pretrain.engine.build_model import bind_methods, build_model
from pretrain.errors import UserError
from pretrain.methods.sigma_reparam import SpectralGate, spectral_norm
from pretrain.methods.weight_norm import RowGains
from pretrain.methods.wesar import Gate
from pretrain.model.loss import HeadTerm, LossHead
from pretrain.model.reparameterization import Multiple, Reparameterized, ReparameterizedLinear, applied, reparameterize

INPUTS, OUTPUTS, SIGMA = 12, 20, 3.0


def spectral(differentiate: bool = True) -> SpectralGate:
    gate = SpectralGate(differentiate)
    gate.restore(*(vector / vector.norm() for vector in (torch.arange(1.0, OUTPUTS + 1), torch.ones(INPUTS))))
    gate.is_due = False
    return gate


def sigma_of(weight: torch.Tensor, differentiate: bool = True) -> torch.Tensor:
    u, v = torch.arange(1.0, OUTPUTS + 1).to(weight.dtype), torch.ones(INPUTS).to(weight.dtype)
    sigma = u @ weight @ v / (u.norm() * v.norm())
    return sigma if differentiate else sigma.detach()


# name: (f of the module, the formula of W and s, the factor of the bias)
FUNCTIONS = {
    "scalar": (Gate, lambda w, s: w * s, 1.0),
    "constant": (lambda: Multiple(0.3), lambda w, s: 0.3 * w, 1.0),
    "constant with bias": (lambda: Multiple(0.3, with_bias=True), lambda w, s: 0.3 * w, 0.3),
    "rows": (RowGains, lambda w, s: s[:, None] * w / w.square().sum(1, keepdim=True).sqrt(), 1.0),
    "spectral": (spectral, lambda w, s: s * w / sigma_of(w), 1.0),
    "spectral, sigma constant": (lambda: spectral(False), lambda w, s: s * w / sigma_of(w, False), 1.0),
}
MODULES = {
    "linear": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
    "linear with bias": lambda: nn.Linear(INPUTS, OUTPUTS),
    "conv1d": lambda: Conv1D(OUTPUTS, INPUTS),
    "head": lambda: LossHead(INPUTS, OUTPUTS),
}


def made(stock: nn.Module, function: str) -> nn.Module:
    """Return the module that replaces `stock`, float64, with values that do not depend on the global seed."""
    model = nn.Sequential(stock)
    reparameterize(model, "0", FUNCTIONS[function][0]())
    module, generator = model[0].double(), torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) + 0.1)
    return module


def formula(module: nn.Module, function: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W̄ (outputs, inputs) and the bias, with autograd's own graph."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    _, function_of, factor = FUNCTIONS[function]
    bias = getattr(module, "bias", None)  # an embedding has none
    return function_of(weight, module.weight_scale), bias if bias is None else factor * bias


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, of: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(found, of), torch.autograd.grad(expected, of), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", MODULES)
def test_values_and_gradients_are_those_of_the_formula(kind, function):
    module = made(MODULES[kind](), function)
    hidden = torch.randn(3, 5, INPUTS, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, OUTPUTS, dtype=torch.float64)
    loss = (module(hidden) - target).square().sum()
    expected = (F.linear(hidden, *formula(module, function)) - target).square().sum()
    assert_same_gradients(loss, expected, [hidden, *module.parameters()])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_heads_loss_and_its_terms_are_those_of_the_formula(function):
    head = made(LossHead(INPUTS, OUTPUTS), function)
    head.terms = {"size": HeadTerm(lambda weight: 0.1 * weight.square().sum())}
    hidden = torch.randn(2, 7, INPUTS, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, OUTPUTS, (2, 7))
    weight, _ = formula(head, function)
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten()) + 0.1 * weight.square().sum()
    assert_same_gradients(head(hidden, targets)["total"].double(), expected, [hidden, *head.parameters()])


@pytest.mark.parametrize("function", ["scalar", "constant"])
def test_an_embedding_multiplies_the_rows_that_are_looked_up(function):
    module = made(nn.Embedding(OUTPUTS, INPUTS), function)
    ids = torch.tensor([[3, 1, 3], [0, 19, 7]])
    target = torch.randn(2, 3, INPUTS, dtype=torch.float64)
    loss = (module(ids) - target).square().sum()
    expected = (F.embedding(ids, formula(module, function)[0]) - target).square().sum()
    assert_same_gradients(loss, expected, list(module.parameters()))


@pytest.mark.parametrize("function", ["scalar", "rows", "spectral"])
@pytest.mark.parametrize("kind", ["linear", "linear with bias", "conv1d"])
def test_in_bf16_factors_count_in_float32_and_the_product_is_cast_last(kind, function):
    module = made(MODULES[kind](), function).bfloat16()
    exact = torch.rand(module.weight_scale.shape) + 0.5
    assert not torch.equal(exact, exact.bfloat16().float())
    module.exact_scale = exact
    hidden = torch.randn(4, INPUTS).bfloat16()
    stock = MODULES[kind]().bfloat16()
    stock.weight.data = applied(module.effective, module.weight.detach(), exact, module.input_major).bfloat16()
    if module.bias is not None:
        stock.bias.data = module.bias.data
    found = module(hidden)
    assert torch.equal(found, stock(hidden))
    found.float().sum().backward()
    assert module.weight_scale.grad.dtype == torch.bfloat16
    assert module.weight_scale.grad.abs().min() > 0


def test_another_kind_of_module_is_refused():
    with pytest.raises(TypeError, match="norm is a LayerNorm"):
        reparameterize(nn.ModuleDict({"norm": nn.LayerNorm(4)}), "norm", Gate())


def test_row_lengths_do_not_depend_on_the_number_of_threads():
    weight, gains = torch.randn(300, 4097), torch.rand(300)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [applied(RowGains(), weight, gains), applied(RowGains(), weight.T.contiguous(), gains, True).T]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


# the state of σReparam


def test_first_vectors_find_the_spectral_norm_within_three_percent():
    weight = torch.randn(200, 120, generator=torch.Generator().manual_seed(0))
    sigma = spectral_norm(weight, *SpectralGate(True).start(weight))
    assert 0.97 < float(sigma / torch.linalg.matrix_norm(weight, 2)) < 1.0001


def test_the_first_forward_starts_the_vectors_for_the_weight_that_it_finds():
    module = made(nn.Linear(INPUTS, OUTPUTS), "spectral")
    module.effective = SpectralGate(True)
    _, expected = SpectralGate(True).start(module.weight.detach())
    module.eval()(torch.randn(2, INPUTS, dtype=torch.float64))
    _, right = module.effective.vectors
    assert torch.equal(right, expected)


def test_vectors_advance_in_the_first_forward_of_training_after_a_step_and_never_else():
    module = made(nn.Linear(INPUTS, OUTPUTS), "spectral")
    gate, hidden = module.effective, torch.randn(4, INPUTS, dtype=torch.float64)
    gate.start(module.weight.detach())

    def vectors():
        return torch.cat(gate.vectors)

    held = vectors()
    with torch.no_grad():
        module.weight += 0.2 * torch.randn(OUTPUTS, INPUTS)
    gate.after_step()
    module.eval()
    found = module(hidden)
    assert torch.equal(vectors(), held)
    left, right = gate.vectors
    sigma = left.double() @ module.weight @ right.double()
    expected = F.linear(hidden, module.weight_scale * module.weight / sigma, module.bias)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    module.train()
    module(hidden).sum().backward()
    once = vectors()
    assert not torch.equal(once, held)
    module(hidden)
    module.eval()(hidden)
    assert torch.equal(vectors(), once)


def test_a_module_that_takes_up_stored_vectors_computes_the_same(tmp_path):
    plan_config, model_config = tiny_config("sigma_reparam")
    models = [tiny_model(plan_config, model_config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(0, 50, (2, 9))
    models[0](tokens, tokens)
    for module in models[0].modules():
        if isinstance(module, Reparameterized) and module.effective:
            module.effective.after_step()
    save_method_state(tmp_path, plan_config.methods, models[0])
    load_method_state(tmp_path, plan_config.methods, models[1])
    for mode in (False, True, False):
        results = [model.train(mode)(tokens, tokens)["total"] for model in models]
        assert torch.equal(*results)


def test_a_checkpoint_without_the_vectors_is_refused(tmp_path):
    plan_config, model_config = tiny_config("sigma_reparam")
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.left_singular_vector"):
        load_method_state(tmp_path, plan_config.methods, tiny_model(plan_config, model_config))


# tensors that are kept from forward to backward


def tiny_config(method: str, family: str = "llama"):
    shape = {"vocab_size": 50, "tie_word_embeddings": False}
    if family == "llama":
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        model_config = LlamaConfig(hidden_size=24, intermediate_size=44, **heads, **shape)
    else:
        model_config = GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=32, **shape)
    config = Config.model_validate(
        {
            "name": "case",
            "model": {"family": family},
            "tokenizer": "none",
            "data": {"train": "none", "seq_len": 9, "global_batch_size": 2, "micro_batch_size": 2},
            "steps": 1,
            "optim": {"lr": 1e-3},
            "methods": [{"name": method}],
            "deepspeed": {"zero_optimization": {"stage": 0}},
        }
    )
    return bind_methods(config, model_config), model_config


def tiny_model(config: Config, model_config) -> nn.Module:
    model = build_model(config, model_config, {"zero_optimization": {"stage": 0}})
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm" in name))
    return model


@contextmanager
def watched_matrices():
    """Collect weak references to the memory of every W̄ that is made in the block."""
    compute, seen = Reparameterized._compute, []

    def watch(self, weight, scale):
        result = compute(self, weight, scale)
        seen.append(StorageWeakRef(result.untyped_storage()))
        return result

    Reparameterized._compute = watch
    try:
        yield seen
    finally:
        Reparameterized._compute = compute


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["wesar", "weight_norm", "sigma_reparam", "residual_scaling"])
def test_no_derived_matrix_is_kept_from_forward_to_backward(method, family, precision):
    model = tiny_model(*tiny_config(method, family)).to(precision)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    matrices = {parameter.shape for parameter in model.parameters() if parameter.dim() == 2}
    matrices |= {shape[::-1] for shape in matrices}
    saved = []

    def keep(tensor):
        if tensor.shape in matrices and tensor.data_ptr() not in parameters:
            saved.append((tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())))
        return tensor

    tokens = torch.randint(0, 50, (2, 9))
    with watched_matrices() as made_matrices, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens)["total"]
    assert made_matrices
    assert all(reference.expired() for reference in made_matrices)
    kept = [shape for shape, reference in saved if not reference.expired()]
    assert kept == [(50, 24)], "the head keeps the gradient of its own matrix, and nothing else is kept"
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_memory_test_notices_a_matrix_that_is_kept(monkeypatch):
    """A module that leaves the product to autograd keeps W̄."""
    monkeypatch.setattr(
        Reparameterized, "product", lambda self, hidden: F.linear(hidden, self._compute(self.weight, self.weight_scale))
    )
    model = tiny_model(*tiny_config("weight_norm"))
    with watched_matrices() as made_matrices:
        loss = model(torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9)))["total"]
    assert not all(reference.expired() for reference in made_matrices)
    loss.backward()


def kept_by_a_compiled_product(monkeypatch, *, plain: bool) -> list[tuple[int, ...]]:
    """Return the shapes of what a compiled product with W̄ = αW keeps for the backward pass, besides W itself."""
    if plain:  # as a module that leaves W̄ to the compiler
        monkeypatch.setattr(
            "pretrain.model.reparameterization.checkpoint", lambda function, *args, **_: function(*args)
        )
    torch._dynamo.reset()
    module = ReparameterizedLinear(24, 40, bias=False, effective=Gate()).bfloat16()
    module.exact_scale = torch.tensor([0.3])
    hidden = torch.ones(7, 24, dtype=torch.bfloat16, requires_grad=True)  # its gradient takes W̄
    out = torch.compile(module.forward, backend="aot_eager", fullgraph=True)(hidden)
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    kept = [tensor for tensor in out.grad_fn.saved_tensors if tensor.data_ptr() not in parameters]
    out.float().sum().backward()
    assert module.weight.grad is not None
    assert module.weight_scale.grad is not None
    return [tuple(tensor.shape) for tensor in kept]


def test_a_compiled_product_keeps_no_derived_matrix(monkeypatch):
    matrices = {(24, 40), (40, 24)}
    assert not matrices & set(kept_by_a_compiled_product(monkeypatch, plain=False))
    assert matrices & set(kept_by_a_compiled_product(monkeypatch, plain=True))

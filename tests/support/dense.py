"""A LLaMA in plain torch, float32, one process: the reference for every method, written from the formulas alone.

`tests/methods/references/<method>.py` describes one method to the tests that iterate over the registry. Each name has a
default, given in brackets (method_suite.py), and only others need to stand there:

    OPTIONS    [{}] the method's options in the tests, such that it acts visibly within four steps
    EXPORTS    ["LlamaForCausalLM"] the stock class that an untied model is exported as; EXPORTS_TIED where that differs
    FOLD       ["bit"] the exported logits are the trainer's to the bit; "round-off": equal but for rounding.
               FOLD_TIED where a tied model differs, FOLD_GPT2 where GPT-2, which is tied, differs from that
    CONTROL    [a matrix of the blocks] an exported weight that the fold has changed: scaled by 1%, the comparison must fail
    REFUSES_TIED  words of the refusal, for a method that cannot act on a tied model; leave it out otherwise
    initial_std(name, shape, settings)    the deviation that a matrix should start with, from the formula; None: the
               method does not decide it. Left out: it decides none
    initial_value(name, settings)    the constant that a weight should start with, where the method brings weights of its
               own or changes what norms (1) and biases (0) start with; None for the others. Left out: none
    class Reference(DenseLlama)    the method in training; overrides the pieces that it changes

`METHODS=lir,tvr pytest tests/methods` runs the tests of some methods only.

Nothing here may come from `pretrain`: what is tested cannot be its own reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch.nn import functional as F

IGNORED = -100


@dataclass(frozen=True)
class RunSettings:
    """The settings of the run that is repeated.

    Attributes:
        lrs: The learning rate of each step.
        std: The run's initializer_range.
        head_size: The size of a head where it is not hidden / heads.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    eps: float
    theta: float
    std: float
    lrs: tuple[float, ...]
    peak_lr: float
    betas: tuple[float, float]
    adam_eps: float
    weight_decay: float
    clip: float

    head_size: int | None = None

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads


class DenseLlama:
    """Weights by their Hugging Face names, and one method for each piece of the model and of a training step.

    Attributes:
        gradient_norm: the global norm of the last step's gradient, before it was clipped.
    """

    gradient_norm: float

    def __init__(self, settings: RunSettings, initial: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
        """Take every trained weight, float32, and the method's options, as in OPTIONS."""
        self.settings, self.options = settings, options
        self.weights = {name: value.clone().requires_grad_() for name, value in initial.items()}
        self.moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in initial.items()}
        self.steps = 0

    # the model, in the order of its computation

    def matrix(self, module: str) -> torch.Tensor:
        """Return the matrix of a module ("model.layers.0.mlp.up_proj", "lm_head", ...), (outputs, inputs)."""
        if module == "lm_head" and self.settings.tied:
            return self.weights["model.embed_tokens.weight"]
        return self.weights[f"{module}.weight"]

    def bias(self, module: str) -> torch.Tensor | None:
        return self.weights.get(f"{module}.bias")

    def linear(self, x: torch.Tensor, module: str) -> torch.Tensor:
        return F.linear(x, self.matrix(module), self.bias(module))

    def norm(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Normalize by a module: "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"."""
        return self.gain(module) * x / (x.square().mean(-1, keepdim=True) + self.settings.eps).sqrt()

    def gain(self, module: str) -> torch.Tensor:
        return self.weights[f"{module}.weight"]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix("model.embed_tokens")[ids]

    def start_of_stream(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the first block reads, (batch, seq_len, hidden): the embedding, as a method has made it."""
        return self.embed(ids)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the final norm's output, (batch, seq_len, hidden)."""
        x = self.start_of_stream(ids)
        for layer in range(self.settings.layers):
            x = x + self.attention(self.norm(x, f"model.layers.{layer}.input_layernorm"), layer)
            x = x + self.mlp(self.norm(x, f"model.layers.{layer}.post_attention_layernorm"), layer)
            self.after_block(x, layer)
        return self.norm(x, "model.norm")

    def after_block(self, x: torch.Tensor, layer: int) -> None:
        """Look at the residual stream after a block, (batch, seq_len, hidden). Layers count from 0 here."""

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        settings, (batch, length, _) = self.settings, x.shape

        def heads(role: str, count: int) -> torch.Tensor:
            return (
                self.linear(x, f"model.layers.{layer}.self_attn.{role}_proj")
                .view(batch, length, count, -1)
                .transpose(1, 2)
            )

        q, k = self.queries_and_keys(heads("q", settings.heads), heads("k", settings.kv_heads), layer)
        q, k, v = self.rotated(q), self.rotated(k), heads("v", settings.kv_heads)
        k, v = (each.repeat_interleave(settings.heads // settings.kv_heads, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / sqrt(settings.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.linear(mixed.transpose(1, 2).reshape(batch, length, -1), f"model.layers.{layer}.self_attn.o_proj")

    def queries_and_keys(self, q: torch.Tensor, k: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Change queries and keys before the rotation; each (batch, heads, seq_len, head_dim)."""
        return q, k

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.settings.head_dim // 2
        frequencies = self.settings.theta ** (-torch.arange(half) / half)
        angles = torch.arange(x.shape[2])[:, None] * frequencies
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        module = f"model.layers.{layer}.mlp"
        gated = F.silu(self.linear(x, f"{module}.gate_proj")) * self.linear(x, f"{module}.up_proj")
        return self.linear(gated, f"{module}.down_proj")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden, "lm_head")

    # the loss

    def terms(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the terms that are added to the cross-entropy, by name. logits: (tokens, vocabulary)."""
        return {}

    def losses(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `cross_entropy` and the terms. tokens: (batch, seq_len + 1)."""
        targets = tokens[:, 1:].flatten()
        logits = self.logits(self.hidden(tokens[:, :-1])).flatten(0, 1)
        return {"cross_entropy": F.cross_entropy(logits, targets), **self.terms(logits, targets)}

    # a training step: AdamW with decoupled decay, the global gradient norm clipped

    def before_step(self) -> None:
        """Act before the forward pass of step self.steps, which counts from 1."""

    def after_step(self) -> None:
        """Act after step self.steps. Edits go to `self.weights[name].data`."""

    def decay(self, name: str) -> float:
        return self.settings.weight_decay if self.weights[name].dim() == 2 else 0.0

    def trained(self) -> dict[str, torch.Tensor]:
        return self.weights

    def step(self, tokens: torch.Tensor) -> dict[str, float]:
        """Take one optimizer step on a global batch and return the losses before it."""
        self.steps += 1
        self.before_step()
        losses = self.losses(tokens)
        trained = self.trained()
        gradients = torch.autograd.grad(torch.stack([*losses.values()]).sum(), list(trained.values()))
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
        self.gradient_norm = float(norm)
        clip = min(1.0, self.settings.clip / (self.gradient_norm + 1e-6))
        with torch.no_grad():
            for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
                self.update(name, weight, gradient * clip)
            self.after_step()
        return {name: loss.item() for name, loss in losses.items()}

    def update(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        settings, lr = self.settings, self.settings.lrs[self.steps - 1]
        (beta1, beta2), (first, second) = settings.betas, self.moments[name]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean, square = first / (1 - beta1**self.steps), second / (1 - beta2**self.steps)
        weight.mul_(1 - lr * self.decay(name)).sub_(lr * mean / (square.sqrt() + settings.adam_eps))

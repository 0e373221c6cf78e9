"""The time of an optimizer step by a roofline: each kind of work at the rate that its kernels reach.

    products        6 FLOPs for each weight that multiplies a token, and a third more where a block is computed again
    attention       the scores and the weighted sum, half of them as the mask is causal, and as much again backward and a half
    other kernels   norms, rotary positions, activation functions, residuals: bound by the memory's bandwidth. Their traffic
                    is taken as a multiple of what a block keeps for backward (counted for a 1B model: 14.5 in eager blocks,
                    3 in compiled ones)
    optimizer       reads and writes of masters, moments, gradients and weights
    communication   see `_communication`. ZeRO-2 and 3 hide it behind the computation of a micro-batch, as far as it fits

No GPU has confirmed these figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.schema import Config
from pretrain.monitor.throughput import peak_of
from pretrain.planning.cluster import ATTENTION, PRODUCTS, STREAMING, WHOLE_STEPS, Cluster
from pretrain.planning.memory import attention_widths, kept_bytes
from pretrain.planning.run_shape import RunShape

_TRAFFIC = {"eager": 14.5, "compiled": 3.0}
_HOST_LINK = 20e9  # bytes per second between a GPU and its host, of PCIe 5 shared by two GPUs
_STATE_TRAFFIC = 12  # bytes of each element that a step moves besides moments: gradient, and master read and written


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer step of one rank, by kind of work, and what follows from them.

    Attributes:
        parts: seconds by kind of work. What is hidden behind computation does not count.
        tokens_per_s: of all ranks together.
        mfu: model FLOPs utilization, as the trainer prints it.
        sent_bytes: bytes that each rank sends in one step.
    """

    parts: dict[str, float]
    tokens_per_s: float
    mfu: float
    sent_bytes: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def is_compiled(config: Config) -> bool:
    """Return whether the blocks of a run are compiled on GPUs."""
    return config.compile != "off" and not any(method.eager_blocks for method in config.methods)


def step_time(shape: RunShape, cluster: Cluster) -> StepTime:
    """Predict the time of a step of a run on a cluster."""
    config, gpu = shape.config, cluster.gpu
    peak, micro_batches = peak_of(gpu.peaks, shape.precision), shape.accumulation_steps
    assert peak is not None, "every kind of GPU here has its peaks there"
    tokens, tensor = shape.tokens_per_micro_batch, config.parallel.tensor
    queries, _ = attention_widths(shape.model_config)
    layers, again = shape.model_config.num_hidden_layers, config.activation_checkpointing == "full"
    scores = 12 * layers * queries * config.data.seq_len  # FLOPs for each token, not halved: as in `flops_per_token`
    products = (shape.flops_per_token - scores) * tokens / tensor * (4 / 3 if again else 1)
    attention = scores / 2 * tokens / tensor * (3.5 + again) / 3
    recomputes = config.activation_checkpointing != "off"
    traffic = (
        _TRAFFIC["compiled" if is_compiled(config) else "eager"] * kept_bytes(shape) * (4 / 3 if recomputes else 1)
    )
    compute = (
        products / (PRODUCTS * peak) + attention / (ATTENTION * peak) + traffic / (STREAMING * gpu.bandwidth)
    ) / WHOLE_STEPS
    hidden, exposed, once = _communication(shape, cluster)
    sharers = shape.zero_ranks if shape.zero_stage else 1
    elements = shape.elements_per_rank / sharers
    traffic = _STATE_TRAFFIC * elements + 2 * shape.moment_bytes_per_rank / sharers
    optimizer = traffic / (STREAMING * gpu.bandwidth)
    if shape.optimizer_on_cpu:
        optimizer = 6 * elements / _HOST_LINK + traffic / _HOST_LINK
    parts = {
        "computation": micro_batches * compute,
        "communication": micro_batches * (exposed.seconds + max(0.0, hidden.seconds - compute)) + once.seconds,
        "optimizer": optimizer,
    }
    tokens_per_s = config.tokens_per_step / sum(parts.values())
    mfu = tokens_per_s * shape.flops_per_token / (peak * shape.world_size)
    sent = micro_batches * (hidden.sent + exposed.sent) + once.sent
    return StepTime(parts, tokens_per_s, mfu, sent)


@dataclass(frozen=True)
class _Traffic:
    """Bytes that a rank sends, and the seconds that this takes."""

    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: _Traffic) -> _Traffic:
        return _Traffic(self.sent + other.sent, self.seconds + other.seconds)


def _communication(shape: RunShape, cluster: Cluster) -> tuple[_Traffic, _Traffic, _Traffic]:
    """Return the communication of a micro-batch beside computation, that which stops it, and that of a step.

    With share = (n - 1) / n of n ranks, a gather or a scatter of x bytes sends share x, an all-reduce twice that.

    ZeRO-1         once a step: all-reduce of fp32 gradients, gather of the stepped weights
    ZeRO-2         in each micro-batch: a scatter of fp32 gradients, once a step: a gather of the weights
    ZeRO-3         in each micro-batch: two gathers of the weights, a scatter of fp32 gradients
    tensor         in each block and direction two all-reduces of the activations, half as much again if recomputed
    sequence       in each block and direction: queries, keys, values and the output of attention to other ranks
    """
    config, model = shape.config, shape.model_config
    width = 2 if shape.precision != "fp32" else 4
    elements, ranks, tensor, sequence = (
        shape.elements_per_rank,
        shape.zero_ranks,
        config.parallel.tensor,
        config.parallel.sequence,
    )

    def moved(size: float, among: int, span: int) -> _Traffic:
        sent = size * (among - 1) / among
        return _Traffic(sent, sent / cluster.rate(span) if among > 1 else 0.0)

    def over_all(size: float) -> _Traffic:
        return moved(size, ranks, shape.world_size)

    weights, gradients = width * elements, 4.0 * elements
    hidden, exposed, once = _Traffic(), _Traffic(), _Traffic()
    if shape.zero_stage == 3:
        hidden = over_all(2 * weights + gradients)
    elif shape.zero_stage == 2:
        hidden, once = over_all(gradients), over_all(weights)
    else:
        once = over_all(2 * gradients + (weights if shape.zero_stage else 0))
    passes = 2 + (config.activation_checkpointing != "off")
    activations = width * shape.tokens_per_micro_batch * model.num_hidden_layers
    exposed += moved(2 * passes * 2 * activations * model.hidden_size, tensor, tensor)
    queries, keys = attention_widths(model)
    exposed += moved(passes * activations * (2 * queries + 2 * keys) / tensor, sequence, tensor * sequence)
    return hidden, exposed, once

"""The rows of `metrics.jsonl`: one JSON object a line, of the kinds train, eval, weights, activations and event.

The trainer writes these types and every reader gets them from `parse_row`. The description of a field is
"unit; meaning". `docs/metrics.md` is made from them: `python -m pretrain.monitor.rows_page > docs/metrics.md`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NotRequired, TypeAlias, cast

from typing_extensions import TypedDict

Number: TypeAlias = float | None  # null stands for NaN and infinity, which JSON does not have


class Row(TypedDict):
    """The fields of every row, besides `kind`."""

    step: Annotated[int, "steps; optimizer steps done, this one included"]
    time: NotRequired[Annotated[float, "s; Unix time of writing. The writer adds it"]]


class TrainRow(Row):
    """Written every `log.interval_steps` steps and at the last step."""

    kind: Literal["train"]
    tokens: Annotated[int, "tokens; read by all ranks up to this step"]
    first_sample: Annotated[int, "sample; number of the first sample of this step in the run's order, from 0"]
    last_sample: Annotated[int, "sample; number of the last sample of this step"]
    epochs: Annotated[dict[str, float], "epochs; how often each corpus of `data.train` has been read, by its path"]
    loss: Annotated[Number, "nats per token; mean cross-entropy of this step over all targets that count"]
    grad_norm: Annotated[
        Number, "-; norm of the whole gradient of this step before clipping. Null if it overflowed or is not computed"
    ]
    lr: Annotated[
        Number, "-; learning rate of this step, before the factors of parameter groups. Null if it is infinite"
    ]
    tokens_per_s: Annotated[
        float, "tokens/s; speed of all ranks together since the last `train` row, without evaluation and saving"
    ]
    step_time_s: Annotated[float, "s; mean time of one step over the same interval"]
    data_wait: Annotated[float, "share; part of the same interval in which rank 0 waited for batches"]
    mfu: Annotated[
        Number,
        "share; model FLOPs utilization over the same interval, of the GPU's dense peak in the run's precision (TF32's in "
        "an fp32 run where torch may use it). Null on a CPU and on unknown devices",
    ]
    memory_bytes: Annotated[int, "bytes; peak memory of rank 0 so far: of the GPU's allocator, or resident on a CPU"]
    loss_terms: NotRequired[
        Annotated[dict[str, Number], "nats per token; what each loss term of a method adds, by its name"]
    ]
    zclip: NotRequired[
        Annotated[Number, "factor; multiplier of ZClip on the gradient. 1 leaves it, 0 stands for a skipped step"]
    ]
    loss_scale: NotRequired[Annotated[float, "factor; loss scale of this step. With fp16 only"]]
    skipped: NotRequired[Annotated[int, "steps; skipped so far because a gradient overflowed. With fp16 only"]]


class EvalRow(Row):
    """Written every `eval.interval_steps` steps and at the last step, for runs with `data.val`."""

    kind: Literal["eval"]
    loss: Annotated[Number, "nats per token; mean cross-entropy over the validation batches"]
    perplexity: Annotated[Number, "-; exp(loss), of a loss of at most 700"]
    average_loss: NotRequired[
        Annotated[Number, "nats per token; `loss` with the average of the weights, where `ema` keeps one"]
    ]


class WeightValues(TypedDict, total=False):
    """Values of one full weight, whatever its sharding.

    `std`, `mean`, `kurtosis` and `absolute_maximum` are of the float32 master after the optimizer step and before any
    method edits it.
    """

    std: Annotated[Number, "-; standard deviation over all elements, with Bessel's correction"]
    mean: Annotated[Number, "-; mean over all elements"]
    kurtosis: Annotated[Number, "-; fourth standardized moment, 3 for normal values"]
    absolute_maximum: Annotated[Number, "-; largest magnitude of an element"]
    update_ratio: Annotated[
        Number, "ratio; Frobenius norm of the change by this optimizer step over that of the weight after it"
    ]
    rescaled: Annotated[bool, "-; whether TVR rescaled the weight at this step"]
    target: Annotated[Number, "-; standard deviation to which TVR rescales the weight"]
    threshold: Annotated[Number, "-; standard deviation above which TVR rescales it"]
    lower_threshold: Annotated[Number, "-; standard deviation below which TVR rescales it, with `two_sided`"]


class WeightsRow(Row):
    """Written every `log.weights_interval_steps` steps, and at the steps at which a method reports on weights.

    At the interval each weight has `std`, `mean`, `kurtosis`, `absolute_maximum`, `update_ratio` and `rescaled`. When TVR
    acts, its weights have `std`, `mean`, `target`, `threshold` and `rescaled`.
    """

    kind: Literal["weights"]
    weights: Annotated[dict[str, WeightValues], "-; values of each weight, by its name"]


class LayerActivations(TypedDict):
    """Values of the residual stream after one decoder block, on the fixed probe batch."""

    layer: Annotated[int, "-; number of the block, from 1"]
    top: Annotated[Number, "-; largest magnitude"]
    median: Annotated[Number, "-; median magnitude"]
    excess_kurtosis: Annotated[Number, "-; kurtosis over channels minus 3, mean over tokens"]


class ActivationsRow(Row):
    """Written every `log.activations_interval_steps` steps and at the last step."""

    kind: Literal["activations"]
    layers: Annotated[list[LayerActivations], "-; values of each block that could be measured"]


class EventRow(Row):
    """Something that happens once. The name in `event` decides the other fields."""

    kind: Literal["event"]


class Started(EventRow):
    """The run begins with fresh weights."""

    event: Literal["started"]
    parameters: Annotated[int, "elements; size of all weights, a tied weight counted once"]
    world_size: Annotated[int, "ranks; number of ranks that train"]


class ChangedKey(TypedDict):
    """A difference from the run that wrote the checkpoint."""

    key: Annotated[str, "-; dotted key of the run file, or `environment.` and a package"]
    was: Annotated[str, "-; its value in the checkpoint's run"]
    now: Annotated[str, "-; its value in this run"]
    effect: Annotated[str, "-; what follows from the change. Empty where that is plain"]


class Resumed(EventRow):
    """The run resumes from a checkpoint of this step."""

    event: Literal["resumed"]
    parameters: Annotated[int, "elements; size of all weights, a tied weight counted once"]
    world_size: Annotated[int, "ranks; number of ranks that train"]
    changes: NotRequired[Annotated[list[ChangedKey], "-; differences from the run that wrote the checkpoint, if any"]]


class CheckpointSaved(EventRow):
    """A checkpoint of this step is complete. The row can come after those of later steps."""

    event: Literal["checkpoint_saved"]
    checkpoint: Annotated[str, "-; path of the checkpoint's folder"]
    seconds: Annotated[float, "s; time from the start of saving to the complete checkpoint"]
    stall_s: Annotated[float, "s; part of it in which training waited"]


class NotSaved(EventRow):
    """No checkpoint is written because the model holds NaN or infinity."""

    event: Literal["not_saved"]
    reason: Annotated[str, "-; where the value was found"]


class BadStep(EventRow):
    """The guard found this step's loss or gradient norm to be far above those before it, or not finite."""

    event: Literal["spike", "not_finite"]
    reason: Annotated[str, "-; the value, and what it was compared with"]
    skipped: Annotated[bool, "-; whether the update was left out"]
    first_sample: Annotated[int, "sample; number of the first sample of this step, from 0"]
    last_sample: Annotated[int, "sample; number of the last sample of this step"]
    autopsy: Annotated[str | None, "-; path of the step's autopsy. Null if none was written"]


class GradientClipped(EventRow):
    """ZClip shortened the gradient of this step."""

    event: Literal["zclip"]
    factor: Annotated[float, "factor; multiplier of the gradient"]
    grad_norm: Annotated[Number, "-; norm of the whole gradient before clipping"]
    first_sample: Annotated[int, "sample; number of the first sample of this step, from 0"]
    last_sample: Annotated[int, "sample; number of the last sample of this step"]


class RolledBack(EventRow):
    """The run returns to an earlier checkpoint and leaves out the samples since. `step` is the last skipped one."""

    event: Literal["rolled_back"]
    to_step: Annotated[int, "steps; step of the checkpoint"]
    first_sample: Annotated[int, "sample; number of the first sample that is left out, from 0"]
    last_sample: Annotated[int, "sample; number of the last sample that is left out"]


class Ended(EventRow):
    """The run ends: all steps are done, a person asked for it, or a signal came."""

    event: Literal["finished", "stopped", "preempted"]
    reason: Annotated[str, "-; what ended the run"]


class WentWithout(EventRow):
    """Something that training does not need has failed. Written once for each kind and class of error."""

    event: Literal["went_without"]
    what: Annotated[str, "-; kind of work, such as `autopsy` or `tracking`"]
    reason: Annotated[str, "-; the error"]


class TrackingChanged(EventRow):
    """Tracking in wandb has stopped to work, or works again."""

    event: Literal["tracking_off", "tracking_on"]
    reason: Annotated[str, "-; the error, or where the run is tracked"]


AnyEvent: TypeAlias = (
    Started
    | Resumed
    | CheckpointSaved
    | NotSaved
    | BadStep
    | GradientClipped
    | RolledBack
    | Ended
    | WentWithout
    | TrackingChanged
)
AnyRow: TypeAlias = TrainRow | EvalRow | WeightsRow | ActivationsRow | AnyEvent


def parse_row(line: str | bytes) -> AnyRow:
    """Return the row that a line of `metrics.jsonl` holds.

    Fields beside `kind` and `step` are not checked: files of other versions may have fewer or more. Their `weights` rows,
    which had the names of weights beside `kind` and `step`, come in today's form.

    Raises:
        ValueError: the line is no JSON object with a kind and a step.
    """
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), int):
        raise ValueError("it is no JSON object with a kind and a whole-numbered step")
    if row["kind"] == "weights" and "weights" not in row:
        row = _with_weights_apart(row)
    return cast(AnyRow, row)


def _with_weights_apart(row: dict[str, Any]) -> dict[str, Any]:
    weights = {name: values for name, values in row.items() if isinstance(values, dict)}
    return {name: value for name, value in row.items() if name not in weights} | {"weights": weights}

"""An autopsy as text: sentences about what was seen and what moved, tables of the figures, and the batch by sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import isfinite
from statistics import median
from textwrap import indent
from typing import Any, TypedDict

from pretrain.autopsy.part_figures import Measure, Move, Series, moves
from pretrain.data.audit.tables import document_text, table

MOVED = 2.0  # the ratio, up or down, from which a part counts as moved: smaller ones are the noise of batches
NAMED_MOVES = 5  # parts of one measure that are named
LISTED_SAMPLES = 64
SHOWN_SAMPLES = 16
SHOWN_CHARACTERS = 2000  # the most of one sample
TEXT_BYTES = 16 << 20  # the most of all samples in batch.txt

# Characters that a terminal obeys instead of showing: control characters, and those that change the writing direction.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class StepEntry(TypedDict):
    """One step in autopsy.json. Unknown figures are None."""

    step: int
    samples: list[int]  # the first and the last
    loss: float
    loss_terms: dict[str, float]
    gradient_norm: float | None
    clip: float | None  # what the gradient was multiplied by
    lr: float
    skipped: bool


class WeightSeries(TypedDict):
    """The figures of one weight at each step."""

    gradient_norm: list[float | None]
    update_ratio: list[float | None]


class Content(TypedDict):
    """The content of autopsy.json."""

    step: int
    reason: str
    moved: list[str]  # sentences
    steps: list[StepEntry]
    parts: dict[str, Series]  # by measure
    weights: dict[str, WeightSeries]
    batch: list[dict[str, Any]]  # the samples, the worst first


def report(content: Content, measures: Sequence[Measure], shown: Sequence[dict[str, Any]]) -> str:
    """Return the text of `report.md`. shown: the worst samples, with their texts."""
    skipped = content["steps"][-1]["skipped"]
    moved = content["moved"] or ["nothing is recorded that it could be compared with"]
    sections = [
        f"# Step {content['step']:,}: {content['reason']}",
        "The step was left out: the weights are as they were before it."
        if skipped
        else "The step was taken: its update is in the weights.",
        "## What moved",
        "\n".join(f"- {sentence}" for sentence in moved),
        "## The steps",
        _preformatted(steps_table(content["steps"])),
    ]
    for measure in measures:
        sections += [f"## {measure.plural.capitalize()}", _preformatted(_series_table(measure, content["steps"]))]
    sections += ["## The batch", *_batch(content, shown)]
    return shown_safely("\n\n".join(sections) + "\n")


def sentences(measure: Measure) -> Iterator[str]:
    """Yield sentences about how the parts of a model have moved, the clearest first. Zeros (skipped steps) are passed over."""
    found = moves(measure)
    broken = [move for move in found if not isfinite(move.now)]
    if broken:
        yield _broken(measure, broken, len(found))
    whole = [move for move in found if isfinite(move.now) and move.now and move.before]
    moved = [move for move in whole if not 1 / MOVED < move.times < MOVED]
    for move in moved[:NAMED_MOVES]:
        yield (
            f"{move.part}'s {measure.name} is {_times(move)} its median of the steps before ({_figure(move.now)}; it was "
            f"{_figure(move.before)})"
        )
    rest = [move.times for move in whole if move not in moved[:NAMED_MOVES]]
    if moved and rest:
        yield f"the other {measure.plural} are {min(rest):.2g} to {max(rest):.2g} times their medians"
    elif rest:
        yield f"the {measure.plural} are where they were: {min(rest):.2g} to {max(rest):.2g} times their medians"


def steps_table(steps: Sequence[StepEntry]) -> str:
    """Return the table of the steps."""
    terms = list(steps[-1]["loss_terms"])
    header = ("step", "samples", "loss", *terms, "gradient norm", "clipped to", "lr", "")
    rows = [
        (
            step["step"],
            f"{step['samples'][0]:,}-{step['samples'][1]:,}",
            f"{step['loss']:.4f}",
            *(_figure(step["loss_terms"][term]) for term in terms),
            _figure(step["gradient_norm"]),
            "-" if step["skipped"] or step["clip"] is None else f"{step['clip']:.3g}",
            f"{step['lr']:.3g}",
            "left out" if step["skipped"] else "",
        )
        for step in steps
    ]
    return table(header, rows, right=range(len(header) - 1))


def sample_text(sample: dict[str, Any], max_characters: int) -> str:
    """Return one sample with the text of its documents, of which it shows `max_characters` in all."""
    left, parts = max_characters, [sample_line(sample)]
    for document in sample["documents"]:
        parts.append(document_text(document, max(0, left)))
        left -= len(document["text"])
    return "\n".join(parts)


def sample_line(sample: dict[str, Any]) -> str:
    """Return the loss, the source and the statistics of one sample."""
    loss = "no target counts" if sample["loss"] is None else f"loss {sample['loss']:.4f}"
    return f"=== sample {sample['sample']:,}: {loss}; {sample['file']}, number {sample['number']:,}; {_looks(sample)}"


def shown_safely(text: str) -> str:
    r"""Return the text with `\x1b` in place of the character, and so on. Documents are not trusted."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _broken(measure: Measure, broken: list[Move], parts: int) -> str:
    """Return a sentence about where values became not finite. They spread up in forward and down in backward."""
    order = [part for part in measure.series if part in {move.part for move in broken}]
    first = order[-1 if measure.backward else 0]
    if len(broken) == parts:
        return f"none of the {measure.plural} is finite"
    which = f"the {measure.plural} of {_listed(order)} are" if len(order) > 1 else f"{first}'s {measure.name} is"
    way = "backward comes to first" if measure.backward else "forward comes to first"
    return f"{which} not finite" + (f"; of these {way} {first}" if len(order) > 1 else "")


def _listed(parts: Sequence[str]) -> str:
    """Return `embed_tokens, layer 1, layer 2`, shortened if there are many."""
    if len(parts) <= 6:
        return ", ".join(parts)
    return f"{', '.join(parts[:3])} ... {parts[-1]} ({len(parts)} in all)"


def _times(move: Move) -> str:
    return f"{move.times:.3g} times" if move.times >= 1 else f"1/{1 / move.times:.3g} of"


def _series_table(measure: Measure, steps: Sequence[StepEntry]) -> str:
    """Return a table with a row for each part and a column for each step."""
    times = {move.part: _of_median(move) for move in moves(measure)}
    header = ("", *(f"{step['step']:,}" for step in steps), "of median")
    rows = [(part, *map(_figure, series), times.get(part, "-")) for part, series in measure.series.items()]
    return table(header, rows, right=range(1, len(header)))


def _of_median(move: Move) -> str:
    return f"x {move.times:.3g}" if move.now and move.before and isfinite(move.now) else "-"


def _batch(content: Content, shown: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the paragraphs about the batch: a table of its samples, then the texts of those that are shown."""
    samples, (first, last) = content["batch"], content["steps"][-1]["samples"]
    corpora = sorted({sample["corpus"] for sample in samples})
    yield (
        f"{len(samples):,} samples, {first:,} to {last:,} of the run, of {', '.join(corpora)}; the worst first. Their losses "
        "are by the weights as they are now."
    )
    corpus_column = ["corpus"] if len(corpora) > 1 else []
    header = ["sample", "loss", "distinct", "longest run", "most frequent token", *corpus_column, "file", "number"]
    rows = [
        (
            sample["sample"],
            "-" if sample["loss"] is None else f"{sample['loss']:.4f}",
            sample["distinct_tokens"],
            sample["longest_run"],
            f"{sample['top_token_share']:.1%} {sample['top_token']!r}",
            *(sample[column] for column in corpus_column),
            sample["file"],
            sample["number"],
        )
        for sample in samples[:LISTED_SAMPLES]
    ]
    yield _preformatted(table(header, rows, right=(0, 1, 2, 3, len(header) - 1)))
    if (left := len(samples) - LISTED_SAMPLES) > 0:
        yield f"{left:,} more are in autopsy.json."
    which = f"The text of the {len(shown)} worst" if len(shown) < len(samples) else "Their text"
    yield f"{which}, {SHOWN_CHARACTERS:,} characters of each; batch.txt has more."
    yield from (_preformatted(sample_text(sample, SHOWN_CHARACTERS)) for sample in shown)


def worst_sample(samples: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a sentence about the first of the samples, if its loss is known."""
    worst, losses = samples[0], [sample["loss"] for sample in samples if sample["loss"] is not None]
    if losses:
        yield (
            f"sample {worst['sample']:,} has the largest loss by itself, {worst['loss']:.4f}; the batch's median is "
            f"{median(losses):.4f}. It holds {_looks(worst)}"
        )


def _looks(sample: dict[str, Any]) -> str:
    """Describe the tokens of a sample."""
    tokens = "token" if sample["distinct_tokens"] == 1 else "different tokens"
    return (
        f"{sample['distinct_tokens']:,} {tokens}, {sample['top_token']!r} is {sample['top_token_share']:.1%} of all, the "
        f"longest run of one is {sample['longest_run']:,}"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _preformatted(text: str) -> str:
    """Return the text indented, which Markdown shows as it is."""
    return indent(text, "    ", lambda line: True)

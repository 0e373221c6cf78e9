"""An autopsy as text: what was seen and what moved in sentences, the figures in tables, the batch sample by sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import isfinite
from statistics import median
from textwrap import indent

from pretrain.autopsy.parts import Measure, Move, moves
from pretrain.data.audit.tables import document_text, table

MOVED = 2.0  # times up or down: less is the noise of batches
NAMED_MOVES = 5  # of one measure
LISTED_SAMPLES = 64
SHOWN_SAMPLES = 16
SHOWN_CHARACTERS = 2000  # of a sample
TEXT_BYTES = 16 << 20  # of all samples in batch.txt

# What a terminal would obey instead of showing it: control characters, and those that turn the direction of writing.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def report(facts: dict, measures: Sequence[Measure], shown: Sequence[dict]) -> str:
    """The whole `report.md`. facts: what autopsy.json holds. shown: the worst samples, with their texts."""
    skipped = facts["steps"][-1]["skipped"]
    sections = [
        f"# Step {facts['step']:,}: {facts['reason']}",
        "The step was left out: the weights are as they were before it."
        if skipped
        else "The step was taken: its update is in the weights.",
        "## What moved",
        "\n".join(
            f"- {sentence}" for sentence in facts["moved"] or ["nothing is recorded that it could be compared with"]
        ),
        "## The steps",
        _preformatted(steps_table(facts["steps"])),
    ]
    for measure in measures:
        sections += [f"## {measure.plural.capitalize()}", _preformatted(_series_table(measure, facts["steps"]))]
    sections += ["## The batch", *_batch(facts, shown)]
    return shown_safely("\n\n".join(sections) + "\n")


def sentences(measure: Measure) -> Iterator[str]:
    """What is to be said about how the parts of a model have moved, most telling first; of zeros, nothing: steps left out."""
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


def steps_table(steps: Sequence[dict]) -> str:
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


def sample_text(sample: dict, max_characters: int) -> str:
    """One sample and its documents, of which it shows so much in all."""
    left, parts = max_characters, [sample_line(sample)]
    for document in sample["documents"]:
        parts.append(document_text(document, max(0, left)))
        left -= len(document["text"])
    return "\n".join(parts)


def sample_line(sample: dict) -> str:
    loss = "no target counts" if sample["loss"] is None else f"loss {sample['loss']:.4f}"
    return f"=== sample {sample['sample']:,}: {loss}; {sample['file']}, number {sample['number']:,}; {_looks(sample)}"


def shown_safely(text: str) -> str:
    r"""The text with `\x1b` in place of the character, and so on: documents are strangers'."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _broken(measure: Measure, broken: list[Move], parts: int) -> str:
    """Where what is not finite began: it spreads up in forward and down in backward."""
    order = [part for part in measure.series if part in {move.part for move in broken}]
    first = order[-1 if measure.backward else 0]
    if len(broken) == parts:
        return f"none of the {measure.plural} is finite"
    which = f"the {measure.plural} of {_listed(order)} are" if len(order) > 1 else f"{first}'s {measure.name} is"
    way = "backward comes to first" if measure.backward else "forward comes to first"
    return f"{which} not finite" + (f"; of these {way} {first}" if len(order) > 1 else "")


def _listed(parts: Sequence[str]) -> str:
    """`embed_tokens, layer 1, layer 2`, cut where there are many."""
    if len(parts) <= 6:
        return ", ".join(parts)
    return f"{', '.join(parts[:3])} ... {parts[-1]} ({len(parts)} in all)"


def _times(move: Move) -> str:
    return f"{move.times:.3g} times" if move.times >= 1 else f"1/{1 / move.times:.3g} of"


def _series_table(measure: Measure, steps: Sequence[dict]) -> str:
    """A row for each part, a column for each step."""
    times = {move.part: _of_median(move) for move in moves(measure)}
    header = ("", *(f"{step['step']:,}" for step in steps), "of median")
    rows = [(part, *map(_figure, series), times.get(part, "-")) for part, series in measure.series.items()]
    return table(header, rows, right=range(1, len(header)))


def _of_median(move: Move) -> str:
    return f"x {move.times:.3g}" if move.now and move.before and isfinite(move.now) else "-"


def _batch(facts: dict, shown: Sequence[dict]) -> Iterator[str]:
    samples, (first, last) = facts["batch"], facts["steps"][-1]["samples"]
    corpora = sorted({sample["corpus"] for sample in samples})
    yield (
        f"{len(samples):,} samples, {first:,} to {last:,} of the run, of {', '.join(corpora)}; the worst first. Their losses "
        "are by the weights as they are now."
    )
    header = ("sample", "loss", "distinct", "longest run", "most frequent token", "file", "number")
    rows = [
        (
            sample["sample"],
            "-" if sample["loss"] is None else f"{sample['loss']:.4f}",
            sample["distinct_tokens"],
            sample["longest_run"],
            f"{sample['top_token_share']:.1%} {sample['top_token']!r}",
            *((sample["corpus"],) if len(corpora) > 1 else ()),
            sample["file"],
            sample["number"],
        )
        for sample in samples[:LISTED_SAMPLES]
    ]
    if len(corpora) > 1:
        header = (*header[:5], "corpus", *header[5:])
    yield _preformatted(table(header, rows, right=(0, 1, 2, 3, len(header) - 1)))
    if (left := len(samples) - LISTED_SAMPLES) > 0:
        yield f"{left:,} more are in autopsy.json."
    which = f"The text of the {len(shown)} worst" if len(shown) < len(samples) else "Their text"
    yield f"{which}, {SHOWN_CHARACTERS:,} characters of each; batch.txt has more."
    yield from (_preformatted(sample_text(sample, SHOWN_CHARACTERS)) for sample in shown)


def worst_sample(samples: Sequence[dict]) -> Iterator[str]:
    """A sentence about the first of the samples, if its loss is known."""
    worst, losses = samples[0], [sample["loss"] for sample in samples if sample["loss"] is not None]
    if losses:
        yield (
            f"sample {worst['sample']:,} has the largest loss by itself, {worst['loss']:.4f}; the batch's median is "
            f"{median(losses):.4f}. It holds {_looks(worst)}"
        )


def _looks(sample: dict) -> str:
    tokens = "token" if sample["distinct_tokens"] == 1 else "different tokens"
    return (
        f"{sample['distinct_tokens']:,} {tokens}, {sample['top_token']!r} is {sample['top_token_share']:.1%} of all, the "
        f"longest run of one is {sample['longest_run']:,}"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _preformatted(text: str) -> str:
    """As Markdown shows it letter for letter, and a terminal too."""
    return indent(text, "    ", lambda line: True)

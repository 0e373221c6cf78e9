"""The findings of an audit as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

BAR = 40  # characters of the longest


def trace_table(samples: Sequence[dict]) -> str:
    """One row for each document of each sample."""
    header = ("sample", "corpus", "epoch", "shard", "number", "document", "tokens", "from")
    rows = []
    for sample in samples:
        place = [sample[key] for key in ("sample", "corpus", "epoch", "file", "number")]
        for document in sample["documents"]:
            rows.append([*place, document["document"], _stretch(document["tokens"]), _origin(document)])
            place = [""] * len(place)
        if sample["padding"]:
            rows.append([*place, "padding", sample["padding"], ""])
    return table(header, rows, right=(0, 2, 4))


def trace_texts(samples: Sequence[dict], max_characters: int) -> str:
    """The documents of each sample, each under a line that says what it is."""
    return "\n\n".join(
        "\n".join(
            [
                f"=== sample {sample['sample']}: {sample['corpus']}, {sample['file']}, number {sample['number']}",
                *(document_text(document, max_characters) for document in sample["documents"]),
            ]
        )
        for sample in samples
    )


def document_text(document: dict, max_characters: int) -> str:
    """A line about a document, or a part of one, and its text, cut after `max_characters`."""
    text, origin = document["text"], _origin(document)
    left = len(text) - max_characters
    return "\n".join(
        [
            f"--- document {document['document']}, tokens {_stretch(document['tokens'])}{f', {origin}' if origin else ''}",
            text[:max_characters] + (f"[... {left:,} more characters]" if left > 0 else ""),
        ]
    )


def corpus_tables(facts: dict) -> str:
    """Everything in `describe_corpus`."""
    return "\n\n".join(filter(None, [_summary(facts), _lengths(facts), _top_tokens(facts), _largest_sources(facts)]))


def damage_lines(report: dict) -> Iterator[str]:
    """One line for each fault in `find_damage`."""
    for damage in report["damaged"]:
        places = ", ".join(_stretch([first, last + 1]) for first, last in damage["bytes"])
        yield f"{damage['file']}: {damage['fault']}{f', bytes {places}' if places else ''}"


def _summary(facts: dict) -> str:
    ids = facts["vocab_size"]
    per_token = facts["text_bytes_per_token"]
    lines = {
        "location": facts["location"],
        "format": facts["format"] + (f", imported from {facts['imported_from']}" if facts["imported_from"] else ""),
        "tokens": f"{facts['tokens']:,} {facts['dtype']} in {facts['shards']:,} shards, {facts['bytes'] / 1e6:,.1f} MB",
        "documents": f"{facts['documents']:,}"
        + (f", shuffled with the seed {facts['shuffle']['seed']}" if facts["shuffle"] else ""),
        "text": "unknown" if per_token is None else f"{facts['text_bytes']:,} bytes, {per_token:.2f} per token",
        "vocabulary": f"{facts['ids_used']:,} ids occur"
        + (f", {facts['ids_used'] / ids:.2%} of {ids:,}" if ids else "")
        + (f"; documents begin with {facts['bos_id']}" if facts["bos_id"] is not None else "")
        + (f"; documents end with {facts['eos_id']}" if facts["eos_id"] is not None else ""),
        "tokenizer": facts["tokenizer_fingerprint"] or "unknown",
        "corpus": facts["fingerprint"],
    }
    return "\n".join(f"{key:<11}{value}" for key, value in lines.items())


def _lengths(facts: dict) -> str:
    lengths = facts["lengths"]
    if not lengths:
        return ""
    quantiles = ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "p25", "median", "p75", "p99", "max"))
    over = ", ".join(
        f"{share:.2%} over {name.rpartition('_')[2]}" for name, share in lengths.items() if name.startswith("share")
    )
    most = max(row["documents"] for row in facts["histogram"])
    rows = [
        (
            f"{row['from']:,}-{row['to']:,}",
            row["documents"],
            f"{row['tokens'] / facts['tokens']:.1%}",
            "#" * -(-row["documents"] * BAR // most),
        )
        for row in facts["histogram"]
    ]
    return (
        f"Length of documents in tokens: {quantiles}, mean {lengths['mean']:,.1f}.\n"
        f"Share of the tokens in documents of a length: {over}.\n\n"
        + table(("length", "documents", "of tokens", ""), rows, right=(0, 1, 2))
    )


def _top_tokens(facts: dict) -> str:
    rows = [
        (token["id"], token["count"], f"{token['count'] / facts['tokens']:.2%}", _quoted(token.get("text")))
        for token in facts["top_tokens"]
    ]
    return table(("id", "count", "of tokens", ""), rows, right=(0, 1, 2)) if rows else ""


def _largest_sources(facts: dict) -> str:
    rows = [(source["tokens"], source["documents"], source["path"]) for source in facts["largest_sources"]]
    if not rows:
        return ""
    return f"Files it was made from: {facts['source_files']:,}. Those that gave most:\n\n" + table(
        ("tokens", "documents", "file"), rows, right=(0, 1)
    )


def _origin(document: dict) -> str:
    if document["source"] is None:
        return ""
    return f"{document['source']}, document {document['source_document']:,}"


def _quoted(text: str | None) -> str:
    return "" if text is None else repr(text)


def _stretch(bounds: Sequence[int]) -> str:
    """[first, after the last] with both ends included."""
    return f"{bounds[0]:,}-{bounds[1] - 1:,}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Aligned columns; those in `right` at their right ends."""
    cells = [
        list(header),
        *([f"{cell:,}" if isinstance(cell, int) else _in_one_line(cell) for cell in row] for row in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _in_one_line(cell: str) -> str:
    r"""The cell with `\n` for the line's end that the name of a file may hold."""
    return cell.replace("\n", "\\n")

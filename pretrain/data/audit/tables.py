"""The results of an audit as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

BAR = 40  # characters of the longest


def trace_table(samples: Sequence[dict]) -> str:
    """Return a table with one row for each document of each sample."""
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
    """Return the documents of each sample, each under a heading."""
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
    """Return a heading for a document, or a part of one, and its text, cut after `max_characters`."""
    text, origin = document["text"], _origin(document)
    heading = f"--- document {document['document']}, tokens {_stretch(document['tokens'])}"
    if origin:
        heading += f", {origin}"
    left = len(text) - max_characters
    more = f"[... {left:,} more characters]" if left > 0 else ""
    return f"{heading}\n{text[:max_characters]}{more}"


def corpus_tables(corpus: dict) -> str:
    """Return everything in `describe_corpus` as text."""
    return "\n\n".join(
        filter(None, [_summary(corpus), _lengths(corpus), _top_tokens(corpus), _largest_sources(corpus)])
    )


def damage_lines(report: dict) -> Iterator[str]:
    """Yield one line for each damaged file in `find_damage`."""
    for damage in report["damaged"]:
        places = ", ".join(_stretch([first, last + 1]) for first, last in damage["bytes"])
        yield f"{damage['file']}: {damage['fault']}" + (f", bytes {places}" if places else "")


def _summary(corpus: dict) -> str:
    ids = corpus["vocab_size"]
    per_token = corpus["text_bytes_per_token"]
    lines = {
        "location": corpus["location"],
        "format": corpus["format"] + (f", imported from {corpus['imported_from']}" if corpus["imported_from"] else ""),
        "tokens": f"{corpus['tokens']:,} {corpus['dtype']} in {corpus['shards']:,} shards, {corpus['bytes'] / 1e6:,.1f} MB",
        "documents": f"{corpus['documents']:,}"
        + (f", shuffled with the seed {corpus['shuffle']['seed']}" if corpus["shuffle"] else ""),
        "text": "unknown" if per_token is None else f"{corpus['text_bytes']:,} bytes, {per_token:.2f} per token",
        "vocabulary": f"{corpus['ids_used']:,} ids occur"
        + (f", {corpus['ids_used'] / ids:.2%} of {ids:,}" if ids else "")
        + (f"; documents begin with {corpus['bos_id']}" if corpus["bos_id"] is not None else "")
        + (f"; documents end with {corpus['eos_id']}" if corpus["eos_id"] is not None else ""),
        "tokenizer": corpus["tokenizer_fingerprint"] or "unknown",
        "corpus": corpus["fingerprint"],
    }
    return "\n".join(f"{key:<11}{value}" for key, value in lines.items())


def _lengths(corpus: dict) -> str:
    lengths = corpus["lengths"]
    if not lengths:
        return ""
    quantiles = ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "p25", "median", "p75", "p99", "max"))
    over = ", ".join(
        f"{share:.2%} over {name.rpartition('_')[2]}" for name, share in lengths.items() if name.startswith("share")
    )
    most = max(row["documents"] for row in corpus["histogram"])
    rows = [
        (
            f"{row['from']:,}-{row['to']:,}",
            row["documents"],
            f"{row['tokens'] / corpus['tokens']:.1%}",
            "#" * -(-row["documents"] * BAR // most),
        )
        for row in corpus["histogram"]
    ]
    return (
        f"Length of documents in tokens: {quantiles}, mean {lengths['mean']:,.1f}.\n"
        f"Share of the tokens in documents of a length: {over}.\n\n"
        + table(("length", "documents", "of tokens", ""), rows, right=(0, 1, 2))
    )


def _top_tokens(corpus: dict) -> str:
    rows = [
        (token["id"], token["count"], f"{token['count'] / corpus['tokens']:.2%}", _quoted(token.get("text")))
        for token in corpus["top_tokens"]
    ]
    return table(("id", "count", "of tokens", ""), rows, right=(0, 1, 2)) if rows else ""


def _largest_sources(corpus: dict) -> str:
    rows = [(source["tokens"], source["documents"], source["path"]) for source in corpus["largest_sources"]]
    if not rows:
        return ""
    return f"Files it was made from: {corpus['source_files']:,}. Those that gave most:\n\n" + table(
        ("tokens", "documents", "file"), rows, right=(0, 1)
    )


def _origin(document: dict) -> str:
    if document["source"] is None:
        return ""
    return f"{document['source']}, document {document['source_document']:,}"


def _quoted(text: str | None) -> str:
    return "" if text is None else repr(text)


def _stretch(bounds: Sequence[int]) -> str:
    """Return [first, after the last] with both ends included."""
    return f"{bounds[0]:,}-{bounds[1] - 1:,}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Return aligned columns; those in `right` are aligned at their right ends."""
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


def _in_one_line(cell: object) -> str:
    r"""Return the cell as text, with `\n` for an end of line, which the name of a file may hold."""
    return str(cell).replace("\n", "\\n")

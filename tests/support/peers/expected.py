"""The table of consumers and exports, and why some do not fit: the tests prove it and docs/exports.md shows it.

python tests/support/peers/expected.py            # print the table of docs/exports.md
python tests/support/peers/expected.py --write    # put it there
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs/exports.md"
BEGIN, END = "<!-- table of tests/support/peers/expected.py -->\n", "<!-- end of the table -->\n"

TOKENIZERS = ("own", "gpt2", "neox", "llama3", "qwen")
BPE = TOKENIZERS[1:]  # byte-level; ours is a SentencePiece

# Class of the export: how it is trained.
CLASSES = {
    "Llama": "stock",
    "Qwen3": "`qk_norm`",
    "GPT2": "`family: gpt2`",
    "Granite": "`embedding_scale`, tied",
    "VaultGemma": "`softcap`",
    "EvenkeelLlama": "`seednorm`, `attention_residuals`",
}
CONSUMERS = ("transformers 5", "transformers 4", "pipeline", "lm-eval", "llama.cpp", "CTranslate2", "vLLM")


@dataclass(frozen=True)
class Failure:
    """Cells of the table that do not work as they are.

    Attributes:
        consumer: The column.
        classes: The rows.
        says: A regular expression for all errors that are found.
        note: The explanation on the page.
        tokenizers: The tokenizers with which they fail.
        word: The cell's text.
    """

    consumer: str
    classes: tuple[str, ...]
    says: str
    note: str
    tokenizers: tuple[str, ...] = TOKENIZERS
    word: str = "no"


NULL_TOKEN = r"RuntimeError: \[json\.exception\.type_error\.302\] type must be string, but is null"
UNDETECTED = r"BPE pre-tokenizer was not recognized[^;]*"
IN_GGUF = ("Llama", "Qwen3", "GPT2", "Granite")
FAILURES = (
    Failure(
        "lm-eval",
        tuple(CLASSES),
        r"log-likelihoods \(found, expected\): \{'rolling': [^}]*\}",
        "Where a text is scored as a whole (`loglikelihood_rolling`: word perplexity), the harness puts BOS twice before it, "
        "as it does with every tokenizer that puts BOS first. `tools/evaluate.py` puts one. Continuations of a context are "
        "right.",
        ("llama3",),
        "except whole texts",
    ),
    Failure(
        "llama.cpp",
        ("VaultGemma", "EvenkeelLlama"),
        r"RuntimeError: Model (VaultGemma|EvenkeelLlama)ForCausalLM is not supported",
        "llama.cpp has no such architecture.",
    ),
    Failure(
        "llama.cpp",
        ("GPT2",),
        f"NotImplementedError: {UNDETECTED}",
        "llama.cpp's converter takes only byte-level BPE tokenizers for GPT-2. Train GPT-2 models with one of these.",
        ("own",),
    ),
    Failure(
        "llama.cpp",
        ("Qwen3",),
        r"other ids without --override-kv for tokenizer\.ggml\.add_space_prefix",
        "llama.cpp puts a space before the text: its converter reads `add_prefix_space: false` for Llama classes only. Run "
        "with `--override-kv tokenizer.ggml.add_space_prefix=bool:false` (llama-cpp-python: `kv_overrides`), and the ids are "
        "the same.",
        ("own",),
        "with an option",
    ),
    Failure(
        "llama.cpp",
        IN_GGUF,
        UNDETECTED,
        "The converter accepts only published tokenizers. Once you name [how yours splits text](#llamacpp), ids, logits and "
        "text are the same.",
        ("gpt2", "llama3"),
        "named",
    ),
    Failure(
        "llama.cpp",
        IN_GGUF,
        rf"{UNDETECTED}; ids of 1 of 105 texts differ: \[\('e\u0301 and.*",
        "As the note before. Besides, llama.cpp does not compose characters (NFC), which these tokenizers do: a text with "
        "decomposed ones gets other ids. Compose such text before.",
        ("neox", "qwen"),
        "named",
    ),
    Failure(
        "CTranslate2",
        ("Granite", "VaultGemma", "EvenkeelLlama"),
        r"ValueError: No conversion is registered for the model configuration .*",
        "CTranslate2 has no such architecture.",
    ),
    Failure(
        "CTranslate2",
        ("Llama",),
        NULL_TOKEN,
        "CTranslate2 wants a `bos_token` for this class, which Qwen's tokenizers lack.",
        ("qwen",),
    ),
    Failure(
        "CTranslate2",
        ("GPT2",),
        NULL_TOKEN,
        "CTranslate2 wants an `unk_token` for this class, which these tokenizers lack.",
        ("llama3", "qwen"),
    ),
    Failure(
        "vLLM",
        ("EvenkeelLlama",),
        r"ValueError: Unrecognized configuration class .* for this kind of AutoModel: AutoModel\..*",
        "vLLM has no such architecture, and runs classes that come with a model through transformers' `AutoModel`, which "
        "this class, made for causal language models, does not support.",
    ),
)


def failure(consumer: str, cls: str, tokenizer: str) -> Failure | None:
    """Return why a cell does not work; None if it does."""
    for known in FAILURES:
        if known.consumer == consumer and cls in known.classes and tokenizer in known.tokenizers:
            return known
    return None


def table() -> str:
    """Return a row for each class, a column for each consumer: "yes", or the number of the note that says why not."""
    rows = [f"| class (trained by) | {' | '.join(CONSUMERS)} |", "| --- " * (1 + len(CONSUMERS)) + "|"]
    for cls, how in CLASSES.items():
        rows.append(f"| {cls} ({how}) | {' | '.join(_cell(consumer, cls) for consumer in CONSUMERS)} |")
    notes = [f"{number}. {known.note}" for number, known in enumerate(FAILURES, 1)]
    return "\n".join([*rows, "", *notes]) + "\n"


def page_with_table(page: str) -> str:
    """Return the page with the text between its marks replaced by the current table."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def _cell(consumer: str, cls: str) -> str:
    by_tokenizer = {tokenizer: failure(consumer, cls, tokenizer) for tokenizer in TOKENIZERS}
    outcomes = list(dict.fromkeys(by_tokenizer.values()))
    if len(outcomes) == 1:
        return _word(outcomes[0])
    return "<br>".join(
        f"{', '.join(name for name in TOKENIZERS if by_tokenizer[name] == outcome)}: {_word(outcome)}"
        for outcome in outcomes
    )


def _word(known: Failure | None) -> str:
    return "yes" if known is None else f"{known.word} ({FAILURES.index(known) + 1})"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")

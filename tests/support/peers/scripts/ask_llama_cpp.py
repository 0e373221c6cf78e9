"""Ask llama.cpp: convert_hf_to_gguf.py, then its own tokenizer and sampler on the GGUF file."""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from answering import answer

sys.path.insert(0, str(next(Path(llama_cpp.__file__).parents[1].glob("*/vendor/llama.cpp"))))
import convert_hf_to_gguf
from conversion.base import TextModel

DETECT = TextModel.get_vocab_base_pre


class Errors(logging.Handler):
    """A handler that keeps the messages."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def convert(folder: str, out: str, pre_tokenizer: str | None = None) -> None:
    """Convert `folder`. pre_tokenizer: a name in place of the one that the converter detects by the ids of a text."""
    TextModel.get_vocab_base_pre = DETECT if pre_tokenizer is None else lambda self, tokenizer: pre_tokenizer
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
    errors = Errors(logging.ERROR)
    logging.getLogger("hf-to-gguf").handlers = [errors]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as error:
        raise RuntimeError("; ".join(errors.messages)) from error


def load(file: str, overrides: dict[str, Any] | None = None, **settings: Any) -> llama_cpp.Llama:
    return llama_cpp.Llama(file, n_ctx=256, n_threads=1, verbose=False, kv_overrides=overrides, **settings)


def ids(model: llama_cpp.Llama, job: dict[str, Any]) -> list[list[int]]:
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]


def one(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    named, overrides = job["pre_tokenizers"].get(job["name"]), job["overrides"].get(job["name"])
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/model.gguf"
        try:
            convert(folder, out)
        except NotImplementedError as error:
            if named is None or "pre-tokenizer" not in str(error):
                raise
            found["undetected"] = str(error)
            convert(folder, out, named)
        in_32_bits = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        model = load(out, overrides, logits_all=True, **in_32_bits)
        found["ids"] = ids(model, job)
        if overrides and ids(load(out, vocab_only=True), job) != found["ids"]:
            found["overridden"] = f"other ids without --override-kv for {', '.join(overrides)}"
        input_ids = job["input_ids"][job["name"]]
        model.eval(input_ids)
        found["logits"] = np.array(model.scores[: len(input_ids)])
        greedy = {"top_k": 1, "repeat_penalty": 1.0}
        made = model.generate(ids(model, {"texts": [job["prompt"]]})[0], temp=0.0, **greedy)
        found["new_ids"] = [token for token, _ in zip(made, range(job["new_tokens"]), strict=False)]
        model.reset()
        written = model.create_completion(
            job["prompt"], max_tokens=job["new_tokens"], temperature=0.0, echo=True, **greedy
        )
        found["text"] = written["choices"][0]["text"]
        model.close()
    return found


answer(one)

"""Ask CTranslate2: its converter, then its generator."""

import tempfile
from typing import Any

import ctranslate2
import numpy as np
from answering import answer
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer


def one(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        TransformersConverter(folder, trust_remote_code=job["own_code"][job["name"]]).convert(out, force=True)
        generator = ctranslate2.Generator(out, device="cpu", compute_type="float32", intra_threads=1)
        logits = generator.forward_batch([job["input_ids"][job["name"]]])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer.convert_ids_to_tokens(tokenizer(job["prompt"])["input_ids"])
        made = generator.generate_batch(
            [prompt], max_length=job["new_tokens"], sampling_topk=1, include_prompt_in_result=False
        )
    return {"logits": np.array(logits)[0], "new_ids": made[0].sequences_ids[0]}


answer(one)

"""Ask transformers, of whichever version is on the path, as a user types it."""

from typing import Any

import numpy as np
import torch
import transformers
from answering import answer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


@torch.inference_mode()
def one(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    trust: dict[str, Any] = {"trust_remote_code": True} if job["own_code"][job["name"]] else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **trust)
    prompt = tokenizer(job["prompt"], return_tensors="pt")
    settings = {"max_new_tokens": job["new_tokens"], "do_sample": False}
    made = model.generate(**prompt, **settings)[0]
    generate = pipeline("text-generation", model=folder, **trust)
    return {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in job["texts"]],
        "logits": np.array(model(torch.tensor([job["input_ids"][job["name"]]])).logits[0].float()),
        "new_ids": made[prompt["input_ids"].shape[1] :].tolist(),
        "text": tokenizer.decode(made, skip_special_tokens=True),
        "pipeline": generate(job["prompt"], **settings)[0]["generated_text"],
    }


answer(one)

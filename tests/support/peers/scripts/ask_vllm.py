"""Ask vLLM on a CPU: its loader, the log-probabilities of a prompt, and greedy tokens."""

import os
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from answering import answer
from vllm import LLM, SamplingParams


def one(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    trust = {"trust_remote_code": True} if job["own_code"][job["name"]] else {}
    model = LLM(folder, dtype="float32", enforce_eager=True, disable_log_stats=True, **trust)
    input_ids = job["input_ids"][job["name"]][:-1]  # one token has to follow
    scored, made = (
        model.generate(prompt, settings, use_tqdm=False)[0]
        for prompt, settings in (
            ({"prompt_token_ids": input_ids}, SamplingParams(max_tokens=1, prompt_logprobs=0)),
            (job["prompt"], SamplingParams(temperature=0.0, max_tokens=job["new_tokens"])),
        )
    )
    logprobs = [of[token].logprob for token, of in zip(input_ids[1:], scored.prompt_logprobs[1:], strict=True)]
    return {"logprobs": logprobs, "new_ids": list(made.outputs[0].token_ids), "prompt_ids": made.prompt_token_ids}


if __name__ == "__main__":
    answer(one)

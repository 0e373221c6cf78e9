"""Ask lm-evaluation-harness, with its own loader: log-likelihoods of a continuation and of a whole text."""

from typing import Any

from answering import answer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def one(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    trust = {"trust_remote_code": True} if job["own_code"][job["name"]] else {}
    model = HFLM(pretrained=folder, device="cpu", batch_size=2, **trust)

    def ask(kind: str, *arguments: str) -> float:
        found = getattr(model, kind)([Instance(kind, {}, arguments, 0)], disable_tqdm=True)[0]
        return found[0] if isinstance(found, tuple) else found

    return {
        "prefix": model.prefix_token_id,
        "continuation": ask("loglikelihood", job["prompt"], job["continuation"]),
        "first": ask("loglikelihood", "", job["prompt"]),
        "rolling": ask("loglikelihood_rolling", job["prompt"] + job["continuation"]),
    }


answer(one)

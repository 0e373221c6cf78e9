"""Scores of a Hugging Face model on the tasks of EleutherAI's lm-evaluation-harness.

Tasks, prompts, metrics and standard errors are the harness's own (Gao et al. 2024, https://zenodo.org/records/12608602),
so that the figures compare with published ones. Importing this needs the package `lm_eval`, the extra `eval`.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import pretrain.model.evenkeel_llama  # noqa: F401  (a model that no stock class holds loads without running a file of its folder)
from pretrain.data.json_files import content_hash, read_json
from pretrain.errors import UserError, first_line
from pretrain.evaluation.metric_faults import nothing_lost
from pretrain.files import checksum

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about a model that is loaded already

# Draws for the standard error of a metric that is not a mean, such as perplexity. The harness's 100,000 take minutes.
_DRAWS = 1000


def load_tasks(names: list[str], folder: Path | None = None) -> list[Task | Group]:
    """Load tasks and groups with their data, from the harness and from task files.

    Args:
        names: Tasks, groups or tags.
        folder: A folder with task files (*.yaml). A task in it goes before the harness's of the same name.

    Raises:
        UserError: If a name is unknown, a task's data is not available (most come from the Hugging Face hub), or a task
            would run code that the model writes.
    """
    if folder is not None and not any(folder.glob("**/*.yaml")):
        raise UserError(f"there are no task files in '{folder}'. It should hold *.yaml files as the harness has them.")
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(_unknown(name, manager.all_tasks))
    found = [_load(name, manager) for name in names]
    try:
        tasks = manager.load([item for items in found for item in items])["tasks"]
    except ValueError as error:
        raise UserError(f"cannot evaluate {', '.join(names)} together: {error}.") from error
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(f"{', '.join(unsafe)}: this would run code that the model writes, which is not done here.")
    return [item for items in found for item in items]


def load_model(folder: Path, device: str) -> PreTrainedModel:
    """Load the model in `folder`, in the precision it is stored in, on `device`.

    No code of the folder is run: the class is one of transformers or Evenkeel's own.

    Raises:
        UserError: If the model is incomplete, needs its own code, or does not fit on the device.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded  # with the argument before, a pair
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"cannot load the model in '{folder}': {first_line(error)}{_brings_code(folder)}") from error
    if report["missing_keys"]:
        raise UserError(
            f"the files in '{folder}' lack weights of its {type(model).__name__}: "
            f"{', '.join(sorted(report['missing_keys'])[:5])}. Copy or convert it again."
        )
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # torch raises these where a device is not there, or is too small
        raise UserError(f"cannot put the model on the device '{device}': {first_line(error)}") from error


class OneBos(HFLM):
    """The harness's model with one BOS before a text that is scored as a whole, as before a document in training.

    The harness itself begins such a text with the prefix token, even if the tokenizer has put BOS there already.
    """

    add_bos_token: bool | None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task | Group],
    batch_size: int | str = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        tasks: As `load_tasks` returns them.
        batch_size: Sequences, or "auto" for as many as fit into memory.
        limit: Documents of each task; None for all.

    Returns:
        The result of the harness's `simple_evaluate` without the samples, and `faults`: the metrics that could not be
        computed and why, as `nothing_lost` collects them.

    Raises:
        UserError: If the device's memory is too small.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # else standard errors are computed in forks of a process that uses a GPU
    try:
        with redirect_stdout(sys.stderr), nothing_lost(tasks) as faults:
            language_model = OneBos(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = simple_evaluate(
                language_model,
                tasks=tasks,
                task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
                limit=limit,
                bootstrap_iters=_DRAWS,
                log_samples=False,
            )
            return {**results, "faults": faults}
    except torch.OutOfMemoryError as error:
        raise UserError(f"batches of {batch_size} do not fit into memory: {first_line(error)}") from error


def scores(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each task or group, metric and answer filter. A value that is not a finite number becomes None."""
    return [
        {
            "task": task,
            "metric": metric,
            "filter": answers,
            "value": _number(value),
            "stderr": _number(values.get(f"{metric}_stderr,{answers}")),
            "n": values["sample_len"],
            "shots": results["n-shot"].get(task),
            "task_version": results["versions"].get(task),
        }
        for task, values in results["results"].items()
        for metric, _, answers in [key.partition(",") for key in values if "," in key]
        if not metric.endswith("_stderr")
        for value in [values[f"{metric},{answers}"]]
    ]


def model_fingerprint(folder: Path) -> str:
    """Return 32 hex digits of the content of the configuration and of the weight files in `folder` (XXH3-128).

    Raises:
        UserError: If it holds no configuration.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"'{folder}' holds no config.json, so it is no model. Make one with tools/convert_to_hf.py, or fetch one "
            f"with `hf download REPO --local-dir {folder}`."
        )
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return content_hash({file.name: checksum(file) for file in files})


def _load(name: str, manager: TaskManager) -> list[Task | Group]:
    """Return the group `name`, or the task, or the tasks that a tag stands for."""
    try:
        found = manager.load(name)
    except Exception as error:  # whatever data sets and task files raise
        raise UserError(
            f"cannot load the task '{name}': {first_line(error)}. Where there is no network, fill the cache (HF_HOME) "
            "on a machine that has one, by the same command with --limit 1."
        ) from error
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _unknown(name: str, known: list[str]) -> str:
    nearest = get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"Nearest: {', '.join(nearest)}." if nearest else "`lm_eval ls tasks` lists them."
    return f"there is no task '{name}'. {hint}"


def _brings_code(folder: Path) -> str:
    """Return the end of an error message if the model needs a Python file of its own folder."""
    if "auto_map" not in read_json(folder / "config.json"):
        return ""
    return (
        ". Its folder brings Python code, which is not run here. If you have read and trust it: "
        f"lm_eval --model hf --model_args pretrained={folder},trust_remote_code=True --tasks ..."
    )


def _number(value: Any) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except (TypeError, ValueError, OverflowError):  # a text, a list, an integer of 400 digits
        return None

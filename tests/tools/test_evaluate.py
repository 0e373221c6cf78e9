"""tools/evaluate.py against log-likelihoods computed with transformers alone, on tasks made here; and its refusals."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pretrain.model.evenkeel_llama import EvenkeelLlamaForCausalLM, bring_modeling_file, evenkeel_llama
from tests.support.corpus import Corpus, documents_of
from tests.support.runs import PATIENCE_S, REPOSITORY, launch, open_process, wait_for

TOOL = REPOSITORY / "tools/evaluate.py"
LONGEST = 64  # tokens that the model can see; some pages are longer

# Data sets come from functions beside the task files, so that nothing enters a cache.
FUNCTIONS = """
import json, pathlib, time
from datasets import Dataset
from evaluate import EvaluationModule  # a package that many tasks need

HERE = pathlib.Path(__file__).parent

def documents(name):
    return {"test": Dataset.from_list(json.loads((HERE / name).read_text()))}

def choices(**_): return documents("choices.json")
def words(**_): return documents("words.json")
def pages(**_): return documents("pages.json")

def begin_and_wait(doc, results):
    (HERE / "begun").touch()
    time.sleep(600)
"""


@dataclass(frozen=True)
class Setting:
    """A tiny random model of the tests' tokenizer, and a folder of tasks with their documents."""

    model: Path
    tasks: Path

    def documents(self, task: str) -> list[dict]:
        return json.loads((self.tasks / f"{task}.json").read_text())


@pytest.fixture(scope="module")
def setting(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer)
    torch.manual_seed(5)
    LlamaForCausalLM(llama(len(tokenizer))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_tasks(folder / "tasks")
    return Setting(folder / "model", folder / "tasks")


def llama(vocab_size: int) -> LlamaConfig:
    """Return the configuration of a model with initial weights so large that its predictions differ."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=LONGEST,
        initializer_range=0.3,
    )


def write_tasks(folder: Path) -> None:
    texts = documents_of(30)
    folder.mkdir()
    (folder / "functions.py").write_text(FUNCTIONS)
    documents = {
        "choices": [
            {
                "begins": " ".join(text[:8]),
                "ends": [" ".join(text[i : i + 1 + i % 3]) for i in range(9, 13)],
                "label": n % 4,
            }
            for n, text in enumerate(map(str.split, texts[:25]))
        ],
        "words": [{"text": " ".join(text.split()[: 5 + i])} for i, text in enumerate(texts[:12])],
        "pages": [{"page": " ".join(text.split()[: 4 + 9 * i])} for i, text in enumerate(texts[:5])],
    }
    means = [{"metric": "acc"}, {"metric": "acc_norm"}]
    perplexities = [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}]
    of_words = [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}]
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{begins}}",
        "doc_to_choice": "ends",
        "doc_to_target": "label",
        "metric_list": means,
    }
    words = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": perplexities,
    }
    pages = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": of_words,
    }
    for name, task in {"choices": choices, "words": words, "pages": pages}.items():
        (folder / f"{name}.json").write_text(json.dumps(documents[name]))
        lines = yaml.safe_dump({"task": name, "test_split": "test", "metadata": {"version": 3}, **task})
        (folder / f"{name}.yaml").write_text(f"{lines}custom_dataset: !function functions.{name}\n")
    endless = (folder / "choices.yaml").read_text().replace("task: choices", "task: endless")
    (folder / "endless.yaml").write_text(f"{endless}process_results: !function functions.begin_and_wait\n")
    both = {"group": "both", "task": ["choices", "words"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(both))


@pytest.fixture(scope="module")
def evaluated(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of the group and the pages, and the printed output."""
    pytest.importorskip("lm_eval")
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    words = ["--model", setting.model, "--tasks", "both,pages", "--task-dir", setting.tasks, "--out", out]
    ended = launch([sys.executable, str(TOOL), *map(str, words), "--batch-size", "3"])
    assert ended.code == 0, ended.stderr
    assert [path.name for path in out.iterdir()] == ["results.json"]
    return {**json.loads((out / "results.json").read_text()), "printed": ended.stdout}


def test_choices_are_those_of_the_largest_likelihood(setting: Setting, evaluated: dict) -> None:
    reference = Reference(setting)
    right, right_by_length = [], []
    for document in setting.documents("choices"):
        likelihoods = [reference.continuation(document["begins"], f" {end}") for end in document["ends"]]
        by_length = [value / len(end) for value, end in zip(likelihoods, document["ends"], strict=True)]
        right.append(likelihoods.index(max(likelihoods)) == document["label"])
        right_by_length.append(by_length.index(max(by_length)) == document["label"])
    assert 0 < sum(right) < len(right)
    assert right != right_by_length
    expected = sum(right) / 25
    row = row_of(evaluated, "choices", "acc")
    assert row["value"] == pytest.approx(expected)
    assert row["stderr"] == pytest.approx(math.sqrt(expected * (1 - expected) / 24))
    assert (row["n"], row["shots"], row["task_version"]) == (25, 0, 3)
    assert row_of(evaluated, "choices", "acc_norm")["value"] == pytest.approx(sum(right_by_length) / 25)


def test_perplexity_of_last_words_is_that_of_their_likelihoods(setting: Setting, evaluated: dict) -> None:
    reference = Reference(setting)
    parts = [document["text"].rsplit(" ", 1) for document in setting.documents("words")]
    likelihoods = [reference.continuation(context, f" {word}") for context, word in parts]
    row = row_of(evaluated, "words", "perplexity")
    assert row["value"] == pytest.approx(math.exp(-sum(likelihoods) / 12), rel=1e-5)
    assert row["stderr"] > 0


def test_perplexity_of_pages_is_that_of_windows_that_meet(setting: Setting, evaluated: dict) -> None:
    reference = Reference(setting)
    pages = [document["page"] for document in setting.documents("pages")]
    assert max(map(len, map(reference.ids, pages))) > 2 * LONGEST
    likelihood = sum(map(reference.page, pages))
    per_word = -likelihood / sum(len(re.split(r"\s+", page)) for page in pages)
    per_byte = -likelihood / sum(len(page.encode()) for page in pages)
    assert row_of(evaluated, "pages", "word_perplexity")["value"] == pytest.approx(math.exp(per_word), rel=1e-5)
    assert row_of(evaluated, "pages", "byte_perplexity")["value"] == pytest.approx(math.exp(per_byte), rel=1e-5)
    assert row_of(evaluated, "pages", "bits_per_byte")["value"] == pytest.approx(per_byte / math.log(2), rel=1e-5)
    assert row_of(evaluated, "pages", "bits_per_byte")["stderr"] is None


def test_a_group_is_the_mean_over_its_documents(evaluated: dict) -> None:
    choices, words, both = (row_of(evaluated, task, "acc") for task in ("choices", "words", "both"))
    assert both["n"] == 37
    assert both["value"] == pytest.approx((25 * choices["value"] + 12 * words["value"]) / 37)


def test_results_say_what_was_evaluated_and_with_what(setting: Setting, evaluated: dict, tmp_path: Path) -> None:
    model = evaluated["model"]
    assert model["path"] == str(setting.model)
    assert (model["class"], model["dtype"]) == ("LlamaForCausalLM", "float32")
    assert model["parameters"] == sum(weight.numel() for weight in Reference(setting).model.parameters())
    assert evaluated["versions"]["lm_eval"].startswith("0.4")
    assert evaluated["settings"]["batch_size"] == 3
    assert "byte_perplexity" in evaluated["printed"]

    from pretrain.evaluation.lm_eval import model_fingerprint

    other = tmp_path / "other"
    shutil.copytree(setting.model, other)
    assert model_fingerprint(other) == model["weights"]
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert model_fingerprint(other) != model["weights"]


@pytest.mark.slow
def test_a_trial_takes_the_first_documents_and_the_batch_that_fits(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, _ = evaluate(capsys, setting, tasks="words", out=tmp_path, words=["--limit", "5", "--batch-size", "auto"])
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    reference = Reference(setting)
    parts = [document["text"].rsplit(" ", 1) for document in setting.documents("words")[:5]]
    expected = math.exp(-sum(reference.continuation(context, f" {word}") for context, word in parts) / 5)
    row = row_of(results, "words", "perplexity")
    assert row["n"] == 5
    assert row["value"] == pytest.approx(expected, rel=1e-5)


def test_a_model_of_our_own_class_is_evaluated_and_its_file_is_not_run(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(setting.model, folder)
    model = EvenkeelLlamaForCausalLM(evenkeel_llama(llama(len(AutoTokenizer.from_pretrained(folder))), seednorm=True))
    bring_modeling_file(model.config, folder)
    model.save_pretrained(folder)
    (folder / "modeling_evenkeel.py").write_text(f"open({str(ran)!r}, 'w')\n")
    code, _ = evaluate(capsys, setting, model=folder, tasks="words", words=["--limit", "2"])
    assert code == 0
    written = json.loads((folder / "evaluation/results.json").read_text())
    assert written["model"]["class"] == "EvenkeelLlamaForCausalLM"
    assert not ran.exists()


def test_code_in_the_folder_of_a_model_is_refused(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(setting.model, folder)
    (folder / "foreign.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(evaluate(capsys, setting, model=folder), str(folder), "not run here", "lm_eval --model hf")
    assert not ran.exists()


def test_what_is_no_whole_model_is_refused(setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint, pickled, cut = (tmp_path / name for name in ("step_00000500", "pickled", "cut"))
    (checkpoint / "deepspeed").mkdir(parents=True)
    shutil.copytree(setting.model, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(Reference(setting).model.state_dict(), pickled / "pytorch_model.bin")
    shutil.copytree(setting.model, cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    lacking = tmp_path / "lacking"
    shutil.copytree(setting.model, lacking)
    config = json.loads((lacking / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    assert_refused(evaluate(capsys, setting, model=tmp_path / "absent"), "absent", "config.json", "convert_to_hf")
    assert_refused(evaluate(capsys, setting, model=checkpoint), "step_00000500", "convert_to_hf")
    assert_refused(evaluate(capsys, setting, model=pickled), "pickled", "safetensors")
    assert_refused(evaluate(capsys, setting, model=cut), "cannot load the model in", "cut")
    assert_refused(evaluate(capsys, setting, model=lacking), "lacking", "model.layers.2.")
    assert_refused(evaluate(capsys, setting, words=["--device", "cuda:7"]), "device 'cuda:7'")
    assert_refused(evaluate(capsys, setting, words=["--device", "nowhere"]), "device 'nowhere'")


@pytest.mark.slow
def test_wrong_tasks_are_refused(setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    mistyped = evaluate(capsys, setting, tasks="choices,hellaswagg", with_harness_tasks=True)
    assert_refused(mistyped, "'hellaswagg'", "Nearest: hellaswag,")
    assert_refused(evaluate(capsys, setting, tasks="both,words"), "both, words together", "words")
    assert_refused(evaluate(capsys, setting, words=["--task-dir", empty]), "empty", "*.yaml")
    assert_refused(evaluate(capsys, setting, tasks=" , "), "at least one task")
    (setting.tasks / "words.json").rename(tmp_path / "words.json")
    try:
        assert_refused(evaluate(capsys, setting, tasks="words"), "cannot load the task 'words'", "words.json")
    finally:
        (tmp_path / "words.json").rename(setting.tasks / "words.json")


SPACELESS = "".join(str(number * number) for number in range(100))
FAULTY = f"""
from datasets import Dataset

def broken(answers): raise ValueError("cannot aggregate\\nat all")
def unknown(doc, results): return {{"acc": 1 / (len(doc["text"]) % 2)}}
def spaceless(**_): return {{"test": Dataset.from_list([{{"text": {SPACELESS!r}}}])}}
def long(**_): return {{"test": Dataset.from_list([{{"text": f"{{n}}" * 50}} for n in (7, 8, 7)])}}
"""
FAULTY_TASKS = {
    "spaceless": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
custom_dataset: !function faulty.spaceless
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte, aggregation: !function faulty.broken}]
""",
    "long": """
output_type: loglikelihood
doc_to_text: "a"
doc_to_target: "{{' ' + text}}"
custom_dataset: !function faulty.long
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    "unscored": """
output_type: loglikelihood
doc_to_text: "a"
doc_to_target: "{{text}}"
custom_dataset: !function functions.words
process_results: !function faulty.unknown
metric_list: [{metric: acc, aggregation: mean}]
""",
}


@pytest.mark.slow
def test_a_metric_that_cannot_be_computed_is_null_and_the_others_stand(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tasks = Path(shutil.copytree(setting.tasks, tmp_path / "tasks"))
    (tasks / "faulty.py").write_text(FAULTY)
    for name, lines in FAULTY_TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test{lines}")
    both = {"group": "faulty", "task": ["long", "spaceless"], "aggregate_metric_list": [{"metric": "perplexity"}]}
    (tasks / "faulty.yaml").write_text(yaml.safe_dump(both))
    words = ["--task-dir", tasks]
    code, stderr = evaluate(capsys, setting, tasks="faulty,unscored,words", out=tmp_path, words=words)
    assert code == 0, stderr
    written = (tmp_path / "results.json").read_text()
    results = json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    values = {(row["task"], row["metric"]): (row["value"], row["stderr"]) for row in results["results"]}

    reference = Reference(setting)
    assert reference.page(SPACELESS) < -math.log(sys.float_info.max)
    per_byte = math.exp(-reference.page(SPACELESS) / len(SPACELESS))
    assert values["spaceless", "word_perplexity"] == (None, None)
    assert values["spaceless", "bits_per_byte"] == (None, None)
    assert values["spaceless", "byte_perplexity"][0] == pytest.approx(per_byte, rel=1e-4)
    likelihoods = [reference.continuation("a", f" {f'{n}' * 50}") for n in (7, 8, 7)]
    expected = math.exp(-sum(likelihoods) / 3)
    assert expected > math.sqrt(sys.float_info.max)  # so its standard error cannot be computed
    assert values["long", "perplexity"] == (pytest.approx(expected, rel=1e-3), None)
    assert values["faulty", "perplexity"][0] == values["long", "perplexity"][0]
    assert values["unscored", "acc"] == (None, None)
    assert values["words", "perplexity"][0] > 0
    assert [(fault["task"], fault["metric"], fault["reason"]) for fault in results["faults"]] == [
        ("unscored", None, "ZeroDivisionError: division by zero"),
        ("spaceless", "word_perplexity", "OverflowError: math range error"),
        ("spaceless", "bits_per_byte", "ValueError: cannot aggregate"),
    ]


def test_results_are_never_overwritten(setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    there = tmp_path / "results.json"
    there.write_text("of last week")
    assert_refused(evaluate(capsys, setting, out=tmp_path), str(there), "there already")
    assert there.read_text() == "of last week"
    assert_refused(evaluate(capsys, setting, out=there), "cannot make the folder")


@pytest.mark.slow
def test_missing_packages_and_networks_are_named_and_a_signal_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    """They run together: each is a process of its own."""
    words = ["--model", str(setting.model), "--task-dir", str(setting.tasks), "--out"]
    without = (
        "import runpy, sys; sys.modules['lm_eval'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    missing = open_process(
        [sys.executable, "-c", without, str(TOOL), *words, str(tmp_path / "missing"), "--tasks", "words"]
    )
    if find_spec("lm_eval"):
        tool = [sys.executable, str(TOOL), *words]
        offline = open_process(
            [*tool, str(tmp_path / "offline"), "--tasks", "hellaswag"],
            {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )
        stopped = open_process([*tool, str(tmp_path / "stopped"), "--tasks", "words,endless"])
        deadline = time.monotonic() + PATIENCE_S
        while not (setting.tasks / "begun").exists() and time.monotonic() < deadline and stopped.poll() is None:
            time.sleep(0.05)
        os.kill(stopped.pid, signal.SIGTERM)
        assert wait_for([stopped]).code == 128 + signal.SIGTERM
        assert not list((tmp_path / "stopped").iterdir())
        ended = wait_for([offline])
        assert_refused((ended.code, ended.stderr[ended.stderr.index("error: ") :]), "'hellaswag'", "HF_HOME")
    ended = wait_for([missing])
    assert_refused((ended.code, ended.stderr), "pip install 'evenkeel[eval]'")


class Reference:
    """Log-likelihoods by one forward pass each, with transformers and nothing else."""

    def __init__(self, setting: Setting) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(setting.model)
        self.tokenizer = AutoTokenizer.from_pretrained(setting.model)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def continuation(self, context: str, text: str) -> float:
        """Return the log-likelihood of `text` after `context`, which are encoded together."""
        whole = self.ids(context + text)
        return self._last(whole, len(whole) - len(self.ids(context)))

    def page(self, page: str) -> float:
        """Return the log-likelihood of each token once, in windows of LONGEST.

        Before a window's first token stands only the token before it. The last window reaches back as far as it can.
        """
        ids = [self.tokenizer.bos_token_id, *self.ids(page)]
        total, done = 0.0, 1
        while done < len(ids):
            until = min(done + LONGEST, len(ids))
            total += self._last(ids[max(0, until - LONGEST - 1) : until], until - done)
            done = until
        return total

    @torch.inference_mode()
    def _last(self, ids: list[int], count: int) -> float:
        """Return the log-likelihood of the last `count` of `ids`, given those before."""
        logs = self.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        return float(logs[-count:].gather(1, torch.tensor(ids[-count:])[:, None]).sum())


def evaluate(
    capsys: pytest.CaptureFixture,
    setting: Setting,
    *,
    model: Path | None = None,
    tasks: str = "words",
    out: Path | None = None,
    words: list = (),
    with_harness_tasks: bool = False,
) -> tuple[int, str]:
    """Run the tool in this process; return its exit code and stderr. Listing the harness's own tasks takes seconds."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    manager = partial(lm_eval.TaskManager, include_defaults=with_harness_tasks)
    arguments = ["--model", model or setting.model, "--tasks", tasks, "--task-dir", setting.tasks, *words]
    if out:
        arguments += ["--out", out]
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        patch.setattr("pretrain.evaluation.lm_eval.TaskManager", manager)
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def assert_refused(ended: tuple[int, str], *parts: str) -> None:
    code, stderr = ended
    assert code == 2, stderr
    assert stderr.count("error: ") == 1
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr


def row_of(results: dict, task: str, metric: str) -> dict:
    (row,) = [row for row in results["results"] if (row["task"], row["metric"]) == (task, metric)]
    return row

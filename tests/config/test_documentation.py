"""The run file of docs/configuration.md has every key, and its values are the defaults."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

# Keys that the page sets to another value than the default: there is no default, or the page shows a value.
CHOSEN = {
    "name",
    "model",
    "tokenizer",
    "data.train",
    "data.val",
    "data.seq_len",
    "data.global_batch_size",
    "data.micro_batch_size",
    "steps",
    "optim.lr",
    "optim.schedule.warmup_steps",
    "deepspeed",
}
# Keys that the page explains in the text below.
ELSEWHERE = {"tokens", "data.shuffle.window_shards", "optim.muon"}


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])


def leaves(mapping: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if path + key in ELSEWHERE:
            continue
        if isinstance(value, dict) and path + key not in CHOSEN:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def test_the_run_file_of_the_page_is_valid_and_shows_every_key_with_its_default(shown):
    smallest = {key: value for key, value in shown.items() if key in CHOSEN}
    smallest["data"] = {key: value for key, value in shown["data"].items() if f"data.{key}" in CHOSEN}
    smallest["optim"] = {"lr": shown["optim"]["lr"], "schedule": shown["optim"]["schedule"]}
    defaults = dict(leaves(Config.model_validate(smallest).model_dump(mode="json")))
    whole = dict(leaves(Config.model_validate(shown).model_dump(mode="json")))
    assert whole == defaults
    assert dict(leaves(shown)).keys() == defaults.keys()

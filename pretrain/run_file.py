"""A YAML file as plain data that remembers where each key stands, and `--set a.b=c` on top of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError


class RunFile:
    """data: the content. origins: where each dotted key was given, "file:line" or "--set ..."."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be read, is not YAML, or holds a key twice."""
        self.path = path
        self.origins: dict[str, str] = {}
        try:
            text = path.read_text()
            self._locate(yaml.compose(text, _Loader), "")
            self.data = yaml.load(text, _Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the run file {path}: {error}.") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(self.data, dict):
            raise UserError(f"{path} holds no configuration; it must be a mapping of keys such as 'name' and 'model'.")

    def override(self, setting: str) -> None:
        """Apply "a.b=c", c in YAML. List items go by number: methods.1.target_std=0.02.

        Raises UserError for a malformed setting or a path that leads nowhere.
        """
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key=value, as in --set optim.lr=3e-4.")
        *parents, last = key.split(".")
        target: Any = self.data
        for depth, part in enumerate(parents):
            if isinstance(target, dict):
                target = target.setdefault(part, {})
            else:
                target = target[_index(target, part, setting, parents[:depth])]
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"--set {setting}: the value is not valid YAML.") from error
        target[last if isinstance(target, dict) else _index(target, last, setting, parents)] = value
        self.origins[key] = f"--set {setting}"

    def where(self, key: str) -> str:
        """The place to look at for a dotted key: its own, that of a key below it, or the file."""
        below = (place for other, place in self.origins.items() if other.startswith(f"{key}."))
        return self.origins.get(key) or next(below, str(self.path))

    def _locate(self, node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            pairs = [(str(index), item, item) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            pairs = [(key.value, key, value) for key, value in node.value]
        else:
            return
        for name, place, value in pairs:
            key, where = f"{prefix}{name}", f"{self.path}:{place.start_mark.line + 1}"
            if key in self.origins:
                raise UserError(f"{where}: the key '{key}' stands twice; it is also at {self.origins[key]}.")
            self.origins[key] = where
            self._locate(value, f"{key}.")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _index(target: Any, part: str, setting: str, parents: list[str]) -> int:
    """`part` as an index into the list `target`."""
    if isinstance(target, list) and part.isdigit() and int(part) < len(target):
        return int(part)
    raise UserError(f"--set {setting}: '{'.'.join(parents)}' has no '{part}'.")

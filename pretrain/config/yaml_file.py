"""A YAML file as plain data with the place of each key: on top of the file that it `extends`, under `--set`.

    extends: base_1b.yaml       # relative to this file. The base may extend another

Mappings merge key by key. Lists and scalars, null too, replace the value below. A section that changes its kind replaces
the whole section below it, whose other keys belong to the old kind (`_KINDS`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError
from pretrain.paths import expanded

# The key that decides the kind of a section, and so which other keys it may hold.
_KINDS = {"model": "family", "init": "distribution"}


@dataclass(frozen=True)
class Origin:
    """The place where a key was given, and its value as it is written there.

    Attributes:
        place: "file:line" or "--set ...".
        text: the value as it is written. None for lists and mappings.
        quoted: whether the value is in quotes, and so a text whatever it looks like.
    """

    place: str
    text: str | None = None
    quoted: bool = False


class RunFile:
    """A run file with its bases and overrides.

    Attributes:
        path: the file.
        data: its content, on top of that of its bases.
        origins: the origin of every dotted key.
    """

    data: dict[str, Any]

    def __init__(self, path: Path, extended_by: tuple[Path, ...] = ()) -> None:
        """Read a file and the files that it extends.

        Args:
            path: the file.
            extended_by: the files whose base it is, the first one first.

        Raises:
            UserError: if a file cannot be read, is not YAML, holds a key twice, or extends itself.
        """
        self.path = path
        self.origins: dict[str, Origin] = {}
        try:
            text = path.read_bytes()  # YAML detects the encoding by itself, whatever the locale
        except OSError as error:
            raise UserError(f"cannot read the run file {path}: {error}.") from error
        try:
            loader = _YamlLoader(text)
            node = loader.get_single_node()
            self._locate(node)
            content = loader.construct_document(node) if node else None
        except _NOT_YAML as error:
            if isinstance(error, yaml.reader.ReaderError) and error.encoding == "utf-8":
                raise UserError(f"{path} is not UTF-8 at byte {error.position}. Save it in this encoding.") from error
            raise UserError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no configuration; it must be a mapping of keys such as 'name' and 'model'.")
        self.data = content
        if "extends" in self.data:
            self._lay_over(self._base((*extended_by, path)))

    def override(self, setting: str) -> None:
        """Apply an override.

        Args:
            setting: "a.b=c" with c in YAML. List items are named by their index: methods.1.target_std=0.02.

        Raises:
            UserError: for a malformed setting, or a key below something that is neither a mapping nor a list.
        """
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {setting}: expected key=value, as in --set optim.lr=3e-4.")
        if not text.strip():
            raise UserError(f"--set {setting}: there is no value; null leaves a key without one.")
        if any("\ud800" <= letter <= "\udfff" for letter in setting):  # how Python holds a byte that is no UTF-8
            raise UserError(f"--set {setting}: the value is not UTF-8, as run files are. Give the file another name.")
        *parents, last = key.split(".")
        target: Any = self.data
        for depth, part in enumerate(parents):
            if isinstance(target, dict):
                target = target.setdefault(part, {})
            else:
                target = target[_index(target, part, setting, parents[:depth])]
        try:
            loader = _YamlLoader(text)
            node = loader.get_single_node()
            self._forget(key)
            self._note(key, f"--set {setting}", node)
            self._locate(node, f"{key}.", f"--set {setting}")
            value = loader.construct_document(node) if node else None
        except _NOT_YAML as error:
            raise UserError(f"--set {setting}: the value is not valid YAML.") from error
        target[last if isinstance(target, dict) else _index(target, last, setting, parents)] = value

    def where(self, key: str) -> str:
        """Return the place of a dotted key: its own, that of a key below it or of its section, or the file."""
        if key in self.origins:
            return self.origins[key].place
        below = (origin.place for other, origin in self.origins.items() if other.startswith(f"{key}."))
        section = key.rpartition(".")[0]
        return next(below, None) or (self.where(section) if section else str(self.path))

    def _base(self, chain: tuple[Path, ...]) -> RunFile:
        """Return the file that this one extends. `chain` are the files up to this one."""
        where, named = self.where("extends"), self.data["extends"]
        if not isinstance(named, str):
            raise UserError(f"{where}: extends: give the path of one run file (got {named!r}).")
        try:
            path = self.path.parent / expanded(named)
        except ValueError as error:
            raise UserError(f"{where}: extends: {error} (got {named!r}).") from error
        if path.resolve() in (file.resolve() for file in chain):
            circle = " -> ".join(str(file) for file in (*chain, path))
            raise UserError(f"{where}: extends: the files extend each other in a circle: {circle}.")
        try:
            return RunFile(path, chain)
        except UserError as error:
            raise UserError(f"{where}: extends: {error}") from error

    def _lay_over(self, base: RunFile) -> None:
        """Put this file's content on top of that of `base`."""
        del self.data["extends"], self.origins["extends"]
        self.data = base._merge(base.data, self.data)
        self.origins = base.origins | self.origins

    def _merge(self, below: dict, above: dict, prefix: str = "") -> dict:
        """Merge `above` on top of `below`, a mapping of this file under `prefix`. Forgets the origins of replaced keys."""
        merged = dict(below)  # a copy, because YAML aliases let several keys share one mapping
        for name, value in above.items():
            key, old = f"{prefix}{name}", below.get(name)
            if isinstance(value, dict) and isinstance(old, dict) and not _changes_kind(key, old, value):
                merged[name] = self._merge(old, value, f"{key}.")
            else:
                self._forget(key)
                merged[name] = value
        return merged

    def _forget(self, key: str) -> None:
        """Drop the origins of `key` and of all below it: its value is replaced."""
        self.origins = {
            other: origin for other, origin in self.origins.items() if other != key and not other.startswith(f"{key}.")
        }

    def _locate(self, node: yaml.Node | None, prefix: str = "", origin: str | None = None) -> None:
        """Record the origin of every key in `node`: its line in this file unless `origin` is given."""
        if isinstance(node, yaml.SequenceNode):
            pairs = [(str(index), item, item) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            pairs = [(key.value, key, value) for key, value in node.value]
        else:
            return
        for name, place, value in pairs:
            key, where = f"{prefix}{name}", origin or f"{self.path}:{place.start_mark.line + 1}"
            if key in self.origins:
                raise UserError(f"{where}: the key '{key}' stands twice; it is also at {self.where(key)}.")
            self._note(key, where, value)
            self._locate(value, f"{key}.", origin)

    def _note(self, key: str, place: str, node: yaml.Node | None) -> None:
        """Record where `key` was given, and its value as it was written."""
        if isinstance(node, yaml.ScalarNode):
            self.origins[key] = Origin(place, node.value, node.style is not None)
        else:
            self.origins[key] = Origin(place)


# RecursionError: an alias inside the value that it stands for. ValueError: an integer of thousands of digits.
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError)
_TAG = "tag:yaml.org,2002:"


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2 (1e-3 is one). 1:30, 010 and 2026-11-30 are texts, not 90, 8 and a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it so)
        first: [(tag, pattern) for tag, pattern in rules if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _YamlDumper(yaml.SafeDumper):
    """SafeDumper that quotes each text that it or `_YamlLoader` would read as something else."""


_WHOLE = r"(0|[1-9]\d*(_\d+)*)"
_MANTISSA = rf"({_WHOLE}\.\d*|\.\d+)"
_NUMBERS = {
    "int": rf"^[-+]?({_WHOLE}|0x[0-9a-fA-F]+)$",
    "float": rf"^([-+]?({_MANTISSA}|({_MANTISSA}|{_WHOLE})[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$",
}
for _kind, _pattern in _NUMBERS.items():
    for _class in (_YamlLoader, _YamlDumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), list("-+.0123456789"))


def is_text(scalar: str) -> bool:
    """Return whether YAML reads these letters as a text also without quotes."""
    return _YamlLoader("").resolve(yaml.ScalarNode, scalar, (True, False)) == f"{_TAG}str"


def to_yaml(data: dict[str, Any]) -> str:
    """Return `data` as YAML that `RunFile`, and every other reader of YAML, reads back unchanged."""
    return yaml.dump(data, Dumper=_YamlDumper, sort_keys=False)


def _changes_kind(key: str, below: dict, above: dict) -> bool:
    """Return whether the section `key` changes its kind, so that the other keys below do not apply."""
    tag = _KINDS.get(key)
    return tag in above and above[tag] != below.get(tag)


def _index(target: Any, part: str, setting: str, parents: list[str]) -> int:
    """Return `part` as an index into the list `target`."""
    if isinstance(target, list) and part.isdigit() and int(part) < len(target):
        return int(part)
    raise UserError(f"--set {setting}: '{'.'.join(parents)}' has no '{part}'.")

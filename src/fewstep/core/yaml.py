"""Strict YAML: `1e-5` is a number, only `true` and `false` are booleans, duplicate keys are refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe, card or option that cannot be honoured; the message names the place and what is accepted."""


NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_INTEGER = re.compile(r"^[-+]?(?:0|[1-9]\d*)$")
_FLOAT = re.compile(r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.inf|\.nan)$")
_RULES = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), "tf"),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""]),
    ("tag:yaml.org,2002:int", _INTEGER, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # ten lines of them can stand for a thousand million values
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers = {}, {}  # our rules instead of YAML 1.1's
for _tag, _pattern, _first in _RULES:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def load_yaml(text: str, where: str = "recipe") -> Any:
    """The plain tree of a YAML document; RecipeError with the line where it is not one."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise RecipeError(f"{where}: it is nested too deeply to be read") from None
    except ValueError:  # Python's own limit
        raise RecipeError(f"{where}: it has a number of thousands of digits") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise RecipeError(f"{where}{place}: {getattr(error, 'problem', None) or error}") from error


def read_text(path: Path) -> str:
    """A text file. RecipeError names one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not a text file: {error.reason} at byte {error.start}, which is no UTF-8"
        ) from None


def load_json(path: Path, what: str) -> Any:
    """The plain tree of a JSON file that should be `what` ("a card"). RecipeError names the file where it is not."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not {what}: {error}; copy the folder again") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `object_pairs_hook` of `json.loads`; ValueError if a key occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"a key occurs twice in {', '.join(key for key, _ in pairs)}; remove one")
    return made


def to_yaml(tree: Any, *, one_line: bool = False) -> str:
    """Text that `load_yaml` reads back as the same tree, in the order given; lists of numbers on one line.

    With `one_line` every value of `tree` stays on the line of its key, however long.
    """
    style: dict[str, Any] = {"default_flow_style": None, "width": 120}
    if one_line:
        style = {"default_flow_style": True, "width": math.inf}
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def digest(tree: Any) -> str:
    """12 hexadecimal characters that name `tree`, whatever the order of its keys."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

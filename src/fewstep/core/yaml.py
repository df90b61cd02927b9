"""YAML without its traps: `1e-5` is a number, only `true` and `false` are booleans, duplicate keys are refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
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
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
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
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise RecipeError(f"{where}{place}: {getattr(error, 'problem', None) or error}") from error


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

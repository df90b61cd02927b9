"""The strict printed form of a recipe: how its file is found, read, changed on the command line, compared and written."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from fewstep.core.atomic import write_text
from fewstep.core.build import At, Raw, build, digest, dump, load_yaml, to_yaml
from fewstep.core.shipped import nearest, shipped
from fewstep.core.yaml import read_text

log = logging.getLogger(__name__)

FILE = "recipe.yaml"
"""The name under which a run and a student keep the resolved recipe."""


@dataclass(frozen=True)
class Difference:
    """One setting in which two recipes differ; None if one of them does not have it."""

    key: str
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.here} -> {self.there}"


class Written:
    """A frozen dataclass with a strict printed form, which is a recipe's file."""

    @classmethod
    def load(cls, path: Path | str, overrides: Iterable[tuple[str, str]] = (), *, allow_imports: bool = False) -> Self:
        """Read a recipe, then apply `(dotted key, text)` overrides to it.

        `path` is a YAML file, the folder of a run or student, or the name of a recipe of the package: `world/dmd2`.
        Classes outside fewstep (`type: package.module:Class`) must have been imported before. With `allow_imports` the file
        imports them, which runs their code; a recipe in the folder of a run or of weights never does. RecipeError for a key,
        name or value that is not accepted; FileNotFoundError names the nearest recipe.
        """
        tree, file, alone = tree_of(path), find(path), not Path(path).is_dir()
        cls.recognise(tree, path)
        at = At(str(file), trusted=allow_imports and alone and not _comes_with_weights(file))
        made: Self = build(cls, tree, names(), at)
        return made.override(overrides, allow_imports=allow_imports)

    @classmethod
    def recognise(cls, tree: Any, path: Path | str) -> None:
        """RecipeError if the file is of another kind; it names the class that reads the file."""

    def override(self, overrides: Iterable[tuple[str, str]], *, allow_imports: bool = False) -> Self:
        """A copy with `(dotted key, text)` pairs applied: `("method.critic-updates", "3")`. Text is read by type."""
        pairs = [(key.replace("-", "_"), value) for key, value in overrides]
        if not pairs:
            return self
        tree = self.tree()
        for key, value in sorted(pairs, key=lambda pair: (not pair[0].endswith(".type"), pair[0].count("."))):
            _set(tree, key, value)
        made: Self = build(type(self), tree, names(), At("command line", trusted=allow_imports))
        return made

    def save(self, path: Path | str) -> Path:
        """Write the resolved recipe, all defaults included, to a file (or as `recipe.yaml` into a folder)."""
        path = Path(path)
        path = path / FILE if path.suffix not in (".yaml", ".yml") else path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self._printed)
        return path

    def tree(self) -> dict[str, Any]:
        """Plain values, all defaults written out."""
        tree: dict[str, Any] = dump(self)
        return tree

    @property
    def _printed(self) -> str:
        return f"# Resolved by fewstep: every default is written out. Hash {self.hash}.\n" + self.text

    @property
    def text(self) -> str:
        """The tree as YAML."""
        return to_yaml(self.tree())

    @property
    def hash(self) -> str:
        """12 characters. Two hashes are equal exactly if all values that decide the numbers of a run are equal."""
        return digest(self.tree())

    def diff(self, other: Written) -> list[Difference]:
        """The settings in which `other` differs, by dotted key."""
        here, there = _flat(self.tree()), _flat(other.tree())
        keys = list(dict.fromkeys([*here, *there]))
        return [Difference(k, here.get(k), there.get(k)) for k in keys if here.get(k) != there.get(k)]


@cache
def names() -> dict[str, type]:
    """Every class a recipe can name, by name."""
    from fewstep.catalogue import classes

    return {cls.__name__: cls for cls in classes()}


def tree_of(path: Path | str) -> Any:
    """The plain values in a recipe's file. Errors as in `Written.load`."""
    file = find(path)
    return load_yaml(read_text(file), str(file))


def find(wanted: Path | str) -> Path:
    """The file that `wanted` means: a file, a folder with a recipe, or the name of a recipe of the package."""
    name, path = Path(wanted).as_posix(), Path(wanted)
    path = path / FILE if path.is_dir() else path
    if path.is_file():
        if name in shipped():
            log.warning("reading the file %s, not the recipe with this name in the package", path)
        return path
    if name in shipped():
        return shipped()[name]
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.y*ml")], n=1, cutoff=0.5)
    meant = folder / near[0] if near and path.parent == folder else nearest(name) or (near and near[0])
    hint = f" Did you mean {meant}?" if meant else ""
    raise FileNotFoundError(
        f"there is no recipe {path}.{hint} `fewstep list recipes` prints the recipes of the package."
    )


def _comes_with_weights(path: Path) -> bool:
    """Whether a recipe is in the folder of a run, a student or a model, which may come from other people."""
    return any(
        (path.parent / name).exists() for name in ("card.json", "model_index.json", "metrics.jsonl", "effective.json")
    )


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    """Put command-line `text` at the dotted `key` of a resolved `tree`."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = _child(node, part, At("command line", ".".join(parents[:depth])))
    here = At("command line", ".".join(parents))
    if last == "type" and isinstance(node, dict) and node.get("type") != text and (text in names() or ":" in text):
        node.clear()  # the keys of one class mean nothing to another
    if isinstance(node, dict):
        node[last] = Raw(text)
    else:
        _child(node, last, here)
        node[int(last)] = Raw(text)


def _child(node: Any, part: str, at: At) -> Any:
    if isinstance(node, dict):
        return node[part]
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    raise at.key(part).fail(f"does not exist: {at.path or 'the recipe'} is {node!r}")


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            found |= _flat(value, f"{key}.{name}" if key else name)
        return found
    return {key: tree}

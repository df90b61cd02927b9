"""A recipe: model x method x data x settings, as one frozen object with a strict printed form.

`distill(...)` is the front door; the command line only builds its arguments.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from fewstep.core.atomic import write_text
from fewstep.core.build import At, Raw, RecipeError, build, digest, dump, load_yaml, to_yaml
from fewstep.core.env import place
from fewstep.core.lock import holding
from fewstep.core.shipped import nearest, shipped
from fewstep.core.yaml import read_text
from fewstep.data import Data, require
from fewstep.engine import Settings, train
from fewstep.engine.prepare import require_possible, require_processes
from fewstep.engine.probe import WorldProbe
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.methods.base import Method
from fewstep.models.bundle import Card, VideoModel
from fewstep.models.source import ModelSource, Pretrained, Scratch

log = logging.getLogger(__name__)

FILE = "recipe.yaml"
"""The name under which a run and a student keep the resolved recipe."""


@dataclass(frozen=True)
class Difference:
    """One setting in which two recipes differ; None where one of them lacks it."""

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
        Classes outside fewstep (`type: package.module:Class`) must have been imported before, or `allow_imports` lets the
        file import them: it runs their code. A recipe in the folder of a run or of weights never does.
        RecipeError for a key, name or value that is not accepted; FileNotFoundError says what is nearest.
        """
        tree, file, alone = tree_of(path), find(path), not Path(path).is_dir()
        if cls is Recipe and isinstance(tree, dict) and "stages" in tree:
            raise RecipeError(f"{path} has stages; fewstep.Pipeline.load reads it")
        at = At(str(file), trusted=allow_imports and alone and not _comes_with_weights(file))
        made: Self = build(cls, tree, names(), at)
        return made.override(overrides, allow_imports=allow_imports)

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
        """12 characters: equal exactly when every value is equal that decides the numbers of a run."""
        return digest(self.tree())

    def diff(self, other: Written) -> list[Difference]:
        """In which settings `other` differs, by dotted key."""
        here, there = _flat(self.tree()), _flat(other.tree())
        keys = list(dict.fromkeys([*here, *there]))
        return [Difference(k, here.get(k), there.get(k)) for k in keys if here.get(k) != there.get(k)]


@dataclass(frozen=True, kw_only=True)
class Recipe(Written):
    """Everything that decides a run's numbers.

    `Recipe.load(path)` reads one, `.save(path)` writes it with all defaults, `.hash` names it, `.run(output)` runs it.
    """

    model: ModelSource
    """Model the run starts from: the teacher, or networks made from scratch."""
    method: Method
    data: Data
    settings: Settings
    probe: WorldProbe | None = None
    """Probe that scores the student during the run and keeps the best one. null: keep the last student."""

    @property
    def hash(self) -> str:
        """12 characters that name the run: equal exactly when every value is equal that decides its numbers.

        How it is spread over processes (`settings.parallel`) is not among them.
        """
        return digest(without_parallel(self.tree()))

    def check(self, card: Card | None = None) -> Card:
        """Refuse what cannot work before any weight is loaded, and return the card of the model the run starts from.

        `card` is what that model will say where it is not there yet. The data must provide what the method needs, and fit the
        model; the model must have the part that is trained, the method a sampling contract for it, every optimiser a role that
        is trained; and the run must be long enough.
        """
        require(self.data, self.method)
        card, name = self.model.card() if card is None else card, type(self.method).__name__
        if self.method.part not in card.parts:
            have = ", ".join(card.parts)
            raise RecipeError(
                f"recipe: {name} trains the {self.method.part}, but the model has only {have}; "
                f"name a {self.method.part} under model"
            )
        self.method.contract(card.contract)
        require_possible(self.method, self.settings, card, self.probe)
        self.data.check_card(card)
        return card

    def run(self, output: Path | str, *, quiet: bool = False) -> VideoModel:
        """Train and return the student; the same call resumes a run that was stopped. Writes `output/student`."""
        output = Path(output)
        self.check()
        if output.exists() and not output.is_dir():
            raise RecipeError(f"{output} is a file; give a folder as output")
        require_processes(self.settings)
        with holding(output) if place().rank == 0 else nullcontext():
            return self._run(output, quiet=quiet)

    def _run(self, output: Path, *, quiet: bool) -> VideoModel:
        leads = place().rank == 0
        if leads:
            self._claim(output)
        whole = self.settings.lora is not None or self.settings.transforms  # which may change every weight
        cut = place().world_size > 1 and self.method.part == "denoiser" and not whole
        model = self.model.load(leave=("denoiser",) if cut else ())  # each process then keeps its share only
        student = train(
            model, self.method, self.data, self.settings, output,
            probe=self.probe, provenance=self._provenance(model), quiet=quiet,
        )  # fmt: skip
        if leads:
            self.save(output / "student")
        return student

    def finished(self, output: Path) -> bool:
        """Whether `output` has the student of this very recipe, written to the end."""
        made = output / "student" / FILE
        return made.is_file() and Recipe.load(made).hash == self.hash

    def _claim(self, output: Path) -> None:
        """Make `output` this recipe's folder, or refuse where another recipe has left more than its beginning there."""
        if output.exists() and not output.is_dir():
            raise RecipeError(f"{output} is a file; give a folder as output")
        if (output / FILE).is_file() and any((output / made).exists() for made in ("checkpoints", "best", "student")):
            try:
                theirs = Recipe.load(output / FILE)
            except RecipeError as error:
                raise RecipeError(
                    f"{output} holds a recipe that cannot be compared: {error}. Give another output folder."
                ) from None
            if theirs.hash != self.hash:
                changed = "; ".join(map(str, theirs.diff(self)[:4]))
                raise RecipeError(
                    f"{output} holds run {theirs.hash} of another recipe ({changed}). Give another output folder."
                )
        if not ((output / FILE).is_file() and self._printed == read_text(output / FILE)):
            self.save(output / FILE)

    def _provenance(self, model: VideoModel) -> dict[str, str]:
        """What the student says of its origin. What the model said of its own is kept, under `teacher.` if it has one."""
        distilled = not isinstance(self.model, Scratch)
        before = model.card.provenance
        chain = {f"teacher.{key}" if distilled else key: value for key, value in before.items()}
        machine = describe_machine(self.settings.device)
        licence = {"licence": before["licence"]} if distilled and "licence" in before else {}
        return (
            chain
            | licence
            | {
                "recipe": self.hash,
                "method": type(self.method).__name__,
                "cite": self.method.cite,
                "teacher": f"{model.card.name} {model.fingerprint(self.method.part)}",
                "data": type(self.data).__name__,
                "data settings": json.dumps(dump(self.data, Data), sort_keys=True),
                "machine": f"{machine.accelerator or machine.cpu}, {machine.cores} CPU cores, {machine.system}",
                "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
            }
        )


def distill(
    *,
    method: Method,
    settings: Settings,
    output: Path | str,
    model: ModelSource | Path | str = "world",
    data: Data | None = None,
    probe: WorldProbe | None = None,
    quiet: bool = False,
) -> VideoModel:
    """Distil `model` with `method` and return the student, which is also in `output/student`.

    `model` is a source, a folder, or `world`, the built-in teacher. `data` defaults to clips of the built-in world.
    Calling it again with the same arguments resumes a run that was stopped.
    """
    from fewstep.world.data import WorldClips

    source = model if isinstance(model, ModelSource) else Pretrained(source=str(model))
    data = WorldClips(num_frames=source.card().num_frames) if data is None else data
    recipe = Recipe(model=source, method=method, data=data, settings=settings, probe=probe)
    return recipe.run(output, quiet=quiet)


@cache
def names() -> dict[str, type]:
    """Every class a recipe can name, by name."""
    from fewstep.catalogue import classes

    return {cls.__name__: cls for cls in classes()}


def tree_of(path: Path | str) -> Any:
    """The plain values in a recipe's file. Errors as in `Written.load`."""
    file = find(path)
    return load_yaml(read_text(file), str(file))


def without_parallel(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree without what only says how it is spread over processes."""
    return tree | {"settings": {key: value for key, value in tree["settings"].items() if key != "parallel"}}


def find(wanted: Path | str) -> Path:
    """The file that `wanted` means: a file, a folder with a recipe, or the name of a recipe of the package."""
    name, path = Path(wanted).as_posix(), Path(wanted)
    path = path / FILE if path.is_dir() else path
    if path.is_file():
        if name in shipped():
            log.warning("%s is here, so it is read; the recipe of that name that comes with fewstep is not", path)
        return path
    if name in shipped():
        return shipped()[name]
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.y*ml")], n=1, cutoff=0.5)
    meant = folder / near[0] if near and path.parent == folder else nearest(name) or (near and near[0])
    hint = f" Did you mean {meant}?" if meant else ""
    raise FileNotFoundError(f"there is no recipe {path}.{hint} `fewstep list recipes` prints those of the package.")


def _comes_with_weights(path: Path) -> bool:
    """Whether a recipe lies in the folder of a run, a student or a model, which may come from anywhere."""
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

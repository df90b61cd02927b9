"""Everything a recipe can name, by kind: for `fewstep list` and for the recipe reader."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewstep.attention import KEEPS, PATTERNS
from fewstep.caching import CACHES
from fewstep.compress import TRANSFORMS
from fewstep.core.shipped import headline, shipped
from fewstep.data import DATA, PARTITIONS
from fewstep.diffusion import DENSITIES, GRIDS, GUIDANCES, PATHS, SAMPLERS
from fewstep.engine import Health, Settings, WorldProbe
from fewstep.methods import HISTORIES, MATCHINGS, METHODS, REWARDS, ROLLOUTS, Adversary, Feedback, Reweighting
from fewstep.models import NETWORKS
from fewstep.models.known import KNOWN, Known
from fewstep.models.source import Diffusers, Pretrained, Previous, Scratch
from fewstep.world.action_clips import WorldActions
from fewstep.world.data import WorldClips
from fewstep.world.parts import ByAttribute
from fewstep.world.script_clips import WorldScripts

KINDS: Mapping[str, tuple[Callable[..., Any], ...]] = MappingProxyType({
    "methods": METHODS,
    "models": (Pretrained, Diffusers, Scratch, Previous),
    "networks": NETWORKS,
    "data": (*DATA, WorldClips, WorldScripts, WorldActions),
    "partitions": (*PARTITIONS, ByAttribute),
    "rollouts": ROLLOUTS,
    "histories": HISTORIES,
    "matchings": MATCHINGS,
    "adversaries": (Adversary,),
    "rewards": (*REWARDS, Reweighting, Feedback),
    "patterns": PATTERNS,
    "memories": KEEPS,
    "caches": CACHES,
    "transforms": TRANSFORMS,
    "samplers": SAMPLERS,
    "grids": GRIDS,
    "paths": PATHS,
    "densities": DENSITIES,
    "settings": (Settings, Health, WorldProbe, *GUIDANCES),
})  # fmt: skip
_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")


@dataclass(frozen=True)
class Entry:
    """One thing a recipe can name."""

    name: str
    doc: str
    """First sentence of its docstring."""
    cite: str
    """Authors, title and arXiv id if the class declares them, else the arXiv ids in its docstrings."""
    file: str
    line: int

    def tree(self) -> dict[str, Any]:
        return asdict(self)


def entries(kind: str) -> list[Entry]:
    """All entries of `kind`: a key of `KINDS`, `recipes` for the recipes of the package, or `students` for public ones."""
    if kind == "recipes":
        return [Entry(name, headline(path), "", _near(path), 1) for name, path in shipped().items()]
    if kind == "students":
        return [_student(known) for known in KNOWN]
    return [entry(thing) for thing in KINDS[kind]]


def _student(known: Known) -> Entry:
    """A public few-step model; the sentence says what is missing here to import it."""
    doc = f"{known.what}. Cannot be imported: fewstep lacks {known.missing}" if known.missing else known.what
    module = f"fewstep.models.known.{known.name.replace('-', '_')}"
    path = Path(str(importlib.util.find_spec(module).origin))  # type: ignore[union-attr]
    return Entry(known.name, doc, known.source, _near(path), 1)


def entry(thing: Callable[..., Any]) -> Entry:
    """The entry of `thing`: its docstring, and where it is defined."""
    text = inspect.getdoc(thing) or ""
    module = inspect.getmodule(thing)
    about = f"{text}\n{inspect.getdoc(module) or ''}"
    cite = getattr(thing, "cite", "") or ", ".join(f"arXiv:{number}" for number in dict.fromkeys(_ARXIV.findall(about)))
    file, line = where(thing)
    return Entry(getattr(thing, "__name__", str(thing)), _first_sentence(text), cite, file, line)


def where(thing: Callable[..., Any]) -> tuple[str, int]:
    """File and line of a definition; the file is relative to the current folder if it is below it."""
    return _near(Path(inspect.getsourcefile(thing) or "?")), inspect.getsourcelines(thing)[1]


def classes() -> list[type]:
    """Every class a recipe can name."""
    return [thing for things in KINDS.values() for thing in things if isinstance(thing, type)]


def _near(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!])\s", paragraph, maxsplit=1)[0]

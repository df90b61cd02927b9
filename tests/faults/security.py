"""Recipes, cards and files that try to run code, or to write where they should not."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from faults.case import Case
from faults.given import RECIPE, card, teacher
from faults.given import run as finished

TRACE = "from pathlib import Path\nPath('pwned').touch()\nclass Foo: ...\n"
"""A module that leaves a file behind where it is imported: the case then fails, because a refusal leaves nothing."""
NAMES = ("evil:Foo", "evil.sub:Foo", "evil:Foo.bar")
UNCLASSY = (
    ".evil:Foo", "..evil:Foo", ":Foo", "evil:", "evil::Foo", "e vil:Foo", "evil/x:Foo", "/etc/evil:Foo", "os;evil:Foo",
    "fewstep.__main__:Foo", "fewstep.cli.__main__:main",
)  # fmt: skip
NO_METHOD = (
    "fewstep.methods.base:Method", "fewstep.methods.base:Nothing", "fewstep.nothing:Foo", "os:system", "builtins:eval",
    "subprocess:Popen", "pathlib:Path", "sys:modules", "fewstep.world.data:WorldClips",
)  # fmt: skip
WITH_TYPES = {
    "method": "method: {{type: '{}'}}",
    "data": "data: {{type: '{}'}}",
    "model": "model: {{type: '{}'}}",
    "model.denoiser": "model: {{type: Scratch, denoiser: {{type: '{}'}}}}",
    "model.path": "model: {{type: Scratch, codec: world, path: {{type: '{}'}}}}",
    "method.rollout": "method: {{type: DMD2, rollout: {{type: '{}'}}}}",
    "model.denoiser.pattern": "model: {{type: Scratch, denoiser: {{type: VideoDiT, pattern: {{type: '{}'}}}}}}",
}


def evil(here: Path) -> None:
    """A module that must not be imported, where Python would find it."""
    sys.modules.pop("evil", None)
    (here / "evil.py").write_text(TRACE)
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))


def with_type(key: str, name: str) -> str:
    """The valid recipe with one class named `name`."""
    line = WITH_TYPES[key].format(name)
    blocks = {"method": "", "data": "", "settings": "", "model": ""}
    current = ""
    for text in RECIPE.strip().splitlines():
        current = current if text.startswith(" ") else text.partition(":")[0]
        blocks[current] += text + "\n"
    return "".join((blocks | {key.partition(".")[0]: line + "\n"}).values())


def in_file(key: str, name: str, *words: str, says: tuple[str, ...] = ()) -> Case:
    files = {"mine.yaml": with_type(key, name)}
    return Case(
        f"{key} {name} {' '.join(words)}", (*words, "mine.yaml"), (f"{key}.type", name, *says), files, prepare=evil
    )


def in_folder(place: str, *words: str) -> Case:
    """A recipe that came with a run, a student or a model."""

    def prepare(here: Path) -> None:
        evil(here)
        (here / "r.yaml").write_text(RECIPE)
        if place.startswith("run"):
            finished(here)
        else:
            teacher(here)
        (here / place).write_text(with_type("method", "evil:Foo"))

    return Case(f"{place} by {' '.join(words)}", words, (place, "evil:Foo"), prepare=prepare)


def traversing(part: str) -> Case:
    def change(tree: dict[str, object]) -> None:
        parts = tree["parts"]
        assert isinstance(parts, dict)
        parts[part] = parts["text"]

    words = ("export", "teacher", "out/student")
    return Case(f"a part called {part!r}", words, ("card.json", "parts", part.strip()), prepare=card(change))


def in_card(key: str) -> Case:
    def change(tree: dict[str, object]) -> None:
        parts = tree["parts"]
        assert isinstance(parts, dict)
        evil(Path())
        if key == "pattern":
            parts["denoiser"]["pattern"] = {"type": "evil:Foo"}
        elif key == "path":
            tree["path"] = {"type": "evil:Foo"}
        else:
            parts[key]["type"] = "evil:Foo"

    words = ("sample", "teacher", "--prompt", "a", "--output", "o.gif")
    return Case(f"card: {key} evil:Foo", words, ("card.json", "evil:Foo"), prepare=card(change))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("pwned",))


def posing(here: Path) -> None:
    (teacher(here) / "denoiser.safetensors").write_bytes(pickle.dumps(Bomb()))


def in_layout(here: Path) -> None:
    """A folder in diffusers' layout whose stamp names a class elsewhere."""
    evil(here)
    tree = json.loads((teacher(here) / "card.json").read_text())
    tree["parts"]["denoiser"]["type"] = "evil:Foo"
    (here / "layout").mkdir()
    (here / "layout/model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "_fewstep": tree}))


CASES = (
    *(in_file(key, "evil:Foo", "explain", says=("--allow-imports",)) for key in WITH_TYPES),
    *(in_file("method", name, "distill", "--dry-run", says=("--allow-imports",)) for name in NAMES),
    *(in_file("method", name, "explain", "--allow-imports") for name in (*UNCLASSY, *NO_METHOD)),
    *(in_file("model.denoiser", name, "explain", "--allow-imports") for name in ("os:system", "fewstep.core.rng:Rng")),
    *(in_file("method", "nowhere:Foo", *words) for words in (("explain",), ("explain", "--allow-imports"))),
    *(
        in_folder(place, *words)
        for place in ("run/recipe.yaml", "run/teacher/recipe.yaml", "teacher/recipe.yaml", "teacher/other.yaml")
        for words in (("explain", place), ("explain", place, "--allow-imports"), ("distill", place, "--dry-run"))
    ),
    in_folder("run/recipe.yaml", "explain", "run", "--allow-imports"),
    in_folder("run/recipe.yaml", "distill", "run", "--dry-run", "--allow-imports"),
    in_folder("run/recipe.yaml", "distill", "r.yaml", "--output", "run"),
    in_folder("run/recipe.yaml", "distill", "r.yaml", "--output", "run", "--allow-imports"),
    *(
        map(
            traversing,
            ("../text", "../../text", "/etc/text", "a/b", "..", ".", " text", "text.safetensors"),
        )
    ),
    *(map(in_card, ("denoiser", "text", "codec", "pattern", "path"))),
    Case(
        "a pickle that poses as weights",
        ("sample", "teacher", "--prompt", "a"),
        ("denoiser.safetensors",),
        prepare=posing,
    ),
    Case(
        "a stamp in diffusers' layout", ("sample", "layout", "--prompt", "a"), ("model_index.json",), prepare=in_layout
    ),
)

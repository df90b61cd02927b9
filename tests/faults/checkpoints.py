"""Damaged checkpoints and folders of runs: the same command must refuse to go on from them, and say from where it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from faults.case import Case
from faults.given import RECIPE, damaged, run

GO_ON = ("distill", "r.yaml", "--output", "run", "--quiet")
"""The run is over, so going on only reads the checkpoint."""
STATE, STUDENT, OPTIM = (
    f"run/checkpoints/step-000001/{name}" for name in ("state.json", "student/*", "student.optim/*")
)


def state(change: Callable[[dict[str, object]], object]) -> Callable[[Path], Path]:
    def changed(content: bytes) -> bytes:
        tree = json.loads(content)
        change(tree)
        return json.dumps(tree).encode()

    return damaged(STATE, changed, run)


def broken(name: str, file: str, change: Callable[[bytes], bytes]) -> Case:
    where = file.rpartition("step-000001/")[2]
    return Case(f"{name} {where}", GO_ON, ("step-000001", "delete"), prepare=damaged(file, change, run))


def flipped(content: bytes, share: float) -> bytes:
    at = int(share * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def gone(file: str) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        run(here)
        sorted(here.glob(file))[0].unlink()

    return prepare


def foreign(here: Path) -> None:
    run(here)
    (here / "run/checkpoints/step-000001/student/more.safetensors").write_bytes(b"x")


def recipe_of_run(text: str) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        run(here)
        (here / "run/recipe.yaml").write_text(text)

    return prepare


CASES = (
    *(broken("a half", file, lambda c: c[: len(c) // 2]) for file in (STATE, STUDENT, OPTIM)),
    *(broken("nothing in", file, lambda c: b"") for file in (STATE, STUDENT, OPTIM)),
    *(broken("a byte more", file, lambda c: c + b"x") for file in (STATE, STUDENT, OPTIM)),
    *(broken("zeros for", file, lambda c: bytes(len(c))) for file in (STATE, STUDENT, OPTIM)),
    *(
        broken(f"a bit at {share} of", file, lambda c, share=share: flipped(c, share))  # type: ignore[misc]
        for file in (STUDENT, OPTIM)
        for share in (0.25, 0.5, 0.75, 0.9, 1.0)
    ),
    *(Case(f"no {file[27:]}", GO_ON, ("step-000001",), prepare=gone(file)) for file in (STATE, STUDENT, OPTIM)),
    Case("a file of somebody else", GO_ON, ("more.safetensors", "delete"), prepare=foreign),
    Case("state: a list", GO_ON, ("state.json",), prepare=damaged(STATE, lambda _: b"[]", run)),
    Case("state: nested", GO_ON, ("state.json",), prepare=damaged(STATE, lambda _: b"[" * 100_000, run)),
    Case("state: latin-1", GO_ON, ("state.json",), prepare=damaged(STATE, lambda _: b'{"a": "\xe9"}', run)),
    Case("state: no step", GO_ON, ("state.json",), prepare=state(lambda t: t.pop("step"))),
    Case("state: no values", GO_ON, ("state.json",), prepare=state(lambda t: t.pop("values"))),
    Case("state: no identity", GO_ON, ("step-000001",), prepare=state(lambda t: t["values"].pop("identity"))),  # type: ignore[attr-defined]
    Case("state: no components", GO_ON, ("state.json",), prepare=state(lambda t: t.pop("components"))),
    Case("state: a component less", GO_ON, ("step-000001",), prepare=state(lambda t: t["components"].pop("student"))),  # type: ignore[attr-defined]
    Case("another recipe", (*GO_ON, "--settings.seed", "1"), ("run", "seed", "another output folder"), prepare=run),
    Case("recipe of the run torn", GO_ON, ("run", "recipe"), prepare=recipe_of_run(RECIPE[:40])),
    Case("recipe of the run empty", GO_ON, ("run", "recipe"), prepare=recipe_of_run("")),
    Case(
        "recipe of the run is another's", GO_ON, ("run",), prepare=recipe_of_run(RECIPE.replace("batch: 2", "batch: 3"))
    ),
)

"""Which known system a file, folder or hub page is, by its name or by names of tensors that no other system has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from pathlib import Path

from fewstep.models.known import KNOWN, Known

NAMES = tuple(system.name for system in KNOWN)


def named(name: str) -> Known:
    """The system called `name`. ValueError lists those there are."""
    for system in KNOWN:
        if system.name == name:
            return system
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"--as {name}: no such system.{hint} Known are {', '.join(NAMES)}")


def recognise(source: str, tensors: Callable[[], Collection[str]]) -> Known:
    """The system that `source` is called after, else the one whose `tensors` it has. ValueError where that is not clear."""
    for name in names_of(source):
        found = [system for system in KNOWN if re.search(system.files, name, re.IGNORECASE)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    keys = tensors()
    by_keys = [system for system in KNOWN if system.keys and any(re.search(system.keys, key) for key in keys)]
    if len(by_keys) == 1:
        return by_keys[0]
    raise ValueError(
        f"{source}: its name does not say which system it is, and many have tensors with these names; give --as NAME, one of "
        f"{', '.join(NAMES)} (fewstep list students)"
    )


def names_of(source: str) -> list[str]:
    """What may say which system it is: the name itself, those of files in it, that of the folder around it, and both."""
    path = Path(source)
    inside = sorted(file.name for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    folder = path.absolute().parent.name
    around = [folder, f"{folder}/{path.name}"] if path.exists() else [source]
    return [path.name, *inside, *around]

"""LoRA files by their names on the Hugging Face hub: only the files that are read are downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from fewstep.models.lora import CONFIG, WEIGHTS

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>.+\.safetensors))?")
SHOWN = 8
"""File names that an error lists."""


def is_hub_name(source: str) -> bool:
    """Whether `source` may be `owner/name`, or `owner/name/FILE.safetensors`; nothing of that name lies here."""
    named = _NAME.fullmatch(source)
    if named is None or Path(source).expanduser().exists() or Path(named["repo"]).parent.exists():
        return False
    return bool(named["file"]) or not named["repo"].endswith(".safetensors")


def local(source: str, files: int = 1) -> Path:
    """The file or folder itself or, of a name on the hub, where its download lies: a file, or a folder with as many LoRA files
    as the model has networks.

    FileNotFoundError says what is not there, or which files of a repository there are to choose from.
    """
    if not is_hub_name(source):
        return Path(source).expanduser()
    named = _NAME.fullmatch(source)
    assert named is not None
    repo, file = named["repo"], named["file"]
    try:
        wanted = [file] if file else _chosen(source, list_repo_files(repo), files)
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except FileNotFoundError:
        raise
    except Exception as error:  # its own errors and those of the network have no class in common
        raise FileNotFoundError(
            f"{source}: there is no such file or folder, and the hub did not give it: {error}"
        ) from error
    path = folder / wanted[0] if len(wanted) == 1 else (folder / wanted[0]).parent
    if not path.exists():
        raise FileNotFoundError(f"{source}: the repository {repo} has no {wanted[0]}; give owner/name/FILE.safetensors")
    return path


def _chosen(source: str, names: Sequence[str], files: int) -> list[str]:
    """The files of a LoRA in a repository."""
    if CONFIG in names:
        return [WEIGHTS, CONFIG]
    every = [name for name in names if name.endswith(".safetensors")]
    if len(every) in (1, files):
        return every
    shown = ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
    raise FileNotFoundError(
        f"{source}: this repository has {len(every)} .safetensors files ({shown or 'none'}), and a LoRA of this model is "
        f"{'one' if files == 1 else 'one or two'}; give one by owner/name/FILE.safetensors"
        + ("" if files == 1 else ", or a folder of your own with both")
    )

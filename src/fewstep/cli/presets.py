"""`--preset`: a model in diffusers' layout, sampled as its scheduler or its authors do."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from fewstep.cli.command import UsageError
from fewstep.models.adapters import is_layout
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.card import Card
from fewstep.models.source import Diffusers

Preset = Literal["layout", "authors"] | None


def card_of(source: str, preset: Preset, **changes: Any) -> Card:
    """A model's card, with what `--preset` and `changes` (fields of `Diffusers`) say. UsageError for a preset of a model that is
    sampled by its own contract.
    """
    if preset is not None and not is_layout(source):
        raise UsageError(
            f"--preset {preset}: {source} is a folder of fewstep's own, which is sampled by its own contract; "
            "leave --preset out"
        )
    return (
        read_card(source)
        if preset is None and not changes
        else Diffusers(source=source, preset=preset, **changes).card()
    )


def teacher_of(student: VideoModel, source: str, *, trust: bool, preset: Preset = None) -> VideoModel:
    """The teacher to compare a student with. A diffusers model takes any size, so it gets the student's."""
    own, wanted = card_of(source, preset), student.card
    names = ("num_frames", "height", "width")
    size, its = (tuple(getattr(card, name) for name in names) for card in (wanted, own))
    if own.role == "teacher" and "denoiser" in own.sources and size != its:
        print(f"{own.name} at the student's size: {size[0]} frames of {size[1]} x {size[2]}", flush=True)
        own = card_of(source, preset, **dict(zip(names, size, strict=True)))
    return VideoModel.load(own, source, trust=trust, runtime=student.runtime)


def presets_of(sources: Collection[str], preset: Preset) -> tuple[Preset, ...]:
    """The preset for each of these models: it is for those in diffusers' layout. UsageError where none is."""
    if preset is not None and not any(map(is_layout, sources)):
        raise UsageError(
            f"--preset {preset}: {' and '.join(sources)} are folders of fewstep's own, which are sampled by their own contracts; "
            "leave --preset out"
        )
    return tuple(preset if is_layout(source) else None for source in sources)

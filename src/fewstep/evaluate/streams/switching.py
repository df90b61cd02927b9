"""Prompts that are switched on the way: how many frames until the new one is right, and what survives of the object.

Every stream is made with its first prompt, and then goes on from the same snapshot with each way of switching.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate.streams.clips import Streamed, cut, decoded_stream, endless, variation
from fewstep.evaluate.streams.figures import Range
from fewstep.evaluate.streams.rolling import Progress
from fewstep.evaluate.streams.suite import DriftCases, DriftSuite
from fewstep.metrics import bootstrap_interval
from fewstep.metrics.statistics import FEWEST, clustered_wilson
from fewstep.streaming import Session, Snapshot
from fewstep.world.grammar import ATTRIBUTES, DIRECTIONS, Scene, describe
from fewstep.world.scripts import Script, render_script
from fewstep.world.windows import NEVER, Windows, read_windows

AFTER = 3
"""Clip lengths that are made after the switch."""
STRIDE = 4
"""Frames between the windows that are read: the resolution of `frames until right`."""
KINDS: Mapping[str, tuple[str, ...]] = {
    "turn": ("direction",), "recolour": ("colour",), "everything": tuple(ATTRIBUTES),
}  # fmt: skip
"""Attributes that the second prompt changes."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One way of switching one kind of prompt, for one row."""

    row: str
    how: str
    kind: str
    clips: int
    right_before: float
    """Share of clips whose first prompt is right in the window before the switch."""
    right: float
    """Share of clips in which the second prompt becomes right and stays right to the end."""
    right_interval: Range | None
    """95 % interval over prompts (Wilson)."""
    frames: float | None
    """Median number of frames from the switch until it is right; None if fewer than half of the clips get there."""
    frames_interval: Range | None
    """95 % interval of the median: percentile bootstrap over clips. None if an end is `never`."""
    survived: dict[str, float]
    """Share of the clips that were right before, in which an attribute that does not change is right at the end."""
    same_object: float | None
    """Share of the clips that were right before, in which shape, colour and size stay, and the track never breaks. None if the
    switch changes the object, or if no clip was right before."""


def switched(scene: Scene, kind: str) -> Scene:
    """The scene of the second prompt: each attribute of the kind has another value, a quarter turn for a direction."""
    new = {}
    for name in KINDS[kind]:
        accepted = ATTRIBUTES[name]
        step = 2 if accepted is DIRECTIONS else 1
        new[name] = accepted[(accepted.index(getattr(scene, name)) + step) % len(accepted)]
    return replace(scene, **new)


def ways() -> tuple[str, ...]:
    """Ways of switching a prompt that `Session.steer` offers."""
    if "how" not in inspect.signature(Session.steer).parameters:
        return ("keep",)
    return typing.get_args(typing.get_type_hints(Session.steer)["how"]) or ("keep",)


def offered(session: Session) -> tuple[str, ...]:
    """Those of `ways` in which this stream can be switched; one that latents alone do not tell is not made anew."""
    found = []
    for how in ways():
        with suppress(ValueError):
            session.require(how)  # type: ignore[arg-type]
            found.append(how)
    return tuple(found)


@torch.inference_mode()
def switch(row: Streamed, cases: DriftCases, suite: DriftSuite, progress: Progress | None) -> list[Switch]:
    """Switch the prompts of a row's streams after one clip length, in every way that they can be and every kind."""
    frames, spans = row.model.card.num_frames, list(cases.batches(suite.batch))
    hows = offered(_session(row, cases.prompts[:1], cases.seeds[:1]))
    found: dict[tuple[str, str], list[Windows]] = {(how, kind): [] for how in hows for kind in KINDS}
    places: list[int] = []
    done, total = 0, len(spans) * len(found)
    for span in spans:
        begun, snapshot = _begun(row, cases.prompts[span], cases.seeds[span], frames)
        places.append(sum(chunk.shape[2] for chunk in begun))
        for (how, kind), windows in found.items():
            texts = [describe(switched(scene, kind)) for scene in cases.scenes[span]]
            clips = next(cut(_continued(row, begun, snapshot, texts, how), (1 + AFTER) * frames, 1))
            windows.append(read_windows(clips, frames, min(STRIDE, frames)))
            done += 1
            if progress is not None:
                progress(f"{row.name}, switched prompts", done, total)
    scale = frames / row.model.latent_shape(frames)[1]
    place = round(places[0] * scale)
    return [summarised(row.name, how, kind, merged(windows), cases, place) for (how, kind), windows in found.items()]


def rendered(cases: DriftCases, frames: int) -> list[Switch]:
    """The same figures for rendered clips: a perfect model."""
    found = []
    for kind in KINDS:
        clips = [
            render_script([Script((scene, switched(scene, kind)), (0, frames))], variation(seed), (1 + AFTER) * frames)
            for scene, seed in zip(cases.scenes, cases.seeds, strict=True)
        ]
        windows = read_windows(torch.cat(clips), frames, min(STRIDE, frames))
        found.append(summarised("real clips", "-", kind, windows, cases, frames))
    return found


def _begun(row: Streamed, prompts: Sequence[str], seeds: Sequence[int], frames: int) -> tuple[list[Tensor], Snapshot]:
    """Chunks of at least one clip length, and where the stream is then."""
    session, wanted = _session(row, prompts, seeds), row.model.latent_shape(frames)[1]
    chunks: list[Tensor] = []
    while sum(chunk.shape[2] for chunk in chunks) < wanted:
        chunks += session.take(1)
    return chunks, session.snapshot


def _continued(
    row: Streamed, begun: Sequence[Tensor], snapshot: Snapshot, texts: Sequence[str], how: str
) -> Iterator[Tensor]:
    """Frames of the whole clip, whose prompts are switched after the chunks that are there."""
    session = _session(row, snapshot, ())
    options: dict[str, Any] = {"how": how} if len(ways()) > 1 else {}
    session.steer(texts, **options)
    return decoded_stream(row.model, chain(begun, endless(session)))


def _session(row: Streamed, start: Snapshot | Sequence[str], seeds: Sequence[int]) -> Session:
    return Session(row.model, start, seed=seeds, num_inference_steps=row.steps, force=True)


def merged(windows: Sequence[Windows]) -> Windows:
    """Windows of several batches of clips of one length."""
    return replace(
        windows[0],
        values=torch.cat([w.values for w in windows]).cpu(),
        unbroken=torch.cat([w.unbroken for w in windows]).cpu(),
    )


def summarised(row: str, how: str, kind: str, windows: Windows, cases: DriftCases, place: int) -> Switch:
    """The figures of switched clips; the switch is at frame `place`."""
    seeds, before = (
        cases.seeds_per_prompt,
        max(w for w, first in enumerate(windows.first) if first + windows.length <= place),
    )
    old = windows.right([Script((scene,)) for scene in cases.scenes])
    new = windows.right([Script((switched(scene, kind),)) for scene in cases.scenes])
    since = windows.since(new.prod(2), place)
    there = since != NEVER
    waited = torch.where(there, (since - place).double(), torch.inf)
    were_right = old[:, before].prod(1) == 1
    kept = [name for name in ATTRIBUTES if name not in KINDS[kind]]
    column = list(ATTRIBUTES).index
    changed = set(KINDS[kind]) & {"shape", "colour", "size"}
    same = windows.same_object(since=before)[were_right, -1]
    frames, between = _median(waited)
    return Switch(
        row=row, how=how, kind=kind, clips=len(waited),
        right_before=float(were_right.double().mean()),
        right=float(there.double().mean()),
        right_interval=_share(there, seeds),
        frames=frames,
        frames_interval=between,
        survived={name: float(new[were_right, -1, column(name)].mean()) for name in kept} if were_right.any() else {},
        same_object=None if changed or not were_right.any() else float(same.double().mean()),
    )  # fmt: skip


def _share(there: Tensor, seeds: int) -> Range | None:
    by_prompt = there.double().unflatten(0, (-1, seeds)).mean(1)
    low, high = clustered_wilson(by_prompt, seeds)
    return (low, high) if len(by_prompt) >= FEWEST else None


def _median(waited: Tensor) -> tuple[float | None, Range | None]:
    """The median of numbers of frames, which may be infinite, and its interval; None for what is infinite."""

    def lower(rows: Tensor) -> Tensor:  # an interpolated median of a number and infinity would be infinite
        return rows.median(1).values

    value = float(lower(waited[None])[0])
    if len(waited) < FEWEST or value == float("inf"):
        return (None if value == float("inf") else value), None
    found = bootstrap_interval(waited.clamp(max=1e9), lower)
    return value, None if found.high > 1e8 else (found.low, found.high)

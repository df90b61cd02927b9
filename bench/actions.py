"""Does a student of the steered world obey its keys, or follow its beat?

    python bench/actions.py runs/world/actions/2-consistency/student --steps 4 --clips 32 --frames 32
    python bench/actions.py runs/world/talking/3-talking/student --signal beat --frames 31

Of keys: share of frames whose displacement is the one that was asked for. Of a beat: correlation of the object's pace with it.
`obeyed`: of clips that are told a random signal. `chance`: the same clips against the signal of other clips. `nothing`: clips of
the same prompts and seeds that are told nothing, against this signal. `still`: an object that never moves. `rendered`: real clips
of this signal, encoded and decoded, which is the most that can be had. Streams whose first chunk is a frame begin with the first
frame of the real clip. Intervals are 95 % over clips.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional, arg

from fewstep.metrics.statistics import mean_interval
from fewstep.models import VideoModel
from fewstep.streaming import Session
from fewstep.streaming.control import inputs_of
from fewstep.world.action_clips import Told, sentence
from fewstep.world.actions import in_time, obeyed, walked
from fewstep.world.checker import Checker
from fewstep.world.grammar import sample_scenes
from fewstep.world.renderer import Variation, render_track


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    steps: int | None = None
    """Sampling steps per chunk (default: from the card)."""
    signal: Literal["keys", "beat"] = "keys"
    clips: int = 32
    frames: int = 32
    at_once: int = 8
    seed: int = 0


@torch.no_grad()
def measure(model: VideoModel, case: Case) -> dict[str, object]:
    """Shares with their intervals."""
    dice = torch.Generator().manual_seed(case.seed)
    scenes, variation = sample_scenes(case.clips, dice), Variation.sample(case.clips, dice)
    told, reads = Told.sample((case.signal,), case.clips, case.frames, dice), inputs_of(model.card)[case.signal]
    moves = told.moves(scenes, variation, case.frames)
    prompts = [sentence(scene, (case.signal,)) for scene in scenes]
    ends = [model.clip_frames(i) for i in range(model.latent_shape(case.frames)[1] + 1)]
    numbers = told.extra(ends, reads.back, reads.ahead)[case.signal]
    rendered = model.codec.encode(render_track(scenes, variation, walked(variation.position, moves)))
    begun = perf_counter()
    steered = _tracks(model, case, prompts, numbers, rendered)
    took = perf_counter() - begun
    free = _tracks(model, case, prompts, torch.full_like(numbers, reads.default or 0.0), rendered)
    real = _read(model, rendered)
    obeys = in_time if case.signal == "beat" else lambda track, moves: obeyed(track, moves).double().mean(1)
    found = {
        "obeyed": obeys(steered, moves), "chance": obeys(steered, moves.roll(1, 0)), "nothing": obeys(free, moves),
        "still": obeys(torch.zeros_like(moves), moves), "rendered": obeys(real, moves),
        "seen": (~steered.isnan().any(2)[:, 1:]).double().mean(1),
    }  # fmt: skip
    figures = {
        name: [round(value, 3) for value in (float(each.mean()), *mean_interval(each))] for name, each in found.items()
    }
    return figures | {"seconds": round(took, 1)}


def _tracks(model: VideoModel, case: Case, prompts: list[str], numbers: Tensor, rendered: Tensor) -> Tensor:
    """Where the objects of sampled clips are, `[B, F, 2]`."""
    found, stream = list[Tensor](), model.card.contract.stream
    for first in range(0, case.clips, case.at_once):
        part = slice(first, first + case.at_once)
        told = {case.signal: numbers[part]}
        cond, uncond = (each.with_extra(told, framewise=True) for each in model.conditions(prompts[part]))
        if stream is None or stream.length(0) > 1:
            latents = model.latents(
                cond, negative=uncond, num_frames=case.frames, num_inference_steps=case.steps, seed=case.seed + first
            )
        else:
            session = Session(
                model, prompts[part], seed=case.seed + first, num_inference_steps=case.steps, conditions=(cond, uncond)
            )
            session.begin_with(rendered[part, :, :1])
            latents = torch.cat(list(session.take(len(stream.lengths(rendered.shape[2])))), 2)
        found.append(_read(model, latents))
    return torch.cat(found)


def _read(model: VideoModel, latents: Tensor) -> Tensor:
    return Checker().read(model.decode(latents)).track


def main() -> None:
    case = tyro.cli(Case)
    model = VideoModel.from_pretrained(case.student)
    json.dump(measure(model, case), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()

"""Does a student of the steered world obey its keys? Share of frames whose displacement is the one that was asked for.

    python bench/actions.py runs/world/actions/2-consistency/student --steps 4 --clips 32 --frames 32

`obeyed`: of clips that are told random keys. `chance`: the same clips against the keys of other clips. `nothing`: clips of the
same prompts and seeds that are told no keys, against these keys. `still`: an object that never moves. `rendered`: real clips of
these keys, encoded and decoded, which is the most that can be had. Intervals are 95 % over clips.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional, arg

from fewstep.metrics.statistics import mean_interval
from fewstep.models import VideoModel
from fewstep.streaming.control import of_latents
from fewstep.world.action_clips import Told, sentence
from fewstep.world.actions import obeyed, random_keys, walked
from fewstep.world.checker import Checker
from fewstep.world.grammar import sample_scenes
from fewstep.world.renderer import Variation, render_track


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    steps: int | None = None
    """Sampling steps per chunk (default: from the card)."""
    clips: int = 32
    frames: int = 32
    at_once: int = 8
    seed: int = 0


@torch.no_grad()
def measure(model: VideoModel, case: Case) -> dict[str, object]:
    """Shares with their intervals."""
    dice = torch.Generator().manual_seed(case.seed)
    scenes, variation = sample_scenes(case.clips, dice), Variation.sample(case.clips, dice)
    keys = random_keys(case.clips, case.frames, dice)
    moves = Told(keys=keys).moves(scenes, variation, case.frames)
    prompts = [sentence(scene, ("keys",)) for scene in scenes]
    ends = [model.clip_frames(i) for i in range(model.latent_shape(case.frames)[1] + 1)]
    rendered = model.codec.encode(render_track(scenes, variation, walked(variation.position, moves)))
    begun = perf_counter()
    steered = _tracks(model, case, prompts, of_latents(keys, ends))
    took = perf_counter() - begun
    free = _tracks(model, case, prompts, torch.zeros_like(of_latents(keys, ends)))
    real = _read(model, rendered)
    found = {
        "obeyed": obeyed(steered, moves), "chance": obeyed(steered, moves.roll(1, 0)), "nothing": obeyed(free, moves),
        "still": obeyed(torch.zeros_like(moves), moves), "rendered": obeyed(real, moves),
        "seen": ~steered.isnan().any(2)[:, 1:],
    }  # fmt: skip
    shares = {}
    for name, right in found.items():
        each = right.double().mean(1)
        shares[name] = [round(value, 3) for value in (float(each.mean()), *mean_interval(each))]
    return shares | {"seconds": round(took, 1)}


def _tracks(model: VideoModel, case: Case, prompts: list[str], keys: Tensor) -> Tensor:
    """Where the objects of sampled clips are, `[B, F, 2]`."""
    found = list[Tensor]()
    for first in range(0, case.clips, case.at_once):
        part = slice(first, first + case.at_once)
        cond, uncond = (c.with_extra({"keys": keys[part]}, framewise=True) for c in model.conditions(prompts[part]))
        latents = model.latents(
            cond, negative=uncond, num_frames=case.frames, num_inference_steps=case.steps, seed=case.seed + first
        )
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

"""Sample clips of fixed prompts and seeds, and measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, interpolate

from fewstep.core import Cond, Seeds
from fewstep.core.call import Sharing
from fewstep.diffusion import CFG, Prediction
from fewstep.diffusion.prediction import target
from fewstep.engine.health.vitals import Looks
from fewstep.metrics import contrast, diversity, energy, motion, pooled, saturation
from fewstep.models import VideoModel
from fewstep.models.denoiser import Predictor
from fewstep.models.videos import video_for
from fewstep.streaming import Video
from fewstep.world.checker import Checker, read_scenes
from fewstep.world.grammar import Scene

LARGEST = 64
"""Longest side of stored frames. Small frames are enough, because figures are relative."""
NOISE = (0.1, 0.9)
"""Times at which critics are tested."""


@dataclass(frozen=True)
class Sampled:
    """Clips of all prompts and seeds at every step count, one count after the other."""

    latents: Tensor
    """Latents `[N P S, C, F, h, w]` for N step counts."""
    frames: Tensor
    """Frames `[N P S, 3, F, H, W]`; large frames are made smaller."""
    times: tuple[float, ...]
    """All times at which the network was called."""


@dataclass(frozen=True)
class Gauge:
    """Samples clips and measures them, in batches of the run's own size and precision, so that compiled graphs are reused."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None
    """Scene of each prompt; None if prompts cannot be checked."""
    seeds: int
    batch: int
    precision: Callable[[], AbstractContextManager[Any]]
    images: Mapping[str, Tensor] | None = None
    """First frames (and last, if any) for an image-to-video model; None for other models."""
    low: Tensor | None = None
    """Latents of a low-resolution clip for each prompt, for students that make it sharp; None: the data give none."""
    shared: Sharing | None = None
    """Processes that generate every clip together."""

    @classmethod
    def of(
        cls, model: VideoModel, prompts: tuple[str, ...], seeds: int, batch: int, precision: Callable[[], Any],
        images: Mapping[str, Tensor] | None = None,
    ) -> Gauge:  # fmt: skip
        scenes = read_scenes(prompts, model.card.height, model.card.width)
        return cls(prompts, scenes, seeds, batch, precision, images)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of every clip of one step count."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.seeds))

    def pictures(self, part: slice) -> Mapping[str, Tensor] | None:
        """First frames (and last, if any) of these clips of `texts`."""
        return self.images and {name: x.repeat_interleave(self.seeds, 0)[part] for name, x in self.images.items()}

    def video(self, model: VideoModel, part: slice) -> Video | None:
        """The low-resolution clips of these clips of `texts`, for a model that begins with them."""
        return video_for(model, None if self.low is None else self.low.repeat_interleave(self.seeds, 0)[part])

    def conditions(self, model: VideoModel, part: slice) -> tuple[Cond, Cond]:
        """Conditions of these clips: with the prompt, and without."""
        return model.conditions(self.texts[part], self.pictures(part))

    def shown(self, model: VideoModel, count: int) -> Cond:
        """Conditions of the first `count` prompts."""
        images = self.images and {name: x[:count] for name, x in self.images.items()}
        return model.conditions(self.prompts[:count], images)[0]

    def parts(self) -> Iterator[slice]:
        """Slices of the clips that are sampled together."""
        return (slice(first, first + self.batch) for first in range(0, len(self.texts), self.batch))

    def sample(self, model: VideoModel, counts: tuple[int, ...]) -> Sampled:
        latents, frames, times = [], [], set()
        for count in counts:
            for part in self.parts():
                with self.precision():
                    for step in model.sampling(
                        self.texts[part],
                        image=self.pictures(part),
                        video=self.video(model, part),
                        num_inference_steps=count,
                        seed=part.start,
                        force=True,
                        shared=self.shared,
                    ):
                        times.update(step.prediction.t.unique().tolist())
                latents.append(step.x.float())
                frames.append(decode(model, step.x))
        return Sampled(torch.cat(latents), torch.cat(frames), tuple(sorted(times, reverse=True)))

    def looks(self, sampled: Sampled, teacher: Sampled) -> Looks:
        """Figures of `sampled`, means over all clips. `teacher` holds the teacher's clips of the same prompts at one step
        count."""
        latents, frames, groups = sampled.latents, sampled.frames, (-1, self.seeds)
        return Looks(
            accuracy=self._accuracy(frames),
            distance=0.0 if sampled is teacher else self._distance(frames, teacher.frames),
            drift=drift(latents, teacher.latents),
            std=float(latents.std()),
            saturation=float(saturation(frames).mean()),
            contrast=float(contrast(frames).mean()),
            motion=float(motion(frames).mean()) if frames.shape[2] > 1 else None,
            diversity=float(diversity(frames.unflatten(0, groups)).mean()),
            by_frame=tuple(latents.transpose(0, 2).flatten(1).std(1).tolist()),
            heed=self._heed(frames, teacher.frames),
            apart=apart(latents, teacher.latents),
        )

    def mixed(self, sampled: Sampled) -> Tensor:
        """One clip per prompt and seed, from each step count in turn: `[P S, C, F, h, w]`."""
        by_count = sampled.latents.unflatten(0, (-1, len(self.texts)))
        row = torch.arange(len(self.texts), device=by_count.device)
        return by_count[row % len(by_count), row]

    def errors(self, networks: tuple[Predictor, ...], x0: Tensor, model: VideoModel, single: int = 0) -> list[float]:
        """Mean squared denoising error of each network on `mixed` clips, or on `single` frames of each, in the network's own
        prediction kind. All networks must have the same path.
        """
        totals = [0.0] * len(networks)
        with torch.no_grad(), self.precision():
            for part in self.parts():
                cond, _ = self.conditions(model, part)
                x_t, t, eps = (v[part] for v in noised(networks[0], x0))
                rows, (x_t, clean, eps) = singled(single, x_t, x0[part], eps)
                for i, network in enumerate(networks):
                    totals[i] += error(network(x_t, t[rows], cond[rows]), clean, eps) * len(t) / len(x0)
        return totals

    @torch.no_grad()
    def asked(self, guidance: CFG, network: Predictor, x0: Tensor, model: VideoModel, single: int = 0) -> float:
        """Standard deviation of what a guided network predicts from the teacher's clips `x0` with noise, relative to that of
        these clips."""
        made = []
        with self.precision():
            for part in self.parts():
                x_t, t, _ = (v[part] for v in noised(network, x0))
                rows, (x_t,) = singled(single, x_t)
                cond, uncond = self.conditions(model, part)
                made.append(guidance(network, x_t, t[rows], cond[rows], uncond[rows]).x0.float())
        return float(torch.cat(made).std() / x0.std())

    def _accuracy(self, frames: Tensor) -> float | None:
        if self.scenes is None:
            return None
        scenes = [scene for scene in self.scenes for _ in range(self.seeds)]
        return Checker().score(frames.cpu(), scenes * (len(frames) // len(scenes))).accuracy()["all"]

    def _distance(self, frames: Tensor, teacher: Tensor) -> float:
        (reference,), mine = self._by_prompt(teacher), self._by_prompt(frames)
        return sum(float(energy(part, reference).mean()) for part in mine) / len(mine)

    def _heed(self, frames: Tensor, teacher: Tensor) -> float | None:
        if len(self.prompts) < 2:
            return None
        (reference,), mine = self._by_prompt(teacher), self._by_prompt(frames)
        whole = _nearer(reference, reference)
        return sum(_nearer(part, reference) for part in mine) / len(mine) / whole if whole > 0 else None

    def _by_prompt(self, frames: Tensor) -> list[Tensor]:
        """Features `[P, S, D]` of the clips, for each step count."""
        return list(features(frames).unflatten(0, (-1, self.seeds)).split(len(self.prompts)))


@torch.no_grad()
def decode(model: VideoModel, latents: Tensor) -> Tensor:
    """Frames in [-1, 1], with sides of at most `LARGEST`."""
    frames = model.codec.decode(latents.float()).clamp(-1, 1).float()
    if max(frames.shape[-2:]) <= LARGEST:
        return frames
    factor = LARGEST / max(frames.shape[-2:])
    images = interpolate(frames.transpose(1, 2).flatten(0, 1), scale_factor=factor, mode="area")
    return images.unflatten(0, (len(frames), -1)).transpose(1, 2)


def features(frames: Tensor) -> Tensor:
    """Features `[B, D]`: appearance and motion, or appearance alone for single images."""
    return pooled(frames) if frames.shape[2] >= 3 else adaptive_avg_pool3d(frames.float(), (1, 4, 4)).flatten(1)


def _nearer(mine: Tensor, reference: Tensor) -> float:
    """Mean energy distance of features `[P, S, D]` to the reference clips of other prompts, minus that to those of their own."""
    others = [float(energy(mine, reference.roll(shift, 0)).mean()) for shift in range(1, len(mine))]
    return sum(others) / len(others) - float(energy(mine, reference).mean())


def apart(latents: Tensor, reference: Tensor) -> float:
    """Root mean square difference from the reference's clips, step count by step count, in the reference's deviation."""
    by_count = latents.unflatten(0, (-1, len(reference)))
    return float((by_count - reference).square().mean().sqrt() / reference.std().clamp_min(1e-6))


def drift(latents: Tensor, reference: Tensor) -> float:
    """Shift of the latent mean in the reference's standard deviations: root mean square over channels."""
    over = (0, 2, 3, 4)
    shift = (latents.mean(over) - reference.mean(over)) / reference.std(over).clamp_min(1e-6)
    return float(shift.square().mean().sqrt())


def noised(denoiser: Predictor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x_t`, `t` and the noise: clip i gets the i-th of equally spaced times, the same at every check."""
    low, high = NOISE
    t = low + (high - low) * (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
    eps = Seeds(tuple(range(len(x0))), device=str(x0.device)).randn(x0.shape, "health")
    return denoiser.path.add_noise(x0, eps, t), t, eps


def singled(count: int, *clips: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The index of each result's clip, and the results: `count` equally spaced frames of each clip `[B, C, F, h, w]`, as clips
    of one frame (fewer from a shorter clip), or whole clips if `count` is 0.
    """
    batch, _, frames = clips[0].shape[:3]
    rows = torch.arange(batch, device=clips[0].device)
    if not count:
        return rows, list(clips)
    chosen = torch.linspace(0, frames - 1, min(count, frames)).long()
    return rows.repeat_interleave(len(chosen)), [
        x[:, :, chosen].transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in clips
    ]


def error(prediction: Prediction, x0: Tensor, eps: Tensor) -> float:
    wanted = target(prediction.kind, x0, eps, prediction.t, prediction.path)
    return float((prediction.raw.float() - wanted).square().mean())


def eyes(networks: tuple[Predictor, ...], x0: Tensor, model: VideoModel, cond: Cond, single: int = 0) -> list[Tensor]:
    """What each network predicts from the same clips with noise (or from `single` frames), as frames."""
    t = torch.full((len(x0),), 0.6, device=x0.device)
    eps = Seeds(tuple(range(len(x0))), device=str(x0.device)).randn(x0.shape, "eyes")
    rows, (x_t,) = singled(single, networks[0].path.add_noise(x0, eps, t))
    with torch.no_grad():
        seen = [decode(model, network(x_t, t[rows], cond[rows]).x0) for network in networks]
    return [
        frames.unflatten(0, (len(x0), -1)).transpose(1, 2).flatten(2, 3) for frames in seen
    ]  # [B, 3, F, H, W] again

"""Rewards, and two ways in which a method that matches distributions can hold one.

A `Reward` says how good a clip is. `Reweighting` lets better clips count more, and needs no gradient (Re-DMD of Reward Forcing,
2512.04678): the student that maximises E[r] - beta KL(student | teacher) follows the gradient of distribution matching with each
clip weighted by exp(r / beta). `Feedback` follows the gradient of the reward itself (ReFL, 2304.05977; T2V-Turbo, 2405.18750;
Hyper-SD, 2404.13686). Methods that rank clips by a reward are in `methods/feedback`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Bounds, Natural, Positive, require_bounds
from fewstep.methods.base import Nets
from fewstep.methods.roles import Decoder, Judge, Role
from fewstep.methods.rollouts import Rolled, Rollout
from fewstep.metrics import motion


class Reward(ABC):
    """How good a clip is, from its frames. A frozen dataclass; networks that it reads are frozen roles of the run."""

    fewest: ClassVar[int] = 1
    """Frames that it must see; of fewer it says nothing."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that it reads."""
        return frozenset()

    @property
    def networks(self) -> dict[str, Role]:
        """The roles that it reads, besides the codec that decodes the clips."""
        return {}

    @abstractmethod
    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        """r of clips `[B, 3, F, H, W]` in [-1, 1], which show what `batch` says: `[B]`, larger is better."""

    @property
    def roles(self) -> dict[str, Role]:
        """Everything that `of` reads."""
        return {"codec": Decoder(), **self.networks}

    def of(self, latents: Tensor, batch: Batch, nets: Nets) -> Tensor:
        """r of latents `[B, C, F, H, W]`, `[B]`, with their gradient where it is recorded."""
        return self.score(nets.codec.decode(latents).clamp(-1, 1), batch, nets)

    def check(self, rollout: Rollout) -> None:
        """Refuse (ValueError) a rollout whose clips have prompts of their own, if the reward compares a clip with its prompt."""
        if self.needs and not rollout.whole:
            raise ValueError(
                f"{type(self).__name__} compares a clip with what the batch says, and {type(rollout).__name__} makes clips with "
                "a past or prompts of their own; take MotionReward, or a rollout of whole clips"
            )


@dataclass(frozen=True, kw_only=True)
class MotionReward(Reward):
    """The motion of a clip, `metrics.motion`: mean absolute difference of neighbouring frames. About 0.05 in the built-in world.

    Not as published: the paper asks a vision-language model how good the motion is. This measure takes flicker and noise for
    motion, so hold out another one (`metrics.flicker`, `metrics.flow`) and look at the clips.
    """

    fewest: ClassVar[int] = 2

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        if frames.shape[2] < self.fewest:
            raise ValueError(
                "one frame has no motion, which MotionReward measures; give it clips of at least two frames"
            )
        return motion(frames)


@dataclass(frozen=True, kw_only=True)
class WorldReward(Reward):
    """Whether a clip of the built-in world shows what its prompt says: mean log-probability of the six attributes, at most 0.

    The package's clip encoder (`world/features`) reads them; it was trained on true clips, so a student can please it with
    clips that are none. The checker (`world.checker`), which is no network, is held out; the Frechet distance is not, because
    it uses the features of this encoder. Of true clips it names the shape in 0.7 and all else in nearly all; of their first four
    frames the direction in 0.4, of eight in all.
    """

    fewest: ClassVar[int] = 8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"})

    @property
    def networks(self) -> dict[str, Role]:
        return {"judge": Judge("world/features")}

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        each = zip(nets.judge.classify(frames), batch.require("labels").unbind(1), strict=True)
        return -torch.stack([F.cross_entropy(logits, label, reduction="none") for logits, label in each]).mean(0)


REWARDS: tuple[type[Reward], ...] = (MotionReward, WorldReward)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a method needs to know of a reward that it holds."""

    reward: Reward

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that it reads."""
        return self.reward.needs

    @property
    def roles(self) -> dict[str, Role]:
        """The frozen networks that it reads."""
        return self.reward.roles

    def check(self, rollout: Rollout) -> None:
        """As `Reward.check`."""
        self.reward.check(rollout)


@dataclass(frozen=True, kw_only=True)
class Reweighting(_Held):
    """Clips that a reward prefers count more. The weights have mean 1 in a batch: they say which clips count, and not how much
    all of them do. With r the same for all clips it is plain distribution matching, bit for bit."""

    reward: Reward = MotionReward()
    beta: Positive = 0.02
    """Temperature, in units of the reward: a clip that is better by beta counts e times as much."""
    limit: float = 4.0
    """Largest weight over the mean, before the weights are brought back to a mean of 1; the smallest is 1 / limit. Large weights
    invite clips that please the reward and nobody else."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if wrong := Bounds(above=1).problem(self.limit):
            raise ValueError(f"limit {wrong}; at 1 the reward does not count")

    @property
    def least_batch(self) -> int:
        """Fewest clips of a batch, whose weights have mean 1."""
        return 2

    def weights(self, score: Tensor) -> Tensor:
        """`exp(r / beta)` over its mean in the batch, limited, and over its mean again: `[B]`. ValueError for a single clip,
        whose weight is always 1."""
        if len(score) < 2:
            raise ValueError(
                "a reward compares the clips of a batch, and this one has a single clip; raise settings.batch"
            )
        raw = ((score - score.max()) / self.beta).exp()  # the largest is 1: no overflow, the same mean
        limited = (raw / raw.mean()).clamp(1 / self.limit, self.limit)
        return limited / limited.mean()

    @torch.no_grad()
    def keep(self, rolled: Rolled, batch: Batch, nets: Nets) -> Tensor:
        """How much each clip counts, `[B, 1]`, or each of its frames, `[B, F]` (`Rolled.keep`)."""
        weights = self.weights(self.reward.of(rolled.clip, batch, nets)).to(rolled.clip)[:, None]
        return weights if rolled.keep is None else weights * rolled.keep


@dataclass(frozen=True, kw_only=True)
class Feedback(_Held):
    """The gradient of a reward, through the decoder and the student's last call. It needs an anchor: the loss of a method that
    holds it. Without one, and with a large weight, clips please the reward and nobody else."""

    reward: Reward = WorldReward()
    weight: Positive = 0.1
    """lambda_r: weight of the loss `-r`, a mean over clips."""
    ceiling: float | None = None
    """a: the loss is `max(0, a - r)`, so clips that are good enough are left alone (Hyper-SD); null: none is good enough."""
    frames: Natural = 0
    """Neighbouring latent frames that are decoded, from a random one on; 0: the whole clip. A codec that compresses time decodes
    them as the beginning of a clip."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if 0 < self.frames < self.reward.fewest:
            raise ValueError(
                f"{type(self.reward).__name__} needs {self.reward.fewest} frames or more to judge a clip, got frames: "
                f"{self.frames}; write frames: {self.reward.fewest}, or 0 for all"
            )

    def loss(self, x0: Tensor, batch: Batch, nets: Nets, rng: Rng) -> Tensor:
        """`lambda_r` times the loss of clips `[B, C, F, H, W]`. ValueError for clips of fewer than `frames` frames."""
        count = self.frames or x0.shape[2]
        if count > x0.shape[2]:
            raise ValueError(
                f"feedback.frames is {count}, and a clip has {x0.shape[2]} latent frames; 0 takes them all"
            )
        first = rng.integer("feedback", x0.shape[2] - count + 1)
        r = self.reward.of(x0[:, :, first : first + count], batch, nets)
        return self.weight * (-r if self.ceiling is None else F.relu(self.ceiling - r)).mean()

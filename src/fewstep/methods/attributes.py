"""Train the small text or clip encoder to read the attributes of a prompt or a clip.

Supervised classification; no paper.

    1  features = encoder(prompt)            of="text"
       features = encoder(frames + noise)    of="features"
    2  minimise the sum over attributes of the cross-entropy of a linear reading

The heads of line 2 serve training only: the text encoder conditions the denoiser with its states, the clip encoder
measures with its features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Amount
from fewstep.methods.base import Method, Nets, Update


@dataclass(frozen=True, kw_only=True)
class ReadAttributes(Method):
    """Attribute classification; `student` is the text or the clip encoder."""

    cite: ClassVar[str] = "supervised attribute reading; no paper"

    of: Literal["text", "features"] = "text"
    """Encoder to train: `text` reads prompts, `features` reads frames."""
    noise: Amount = 0.2
    """Largest standard deviation of the Gaussian noise on frames (uniform in [0, noise]), so that noisy clips are read too."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts" if self.of == "text" else "frames", "labels"})

    @property
    def part(self) -> str:
        return self.of

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        if self.of == "text":
            logits = nets.student.classify(nets.student.encode(batch.prompts))  # 1
        else:
            frames = batch.require("frames")
            sigma = self.noise * rng.rand((len(frames), 1, 1, 1, 1), "sigma")
            logits = nets.student.classify(frames + sigma * rng.randn(frames.shape, "noise"))
        labels = batch.require("labels").unbind(1)
        each = [F.cross_entropy(one, label) for one, label in zip(logits, labels, strict=True)]
        yield {"attributes": torch.stack(each).sum()}  # 2

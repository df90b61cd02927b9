"""Can it be causal: masks, caches and a time per frame, for networks with an attention pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.attention import KVCache, Operation, Pattern, Site
from fewstep.core import Call
from fewstep.evaluate.conformance.subject import Measured, NotApplicable, Subject, relative
from fewstep.models import Denoiser
from fewstep.models.repattern import repattern


@dataclass(frozen=True)
class Everything(Pattern):
    """A mask that hides nothing."""

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _Masked()


class _Masked(Operation):
    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor:
        return torch.ones(q_BHND.shape[2], k_BHMD.shape[2], dtype=torch.bool)


def frame_times(s: Subject) -> Measured:
    """One time for all frames equals the same time given frame by frame.

    Frames and tokens are matched wrongly: a frame's time must reach its own tokens, which follow each other.
    """
    _ = s.pattern
    many = s.t[:, None].expand(-1, s.shape[1])
    return Measured(relative(s.network(s.x_t, many, s.cond).raw, s.network(s.x_t, s.t, s.cond).raw), s.tolerance)


def full_mask(s: Subject) -> Measured:
    """With a mask that hides nothing, the output is that without a mask.

    The masked way through attention is another one: another scale, another order of tokens, or no rotary positions.
    """
    _ = s.pattern
    masked = repattern(s.network, Everything())
    return Measured(relative(masked(s.x_t, s.t, s.cond).raw, s.dense(s.x_t, s.t, s.cond).raw), s.tolerance)


def future(s: Subject) -> Measured:
    """With a causal mask, changing the last chunk of frames changes no earlier one.

    The mask does not reach the attention of every block, or something else mixes frames (a temporal convolution, a norm).
    """
    causal, parts = _chunks(s)
    changed = torch.cat([*parts[:-1], parts[-1] + 1], 2)
    before, after = (causal(x, s.t, s.cond).raw[:, :, : -parts[-1].shape[2]] for x in (s.x_t, changed))
    return Measured(relative(after, before), 0.01 * s.tolerance)


def cache(s: Subject) -> Measured:
    """Chunk by chunk with a cache equals one masked forward.

    Positions of remembered keys are off (`kv.start` is where a call begins), keys are kept after rotation, or something
    besides keys and values reaches from frame to frame.
    """
    s.require("full_mask", "future", "frame_times")
    causal, parts = _chunks(s)
    memory, made = KVCache.empty(s.pattern.keep), []
    t = torch.linspace(0.9, 0.1, s.shape[1]).to(s.t).expand(2, -1)
    for part, time in zip(parts, t.split(s.pattern.chunk, 1), strict=True):
        prediction = causal(part, time, s.cond, Call(kv=causal.recall(memory, part)))
        memory = memory.commit(prediction.kv or (), part.shape[2])
        made.append(prediction.raw)
    return Measured(relative(torch.cat(made, 2), causal(s.x_t, t, s.cond).raw), s.tolerance)


def _chunks(s: Subject) -> tuple[Denoiser, tuple[Tensor, ...]]:
    """The causal denoiser, and the latents in chunks of its pattern."""
    parts = s.x_t.split(s.pattern.chunk, 2)
    if len(parts) < 2:
        raise NotApplicable(
            f"{s.shape[1]} latent frames are one chunk, which has no past; check with more --num-frames"
        )
    return repattern(s.network, s.pattern), parts

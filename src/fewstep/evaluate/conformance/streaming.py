"""Checks for causal models: masks, caches and a time per frame, for networks with an attention pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.attention import Operation, Pattern, Site
from fewstep.core import Call
from fewstep.evaluate.conformance.subject import Measured, NotApplicable, Subject, relative
from fewstep.models import Denoiser
from fewstep.models.repattern import repattern


@dataclass(frozen=True)
class Everything(Pattern):
    """A pattern whose mask hides nothing."""

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _Masked()


class _Masked(Operation):
    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor:
        return torch.ones(q_BHND.shape[2], k_BHMD.shape[2], dtype=torch.bool)


def frame_times(s: Subject) -> Measured:
    """One time for the whole clip gives the same output as that time given for each frame.

    Frames and tokens are matched wrongly: a frame's time must reach the tokens of that frame, which lie next to each other.
    """
    _ = s.pattern
    many = s.t[:, None].expand(-1, s.shape[1])
    return Measured(relative(s.network(s.x_t, many, s.cond).raw, s.network(s.x_t, s.t, s.cond).raw), s.tolerance)


def full_mask(s: Subject) -> Measured:
    """With a mask that hides nothing, the output is the same as without a mask.

    The code for masked attention differs: another scale, another order of tokens, or no rotary positions.
    """
    _ = s.pattern
    masked = repattern(s.network, Everything())
    return Measured(relative(masked(s.x_t, s.t, s.cond).raw, s.dense(s.x_t, s.t, s.cond).raw), s.tolerance)


def future(s: Subject) -> Measured:
    """With a causal mask, a change of the last chunk of frames does not change earlier chunks.

    The mask does not reach the attention of every block, or something else mixes frames (a temporal convolution, a norm).
    """
    causal, parts = _chunks(s)
    changed = torch.cat([*parts[:-1], parts[-1] + 1], 2)
    before, after = (causal(x, s.t, s.cond).raw[:, :, : -parts[-1].shape[2]] for x in (s.x_t, changed))
    return Measured(relative(after, before), 0.01 * s.tolerance)


def cache(s: Subject) -> Measured:
    """Generating chunk by chunk with a cache gives the same output as one masked forward pass.

    The positions of cached keys are wrong (a call begins at `kv.start`), keys are cached after rotation, or something other
    than keys and values passes from frame to frame.
    """
    s.require("full_mask", "future", "frame_times")
    causal, parts = _chunks(s)
    memory, made = s.pattern.begin(), []
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
            f"{s.shape[1]} latent frames are only one chunk, which has no past; give a larger --num-frames"
        )
    return repattern(s.network, s.pattern), parts

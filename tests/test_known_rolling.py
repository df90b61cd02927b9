"""The published student of Rolling Forcing rolls its window as its authors do, over diffusers' own network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from torch import Tensor

from fewstep.core import Seeds
from fewstep.streaming import Session
from test_known_streams import BY_NAME, PROMPTS, Masked, checkpoint, imported, original

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
FIVE = (1.0, 20 / 21, 15 / 17, 10 / 13, 5 / 9)
"""1000, 800, 600, 400, 200 of a thousand, under shift 5."""


@torch.no_grad()
def by_hand(network: Any, text: Tensor, shape: tuple[int, ...], seeds: tuple[int, ...]) -> Tensor:
    """Windows `[max(0, w - 4), min(N - 1, w)]` of chunks of 3 frames, as in the authors' inference. There is no cache: finished
    chunks stand clean before the window, and a mask lets each of them read what was finished before it. In a clip of 21 latent
    frames a window always has room for all of them, so nothing is left out and the sink stays at its place."""
    batch, channels, frames, height, width = shape
    per_frame, count = height * width // 4, frames // 3
    rng = [Seeds(seeds).fold(f"chunk/{c}") for c in range(count)]
    chunks = [own.randn((batch, channels, 3, height, width), "start") for own in rng]
    for window in range(count + 4):
        low, high = max(0, window - 4), min(count - 1, window)
        x, steps = torch.cat(chunks[: high + 1], 2), [window - c for c in range(low, high + 1)]
        times = [0.0] * 3 * low + [FIVE[step] for step in steps for _ in range(3)]
        frame = torch.arange(3 * (high + 1)).repeat_interleave(per_frame)
        reads = (frame[None] // 3 <= frame[:, None] // 3) | (frame[:, None] >= 3 * low)
        for block in network.blocks:
            block.attn1.set_processor(Masked(reads))
        t = torch.tensor(times)
        flow = network(x, 1000 * t.repeat_interleave(per_frame).repeat(batch, 1), text, return_dict=False)[0]
        x0 = x - t[:, None, None] * flow
        for c, step in zip(range(low, high + 1), steps, strict=True):
            chunks[c] = x0[:, :, 3 * c : 3 * c + 3]
            if step < 4:
                s = FIVE[step + 1]
                chunks[c] = (1 - s) * chunks[c] + s * rng[c].randn(tuple(chunks[c].shape), f"renoise/{step}")
    return torch.cat(chunks, 2)


def test_it_rolls_as_its_authors_do(tmp_path: Path) -> None:
    """A clip, to its end; in a stream that goes on the chunks are the same until the last four."""
    file = checkpoint(tmp_path, "self-forcing").rename(tmp_path / "rolling_forcing_dmd.pt")
    student = imported(file, num_frames=81)
    assert student.card.contract == BY_NAME["rolling-forcing"].contract and student.card.name == "rolling-forcing"
    shape = (2, *student.latent_shape())
    assert shape[2] == 21
    made = by_hand(original(), student.encode_text(PROMPTS, guided=False)[0].text, shape, (5, 6))
    torch.testing.assert_close(student.latents(PROMPTS, seed=(5, 6)), made, atol=2e-4, rtol=2e-4)
    endless = torch.cat(list(Session(student, PROMPTS, seed=(5, 6)).take(4)), 2)
    torch.testing.assert_close(endless[:, :, :9], made[:, :, :9], atol=2e-4, rtol=2e-4)
    assert (endless[:, :, 9:] - made[:, :, 9:12]).abs().max() > 1e-3

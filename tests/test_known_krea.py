"""The published student of Krea Realtime makes its memory anew as its authors do, over diffusers' own networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core import Seeds
from fewstep.models import VideoModel
from fewstep.streaming import Session
from test_known_streams import BY_NAME, FOUR, PROMPTS, Masked, imported, original, theirs_names
from tiny_models import shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def checkpoint(folder: Path) -> Path:
    """A plain file with the authors' names."""
    state, file = original().state_dict(), folder / "krea-realtime-video-14b.safetensors"
    save_file({f"model.{one}": state[other].contiguous() for one, other in theirs_names().items()}, file)
    return file


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    """15 latent frames: five chunks."""
    return imported(checkpoint(tmp_path_factory.mktemp("krea")), num_frames=57)


@torch.no_grad()
def by_hand(text: Tensor, shape: tuple[int, ...], seeds: tuple[int, ...], *, image: bool = True) -> Tensor:
    """The authors' loop. There is no cache: the last 3 latent frames stand clean before the chunk, at positions 0 to 2, and a
    mask lets them read each other alone. From the third chunk on the first of them is another one: of the 12 frames that its
    chunk was decoded to, the 4th (the server keeps the last 9), encoded as an image."""
    network, vae = original(), AutoencoderKLWan.from_pretrained(shared("wan") / "vae").eval()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    batch, channels, frames, height, width = shape
    done, per_frame = torch.zeros(batch, channels, 0, height, width), height * width // 4
    reads = (torch.arange(6) < 3).repeat_interleave(per_frame)
    for index in range(frames // 3):
        rng, past = Seeds(seeds).fold(f"chunk/{index}"), done[:, :, -3:]
        x = rng.randn((batch, channels, 3, height, width), "start")
        if index >= 2 and image:
            video = torch.cat([vae.decode(clip * std + mean).sample for clip in done.split(1)])
            picture = video[:, :, -9:][:, :, :1]
            first = torch.cat([vae.encode(one).latent_dist.mode() for one in picture.split(1)])
            past = torch.cat([(first - mean) / std, past[:, :, 1:]], 2)
        for block in network.blocks:
            block.attn1.set_processor(Masked(~reads[:, None] | reads[None]) if index else type(block.attn1.processor)())
        for step, t in enumerate(FOUR):
            times = torch.tensor([0.0] * past.shape[2] + [1000 * t] * 3).repeat_interleave(per_frame).repeat(batch, 1)
            flow = network(torch.cat([past, x], 2), times, text, return_dict=False)[0][:, :, -3:]
            x = x - t * flow
            if step < 3:
                s = FOUR[step + 1]
                x = (1 - s) * x + s * rng.randn(tuple(x.shape), f"renoise/{step}")
        done = torch.cat([done, x], 2)
    return done


def test_it_streams_as_its_authors_do(student: VideoModel) -> None:
    """Clip and session; without the image it is another stream from the third chunk on."""
    assert student.card.contract == BY_NAME["krea-realtime"].contract and student.card.name == "krea-realtime"
    text, shape = student.encode_text(PROMPTS, guided=False)[0].text, (2, *student.latent_shape())
    assert shape[2] == 15
    made = by_hand(text, shape, (5, 6))
    torch.testing.assert_close(student.latents(PROMPTS, seed=(5, 6)), made, atol=2e-4, rtol=2e-4)
    plain = by_hand(text, shape, (5, 6), image=False)
    assert torch.equal(plain[:, :, :6], made[:, :, :6]) and (plain - made)[:, :, 6:].abs().max() > 1e-2
    stream: Any = student.card.contract.stream
    bare = student.with_card(contract=replace(student.card.contract, stream=replace(stream, reencode=False)))
    torch.testing.assert_close(bare.latents(PROMPTS, seed=(5, 6)), plain, atol=2e-4, rtol=2e-4)


def test_a_stream_that_encodes_again_is_restored_bit_for_bit(student: VideoModel) -> None:
    session = Session(student, PROMPTS[:1], seed=5)
    list(session.take(3))
    paused = session.snapshot
    assert paused.seen.pictures is not None and paused.seen.pictures.shape[2] == 3
    (rest,) = session.take(1)
    assert torch.equal(next(Session(student, paused).take(1)), rest)

"""Frames chunk by chunk are the frames of the whole clip, for every codec."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.core import Rng
from fewstep.models import FrameAutoencoder
from fewstep.models.adapters.codecs.codec import VideoCodec
from fewstep.models.adapters.codecs.frame_codec import FrameCodec
from fewstep.models.decoding import Decoded, decode_stream
from fewstep.models.encoding import encode_stream
from support_unets import vae as image_autoencoder
from tiny_models import TINY

pytestmark = pytest.mark.usefixtures("single_thread")
EXACT = {"atol": 1e-5, "rtol": 1e-5}
VIDEO = {
    "wan": (7, 1), "wan_ti2v": (7, 1), "cogvideox": (7, 3), "hunyuan": (11, 5), "hunyuan15": (7, 1), "ltx": (7, 3),
    "ltx_condition": (7, 3),
}  # fmt: skip
"""Latent frames of a clip that is long enough, and how many the first frames need."""
NEARLY = ("ltx", "ltx_condition")
EXACTLY = sorted(VIDEO.keys() - set(NEARLY))


def codec_of(name: str, **options: Any) -> VideoCodec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = TINY[name].make().vae.eval()
    if name == "ltx_condition":
        options |= {"decode_time": 0.05, "decode_noise": 0.025}
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    codec = VideoCodec(config=config, kind=type(vae).__name__, **options)
    codec._hold(vae)
    if name in ("hunyuan", *NEARLY):  # tiles in time fit for their codecs at this size
        ratio = vae.temporal_compression_ratio
        vae.tile_sample_min_num_frames = (2 if name in NEARLY else 4) * ratio
        vae.tile_sample_stride_num_frames = (1 if name in NEARLY else 3) * ratio
    return codec


def latents_of(codec: VideoCodec, frames: int, batch: int = 2) -> Tensor:
    channels, _, height, width = codec.latent_shape(1, 64, 96)
    return Rng(0).randn((batch, channels, frames, height // 2 or 1, width // 2 or 1), "latents")


def streamed(codec: Any, latents: Tensor, chunk: int) -> Tensor:
    return torch.cat(list(decode_stream(codec, latents.split(chunk, 2))), 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("name", EXACTLY)
@torch.no_grad()
def test_chunks_join_to_the_whole(name: str, chunk: int) -> None:
    codec = codec_of(name)
    latents = latents_of(codec, VIDEO[name][0])
    torch.testing.assert_close(streamed(codec, latents, chunk), codec.decode(latents), **EXACT)


@pytest.mark.parametrize("frames", [1, 3, 5, 9])
@pytest.mark.parametrize("name", EXACTLY)
@torch.no_grad()
def test_clips_of_every_length(name: str, frames: int) -> None:
    """A clip may be shorter than what its decoder waits for."""
    codec = codec_of(name)
    latents = latents_of(codec, frames, batch=1)
    torch.testing.assert_close(streamed(codec, latents, 1), codec.decode(latents), **EXACT)


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_the_first_frames_come_with_the_first_latents(name: str) -> None:
    codec, (frames, first) = codec_of(name), VIDEO[name]
    parts, past, begun = latents_of(codec, frames, batch=1).split(1, 2), None, []
    for part in parts:
        made = codec.decode_next(part, past)
        past = made.past
        begun.append(made.frames.shape[2] > 0)
    assert begun.index(True) == first - 1


@pytest.mark.parametrize("name", NEARLY)
@torch.no_grad()
def test_ltx_in_tiles_is_near_the_whole(name: str) -> None:
    """However it is chunked; and nearer than where tiles are joined one frame off, as diffusers joins them."""
    codec = codec_of(name)
    latents = latents_of(codec, 7)
    whole, made = codec.decode(latents), streamed(codec, latents, 1)
    for chunk in (2, 3, 7):
        torch.testing.assert_close(streamed(codec, latents, chunk), made, **EXACT)
    codec.vae.use_framewise_decoding = True
    diffusers = codec.decode(latents)
    assert made.shape == whole.shape == diffusers.shape
    near, far = ((x - whole).square().mean() / whole.var() for x in (made, diffusers))
    assert near < far


def tiled(name: str) -> tuple[VideoCodec, VideoCodec, Tensor]:
    """A codec, the same with small tiles, and latents of frames that need several."""
    codec, tiles = codec_of(name), codec_of(name, tiling=True)
    space = codec.factors[1]
    rows = {"tile_sample_min_height": 4 * space, "tile_sample_min_width": 4 * space}
    if name in ("cogvideox", "hunyuan15"):  # which know their tiles in latents, and their overlap as a share
        rows |= {"tile_overlap_factor_height": 0.5, "tile_overlap_factor_width": 0.5}
        tiles.vae.tile_latent_min_height = tiles.vae.tile_latent_min_width = 4
        tiles.vae.tile_overlap_factor = 0.5
    else:
        rows |= {"tile_sample_stride_height": 2 * space, "tile_sample_stride_width": 2 * space}
    for key, value in rows.items():
        setattr(tiles.vae, key, value)
    channels, *_ = codec.latent_shape(1, 64, 96)
    return codec, tiles, Rng(0).randn((1, channels, 3, 6, 6), "latents")


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_large_frames_in_tiles_are_near_the_whole(name: str) -> None:
    """Every tile is decoded by itself, with zeros around it and norms of its own, and blended into its neighbours."""
    codec, tiles, latents = tiled(name)
    whole, made = codec.decode(latents), tiles.decode(latents)
    assert made.shape == whole.shape and not torch.equal(made, whole)
    error, moved = ((x - whole).square().mean() / whole.var() for x in (made, made.roll(1, -1)))
    assert error < 0.55 and error < 0.9 * moved  # of unrelated frames: 2; one pixel off is further away
    corner = slice(0, 2 * codec.factors[1])  # which belongs to the first tile alone
    first = codec.decode(latents[..., :4, :4])[..., corner, corner]
    assert (made[..., corner, corner] - first).square().mean() < 0.01 * whole.var()


@torch.no_grad()
def test_chunks_in_tiles_are_the_whole_in_tiles_or_refused() -> None:
    for name in VIDEO:
        _, tiles, latents = tiled(name)
        if name == "hunyuan":
            torch.testing.assert_close(streamed(tiles, latents, 1), tiles.decode(latents), **EXACT)
        elif name not in NEARLY:
            with pytest.raises(ValueError, match="does not decode chunks in tiles; set tiling: false"):
                tiles.decode_next(latents)


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_what_is_remembered_does_not_grow(name: str) -> None:
    """But for the keys and values of HunyuanVideo 1.5, which every later frame reads."""
    codec, sizes, past = codec_of(name), [], None
    for part in latents_of(codec, 13, batch=1).split(1, 2):
        past = codec.decode_next(part, past).past
        sizes.append(memory(past))
    if name == "hunyuan15":
        growth = {after - before for before, after in zip(sizes[3:], sizes[4:], strict=False)}
        assert len(growth) == 1 and growth.pop() == 2 * 8 * latents_of(codec, 1, batch=1)[0, 0].numel()
    else:
        assert max(sizes[7:]) <= max(sizes[:7])


@torch.no_grad()
def test_what_cannot_be_streamed_says_so() -> None:
    """A clip that ends between two groups, and noise that is drawn for a whole clip."""
    codec = codec_of("cogvideox")
    with pytest.raises(ValueError, match="decodes 2 k \\+ 1 latent frames, and this clip ended with one more"):
        codec.decode_next(latents_of(codec, 4), last=True)
    with pytest.raises(ValueError, match="num_frames must be 8 k \\+ 1 for this codec, such as 1, got 5"):
        codec.latent_shape(5, 48, 80)
    codec = codec_of("ltx")
    codec.vae.register_to_config(decoder_inject_noise=(True, False, False, False, False))
    with pytest.raises(ValueError, match="draws noise for a whole clip; decode its clips whole"):
        codec.decode_next(latents_of(codec, 4))


@torch.no_grad()
def test_a_stream_goes_on_twice_from_one_place() -> None:
    """Nothing is written into what is remembered."""
    for name in EXACTLY:
        codec = codec_of(name)
        first, second = latents_of(codec, 12, batch=1).split(6, 2)
        past = codec.decode_next(first).past
        twice = [codec.decode_next(second, past).frames for _ in range(2)]
        assert torch.equal(*twice)


@torch.no_grad()
def test_codecs_of_single_frames() -> None:
    torch.manual_seed(0)
    codecs = [FrameAutoencoder(width=8, depth=1), frames_by(image_autoencoder())]
    for codec in codecs:
        latents = Rng(0).randn((2, 4, 5, 4, 6), "latents")
        torch.testing.assert_close(streamed(codec, latents, 2), codec.decode(latents), **EXACT)
        assert isinstance(codec.decode_next(latents), Decoded)


def test_a_stream_keeps_no_graph() -> None:
    """Weights ask for gradients wherever a model was just loaded; what is remembered would grow with the clip."""
    codec = codec_of("wan")
    assert all(weight.requires_grad for weight in codec.parameters())
    assert not streamed(codec, latents_of(codec, 3), 1).requires_grad


def frames_by(vae: Any) -> FrameCodec:
    codec = FrameCodec(config={key: value for key, value in vae.config.items() if not key.startswith("_")})
    codec._hold(vae.eval())
    return codec


def memory(past: Any) -> int:
    """float32 numbers that it keeps alive."""
    if isinstance(past, Tensor):
        return past.untyped_storage().nbytes() // 4
    inner = past.values() if isinstance(past, dict) else past if isinstance(past, list | tuple) else ()
    return sum(map(memory, inner))


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4), (2, 3, 8), (13,), (5, 1, 1, 1, 5)])
@pytest.mark.parametrize("name", ["wan", "wan_ti2v"])
def test_latents_of_frames_that_come_are_those_of_the_clip(name: str, sizes: tuple[int, ...]) -> None:
    codec = codec_of(name)
    frames = Rng(0).randn((2, 3, 13, 64, 96), "frames").clamp(-1, 1)
    chunks = list(encode_stream(codec, frames.split(sizes, 2), (1, 2, 1)))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(chunks, 2), codec.encode(frames), **EXACT)
    assert [chunk.shape[2] for chunk in chunks] == [1, 2, 1]
    assert [chunk.shape[2] for chunk in encode_stream(codec, [frames[:, :, :8]], (1, 2, 1))] == [1]


@torch.no_grad()
def test_latents_come_as_soon_as_their_frames() -> None:
    codec = codec_of("wan")
    frames, past, made = Rng(0).randn((1, 3, 9, 64, 96), "frames"), None, list[int]()
    for frame in frames.split(1, 2):
        found = codec.encode_next(frame, past)
        again = codec.encode_next(frame, past)  # the memory was not changed
        assert torch.equal(found.latents, again.latents)
        past = found.past
        made.append(found.latents.shape[2])
    assert made == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="in tiles"):
        codec_of("wan", tiling=True).encode_next(frames)


@torch.no_grad()
def test_what_an_encoder_remembers_does_not_grow() -> None:
    codec, past, sizes = codec_of("wan"), None, list[int]()
    for number in range(5):
        past = codec.encode_next(Rng(number).randn((1, 3, 4, 64, 96), "frames"), past).past
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors_in(past)))
    assert len(set(sizes[1:])) == 1  # after the first latent, whose convolutions have seen one frame only


def tensors_in(past: Any) -> list[Tensor]:
    return [x for x in tree_leaves(past) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", sorted(VIDEO.keys() - {"wan", "wan_ti2v"}))
def test_encoders_that_look_ahead_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not work chunk by chunk"):
        codec_of(name).encode_next(torch.zeros(1, 3, 1, 64, 96))


def test_frames_of_codecs_without_time_are_encoded_one_by_one() -> None:
    codec = FrameAutoencoder(width=8, depth=1)
    frames = Rng(0).randn((2, 3, 6, 16, 16), "frames")
    chunks = list(encode_stream(codec, frames.split((1, 5), 2), (2, 2, 2)))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(chunks, 2), codec.encode(frames), **EXACT)


@pytest.mark.parametrize("name", VIDEO)
def test_frames_of_a_clip_and_its_latents(name: str) -> None:
    codec = codec_of(name)
    for latents in (1, VIDEO[name][0]):
        assert codec.latent_shape(codec.clip_frames(latents), 64, 96)[1] == latents

"""Reading and writing video files, and lists of them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.core.finite import NonFiniteError
from fewstep.data import (
    ClipError,
    Cut,
    read_clips,
    read_listing,
    read_video,
    to_floats,
    to_pixels,
    write_video,
)
from support_finished import film

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"


def ramp(num_frames: int = 12, height: int = 32, width: int = 48) -> torch.Tensor:
    """`[3, F, H, W]`: frame i is one grey, brighter from frame to frame."""
    grey = torch.linspace(-0.9, 0.9, num_frames)[None, :, None, None]
    return grey.expand(3, num_frames, height, width).contiguous()


def greys(frames: torch.Tensor) -> torch.Tensor:
    """The frame numbers of `ramp()` that uint8 frames `[F, H, W, 3]` show."""
    return ((frames.float().mean((1, 2, 3)) / 127.5 - 1 + 0.9) / 1.8 * 11).round().long()


def test_written_video_is_read_back(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", ramp())
    frames = read_video(path, 12)
    assert frames.dtype == torch.uint8
    assert frames.shape == (12, 32, 48, 3)
    assert greys(frames).tolist() == list(range(12))
    assert (to_floats(frames) - ramp()).abs().max() < 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["ramp.mp4"]  # no draft left


def test_the_same_clip_is_the_same_file(tmp_path: Path) -> None:
    clip = film(0, side=64)
    files = [write_video(tmp_path / f"{number}.mp4", clip, fps=8).read_bytes() for number in range(40)]
    assert len(set(files)) == 1


def test_start_and_stride(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", ramp())
    assert greys(read_video(path, 4, stride=3, start=1)).tolist() == [1, 4, 7, 10]
    with pytest.raises(ClipError, match="too short: 3 of 4 frames from frame 4, every 3 frames"):
        read_video(path, 4, stride=3, start=4)


def test_windows_do_not_overlap(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", ramp())
    cut = Cut(num_frames=2, height=16, width=16, stride=2, clips_per_video=0)
    clips = list(read_clips(path, cut))
    assert [clip.start for clip in clips] == [0, 4, 8]
    assert [greys(clip.frames).tolist() for clip in clips] == [[0, 2], [4, 6], [8, 10]]
    assert len(list(read_clips(path, Cut(num_frames=5, height=16, width=16, clips_per_video=3)))) == 2
    first = next(read_clips(path, cut)).frames
    assert torch.equal(first, read_video(path, 2, stride=2, size=(16, 16)))


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    frames = -torch.ones(3, 2, 32, 64)
    frames[..., 16:48] = 1.0  # the central square is white
    path = write_video(tmp_path / "wide.mp4", frames)
    small = read_video(path, 2, size=(16, 16))
    assert small.shape == (2, 16, 16, 3)
    assert small[:, :, 2:-2].float().mean() > 250
    tall = read_video(path, 2, size=(32, 8))
    assert tall.shape == (2, 32, 8, 3)
    assert tall.float().mean() > 250


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = torch.ones(3, 1, 64, 64)
    stripes[..., ::2] = -1.0
    path = write_video(tmp_path / "stripes.mp4", stripes)
    assert (read_video(path, 1, size=(8, 8)).float() - 127.5).abs().max() < 12


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a rotation")
def test_phone_videos_are_turned_upright(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = 255  # white at the left
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.set_display_rotation(90)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    with av.open(str(path)) as file:
        rotation = next(file.decode(video=0)).rotation
    frame = read_video(path, 1)[0].float()
    assert frame.shape == (64, 32, 3)
    assert abs(rotation) == 90  # counterclockwise: the left edge goes to the bottom
    white = frame[-16:] if rotation == 90 else frame[:16]
    assert white.mean() > 240


def test_bad_files_say_why(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "ramp.mp4", ramp()).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    for name in ("cut", "text", "empty"):
        with pytest.raises(ClipError, match="not a readable video"):
            read_video(tmp_path / f"{name}.mp4", 1)
    with pytest.raises(ClipError, match="no such file"):
        read_video(tmp_path / "absent.mp4", 1)
    with pytest.raises(ClipError, match="too short: 12 of 13 frames"):
        list(read_clips(tmp_path / "ramp.mp4", Cut(num_frames=13)))


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    noise = torch.rand(3, 30, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = bytearray(write_video(tmp_path / "noise.mp4", noise).read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(ClipError, match=r"damaged|cannot be decoded"):
        read_video(tmp_path / "damaged.mp4", 30)


def test_odd_sizes_rates_and_tiles(tmp_path: Path) -> None:
    clips = torch.stack([ramp(4, 15, 17), -ramp(4, 15, 17), ramp(4, 15, 17)])
    assert read_video(write_video(tmp_path / "row.mp4", clips, fps=12.5), 4).shape == (4, 16, 52, 3)
    tiled = read_video(write_video(tmp_path / "tiled.mp4", clips, scale=2, columns=2), 4).float()
    assert tiled.shape == (4, 60, 68, 3)
    assert tiled[:, 32:, 36:].max() < 12  # the empty place is black
    assert (tiled[:, :28, :32].mean() + tiled[:, :28, 36:].mean() - 255).abs() < 4


def test_gif_shows_every_frame_enlarged(tmp_path: Path) -> None:
    with Image.open(write_video(tmp_path / "ramp.GIF", ramp(5, 6, 7), fps=8, scale=3)) as gif:
        assert (gif.size, gif.n_frames) == ((21, 18), 5)
        seen = []
        for i in range(gif.n_frames):
            gif.seek(i)
            assert gif.info["duration"] == 120
            seen.append(np.asarray(gif.convert("RGB")).copy())
    assert np.abs(np.stack(seen)[:, ::3, ::3] - to_pixels(ramp(5, 6, 7)).numpy().astype(int)).max() <= 2


def test_writing_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write .avi; choose .mp4 or .gif or .webp or .png"):
        write_video(tmp_path / "a.avi", ramp())
    with pytest.raises(ValueError, match="must be floats"):
        write_video(tmp_path / "a.mp4", to_pixels(ramp()))
    with pytest.raises(NonFiniteError):
        write_video(tmp_path / "a.mp4", ramp() * torch.nan)
    assert not list(tmp_path.iterdir())


def test_pixel_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_pixels(to_floats(pixels)), pixels)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not on this machine")
def test_real_clips() -> None:
    listing = read_listing(CLIPS)
    assert len(listing) == 8
    clips = list(read_clips(listing[0].video(), Cut(num_frames=8, height=36, width=64, stride=3, clips_per_video=0)))
    assert [clip.start for clip in clips] == [0, 24, 48]
    assert all(clip.frames.shape == (8, 36, 64, 3) and clip.frames.float().std() > 10 for clip in clips)

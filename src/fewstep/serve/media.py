"""Frames as bytes: pictures, fragments of a video that goes on, and whole files."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image

from fewstep.serve.orders import Pixels


class Encoder(Protocol):
    """Turns the chunks of one stream into binary messages."""

    def add(self, frames: Pixels) -> list[bytes]:
        """The messages of a chunk `[F, H, W, 3]`."""


class WebP:
    """One picture per frame; small ones without loss."""

    def add(self, frames: Pixels) -> list[bytes]:
        return [self._picture(frame) for frame in frames]

    def _picture(self, frame: Pixels) -> bytes:
        out = io.BytesIO()
        Image.fromarray(frame).save(out, "webp", lossless=max(frame.shape[:2]) <= 128, quality=85, method=0)
        return out.getvalue()


class FragmentedMP4:
    """Fragments of one MP4 (H.264), the header before the first. What it holds back of a chunk, a frame at most, comes with the
    next one."""

    def __init__(self, fps: float) -> None:
        self._out, self._rate = io.BytesIO(), Fraction(fps).limit_denominator(1000)
        movflags = "frag_every_frame+empty_moov+default_base_moof"
        options = {"movflags": movflags, "flush_packets": "1", "use_editlist": "0"}
        self._file = av.open(_Unseekable(self._out), "w", format="mp4", options=options)
        self._stream: Any = None

    def add(self, frames: Pixels) -> list[bytes]:
        frames = np.pad(frames, [(0, 0), *((0, size % 2) for size in frames.shape[1:3]), (0, 0)], mode="edge")
        if self._stream is None:
            options = {"crf": "20", "preset": "ultrafast", "tune": "zerolatency"}
            self._stream = self._file.add_stream("libx264", rate=self._rate, options=options)
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        for frame in frames:
            self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        made = self._out.getvalue()
        self._out.seek(0)
        self._out.truncate()
        return [made] if made else []


class _Unseekable:
    """A file that can only grow, so that the muxer goes back to nothing."""

    def __init__(self, out: io.BytesIO) -> None:
        self.write = out.write


def encoder(media: str, fps: float) -> Encoder:
    return WebP() if media == "webp" else FragmentedMP4(fps)

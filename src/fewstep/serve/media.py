"""Frames as bytes: pictures, fragments of a video that goes on, and whole files."""

from __future__ import annotations

import io
from threading import Lock
from typing import Protocol

from PIL import Image

from fewstep.data.growing import Fragments
from fewstep.serve.orders import Pixels


class Encoder(Protocol):
    """Turns the chunks of one stream into binary messages."""

    def add(self, frames: Pixels) -> list[bytes]:
        """The messages of a chunk `[F, H, W, 3]`."""

    def close(self) -> None:
        """Free what it holds; nothing follows."""


class WebP:
    """One picture per frame; small ones without loss."""

    def add(self, frames: Pixels) -> list[bytes]:
        return [self._picture(frame) for frame in frames]

    def close(self) -> None:
        """It holds nothing."""

    def _picture(self, frame: Pixels) -> bytes:
        out = io.BytesIO()
        Image.fromarray(frame).save(out, "webp", lossless=max(frame.shape[:2]) <= 128, quality=85, method=0)
        return out.getvalue()


class FragmentedMP4:
    """Fragments of one MP4 (H.264), the header before the first. What it holds back of a chunk, a frame at most, comes with the
    next one."""

    def __init__(self, fps: float) -> None:
        self._out = io.BytesIO()
        self._lock = Lock()  # a stream that is given up is closed while another thread may still encode
        self._fragments = Fragments(_Unseekable(self._out), fps=fps, crf=20, preset="ultrafast")

    def add(self, frames: Pixels) -> list[bytes]:
        with self._lock:
            self._fragments.add(frames)
            made = self._out.getvalue()
            self._out.seek(0)
            self._out.truncate()
        return [made] if made else []

    def close(self) -> None:
        with self._lock:
            self._fragments.close()  # what x264 holds is not freed otherwise


class _Unseekable:
    """A file that can only grow, so that the muxer goes back to nothing."""

    def __init__(self, out: io.BytesIO) -> None:
        self.write = out.write


def encoder(media: str, fps: float) -> Encoder:
    return WebP() if media == "webp" else FragmentedMP4(fps)

"""Videos that can be played while they are written, and also if their writer was killed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def x264(crf: int, **more: str) -> dict[str, str]:
    """Options of the encoder, with which the same clip always becomes the same file: x264's AVX-512 code encodes small frames
    differently now and then, so it does without."""
    steady = {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}
    return {"crf": str(crf), **more, **steady}


class Fragments:
    """An MP4 (H.264) to which frames are added: every frame is a fragment of its own, written when the next one comes.

    Nothing is held back to compress better, so it is larger than what `write_video` makes.
    """

    def __init__(self, target: Any, *, fps: float, crf: int, preset: str, note: str = "") -> None:
        """`target` is a path, or an object to `write` to, which need not seek. `crf` and `preset` are those of x264."""
        options = {
            "movflags": "frag_every_frame+empty_moov+default_base_moof",
            "flush_packets": "1",
            "use_editlist": "0",
        }
        self._file = av.open(target, "w", format="mp4", options=options)
        if note:
            self._file.metadata["comment"] = note
        self._rate = Fraction(fps).limit_denominator(1000)
        self._options = x264(crf, preset=preset, tune="zerolatency")
        self._stream: Any = None
        self.frames = 0
        """Number of frames that were added."""

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Frames `[F, H, W, 3]`, all of one size. The last row or column of an odd size is repeated."""
        frames = np.pad(frames, [(0, 0), *((0, size % 2) for size in frames.shape[1:3]), (0, 0)], mode="edge")
        height, width = frames.shape[1:3]
        if self._stream is None:
            self._stream = self._file.add_stream("libx264", rate=self._rate, options=self._options)
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        if (height, width) != (self._stream.height, self._stream.width):
            raise ValueError(
                f"frames of {self._stream.height} x {self._stream.width} are in the file, and {height} x {width} were added; a "
                "file has frames of one size"
            )
        for frame in frames:
            self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            self.frames += 1

    def close(self) -> None:
        """Write what is left."""
        if self._stream is not None:
            self._file.mux(self._stream.encode())
        self._file.close()


class GrowingVideo:
    """A file of `Fragments`, on disk."""

    def __init__(self, path: str | Path, *, fps: float, scale: int = 1, note: str = "") -> None:
        """Any file at `path` is replaced at once. `scale` enlarges by repeating pixels; `read_note` reads the `note` again."""
        path = Path(path)
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"{path}: a video that grows is an .mp4; give a name that ends so")
        if scale < 1 or not 0 < fps <= 1000:
            raise ValueError(f"scale must be at least 1 and fps above 0 and at most 1000, got scale={scale}, fps={fps}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fragments, self._scale = Fragments(str(path), fps=fps, crf=18, preset="veryfast", note=note), scale

    @property
    def frames(self) -> int:
        """Number of frames in the file."""
        return self._fragments.frames

    def add(self, pixels: Tensor) -> None:
        """Frames uint8 `[F, H, W, 3]`; as `Fragments.add`."""
        self._fragments.add(pixels.repeat_interleave(self._scale, 1).repeat_interleave(self._scale, 2).numpy())

    def close(self) -> None:
        """Write what is left."""
        self._fragments.close()

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

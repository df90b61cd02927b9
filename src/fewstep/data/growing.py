"""A video file that can be played while it is written, and also if its writer was killed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor


class GrowingVideo:
    """An MP4 (H.264) to which frames are added: every frame is a fragment of its own, on disk when the next one comes.

    Nothing is held back to compress better, so the file is larger than that of `write_video`.
    """

    def __init__(self, path: str | Path, *, fps: float, scale: int = 1, note: str = "") -> None:
        """Any file at `path` is replaced at once. `scale` enlarges by repeating pixels; `read_note` reads the `note` again."""
        path = Path(path)
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"{path}: a video that grows is an .mp4; give a name that ends so")
        if scale < 1 or not 0 < fps <= 1000:
            raise ValueError(f"scale must be at least 1 and fps above 0 and at most 1000, got scale={scale}, fps={fps}")
        path.parent.mkdir(parents=True, exist_ok=True)
        movflags = "frag_every_frame+empty_moov+default_base_moof"
        options = {"movflags": movflags, "flush_packets": "1", "use_editlist": "0"}
        self._file = av.open(str(path), "w", format="mp4", options=options)
        if note:
            self._file.metadata["comment"] = note
        self._rate, self._scale = Fraction(fps).limit_denominator(1000), scale
        self._stream: Any = None
        self.frames = 0
        """Number of frames in the file."""

    def add(self, pixels: Tensor) -> None:
        """Frames uint8 `[F, H, W, 3]`, all of one size. The last row or column of an odd size is repeated."""
        array = pixels.repeat_interleave(self._scale, 1).repeat_interleave(self._scale, 2).numpy()
        array = np.pad(array, [(0, 0), *((0, size % 2) for size in array.shape[1:3]), (0, 0)], mode="edge")
        if self._stream is None:
            options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
            self._stream = self._file.add_stream("libx264", rate=self._rate, options=options)
            self._stream.height, self._stream.width = array.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        if array.shape[1:3] != (self._stream.height, self._stream.width):
            raise ValueError(
                f"frames of {self._stream.height} x {self._stream.width} are in the file, and {array.shape[1]} x "
                f"{array.shape[2]} were added; a file has frames of one size"
            )
        for frame in array:
            self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            self.frames += 1

    def close(self) -> None:
        """Write what is left."""
        if self._stream is not None:
            self._file.mux(self._stream.encode())
        self._file.close()

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

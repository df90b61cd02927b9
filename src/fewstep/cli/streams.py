"""`fewstep stream` and its arguments. Nothing heavy is imported here, so that `fewstep --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from fewstep.cli.command import Overrides, Runs


@dataclass(frozen=True)
class Stream(Runs):
    """Write a video while it is made, chunk by chunk, with a student that streams. The file can be played meanwhile.

    Ctrl-C ends the video after the frames that are made."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]] = "world/stream"
    """Student that streams: a fewstep folder (a run's student/), or a built-in."""
    prompt: str | None = None
    """Prompt of the beginning; with --restore the next prompt (default: the stream's)."""
    at: UseAppendAction[tuple[tuple[float, str], ...]] = ()
    """Another prompt, from the first chunk on that starts at this second or later: --at 10 "a blue star". May be repeated."""
    switch: Literal["keep", "recache", "clear", "lerp"] = "keep"
    """How --at changes the prompt. keep: smoothly. recache: at once, from the last frames. clear: a hard cut. lerp: over four
    chunks."""
    keys: str = ""
    """Keys that are held, for a student that reads them, frame by frame: "left*8 right*8 none*4 left+up". A last key without a
    number is held to the end. Or a text file with a line for each change: its second, and the keys (default: none)."""
    seconds: float = 10.0
    """Length of the video."""
    image: Path | None = None
    """Picture that the video begins with, scaled and cropped to its size. For students whose first chunk is one latent frame."""
    video: Path | None = None
    """Video to change, frame by frame: each chunk starts from its frames, noised to --strength (default: start from noise)."""
    strength: float | None = None
    """Time, from 0 to 1, at which a chunk of --video starts: the student's largest that is not above this. At 1 nothing of the
    video is left (default: the student's second time)."""
    num_inference_steps: int | None = None
    """Number of sampling steps per chunk (default: from the card). A student refuses step counts it was not trained for."""
    cascade: int | None = None
    """Start a chunk when the one before has made so many steps, which must divide their number (default: when it is finished).
    The video is another one; it is faster only where a chunk is too small to fill the device."""
    seed: int = 0
    """Seed of the video."""
    lora: tuple[str, ...] = ()
    """LoRAs to merge into the denoiser: files, folders or hub names (owner/name, or owner/name/FILE.safetensors)."""
    output: Path = Path("stream.mp4")
    """File to write, an .mp4. It can be played while it is written, and also if this command is killed."""
    preview: Path | None = None
    """Picture (.png) that shows the newest frame while the video is made."""
    snapshot: Path | None = None
    """File to write where the stream is at the end, so that --restore goes on with it. The video must end with a whole chunk."""
    restore: Path | None = None
    """File of --snapshot: go on with that stream, with the same student."""
    like: Path | None = None
    """Video that fewstep stream wrote: make it again. Other options given here replace those of the file."""
    scale: int | None = None
    """Enlarge each pixel this many times (default: small videos to about 128 pixels, others not at all)."""
    force: bool = False
    """Allow a step count that the student was not trained for."""
    dry_run: bool = False
    """Print the chunks, and how much memory the stream takes. Load and write nothing."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import live

        return live.stream(self)

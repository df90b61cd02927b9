"""`fewstep sample` and its arguments. Nothing heavy is imported here, so that `fewstep --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fewstep.cli.command import Overrides, Runs


@dataclass(frozen=True)
class Sample(Runs):
    """Generate one clip per prompt with a student or teacher."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]] = ""
    """Model: a fewstep folder (a run's student/), a folder in diffusers' layout, a hub name, or `world`."""
    prompt: tuple[str, ...] = ()
    """Prompts, one clip each. Up to 8 clips go side by side into one file; more go into one file each (sample-01.mp4, ...)."""
    like: Path | None = None
    """Make the clips of this file again: it says how fewstep sample made it. Other options change that."""
    prompt_file: Path | None = None
    """Text file with one prompt per line, in place of --prompt."""
    image: tuple[Path, ...] = ()
    """First frame for image-to-video models: one image for all prompts, or one per prompt."""
    last_image: tuple[Path, ...] = ()
    """Last frame for models that generate between two images: one for all prompts, or one per prompt."""
    video: Path | None = None
    """Video to begin with: a low-resolution one, for a student that makes it sharp (--prompt may be left out), or one to change
    (default: start from noise)."""
    strength: float | None = None
    """Time, from 0 to 1, at which the change of --video starts: the model's largest that is not above this. At 1 nothing of the
    video is left (default: the model's second time)."""
    preset: Literal["layout", "authors"] | None = None
    """For a model in diffusers' layout: sample it as the layout's own scheduler does (layout), or as its authors do (authors)
    (default: Euler or DDIM over plain times)."""
    num_inference_steps: int | None = None
    """Number of sampling steps (default: from the card). A student refuses step counts it was not trained for."""
    guidance_scale: float | None = None
    """Guidance scale: uncond + scale (cond - uncond) (default: from the card)."""
    scalar: tuple[str, ...] = ()
    """Numbers that the model reads besides time and text (ScalarInput), by name, such as guidance=4.0."""
    negative_prompt: str | None = None
    """Negative prompt, for models that are sampled with guidance or with --nag-scale (default: from the card)."""
    nag_scale: float | None = None
    """Push the attention to the prompt away from the negative prompt (NAG), in the same call: a negative prompt for students
    without guidance. Usual values: 4 to 11 (default: no NAG)."""
    nag_tau: float | None = None
    """Largest factor by which NAG lets the norm of what a token reads grow (default: 2.5)."""
    nag_alpha: float | None = None
    """Share of what NAG pushed in the result, 0 to 1 (default: 0.25)."""
    lora: tuple[str, ...] = ()
    """LoRAs to merge into the denoiser: files, folders or hub names (owner/name, or owner/name/FILE.safetensors)."""
    texts: Path | None = None
    """Folder with text states of known prompts: the text encoder is loaded only for prompts that are not there, alone, and theirs
    are added. A run's data.text_cache is such a folder (default: every prompt is encoded)."""
    num_frames: int | None = None
    """Frames per clip (default: from the card). Another number needs --force."""
    height: int | None = None
    """Height of the clips in pixels (default: from the card). A student needs --force for another."""
    width: int | None = None
    """Width of the clips in pixels (default: from the card). A student needs --force for another."""
    seed: tuple[int, ...] = (0,)
    """Seed of the first clip; each further clip adds 1. With several seeds every prompt is sampled with each: a grid with a row
    per prompt."""
    batch: int | None = None
    """Clips generated at once (default: 8; on a GPU as many of them as fit, which the first clip shows)."""
    output: Path = Path("sample.mp4")
    """File to write: .mp4, .gif, .webp (without loss), or .png for a folder with a file per frame."""
    fps: float | None = None
    """Frames per second of the file (default: from the card)."""
    preview: Path | None = None
    """Picture (.png) that shows the middle frame after each step, while clips are being made."""
    scale: int | None = None
    """Enlarge each pixel this many times (default: small clips to about 128 pixels, others not at all)."""
    teacher: str | None = None
    """Model for the first steps, with its own guidance: usually the teacher (default: the student makes all steps)."""
    teacher_steps: int | None = None
    """Number of the first steps that --teacher makes, at the student's times."""
    force: bool = False
    """Allow a step count, number of frames or guidance that the student was not trained for."""
    dry_run: bool = False
    """Print how much memory sampling needs, by network and phase. Load and write nothing."""
    memory: str | None = None
    """With --dry-run: memory of the device, such as 24GB. Prints whether sampling fits, and what would make it fit."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import clips

        return clips.sample(self)

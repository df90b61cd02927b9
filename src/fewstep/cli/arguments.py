"""Commands and their arguments. Nothing heavy is imported here, so that `fewstep --help` is fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import tyro
from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Loads, Overrides, Runs, UsageError
from fewstep.cli.drift import Drift
from fewstep.cli.finished import Compare, Study
from fewstep.cli.generation import Sample
from fewstep.cli.leaderboard import Leaderboard
from fewstep.cli.questions import Doctor, Explain, List, Watch
from fewstep.cli.serving import Serve
from fewstep.cli.streams import Stream
from fewstep.cli.students import Import

LayoutName = Literal["plain", "openvid", "webvid", "ucf101", "tars"]
"""Copy of `fewstep.data.layouts.LayoutName`: importing that module would load torch just to print a help text."""


@dataclass(frozen=True)
class Demo(Command):
    """Distil the built-in teacher, measure the student and write a report. Takes minutes on a CPU."""

    output: Path = Path("runs/demo")
    """Folder for the student, its clips and the report."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.demo(self)


@dataclass(frozen=True)
class Prepare(Loads):
    """Encode captioned videos to latent shards. Under torchrun each process does a share of the work."""

    videos: Positional[Annotated[Path, arg(metavar="VIDEOS")]]
    """Dataset: a folder, a table (.csv, .jsonl), a list (UCF-101) or an archive (.tar)."""
    output: Path
    """Folder to write the shards to."""
    model: str = "world"
    """Model whose codec encodes the videos: a folder, a hub name, or `world`."""
    layout: LayoutName = "plain"
    """Layout of the dataset on disk. plain: captions.jsonl, a table, or a folder of videos with text files beside them."""
    root: str = ""
    """Folder that video names are relative to (default: the dataset's folder)."""
    num_frames: int | None = None
    """Frames per clip (default: from the model's card)."""
    height: int | None = None
    """Height of the clips in pixels (default: from the model's card)."""
    width: int | None = None
    """Width of the clips in pixels (default: from the model's card)."""
    stride: int = 1
    """Take every N-th frame of the video."""
    clips_per_video: int = 1
    """Largest number of clips per video; 0 = as many as fit."""
    shots: bool = False
    """Detect cuts. A clip never crosses a cut, and each shot gives at most one clip."""
    min_seconds: float | None = None
    """Drop videos shorter than this many seconds (default: no limit)."""
    max_seconds: float | None = None
    """Drop videos longer than this many seconds (default: no limit)."""
    min_side: int | None = None
    """Drop videos whose shorter side has fewer pixels (default: no limit)."""
    min_motion: float | None = None
    """Drop clips with less motion: mean difference of neighbouring frames, 0 to 1 (default: no limit)."""
    max_motion: float | None = None
    """Drop clips with more motion (default: no limit)."""
    min_brightness: float | None = None
    """Drop clips with a lower mean brightness, 0 to 1 (default: no limit)."""
    max_brightness: float | None = None
    """Drop clips with a higher mean brightness (default: no limit)."""
    texts: bool = False
    """Encode the captions too, to OUTPUT/texts. A recipe reads them with data.text_cache."""
    batch: int | None = None
    """Clips encoded at once (default: 16; fewer for large clips; 1 for codecs that take one clip at a time)."""
    threads: int = 4
    """Decoding threads per process."""
    autocast: Literal["off", "bf16"] = "off"
    """Precision of the codec: off is float32."""
    device: str = "cpu"
    """Device for the networks, such as cpu or cuda. Processes on one machine share its devices."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.prepare(self)


@dataclass(frozen=True)
class Pairs(Runs):
    """Store a teacher's ODE states for methods that regress on them. Under torchrun each process does a share of the work.

    Use --dtype bfloat16 if the student is trained with settings.autocast: bf16.
    """

    prompts: Positional[Annotated[str, arg(metavar="PROMPTS")]]
    """Text file with one prompt per line, or `world:N` for N prompts of the built-in world. For an image-to-video model: a
    .csv file with the columns caption, image and, optionally, last_image. For a model that streams: a folder written by
    `fewstep prepare`, or `world:N`; each chunk reads the clean chunks of the clip before it."""
    output: Path
    """Folder to write the shards to."""
    model: str = "world"
    """Teacher: a folder, a hub name, or `world`."""
    preset: Literal["layout", "authors"] | None = None
    """For a teacher in diffusers' layout: sample it as the layout's own scheduler does (layout), or as its authors do (authors)
    (default: Euler or DDIM over plain times)."""
    steps: int | None = None
    """Steps of the teacher's solver (default: from its card)."""
    guidance_scale: float | None = None
    """Guidance scale of the teacher (default: from its card)."""
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)
    """Times whose states are stored, decreasing from 1 to 0. Use the student's grid."""
    num_frames: int | None = None
    """Frames per clip (default: from the teacher's card)."""
    seed: int = 0
    """Seed of the first pair's noise; pair i has seed + i."""
    batch: int = 16
    """Clips generated at once."""
    shard_size: int = 16
    """Pairs per file. A killed command loses at most one file per process."""
    storage: Literal["float16", "float32"] = "float32"
    """Type of the stored states."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.pairs(self)


@dataclass(frozen=True)
class Train(Command):
    """Train a model from scratch with a recipe. Every key of the recipe is an option: --settings.steps 100."""

    takes_overrides: ClassVar[bool] = True

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE")]]
    """Recipe: a name from `fewstep list recipes`, a YAML file, or the folder of an earlier run."""
    output: Path | None = None
    """Folder of the run (default: runs/<recipe>-<hash>). A stopped run resumes from its last checkpoint."""
    dry_run: bool = False
    """Print what would be trained and how much memory it needs. Load and write nothing."""
    memory: str | None = None
    """With --dry-run: memory of one device, such as 24GB. Prints whether the run fits, and what would make it fit."""
    flops: float | None = None
    """With --dry-run: floating-point operations per second that the device sustains, such as 150e12. Prints the time."""
    price: float | None = None
    """With --dry-run and --flops: price of one hour of the device. Prints the cost."""
    shard: int | None = None
    """With --dry-run and --memory: number of devices to shard over (default: 8)."""
    allow_fallback: bool = False
    """If a requested feature is not available, run without it and record this in the student's card (default: refuse)."""
    allow_imports: bool = False
    """Import classes outside fewstep that the recipe file names; this runs their code (default: refuse). A recipe in the
    folder of a run or of weights never imports."""
    strict: bool = False
    """Refuse fallbacks (default)."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.train(self, overrides)


@dataclass(frozen=True)
class Distill(Train):
    """Distil a model into a few-step student with a recipe. Every key is an option: --method.critic-updates 3."""


@dataclass(frozen=True)
class Evaluate(Runs):
    """Compare a student with its teacher on the same prompts and seeds, and write a report."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    """Student: a fewstep folder."""
    output: Path
    """Folder to write results.json and report.html to."""
    teacher: str = "world"
    """Teacher to compare with: a folder, a hub name, or `world`."""
    preset: Literal["layout", "authors"] | None = None
    """For a teacher (and student) in diffusers' layout: sample it as the layout's own scheduler does (layout), or as its authors
    do (authors) (default: Euler or DDIM over plain times)."""
    num_inference_steps: tuple[int, ...] = ()
    """Step counts to measure (default: all that the student was trained for)."""
    suite: Literal["world", "avdm2"] = "world"
    """Set of measurements. world: prompts of the built-in world, or your own. avdm2: FVD to real clips and CLIPScore, as in
    the AVDM2 paper; needs --real, --features and --clip."""
    real: Path | None = None
    """Real videos with captions (a folder, captions.jsonl or a CSV table). The captions are the prompts."""
    stride: int | None = None
    """Take every N-th frame of the real videos (default: 4)."""
    layout: LayoutName | None = None
    """Layout of the real videos on disk, as for fewstep prepare (default: plain)."""
    root: str | None = None
    """Folder that the names of the real videos are relative to (default: the dataset's folder)."""
    features: str = "auto"
    """Features for the distance. A TorchScript file (I3D): it runs code, so use only a file that you trust. A folder with a
    video encoder (VideoMAE) or with fewstep features. `pooled`. auto: the built-in world's features if they fit."""
    clip: Path | None = None
    """Folder with CLIPModel and CLIPProcessor, for CLIPScore (default: no CLIPScore)."""
    prompts: int | None = None
    """Number of prompts (default: 64; avdm2: 100)."""
    prompt_file: Path | None = None
    """Text file with your own prompts, one per line (default: prompts of the suite)."""
    seeds: int | None = None
    """Clips per prompt; diversity needs two or more (default: 2; avdm2: 1)."""
    seed: int = 2024
    """Seed that draws the prompts, the noise and the real clips."""
    num_frames: int | None = None
    """Frames per clip (default: from the card)."""
    batch: int | None = None
    """Clips generated at once (default: 32; avdm2: 4)."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.evaluate(self)


@dataclass(frozen=True)
class CheckModel(Runs):
    """Check that a model was read with the right conventions (time, sign, guidance, shift)."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Model: a folder in diffusers' layout, a hub name, a fewstep folder, or `world`."""
    only: tuple[str, ...] = ()
    """Names of the checks to run (default: all)."""
    num_frames: int | None = None
    """Frames of the test clip (default: the card's if small, else a few latent frames)."""
    height: int | None = None
    """Height of the test clip in pixels (default: the card's if small, else 8 latent rows)."""
    width: int | None = None
    """Width of the test clip in pixels (default: the card's if small, else 16 latent columns)."""
    num_inference_steps: int = 3
    """Sampling steps of the clip that is compared with the diffusers pipeline."""
    prompt: tuple[str, ...] = ()
    """Two prompts (default: prompts of the built-in world). The first is the caption of --video."""
    video: Path | None = None
    """Video file for the checks that need trained weights (default: a rendered clip)."""
    seed: int = 0
    """Seed of the noise."""
    json: bool = False
    """Print the findings as a JSON list of objects."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.check_model(self)


@dataclass(frozen=True)
class Export(Loads):
    """Export a student for diffusers, ComfyUI or another server. Plain diffusers then generates the same clips."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    """Student: a run's student/, or another fewstep folder with a diffusers network."""
    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """Folder to write to. It must not exist, or it must be empty."""
    names: Literal["diffusers", "comfyui"] = "diffusers"
    """Weight names. diffusers: a whole folder in its layout. comfyui: only the denoiser, in one file, with the original
    authors' names."""
    engine: Annotated[Literal["vllm-omni", "sglang", "lightx2v"] | None, arg(name="for")] = None
    """Export for this server: the files, flags and noise levels that it needs, and SERVE.md with the command (default: none).
    Refused where it would make other clips."""
    lora: bool = False
    """Export only the LoRA, as a file to load on top of the teacher. Needs a student trained with settings.lora."""
    link: bool = False
    """Create links to the text encoder and codec instead of copies."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the file. float32: the student as it was trained. The others: half the size, and rounded clips."""
    evaluation: Path | None = None
    """Folder written by `fewstep evaluate`. Adds its figures for this student to the card and to README.md."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.export(self)


@dataclass(frozen=True)
class CheckLora(Runs):
    """Apply a style LoRA of the teacher to teacher and student, and measure how much of its effect the student keeps."""

    lora: Positional[Annotated[str, arg(metavar="LORA")]]
    """LoRA file, a folder that contains one, or a hub name (owner/name, or owner/name/FILE.safetensors)."""
    student: str
    """Student: a fewstep folder (a run's student/)."""
    output: Path
    """Folder to write the figures and the picture to."""
    teacher: str = "world"
    """Teacher: a folder, a hub name, or `world`."""
    restyled: str | None = None
    """Measure this student, distilled from the teacher with the LoRA, instead of the student with the LoRA."""
    num_inference_steps: int | None = None
    """Sampling steps of the student (default: from its card)."""
    prompt: tuple[str, ...] = ()
    """Prompts to sample (default: 16 prompts of the built-in world)."""
    prompt_file: Path | None = None
    """Text file with one prompt per line, in place of --prompt."""
    seeds: int = 2
    """Clips per prompt."""
    features: str = "auto"
    """Features that measure the style, as for fewstep evaluate."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.check_lora(self)


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo, "prepare": Prepare, "train": Train, "pairs": Pairs, "distill": Distill, "sample": Sample, "stream": Stream,
    "serve": Serve, "evaluate": Evaluate, "check-model": CheckModel, "import": Import, "export": Export, "check-lora": CheckLora,
    "compare": Compare, "study": Study, "drift": Drift, "leaderboard": Leaderboard,
    "watch": Watch, "list": List, "explain": Explain, "doctor": Doctor,
}  # fmt: skip


def parse(words: Sequence[str]) -> Command:
    """The command of a command line. SystemExit after printing the help, or an error with the closest valid option."""
    options = (tyro.conf.FlagCreatePairsOff,)
    if words and words[0] in COMMANDS:  # the options of other commands are not needed
        name, *rest = words
        return tyro.cli(COMMANDS[name], prog=f"fewstep {name}", args=rest, config=options)
    arms: list[Any] = [Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items()]
    one_of: Any = Union[tuple(arms)]  # noqa: UP007
    about = "Distil a slow video diffusion model into a fast one, and measure the result."
    command: Command = tyro.cli(one_of, prog="fewstep", description=about, args=list(words), config=options)
    return command


def split_overrides(words: Sequence[str]) -> tuple[list[str], Overrides]:
    """Split a command line: `--a.b value` and `--a.b=value` become pairs, in order; the other words stay words."""
    rest: list[str] = []
    pairs: Overrides = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and "." in key):
            rest.append(word)
        elif equals:
            pairs.append((key, value))
        elif queue and not queue[0].startswith("--"):
            pairs.append((key, queue.pop(0)))
        else:
            raise UsageError(f"{word} needs a value, for example {word} true")
    return rest, pairs

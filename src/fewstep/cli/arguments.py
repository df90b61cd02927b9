"""Commands and their arguments. Nothing heavy is imported here: `fewstep --help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import tyro
from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Loads, Overrides, UsageError
from fewstep.cli.questions import Doctor, Explain, List, Watch

LayoutName = Literal["plain", "openvid", "webvid", "ucf101", "tars"]
"""As in `fewstep.data.layouts`, which would load torch to print a help."""


@dataclass(frozen=True)
class Demo(Command):
    """Distil the built-in world's teacher, measure the student, write a report: everything in minutes, on a CPU."""

    output: Path = Path("runs/demo")
    """Folder for the student, its clips and the report."""
    quiet: bool = False
    """No progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.demo(self)


@dataclass(frozen=True)
class Prepare(Loads):
    """Encode captioned videos to latent shards, once. Under torchrun each process takes a share."""

    videos: Positional[Annotated[Path, arg(metavar="VIDEOS")]]
    """The dataset: a folder, or its table (.csv, .jsonl), list (UCF-101) or archive (.tar)."""
    output: Path
    """Folder for the shards."""
    model: str = "world"
    """Whose codec encodes: a folder, a name on the hub, or `world`."""
    layout: LayoutName = "plain"
    """How the dataset lies on disk; plain is captions.jsonl, a table, or a folder of videos with text files beside them."""
    root: str = ""
    """Folder that the names of the videos start from (default: the dataset's own)."""
    num_frames: int | None = None
    """Frames per clip (default: as the model's card says)."""
    height: int | None = None
    width: int | None = None
    stride: int = 1
    """Take every so many frames."""
    clips_per_video: int = 1
    """At most this many per video; 0 = as many as fit."""
    shots: bool = False
    """Look for cuts: every clip comes from one shot, and every shot gives one clip at most."""
    min_seconds: float | None = None
    """Drop shorter videos."""
    max_seconds: float | None = None
    min_side: int | None = None
    """Drop videos with fewer pixels along the shorter side."""
    min_motion: float | None = None
    """Drop clips that move less: mean difference of neighbouring frames, 0 to 1."""
    max_motion: float | None = None
    min_brightness: float | None = None
    """Drop clips that are darker on average, 0 to 1."""
    max_brightness: float | None = None
    texts: bool = False
    """Encode the captions too, into OUTPUT/texts, for a recipe's data.text_cache."""
    batch: int | None = None
    """Clips encoded at once (default: 16, fewer of large ones, 1 with codecs that can do no more)."""
    threads: int = 4
    """Of each process, that decode videos while others are encoded."""
    autocast: Literal["off", "bf16"] = "off"
    """Arithmetic of the codec."""
    device: str = "cpu"
    """Where networks run; processes of one machine share its devices."""
    quiet: bool = False
    """No progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.prepare(self)


@dataclass(frozen=True)
class Pairs(Loads):
    """Store a teacher's ODE states, for methods that regress on them. Under torchrun each process takes a share."""

    prompts: Positional[Annotated[str, arg(metavar="PROMPTS")]]
    """A text file with one prompt per line, `world:N` for N prompts of the built-in world, or, for a model that makes clips
    of images, a .csv with caption, image and perhaps last_image."""
    output: Path
    """Folder for the shards."""
    model: str = "world"
    """The teacher: a folder, a name on the hub, or `world`."""
    steps: int | None = None
    """Steps of the teacher's solver (default: as its card says)."""
    guidance_scale: float | None = None
    """Default: as its card says."""
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)
    """Times whose states are kept, decreasing from 1 to 0: the student's grid."""
    num_frames: int | None = None
    seed: int = 0
    batch: int = 16
    """Clips made at once."""
    shard_size: int = 16
    """Pairs per file: what is lost when it is killed, at most."""
    storage: Literal["float16", "float32"] = "float32"
    """How the states are kept."""
    autocast: Literal["off", "bf16"] = "off"
    """Arithmetic of the teacher: give the settings.autocast that the student will be trained with."""
    device: str = "cpu"
    """Where networks run; processes of one machine share its devices."""
    quiet: bool = False
    """No progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.pairs(self)


@dataclass(frozen=True)
class Train(Command):
    """Train a model from scratch, as a recipe says. Its keys are options: --settings.steps 100."""

    takes_overrides: ClassVar[bool] = True

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE")]]
    """A name of `fewstep list recipes`, a YAML file, or the folder of an earlier run."""
    output: Path | None = None
    """Folder of the run (default: runs/<recipe>-<hash>). A run that was stopped goes on from its last checkpoint."""
    dry_run: bool = False
    """Say what would be trained, what memory it takes and when; load and write nothing."""
    memory: str | None = None
    """With --dry-run: of one device, such as 24GB; says whether the run fits, and what would make it fit."""
    flops: float | None = None
    """With --dry-run: floating-point operations per second that the device keeps up, such as 150e12; gives the time."""
    price: float | None = None
    """With --dry-run and --flops: of one hour of the device; gives the cost."""
    shard: int | None = None
    """With --dry-run and --memory: over how many devices sharding would spread the run (default: 8)."""
    allow_fallback: bool = False
    """Where something asked for cannot be had, run otherwise and write it into the student's card. Default: refuse."""
    allow_imports: bool = False
    """Import the classes outside fewstep that the recipe file names, which runs their code. Default: refuse. A recipe in the
    folder of a run or of weights never imports."""
    strict: bool = False
    """The default, for those who like to see it written: refuse what cannot be had."""
    quiet: bool = False
    """No progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.train(self, overrides)


@dataclass(frozen=True)
class Distill(Train):
    """Distil a model into a student of few steps, as a recipe says. Its keys are options: --method.critic-updates 3."""


@dataclass(frozen=True)
class Sample(Loads):
    """Make a clip per prompt with a student or teacher."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    """A folder that fewstep wrote (a run's student/) or in diffusers' layout, a name on the hub, or `world`."""
    prompt: tuple[str, ...] = ()
    """One or several prompts, a clip each: up to 8 side by side in one file, more in a file each (sample-01.mp4, ...)."""
    prompt_file: Path | None = None
    """A text file with one prompt per line."""
    image: tuple[Path, ...] = ()
    """Of a model that makes clips of images: the picture that all begin with, or one for each prompt."""
    last_image: tuple[Path, ...] = ()
    """Of a model that makes clips between two images: the picture that they end with."""
    num_inference_steps: int | None = None
    """Default: as the card says. A student refuses step counts it was not trained for."""
    guidance_scale: float | None = None
    """uncond + scale (cond - uncond); default: as the card says."""
    num_frames: int | None = None
    """Default: as the card says; another number needs --force."""
    seed: int = 0
    """Of the first clip; the next has the next seed."""
    output: Path = Path("sample.mp4")
    """.mp4 or .gif."""
    scale: int | None = None
    """Enlarge the pixels so many times (default: small clips to about 128 pixels, others not at all)."""
    device: str = "cpu"
    """Where networks run."""
    force: bool = False
    """Sample with a step count, number of frames or guidance the student was not trained for."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import clips

        return clips.sample(self)


@dataclass(frozen=True)
class Evaluate(Loads):
    """Measure a student beside its teacher on the same prompts and seeds, and write a report."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    """A folder that fewstep wrote."""
    output: Path
    """Folder for results.json and the page."""
    teacher: str = "world"
    """What it is compared with: a folder, a name on the hub, or `world`."""
    num_inference_steps: tuple[int, ...] = ()
    """Step counts to measure (default: all that the student was trained for)."""
    suite: Literal["world", "avdm2"] = "world"
    """world: prompts of the built-in world, or your own. avdm2: FVD to real clips and CLIPScore, as in that paper; needs
    --real, --features and --clip."""
    real: Path | None = None
    """Captioned videos (a folder, captions.jsonl or a CSV table); their captions are the prompts."""
    stride: int | None = None
    """Of the real clips: take every so many frames of the file (default: 4)."""
    layout: LayoutName | None = None
    """How the real clips lie on disk, as for fewstep prepare (default: plain)."""
    root: str | None = None
    """Folder that the names of the real clips start from (default: the dataset's own)."""
    features: str = "auto"
    """Of the distance: a TorchScript file (I3D), which runs code, so give only one that you trust; a folder of a video
    encoder (VideoMAE) or with features of fewstep's own; `pooled`; or auto: the built-in world's where they fit."""
    clip: Path | None = None
    """Folder of CLIPModel and CLIPProcessor, for CLIPScore."""
    prompts: int | None = None
    """Number of prompts (default: 64; avdm2: 100)."""
    prompt_file: Path | None = None
    """Your own prompts instead, one per line."""
    seeds: int | None = None
    """Clips per prompt; diversity needs two or more (default: 2; avdm2: 1)."""
    seed: int = 2024
    """Draws the prompts, their seeds and the real clips."""
    num_frames: int | None = None
    batch: int | None = None
    """Clips made at once (default: 32; avdm2: 4)."""
    autocast: Literal["off", "bf16"] = "off"
    """Arithmetic of the networks, for every row."""
    device: str = "cpu"
    """Where networks run."""
    quiet: bool = False
    """No progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.evaluate(self)


@dataclass(frozen=True)
class CheckModel(Loads):
    """Check that a model keeps the conventions everything else counts on: most failures are wrong conventions."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """A folder in diffusers' layout or its name on the hub, a folder that fewstep wrote, or `world`."""
    only: tuple[str, ...] = ()
    """Names of checks to run (default: all)."""
    num_frames: int | None = None
    """Size to check at (default: the card's where that is small, else a few latent frames of 8 x 16)."""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 3
    """Steps of the clip that is compared with the pipeline's."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the denoiser. float64 tells rounding from mistakes, and takes twice the memory."""
    device: str = "cpu"
    """Where networks run."""
    prompt: tuple[str, ...] = ()
    """Two are used; the first one captions --video."""
    video: Path | None = None
    """A video file as the known clip of the checks that need trained weights (default: a rendered clip)."""
    seed: int = 0
    json: bool = False
    """Print the findings as a list of objects."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.check_model(self)


@dataclass(frozen=True)
class Export(Loads):
    """Write a student for other tools. In diffusers' layout, plain diffusers makes the same clips with it."""

    student: Positional[Annotated[str, arg(metavar="STUDENT")]]
    """A run's student/, or another folder with a network of diffusers in it."""
    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """Where to; it must not exist, or be empty."""
    names: Literal["diffusers", "comfyui"] = "diffusers"
    """comfyui: the denoiser alone, one file by the names that its authors gave the weights."""
    lora: bool = False
    """Of a student trained with settings.lora: its adapters alone, one file to load over the teacher."""
    link: bool = False
    """Link text encoder and codec to where they are, in place of a copy."""
    evaluation: Path | None = None
    """A folder of `fewstep evaluate`: its figures of this student go onto the card and the page."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.export(self)


@dataclass(frozen=True)
class CheckLora(Loads):
    """Try a style LoRA of the teacher on teacher and student, and say how much of it survives."""

    lora: Positional[Annotated[str, arg(metavar="LORA")]]
    """A LoRA file, or a folder with one."""
    student: str
    """A folder that fewstep wrote (a run's student/)."""
    output: Path
    """Folder for the figures and the picture."""
    teacher: str = "world"
    """A folder, a name on the hub, or `world`."""
    restyled: str | None = None
    """A student distilled from the teacher with the LoRA, to measure instead of the student with the LoRA."""
    num_inference_steps: int | None = None
    """Of the student; default: its own."""
    prompt: tuple[str, ...] = ()
    """Default: 16 prompts of the built-in world."""
    prompt_file: Path | None = None
    """A text file with one prompt per line."""
    seeds: int = 2
    """Clips per prompt."""
    features: str = "auto"
    """What sees the style, as for fewstep evaluate."""
    device: str = "cpu"
    """Where networks run."""
    quiet: bool = False
    """No progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import commands

        return commands.check_lora(self)


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo, "prepare": Prepare, "train": Train, "pairs": Pairs, "distill": Distill, "sample": Sample,
    "evaluate": Evaluate, "check-model": CheckModel, "export": Export, "check-lora": CheckLora,
    "watch": Watch, "list": List, "explain": Explain, "doctor": Doctor,
}  # fmt: skip


def parse(words: Sequence[str]) -> Command:
    """The command of a command line; SystemExit after printing the help, or an error with the nearest right option."""
    arms: list[Any] = [Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items()]
    one_of: Any = Union[tuple(arms)]  # noqa: UP007
    about = "Takes a slow video diffusion model and hands back a fast one, with proof."
    options = (tyro.conf.FlagCreatePairsOff,)
    command: Command = tyro.cli(one_of, prog="fewstep", description=about, args=list(words), config=options)
    return command


def split_overrides(words: Sequence[str]) -> tuple[list[str], Overrides]:
    """Take `--a.b value` and `--a.b=value` off a command line: the other words, and the pairs in order."""
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

"""Faults in public few-step weights: wrong bases, unknown names, torn files, half of a pair, pickles that run code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faults.case import Case
from faults.weights import BYTES

SIZE = ("--num-frames", "5", "--height", "32", "--width", "48")
LIGHTX2V = "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
LAYER = "diffusion_model.blocks.0.self_attn.q"
PAIR = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1"


class Harmful:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


def base(here: Path, family: str = "wan") -> Path:
    """A tiny model in diffusers' layout, as `base`."""
    from tiny_models import save_tiny

    return save_tiny(family, here / "base")


def lora(layer: str = LAYER, out: int = 24, family: str = "wan", name: str = LIGHTX2V) -> Callable[[Path], None]:
    """A LoRA over one layer, and its base."""

    def prepare(here: Path) -> None:
        base(here, family)
        (here / name).parent.mkdir(exist_ok=True)
        matrices = {"lora_down.weight": torch.ones(2, 24), "lora_up.weight": torch.ones(out, 2)}
        save_file({f"{layer}.{end}": value for end, value in matrices.items()}, here / name)

    return prepare


def stored(name: str, content: bytes) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        base(here)
        (here / name).write_bytes(content)

    return prepare


def pickled(content: object) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        base(here)
        torch.save(content, here / "rcm_wan2.1.pt")

    return prepare


def whole(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The base's own weights as another tool names them, changed."""

    def prepare(here: Path) -> None:
        tensors = load_file(base(here) / "transformer/diffusion_pytorch_model.safetensors")
        change(tensors)
        torch.save({f"net.{name}": value for name, value in tensors.items()}, here / "rcm_wan2.1.pt")

    return prepare


def third(here: Path) -> None:
    """Three files for two experts."""
    for name in ("high", "low", "other"):
        lora(family="wan_experts", name=f"{PAIR}/{name}.safetensors")(here)


def imported(name: str, source: str, prepare: Callable[[Path], object], *says: str, more: tuple[str, ...] = ()) -> Case:
    words = ("import", source, "--base", "base", "--output", "student", *SIZE, *more)
    return Case(f"import: {name}", words, says, prepare=prepare)


FIRST = "blocks.0.attn1.to_q.weight"
PICKLE = "rcm_wan2.1.pt"
CASES = (
    imported("nothing there", "lcm-lora-sdv1-5", base, "lcm-lora-sdv1-5", "download"),
    imported(
        "an unknown name",
        "mine.safetensors",
        lora(name="mine.safetensors"),
        "mine.safetensors",
        "--as",
        "list students",
    ),
    imported("no such system", LIGHTX2V, lora(), "wan-lightning", "wan22-lightning", more=("--as", "wan-lightning")),
    imported(
        "one that cannot be imported",
        LIGHTX2V,
        lora(),
        "turbodiffusion",
        "fewstep lacks",
        more=("--as", "turbodiffusion"),
    ),
    imported(
        "another base", LIGHTX2V, lora(family="wan_experts"), "base is a WanExperts", "belongs to a Wan", "--base"
    ),
    imported("no base there", LIGHTX2V, lambda here: lora()(here) or (here / "base").rename(here / "away"), "base"),
    imported(
        "an unknown layer", LIGHTX2V, lora("diffusion_model.blocks.9.self_attn.q"), LIGHTX2V, "blocks.9", "lora_unet_"
    ),
    imported("an unknown ending", LIGHTX2V, lora(f"{LAYER}.hada"), LIGHTX2V, "hada", "diff_b"),
    imported("other shapes", LIGHTX2V, lora(out=12), LIGHTX2V, "(12, 2)", "(24, 24)"),
    imported(
        "a folder that is full",
        LIGHTX2V,
        lambda here: lora()(here) or (here / "student/x").mkdir(parents=True),
        "student",
    ),
    imported("steps it has not", LIGHTX2V, lora(), "4 steps", "8", more=("--steps", "8")),
    imported("no frames", LIGHTX2V, lora(), "num_frames", "0", more=("--num-frames", "0")),
    imported(
        "one of two experts",
        f"{PAIR}/high.safetensors",
        lora(family="wan_experts", name=f"{PAIR}/high.safetensors"),
        "high and low",
    ),
    imported("two of three experts", PAIR, third, PAIR, "3 .safetensors"),
    imported(
        "images for text",
        "wan2.1_i2v_lightx2v.safetensors",
        lora(name="wan2.1_i2v_lightx2v.safetensors"),
        "i2v",
        "--base",
    ),
    *(
        imported(f"a LoRA that is {name}", LIGHTX2V, stored(LIGHTX2V, change(bytes(1000))), LIGHTX2V)
        for name, change in BYTES.items()
    ),
    *(
        imported(f"weights that are {name}", PICKLE, stored(PICKLE, change(bytes(1000))), PICKLE)
        for name, change in BYTES.items()
    ),
    imported("a pickle that runs code", PICKLE, pickled({"net.x": Harmful()}), PICKLE, "code"),
    imported("a pickle of numbers", PICKLE, pickled({"step": 3}), PICKLE, "no tensors"),
    imported("a pickle of a list", PICKLE, pickled([torch.ones(1)]), PICKLE, "no tensors"),
    imported("a tensor less", PICKLE, whole(lambda t: t.pop(FIRST)), FIRST, "1 tensors are missing"),
    imported("a tensor more", PICKLE, whole(lambda t: t.update(more=torch.ones(1))), "net.more"),
    imported(
        "a tensor of another shape", PICKLE, whole(lambda t: t.update({FIRST: torch.ones(3, 3)})), FIRST, "(3, 3)"
    ),
)

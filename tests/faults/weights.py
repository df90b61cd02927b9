"""Faults in weights: files of models, adapters and LoRAs that are cut short, empty, exchanged or of another kind."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faults.case import Case
from faults.given import damaged, teacher

SAMPLE = ("sample", "teacher", "--prompt", "a red ball", "--output", "out.gif")
LORA = ("check-lora", "lora.safetensors", "--student", "teacher", "--teacher", "teacher", "--output", "out", "--quiet")
PARTS = ("denoiser", "text", "codec")


def header(tree: object, length: int | None = None) -> bytes:
    """A safetensors file that holds nothing but this header."""
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "one byte": lambda _: b"x",
    "random bytes": lambda c: bytes(i * 37 % 256 for i in range(len(c))),
    "zeros": lambda c: bytes(len(c)),
    "cut in the header": lambda c: c[:100],
    "cut in half": lambda c: c[: len(c) // 2],
    "without the last byte": lambda c: c[:-1],
    "with a byte more": lambda c: c + b"x",
    "a pickle": lambda _: pickle.dumps({"w": 1}),
    "a zip": lambda _: b"PK\x03\x04" + bytes(100),
    "a page of HTML": lambda _: b"<!DOCTYPE html><html>404</html>",
    "a pointer of git LFS": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a header of exabytes": lambda _: header({}, 1 << 60),
    "an empty header": lambda _: header({}),
    "a header that is a list": lambda _: header([]),
    "offsets beyond the file": lambda _: header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "negative shapes": lambda _: header({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 0]}}),
    "an unknown dtype": lambda _: header({"w": {"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}}),
}


def rewritten(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A part whose tensors were changed and saved anew, without a stamp on the card."""

    def prepare(here: Path) -> None:
        path = teacher(here) / f"{part}.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        tree = json.loads((here / "teacher/card.json").read_text())
        (here / "teacher/card.json").write_text(json.dumps(tree | {"files": {}}))

    return prepare


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in sorted(tensors.items()) if value.is_floating_point() and value.ndim > 1)


def flip(content: bytes, share: float) -> bytes:
    at = int(share * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def lora(content: bytes) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        teacher(here)
        (here / "lora.safetensors").write_bytes(content)

    return prepare


def adapters(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        teacher(here)
        save_file(tensors, here / "lora.safetensors")

    return prepare


def folder(config: str, weights: bytes) -> Callable[[Path], None]:
    """An adapter's folder, as peft writes it, that is no adapter's folder."""

    def prepare(here: Path) -> None:
        teacher(here)
        (here / "lora.safetensors").mkdir()
        (here / "lora.safetensors/adapter_config.json").write_text(config)
        (here / "lora.safetensors/adapter_model.safetensors").write_bytes(weights)

    return prepare


def part_of(part: str, name: str, prepare: Callable[[Path], object], *says: str) -> Case:
    return Case(f"{part}: {name}", SAMPLE, (f"{part}.safetensors", *says), prepare=prepare)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object], *says: str) -> Case:
    return part_of("denoiser", name, rewritten("denoiser", change), *says)


def of_lora(name: str, prepare: Callable[[Path], object], says: str = "lora.safetensors") -> Case:
    return Case(f"a LoRA: {name}", LORA, (says,), prepare=prepare)


def without(part: str) -> Callable[[Path], object]:
    return lambda here: (teacher(here) / f"{part}.safetensors").unlink()


def exchanged(here: Path) -> None:
    (teacher(here) / "codec.safetensors").replace(here / "teacher/denoiser.safetensors")


def folder_as_file(here: Path) -> None:
    (teacher(here) / "denoiser.safetensors").unlink()
    (here / "teacher/denoiser.safetensors").mkdir()


def empty_folder(here: Path) -> None:
    teacher(here)
    (here / "lora.safetensors").mkdir()


def flipped(part: str, share: float) -> Case:
    prepare = damaged(f"teacher/{part}.safetensors", lambda content: flip(content, share))
    return part_of(part, f"one bit at {share}", prepare, "copy")


def as_kind(dtype: torch.dtype) -> Case:
    return tensors(f"{dtype}", lambda t: t.update({first(t): t[first(t)].to(dtype)}))


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("check-model", "teacher"),
    ("export", "teacher", "o"),
    ("evaluate", "teacher", "--output", "o"),
    ("pairs", "world:1", "--model", "teacher", "--output", "o"),
    ("check-lora", "l.safetensors", "--student", "teacher", "--output", "o"),
)
TORN = damaged("teacher/denoiser.safetensors", BYTES["cut in half"])
CASES = (
    *(
        part_of(part, name, damaged(f"teacher/{part}.safetensors", change))
        for part in PARTS
        for name, change in BYTES.items()
        if part == "denoiser" or name in ("nothing", "cut in half", "random bytes")
    ),
    *(flipped(part, share) for part in PARTS for share in (0.5, 0.75, 1.0)),
    *(part_of(part, "not there", without(part)) for part in PARTS),
    *(part_of(part, "lacks a tensor", rewritten(part, lambda t: t.pop(first(t)))) for part in PARTS),
    part_of("denoiser", "the codec's file", exchanged),
    part_of("denoiser", "a folder", folder_as_file),
    tensors("a tensor more", lambda t: t.update(more=torch.ones(2)), "more"),
    tensors("a tensor of another shape", lambda t: t.update({first(t): torch.ones(3)})),
    tensors("a tensor without values", lambda t: t.update({first(t): torch.ones(0)})),
    *(as_kind(dtype) for dtype in (torch.int8, torch.int64, torch.bool, torch.uint8)),
    *(Case(f"denoiser cut, {words[0]}", words, ("denoiser.safetensors",), prepare=TORN) for words in COMMANDS),
    *(of_lora(name, lora(change(bytes(1000)))) for name, change in BYTES.items()),
    of_lora("not there", teacher),
    of_lora("another model's", adapters(**{"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)})),
    of_lora("one half", adapters(**{"blocks.0.attention.qkv.lora_A.weight": torch.ones(2, 24)})),
    of_lora("an empty folder", empty_folder),
    of_lora("torn settings", folder('{"r": 2', b""), "adapter_config.json"),
    of_lora("empty settings", folder("", b"")),
    of_lora("no weights", folder('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}', b""), "adapter_model.safetensors"),
)

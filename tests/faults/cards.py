"""Faults in the card of a model's folder: torn files, absurd sizes, names that lead elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faults.case import Case
from faults.given import card, damaged, run, teacher

SAMPLE = ("sample", "teacher", "--prompt", "a red ball", "--output", "out.gif")
ABSENT = object()


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Change the card at a place: keys, then the value (`ABSENT` deletes)."""
    *keys, last, value = path

    def change(tree: dict[str, Any]) -> None:
        node: Any = tree
        for key in keys:
            node = node[key]
        if value is ABSENT:
            del node[last]
        else:
            node[last] = value

    return change


def changed(*path: Any, says: tuple[str, ...] = (), words: tuple[str, ...] = SAMPLE) -> Case:
    *keys, value = path
    shown = "absent" if value is ABSENT else repr(value)[:50]
    return Case(f"{'.'.join(map(str, keys))} {shown}", words, says or (str(keys[-1]),), prepare=card(put(*path)))


def whole(name: str, content: bytes, *says: str) -> Case:
    return Case(
        f"card of {name}", SAMPLE, ("card.json", *says), prepare=damaged("teacher/card.json", lambda _: content)
    )


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


NUMBERS = (
    *(
        (key, value)
        for key in ("num_frames", "height", "width")
        for value in (0, -4, 98304, 10**12, 1.5, "4", None, True, [4])
    ),
    *(("fps", value) for value in (0, -8, 10**9, 8.5, "8", None)),
)
NETWORK: Mapping[tuple[str, str], tuple[Any, ...]] = {
    ("denoiser", "width"): (0, -24, 98304, 10**9, 24.0, "24", None),
    ("denoiser", "depth"): (0, -1, 10**9, 1.0, None),
    ("denoiser", "heads"): (0, -2, 10**9),
    ("denoiser", "patch"): (0, -2, 10**9),
    ("denoiser", "channels"): (0, -4, 10**9),
    ("denoiser", "text_width"): (0, -16, 10**9),
    ("denoiser", "mlp_ratio"): (0, -4.0, float("nan"), float("inf")),
    ("text", "width"): (0, -16, 10**9),
    ("text", "depth"): (0, -1, 10**9),
    ("text", "heads"): (0, 10**9),
    ("text", "buckets"): (0, -64, 10**12),
    ("text", "length"): (0, -4, 10**9),
    ("codec", "width"): (0, -8, 10**9),
    ("codec", "depth"): (0, -1, 10**9),
    ("codec", "latent_channels"): (0, -4, 10**9),
}
OTHER_SIZE: Mapping[tuple[str, str], int] = {
    ("denoiser", "width"): 48, ("denoiser", "depth"): 2, ("text", "width"): 32, ("text", "buckets"): 65,
    ("codec", "width"): 16, ("codec", "latent_channels"): 8, ("denoiser", "text_width"): 32,
}  # fmt: skip

CASES = (
    whole("nothing", b""),
    whole("null", b"null"),
    whole("a list", b"[]"),
    whole("a number", b"3"),
    whole("a text", b'"card"'),
    whole("{}", b"{}", "parts"),
    whole("random bytes", bytes(range(256))),
    whole("latin-1", '{"name": "caf\xe9"}'.encode("latin-1")),
    whole("UTF-16", '{"name": "x"}'.encode("utf-16")),
    whole("a byte order mark", b'\xef\xbb\xbf{"name": "x"}'),
    whole("100,000 lists", b"[" * 100_000),
    whole("100,000 mappings", b'{"a":' * 100_000),
    whole("a half", b'{"name": "x", "parts": {"denoi'),
    whole("two objects", b'{"name": "x"}{"name": "y"}'),
    whole("single quotes", b"{'name': 'x'}"),
    whole("a comment", b'// mine\n{"name": "x"}'),
    Case("card cut short", SAMPLE, ("card.json", "copy"), prepare=damaged("teacher/card.json", cut(0.5))),
    Case("no card", SAMPLE, ("teacher", "card.json"), prepare=lambda here: (teacher(here) / "card.json").unlink()),
    Case("an empty folder", SAMPLE, ("teacher", "card.json"), prepare=lambda here: (here / "teacher").mkdir()),
    Case("a file in place of the folder", SAMPLE, ("teacher",), {"teacher": "x"}),
    Case("nothing there", SAMPLE, ("teacher",)),
    Case("a name on the hub that is none", ("sample", "own/er/name", "--prompt", "a"), ("own/er/name",)),
    Case("the run's folder, not the student's", ("sample", "run", "--prompt", "a"), ("run", "student/"), prepare=run),
    *(changed(key, value, says=(key,)) for key, value in NUMBERS),
    *(
        changed("parts", part, key, value, says=(f"parts.{part}",))
        for (part, key), values in NETWORK.items()
        for value in values
    ),
    *(changed("parts", part, key, value, says=(part,)) for (part, key), value in OTHER_SIZE.items()),
    changed("parts", "denoiser", "heads", 5, says=("VideoDiT", "24 / 5")),
    changed("parts", "text", "heads", 3, says=("TextEncoder", "3 heads")),
    changed("parts", {}, says=("parts",)),
    changed("parts", None, says=("parts",)),
    changed("parts", [], says=("parts",)),
    changed("parts", ABSENT, says=("parts",)),
    changed("parts", {"denoiser": None}, says=("parts.denoiser",)),
    changed("parts", {"denoiser": {}}, says=("parts.denoiser",)),
    changed("parts", {"denoiser": []}, says=("parts.denoiser",)),
    changed("parts", {"denoiser": "VideoDiT"}, says=("parts.denoiser",)),
    changed("parts", "denoiser", "type", ABSENT, says=("parts.denoiser.type",)),
    changed("parts", "denoiser", "type", "VideoDIT", says=("parts.denoiser.type", "VideoDiT")),
    changed("parts", "denoiser", "type", None, says=("parts.denoiser.type",)),
    changed("parts", "denoiser", "type", 3, says=("parts.denoiser.type",)),
    changed("parts", "denoiser", "type", ["VideoDiT"], says=("parts.denoiser.type",)),
    changed("parts", "denoiser", "type", "TextEncoder", says=("parts.denoiser",)),
    changed("parts", "denoiser", "type", "Dense", says=("parts.denoiser.type",)),
    changed("parts", "denoiser", "extra", 1, says=("parts.denoiser.extra",)),
    changed("parts", "denoiser", "pattern", {"type": "Nothing"}, says=("pattern",)),
    changed("parts", "denoiser", "pattern", {"type": "BlockCausal", "chunk": 0}, says=("chunk",)),
    changed("parts", "denoiser", "pattern", {"type": "BlockCausal", "chunk": -3}, says=("chunk",)),
    changed("parts", "denoiser", "pattern", None, says=("pattern",)),
    changed("parts", "text", "attribute_sizes", [0], says=("attribute_sizes",)),
    changed("parts", "text", "attribute_sizes", [-5], says=("attribute_sizes",)),
    changed("parts", "text", "attribute_sizes", 5, says=("attribute_sizes",)),
    changed("parts", "vae", {"type": "FrameAutoencoder"}, says=("vae", "codec")),
    changed("parts", "transformer", {"type": "VideoDiT"}, says=("transformer", "denoiser")),
    changed("sources", {"text": "somewhere"}, says=("TextEncoder", "sources")),
    changed("sources", {"denoiser": "somewhere"}, says=("VideoDiT", "sources")),
    changed("sources", {"vae": "somewhere"}, says=("vae",)),
    changed("sources", {"text": 3}, says=("sources.text",)),
    changed("sources", ["text"], says=("sources",)),
    changed("files", {"text": 3}, says=("files.text",)),
    changed("files", {"nothing": "3 abc"}, says=("nothing",)),
    changed("fingerprints", [], says=("fingerprints",)),
    changed("name", None),
    changed("name", 3),
    changed("name", ABSENT),
    changed("role", "boss"),
    changed("role", ""),
    changed("role", None),
    changed("kind", "noise"),
    changed("kind", 1),
    changed("path", {"type": "Straight"}, says=("path.type",)),
    changed("path", {"type": "VP", "high": float("nan")}, says=("path.high",)),
    changed("path", {"type": "Betas", "num_train_timesteps": 10**12}, says=("path.num_train_timesteps",)),
    changed("path", {"type": "EDM", "sigma_min": 0}, says=("path.sigma_min",)),
    changed("path", None),
    changed("path", {}, says=("path.type",)),
    changed("contract", "steps", 0, says=("contract.steps",)),
    changed("contract", "steps", -1, says=("contract.steps",)),
    changed("contract", "steps", 10**12, says=("contract.steps",)),
    changed("contract", "steps", 1.5, says=("contract.steps",)),
    changed("contract", "grid", {"type": "Shifted", "shift": 0}, says=("contract.grid.shift",)),
    changed("contract", "grid", {"type": "Shifted", "shift": float("inf")}, says=("contract.grid.shift",)),
    changed("contract", "grid", {"type": "Shifted", "terminal": 2}, says=("contract.grid.terminal",)),
    changed("contract", "grid", {"type": "LinearQuadratic", "threshold": -1}, says=("contract.grid.threshold",)),
    changed("contract", "grid", {"type": "Even"}, says=("contract.grid",)),
    changed("contract", "grid", 3.0, says=("contract.grid",)),
    changed("contract", "sampler", {"type": "RK4"}, says=("contract.sampler",)),
    changed("contract", "sampler", "euler", says=("contract.sampler",)),
    changed("contract", "sampler", {"type": "Staggered", "groups": 0}, says=("contract.sampler.groups",)),
    changed("contract", "sampler", {"type": "Staggered", "delay": -1}, says=("contract.sampler.delay",)),
    changed("contract", "sampler", {"type": "Staggered", "sampler": {"type": "Staggered"}}, says=("contract.sampler",)),
    changed("contract", "stream", {"chunks": []}, says=("contract.stream",)),
    changed("contract", "stream", {"chunks": [0]}, says=("contract.stream.chunks",)),
    changed("contract", "stream", {"window": -1}, says=("contract.stream.window",)),
    changed("contract", "stream", {"sink": 1}, says=("contract.stream",)),
    changed("contract", "stream", {"window": 1, "chunks": [2]}, says=("contract.stream",)),
    changed("contract", "stream", {"commit": "dirty"}, says=("contract.stream.commit",)),
    changed("contract", "stream", {"commit": "noised"}, says=("contract.stream",)),
    changed("contract", "shift", 3.0, says=("contract.shift",)),
    changed("contract", {"solver": "rk4"}, says=("rk4",)),
    changed("contract", {"shift": 0}, says=("shift",)),
    changed("contract", {"grids": {"one": [1, 0]}}, says=("one",)),
    changed("contract", {"timesteps": {"spacing": "random"}}, says=("spacing",)),
    changed("contract", "guidance", {"scale": float("nan")}, says=("contract.guidance.scale",)),
    changed("contract", "guidance", {"low": 1, "high": 0}, says=("contract.guidance",)),
    changed("contract", "grid", {"type": "Exact", "grids": [[0.5, 0]]}, says=("contract.grid",)),
    changed("contract", "grid", {"type": "Exact", "grids": [[1]]}, says=("contract.grid",)),
    changed("contract", "grid", {"type": "Exact", "grids": []}, says=("contract.grid",)),
    changed("contract", "grid", {"type": "Exact", "grids": [[1, 0.5, 0], [1, 0.4, 0]]}, says=("contract.grid",)),
    changed("contract", "grid", {"type": "Exact", "grids": [[1, float("nan")]]}, says=("contract.grid.grids",)),
    changed("contract", "grid", {"type": "Exact", "grids": ["10"]}, says=("contract.grid.grids",)),
    changed("contract", "grid", {"type": "Timesteps", "spacing": "random"}, says=("contract.grid.spacing",)),
    changed("contract", "grid", {"type": "Timesteps", "num_train_timesteps": 0}, says=("contract.grid.num_train",)),
    changed("contract", None),
    changed("negative_prompt", 3),
    changed("provenance", {"licence": 3}, says=("provenance.licence",)),
    changed("scores", {"motion": "good"}, says=("scores.motion",)),
    changed("scores", {"motion": float("inf")}, says=("scores.motion",)),
    changed("surprise", 1),
)


def _recipe_of(here: Path) -> None:
    """A recipe that starts from a card with a fault."""
    card(put("num_frames", -4))(here)
    (here / "r.yaml").write_text(json.dumps({
        "model": {"type": "Pretrained", "source": "teacher"}, "method": {"type": "FlowMatching"},
        "data": {"type": "WorldClips"}, "settings": {"steps": 1},
    }))  # fmt: skip


CASES += tuple(
    Case(f"negative frames of a card, {words[0]}", words, ("num_frames", "-4"), prepare=_recipe_of)
    for words in (
        ("distill", "r.yaml", "--dry-run"), ("explain", "r.yaml"), ("pairs", "world:1", "--model", "teacher", "--output", "o"),
        ("evaluate", "teacher", "--output", "o"), ("check-model", "teacher"), ("export", "teacher", "o"),
        ("prepare", ".", "--output", "o", "--model", "teacher"),
        ("check-lora", "l.safetensors", "--student", "teacher", "--output", "o"),
    )
)  # fmt: skip

"""README.md of an exported folder: what the model is, how to sample it, its origin and licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from fewstep.diffusion.times import in_steps
from fewstep.models.card import Card

_RESTRICTED = re.compile(
    r"\bnc\b|non[-_ ]?commercial|\bnot? (for )?commercial|research[-_ ]((use|purposes?)[-_ ])?only|personal use only"
    r"|academic (use|purposes?|research)",
    re.IGNORECASE,
)
_CAPITALS = re.compile(r"[A-Za-z0-9.-]+")


def restrictions(provenance: Mapping[str, str]) -> dict[str, str]:
    """Entries anywhere in the chain that forbid commercial use, by their name. Words are all that is looked at."""
    return {key: value for key, value in provenance.items() if _RESTRICTED.search(value)}


def readme(card: Card, title: str, usage: Mapping[int, str], recipe: str = "") -> str:
    """Markdown; `usage` is Python by step count, or nothing where it is used with other tools; `recipe` is YAML."""
    parts = [_head(card, title), *_licence(card), *_sampling(card, usage), *_origin(card), *_scores(card)]
    if recipe:
        parts += ["## Recipe", _block(recipe.strip(), "yaml")]
    return "\n\n".join(parts) + "\n"


def _head(card: Card, title: str) -> str:
    """The hub's front matter, the title, and what this is."""
    licence = card.provenance.get("licence", "")
    plain = bool(_CAPITALS.fullmatch(licence)) and not restrictions(card.provenance)
    front = {
        "library_name": "diffusers",
        "pipeline_tag": f"{'image' if 'image' in card.parts else 'text'}-to-{'video' if card.num_frames > 1 else 'image'}",
        "license": licence.lower() if plain else "other",
        "license_name": "" if plain else licence,
        "base_model": _base(card),
        "tags": ["fewstep", *(["distillation"] if card.role == "student" else [])],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    steps = " or ".join(map(str, card.contract.counts))
    what = f"{card.name}, distilled to" if card.role == "student" else f"{card.name} in"
    unit = "step" if card.contract.counts == (1,) else "steps"
    text = f"{what} {steps} {unit}: {card.num_frames} frames of {card.height} x {card.width}, {card.fps} per second."
    return "\n".join(["---", *lines, "---", "", f"# {title}", "", text])


def _base(card: Card) -> str:
    """What the hub may link to: the first source that is no folder."""
    sources = [value for key, value in card.provenance.items() if key.rpartition(".")[2] == "source"]
    return next((source for source in sources if not source.startswith("/")), "")


def _licence(card: Card) -> list[str]:
    """Before anything else, because a licence is inherited: a warning if there must be one, and the whole chain."""
    found = restrictions(card.provenance)
    warning = ["**Not for commercial use.** What this was made from forbids it:", _bullets(found)] if found else []
    own = card.provenance.get("licence", "unknown; ask those who made what it was made from")
    chain = {key.removesuffix(".licence"): value for key, value in card.provenance.items() if key.endswith(".licence")}
    return [*warning, f"Licence: {own}."] + (["It was made from:", _bullets(chain)] if chain else [])


def _bullets(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def _sampling(card: Card, usage: Mapping[int, str]) -> list[str]:
    contract, steps = card.contract, card.contract.steps
    sections = ["## Sampling"]
    if steps in usage:
        call = "pipe(image, prompt, **sampling)" if "image" in card.parts else "pipe(prompt, **sampling)"
        made = f"`{call}` makes the clip that was trained for, with plain diffusers."
        sections += [_block(usage[steps]), made]
    random = "" if contract.sampler.deterministic else " Between steps it draws fresh noise."
    scale = f"{contract.guidance.scale:g}" if contract.guidance.active else "none (1)"
    sections.append(f"Sampler {type(contract.sampler).__name__}, guidance {scale}.{random}")
    for count in (steps, *(n for n in contract.counts if n != steps)):
        times = ", ".join(f"{t:.6g}" for t in contract.times(count))
        sections.append(f"In {in_steps(count)} the noise levels are {times}.")
        if count != steps and count in usage:
            sections.append(_block(usage[count]))
    return sections


def _block(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


def _origin(card: Card) -> list[str]:
    if not card.provenance:
        return []
    rows = [f"| {key} | {_cell(value)} |" for key, value in card.provenance.items()]
    return ["## Origin", "\n".join(["| what | |", "| --- | --- |", *rows])]


def _scores(card: Card) -> list[str]:
    if not card.scores:
        return ["## Scores", "Not measured."]
    rows = [f"| {_cell(key)} | {value:.4g} |" for key, value in card.scores.items()]
    table = "\n".join(["| figure | |", "| --- | --- |", *rows])
    probed = any("n = " not in key for key in card.scores)
    return ["## Scores", table] + (
        ["Figures without n are those of the recipe's `probe`, during training."] if probed else []
    )


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())

"""Export a model as files for other tools, which then generate the same clips without fewstep.

In diffusers' layout `model_index.json` carries the card under `_fewstep`: diffusers ignores private keys, and `read_card`
prefers it to what the family says of such a layout, so that a student comes back as the student it is.
"""

from __future__ import annotations

import json
import shutil
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.attention import Dense
from fewstep.core import dump
from fewstep.core.atomic import new_folder, write_text
from fewstep.models.adapters.export.engines import ENGINES, Engine
from fewstep.models.adapters.export.engines.page import PAGE, page
from fewstep.models.adapters.export.engines.plan import Plan
from fewstep.models.adapters.export.engines.student import Student
from fewstep.models.adapters.export.experts import as_wan22, two_experts
from fewstep.models.adapters.export.narrow import Dtype, narrowed, own_types
from fewstep.models.adapters.export.readme import readme
from fewstep.models.adapters.export.usage import OWN_TIMES, Usage, original_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.lora_file import Names, file_names, names_of, require_adapter, write_lora
from fewstep.models.adapters.lora_reading import read_lora
from fewstep.models.card import Card, parse_card
from fewstep.models.fingerprint import describe, print_of

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel

STAMP = "_fewstep"
"""Key of the card in `model_index.json`."""
RECIPE = "recipe.yaml"
_NOT_WRITTEN = ("motion_adapter",)
"""Parts of layouts whose weights the denoiser holds as well: a teacher's copy would contradict the student."""


def export(
    model: VideoModel,
    folder: Path,
    *,
    names: Names,
    link: bool,
    dtype: Dtype,
    recipe: str,
    engine: Engine | None = None,
) -> Path:
    """Write `model` in diffusers' layout, or its denoiser as one file by the names that its authors gave the weights; or what
    another `engine` needs to serve it.

    What the model did not change is copied from its source, or linked; `recipe` is the text of what made it, if known.
    ValueError where plain diffusers, or the engine, could not make the same clips; FileExistsError for a folder that is not
    empty.
    """
    model = as_wan22(model)
    if engine is not None:
        return _export_for(engine, model, folder, link=link, dtype=dtype, recipe=recipe)
    if names == "comfyui":
        if link:
            raise ValueError("one file of weights has nothing to link; leave link out, or write diffusers' layout")
        return _export_weights(model, folder, dtype, recipe, {})
    return _export_layout(model, folder, link, dtype, recipe, None)


def _export_for(engine: Engine, model: VideoModel, folder: Path, *, link: bool, dtype: Dtype, recipe: str) -> Path:
    _require_plain(model)
    original_of(model)  # refuses fewstep's own networks, which have no layout to look for
    student = Student(model, _layout(model), folder.name)
    plan = ENGINES[engine](student)
    files = {**plan.files, PAGE: page(engine, student, plan)}
    if plan.names == "comfyui":
        if link:
            raise ValueError(f"--for {engine} writes files of weights, which have nothing to link; leave link out")
        return _export_weights(model, folder, dtype, recipe, files)
    return _export_layout(model, folder, link, dtype, recipe, replace(plan, files=files))


def _export_layout(model: VideoModel, folder: Path, link: bool, dtype: Dtype, recipe: str, plan: Plan | None) -> Path:
    """Diffusers' layout, with what the `plan` for an engine adds."""
    _require_plain(model)
    usage = _usage(model, dtype)
    card, layout = _sealed(model, own_types(model.denoiser, usage.original, dtype)), usage.layout
    networks, made = usage.original.networks, dict[str, Any](usage.schedulers())
    if usage.guider is not None:
        made["guider"] = usage.guider
    index = layout.index | {
        "scheduler": ["diffusers", type(made["scheduler"]).__name__],
        **{name: [None, None] for name in _NOT_WRITTEN if name in layout.index},
        **(plan.index if plan is not None else {}),
        STAMP: dump(card),
    }
    with new_folder(folder) as draft:
        for name, network in networks.items():
            narrowed(network, dtype).save_pretrained(draft / name)
        for name, part in made.items():
            part.save_pretrained(draft / name)
        for name in _folders(index, leave={*networks, *made}):
            _bring(Layout.find(layout.source, (name,)).folder / name, draft / name, link=link)
        write_text(draft / "model_index.json", json.dumps(index, indent=2) + "\n")
        _describe(draft, card, folder.name, usage.pages(folder.name, folder.name), recipe)
        _write(draft, plan.files if plan is not None else {})
    return folder


def export_lora(
    model: VideoModel, adapter: Path, folder: Path, *, names: Names, dtype: Dtype = "float32", recipe: str = ""
) -> Path:
    """Write the adapters of a student, which are in the folder `adapter`, as one file for its teacher's pipeline.

    Errors as in `export`; FileNotFoundError where there are no adapters.
    """
    _require_plain(model)
    usage = _usage(model)
    if not usage.takes_lora:
        raise ValueError(f"diffusers loads no LoRA into its {usage.pipeline}; export the whole student")
    _require_base(model, adapter, usage.layout)
    with new_folder(folder) as draft:
        write_lora(model.denoiser, adapter, draft, names, folder.name, getattr(torch, dtype))
        for name, scheduler in usage.schedulers().items():
            scheduler.save_pretrained(draft / name)
        _describe(draft, model.card, folder.name, usage.pages(usage.layout.source, folder.name, lora=True), recipe)
    return folder


def _require_base(model: VideoModel, adapter: Path, layout: Layout) -> None:
    """ValueError where the student is not the layout's network plus these adapters: over it they would do something else."""
    backbone = model.denoiser.backbone
    updates = read_lora(model.denoiser, require_adapter(adapter)).layers
    own, parts = backbone.state_dict(), tuple(backbone.folders)  # type: ignore[arg-type]
    layout, names = Layout.find(layout.source, parts), {name: backbone.foreign(name) for name in own}
    stored = ChainMap[str, Tensor](*(layout.weights(part, own, names) for part in parts))  # type: ignore[arg-type]
    for name, value in own.items():
        expected, layer = stored[name].to(value.device), f"backbone.{name.removesuffix('.weight')}"
        if layer in updates:
            expected = expected + updates[layer].update.to(value)
        if not torch.allclose(value, expected, atol=1e-5, rtol=1e-5):
            raise ValueError(
                f"{layout.source} with these adapters is not this student: they belong to a teacher that was trained or "
                "restyled; export the whole student"
            )


def _describe(draft: Path, card: Card, title: str, usage: Mapping[int, str], recipe: str) -> None:
    """The page, and the recipe as a file, where the next export finds it."""
    write_text(draft / "README.md", readme(card, title, usage, recipe))
    if recipe:
        write_text(draft / RECIPE, recipe)


def _write(draft: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        write_text(draft / name, text)


def _export_weights(model: VideoModel, folder: Path, dtype: Dtype, recipe: str, more: Mapping[str, str]) -> Path:
    """The denoiser alone, a file for each of its networks; the card is in the files' metadata, and on the page. `more` files
    are written beside them."""
    _require_plain(model)
    names: Names = "comfyui"
    backbone, types = model.denoiser.backbone, own_types(model.denoiser, original_of(model), dtype)
    card = _sealed(model, types)
    rename = names_of(model.denoiser, names)
    files = file_names(backbone.folders, names, folder.name)  # type: ignore[arg-type]
    written: dict[str, dict[str, Tensor]] = {network: {} for network in files}
    for name, value in backbone.state_dict().items():
        network, _, within = rename(name).rpartition("/")
        stored = types.get(f"backbone.{name}", value.dtype)
        written[network or next(iter(files))][within] = value.to(stored).contiguous()
    with new_folder(folder) as draft:
        for network, tensors in written.items():
            save_file(tensors, draft / files[network], {"fewstep": json.dumps(dump(card))})
        _describe(draft, card, folder.name, {}, recipe)
        _write(draft, more)
    return folder


def stamped(layout: Layout) -> Card | None:
    """The card of a layout that `export` wrote; None of any other."""
    if STAMP not in layout.index:
        return None
    card = parse_card(layout.index[STAMP], f"{layout.source}: model_index.json")
    return replace(card, sources=dict.fromkeys(card.parts, layout.source))


def _require_plain(model: VideoModel) -> None:
    """ValueError for a causal student, and for a network that is transformed."""
    model.denoiser.backbone.require_plain()
    if not isinstance(getattr(model.denoiser.backbone, "pattern", Dense()), Dense):
        name = type(model.denoiser.backbone).__name__
        raise ValueError(
            f"elsewhere every frame of {name} reads every other, and this one is causal; keep it in fewstep's folder"
        )


def _usage(model: VideoModel, dtype: Dtype = "float32") -> Usage:
    """ValueError where plain diffusers could not make the same clips."""
    original_of(model)  # refuses fewstep's own networks, which have no layout to look for
    usage = Usage(model, _layout(model), dtype)
    if usage.pipeline in OWN_TIMES:
        raise ValueError(
            f"{usage.pipeline} goes by times of its own and draws its noise itself; a folder of fewstep's own keeps this "
            "student exactly"
        )
    return usage


def _sealed(model: VideoModel, types: Mapping[str, torch.dtype]) -> Card:
    """The card as it goes out: everything in one folder, the denoiser's numbers in the `types` that they are stored in."""
    prints = {name: model.card.fingerprints.get(name) or model.fingerprint(name) for name in model.parts}
    prints["denoiser"] = print_of(model.denoiser, model.weights("denoiser"), types)
    parts = {name: describe(part) for name, part in model.parts.items()}
    return replace(model.card, parts=parts, sources={}, fingerprints=prints, files={})


def _layout(model: VideoModel) -> Layout:
    """Where the parts that were not trained came from."""
    card = model.card
    sources = {source for part, source in card.sources.items() if part != "denoiser"}
    made_here = [part for part in card.parts if part not in ("denoiser", *card.sources)]
    if made_here or len(sources) != 1:
        own = f", and has its own {' and '.join(made_here)}" if made_here else ""
        raise ValueError(
            "text encoder and codec must come from one layout of diffusers; this card names "
            f"{' and '.join(sorted(sources)) or 'none'}{own}"
        )
    layout = Layout.find(sources.pop())
    return replace(layout, index=two_experts(layout.index, model.denoiser.backbone))


def _folders(index: Mapping[str, Any], leave: Collection[str]) -> list[str]:
    """Folders of the parts that are there, besides those to `leave`."""
    return [k for k, v in index.items() if isinstance(v, list) and v[:1] not in ([], [None]) and k not in leave]


def _bring(source: Path, target: Path, *, link: bool) -> None:
    if link:
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target)

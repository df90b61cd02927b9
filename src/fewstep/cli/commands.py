"""Commands that write results: they load models, call the library, and print where the result is."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fewstep.cli.command import Overrides, UsageError
from fewstep.core.env import place

if TYPE_CHECKING:
    from rich.table import Table

    from fewstep.cli import arguments
    from fewstep.data.prepare import Prepared
    from fewstep.evaluate import Suite
    from fewstep.models.bundle import VideoModel
    from fewstep.models.images import ImageEncoder


def demo(options: arguments.Demo) -> int:
    from fewstep.cli.pace import telling
    from fewstep.cli.screen import screen
    from fewstep.cli.screen import table as columns
    from fewstep.demo import run_demo
    from fewstep.evaluate import details, table

    began = time.monotonic()
    with telling(options.quiet) as progress:
        made = run_demo(options.output, quiet=options.quiet, progress=progress)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    out = screen()
    out.print(table(made.report))
    out.print(details(made.report))
    places = {"the page": made.page, "the figures": made.page.with_name("results.json"), "the film": made.film}
    places |= {"the student": made.student, "the run": made.page.with_name("run")}
    out.print(columns((f"\n{minutes} min {seconds:02d} s", ""), [(what, str(path)) for what, path in places.items()]))
    return 0


def train(options: arguments.Train, overrides: Overrides) -> int:
    from fewstep.core.peers import part_company
    from fewstep.pipeline import Pipeline, read

    if options.strict and options.allow_fallback:
        raise UsageError("--strict and --allow-fallback are opposites; give one of them")
    recipe = read(options.recipe, overrides, allow_imports=options.allow_imports)
    if options.strict or options.allow_fallback:
        stages = [f"stages.{name}." for name in recipe.stages] if isinstance(recipe, Pipeline) else [""]
        recipe = recipe.override((f"{s}settings.allow_fallback", str(options.allow_fallback).lower()) for s in stages)
    source = options.recipe if options.recipe.is_dir() else options.recipe.with_suffix("")
    output = options.output or Path("runs") / f"{source.name}-{recipe.hash}"
    if options.dry_run:
        from fewstep.cli import plan

        return plan.show(recipe, output, plan.Device.of(options))
    for option in ("memory", "flops", "price", "shard"):
        if getattr(options, option) is not None:
            raise UsageError(
                f"--{option} works only with --dry-run, which prints what a run needs; add --dry-run, or leave --{option} out"
            )
    made = recipe.complete(output, quiet=options.quiet)
    part_company()
    return _made(made)


def prepare(options: arguments.Prepare) -> int:
    from fewstep.cli.pace import telling
    from fewstep.cli.running import own_device
    from fewstep.cli.screen import screen
    from fewstep.core.peers import meet_peers, part_company
    from fewstep.data.keep import Keep
    from fewstep.data.prepare import Preparation
    from fewstep.data.prepare import prepare as encode
    from fewstep.data.store import Progress, ShardReader
    from fewstep.data.texts import store_texts
    from fewstep.data.video import Cut
    from fewstep.models.bundle import VideoModel

    peers = meet_peers()
    unused = {"denoiser", "features"} if options.texts else {"denoiser", "features", "text"}
    model = VideoModel.from_pretrained(options.model, leave=unused, trust=options.trust)
    for part in model.parts.keys() - unused:
        model.part(part).to(own_device(options.device))
    given = {name: getattr(options, name) for name in ("num_frames", "height", "width")}
    size = {name: getattr(model.card, name) if value is None else value for name, value in given.items()}
    cut = Cut(**size, stride=options.stride, clips_per_video=options.clips_per_video, shots=options.shots)
    keep = Keep(**{field.name: getattr(options, field.name) for field in fields(Keep)})
    plan = Preparation(cut=cut, keep=keep, batch=options.batch, threads=options.threads, autocast=options.autocast)
    if peers.leads:
        every = f", every {cut.stride} frames of the file" if cut.stride > 1 else ""
        print(f"clips of {cut.num_frames} frames of {cut.height} x {cut.width}{every}", flush=True)
        print("making the list of the videos", flush=True)
    skipped = 0
    with telling(options.quiet or not peers.leads) as tell:

        def progress(event: Progress) -> None:
            nonlocal skipped
            skipped += bool(event.problem)
            tell(f"videos{_share()}", event.done, event.total, f"{skipped:,} dropped" if skipped else "")

        prepared = encode(
            options.videos, options.output, model.codec, plan, layout=options.layout, root=options.root,
            progress=progress, image=cast("ImageEncoder | None", model.parts.get("image")),
        )  # fmt: skip
        if options.texts:
            store_texts(
                model, ShardReader(prepared.folder, "latents").captions, prepared.folder / "texts", peers=peers,
                progress=lambda e: tell(f"texts{_share()}", e.done, e.total),
            )  # fmt: skip
    if peers.leads:
        if prepared.report.dropped:
            screen().print(_dropped(prepared))
        print(f"{prepared.clips} clips in {prepared.shards} shards, from {prepared.report.videos} videos")
    part_company()
    return _made(prepared.folder)


def _share() -> str:
    """A note for the progress line if several processes share the work."""
    world = place().world_size
    return f" (process 1 of {world})" if world > 1 else ""


def _dropped(prepared: Prepared) -> Table:
    from fewstep.cli.screen import table

    rows = [
        (reason, str(count.videos or ""), str(count.clips or ""), count.example)
        for reason, count in prepared.report.dropped.items()
    ]
    return table(("dropped", "videos", "clips", "for example"), rows)


def _ran(model: VideoModel) -> None:
    """Say how a model is run, where it is not as always."""
    from fewstep.models.runtime import Runtime, effective, told

    if model.runtime != Runtime() and place().rank == 0:
        print(told(effective(model)), flush=True)


def _of_pairs(options: arguments.Pairs) -> Sequence[str]:
    """The prompts of trajectories."""
    from fewstep.data.prompts import read_prompts
    from fewstep.world.grammar import world_prompts

    name, _, count = options.prompts.partition(":")
    if name == "world" and count.isdecimal():
        return world_prompts(int(count), 0.5, options.seed)
    return read_prompts(Path(options.prompts))


def _clips_of_pairs(options: arguments.Pairs, model: VideoModel) -> Sequence[str]:
    """The prompts of trajectories of a model that streams, with clips if what was named has some."""
    from fewstep.data.clipped import prepared_clips
    from fewstep.world.data import world_clips

    name, _, count = options.prompts.partition(":")
    if name == "world" and count.isdecimal():
        return world_clips(model, int(count), options.seed)
    return prepared_clips(options.prompts, model) if Path(options.prompts).is_dir() else _of_pairs(options)


def pairs(options: arguments.Pairs) -> int:
    from fewstep.cli.pace import telling
    from fewstep.cli.presets import card_of
    from fewstep.cli.running import runtime_of
    from fewstep.core.peers import meet_peers, part_company
    from fewstep.data.pairs import PairPlan, make_pairs, pairs_cost
    from fewstep.models.bundle import VideoModel

    card = card_of(options.model, options.preset)
    prompts = None if card.contract.stream is not None else _of_pairs(options)
    plan = PairPlan(
        times=options.times, steps=options.steps, seed=options.seed, num_frames=options.num_frames,
        guidance=None if options.guidance_scale is None else card.contract.guidance.rescaled(options.guidance_scale),
        storage=options.storage, shard_size=options.shard_size,
    )  # fmt: skip
    peers = meet_peers()
    runtime = runtime_of(options, options.model, card=card)
    model = VideoModel.load(card, options.model, trust=options.trust, runtime=runtime)
    _ran(model)
    prompts = _clips_of_pairs(options, model) if prompts is None else prompts
    cost = pairs_cost(model, len(prompts), plan)
    if peers.leads:
        print(
            f"{cost.pairs} pairs of {cost.nfe_per_pair} network evaluations each, {cost.nfe:,} in all; "
            f"{cost.bytes / 2**20:,.1f} MiB",
            flush=True,
        )
    with telling(options.quiet or not peers.leads) as tell:
        made = make_pairs(
            model, prompts, options.output, plan, batch=options.batch,
            progress=lambda e: tell(f"pairs{_share()}", e.done, e.total),
        )  # fmt: skip
    if peers.leads:
        print(f"{made.pairs} pairs, preview in {made.preview}")
    part_company()
    return _made(made.folder)


def evaluate(options: arguments.Evaluate) -> int:
    from fewstep.cli.pace import telling
    from fewstep.cli.presets import card_of, presets_of, teacher_of
    from fewstep.cli.running import runtime_of
    from fewstep.cli.screen import screen
    from fewstep.evaluate import details, entries, table, write_report
    from fewstep.evaluate import evaluate as measure
    from fewstep.models.bundle import VideoModel

    suite = _suite(options)
    own, its = presets_of((options.student, options.teacher), options.preset)
    card = card_of(options.student, own)
    runtime = runtime_of(options, options.student, card=card)
    student = VideoModel.load(card, options.student, trust=options.trust, runtime=runtime)
    _ran(student)
    teacher = teacher_of(student, options.teacher, trust=options.trust, preset=its)
    with telling(options.quiet) as progress:
        rows = entries(teacher, student, options.num_inference_steps)
        report = measure(rows, suite, options.output, progress=progress)
    folder = Path(options.student)
    run = folder.parent if (folder.parent / "metrics.jsonl").is_file() else None
    resolved = next((p for p in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if p.is_file()), None)
    recipe = resolved.read_text(encoding="utf-8") if resolved is not None else None
    page = write_report(options.output, run=run, recipe=recipe)
    out = screen()
    out.print(table(report))
    out.print(details(report))
    return _made(page)


def _suite(options: arguments.Evaluate) -> Suite:
    """The suite that the options choose; options that are not given have the suite's defaults."""
    from fewstep.evaluate import RealClips, Suite

    given = {
        "prompts": options.prompts, "seeds_per_prompt": options.seeds, "batch": options.batch, "seed": options.seed,
        "num_frames": options.num_frames,
        "texts": _prompts((), options.prompt_file) if options.prompt_file else None,
    }  # fmt: skip
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.suite == "world":
        if any(getattr(options, name) is not None for name in ("real", "stride", "layout", "root")):
            raise UsageError("--real, --stride, --layout and --root belong to --suite avdm2; add it, or leave them out")
        return Suite(features=options.features, clip=str(options.clip or ""), **chosen)
    if options.real is None or options.clip is None or options.features == "auto":
        raise UsageError(
            "--suite avdm2 compares with real clips: give --real (captioned videos), --features (for example "
            "i3d_torchscript.pt) and --clip (a folder with CLIPModel and CLIPProcessor)"
        )
    asked = {name: getattr(options, name) for name in ("stride", "layout", "root")}
    real = RealClips(path=str(options.real), **{name: value for name, value in asked.items() if value is not None})
    return Suite.avdm2(real=real, features=options.features, clip=str(options.clip), **chosen)


def check_model(options: arguments.CheckModel) -> int:
    """Exit code 1 if a check fails."""
    from fewstep.cli.pace import telling
    from fewstep.cli.running import runtime_of
    from fewstep.cli.screen import screen
    from fewstep.cli.screen import table as columns
    from fewstep.evaluate import conformance
    from fewstep.models.bundle import VideoModel

    if options.dtype == "bfloat16":
        raise UsageError("--dtype bfloat16: models are checked in float32 or float64, where rounding hides no mistake")
    if options.offload == "block":
        raise UsageError("--offload block: checks call the network as a whole; leave it out, or choose model")
    model = VideoModel.from_pretrained(options.source, trust=options.trust, runtime=runtime_of(options, options.source))
    inputs = conformance.Options(
        num_frames=options.num_frames, height=options.height, width=options.width, steps=options.num_inference_steps,
        seed=options.seed, prompts=options.prompt, video=options.video,
    )  # fmt: skip
    with telling(options.json) as progress:
        found = conformance.check_model(model, inputs, options.only, progress)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
        return 1 if found.failed else 0
    out = screen()
    size = f"{found.num_frames} frames of {found.height} x {found.width}, latents {found.latents}"
    out.print(f"{found.model} ({found.network}): {size}, {found.dtype} on {found.device}\n", markup=False)
    rows = [(f.name, f.outcome, "" if f.figure is None else f"{f.figure:.1e}", f.bound, f.note) for f in found.findings]
    out.print(columns(("check", "", "figure", "bound", ""), rows))
    for f in found.failed:
        out.print(f"\n{f.name}: {f.what}\n  {f.meaning}", markup=False, soft_wrap=True)
    counts = Counter(f.outcome for f in found.findings)
    out.print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), reverse=True)))
    return 1 if found.failed else 0


def export(options: arguments.Export) -> int:
    from fewstep.evaluate.results import figures, load_report
    from fewstep.models import adapters
    from fewstep.models.bundle import VideoModel
    from fewstep.written import FILE

    if options.engine is not None and (options.lora or options.names != "diffusers"):
        raise UsageError(f"--for {options.engine} says which files are written; leave out --lora and --names")
    model, home = VideoModel.from_pretrained(options.student, trust=options.trust), Path(options.student)
    if options.evaluation is not None:
        scores = figures(load_report(options.evaluation), model.fingerprint("denoiser"))
        model = model.with_card(scores=model.card.scores | scores)
    recipe = (home / FILE).read_text(encoding="utf-8") if (home / FILE).is_file() else ""
    if options.lora:
        files = {"names": options.names, "dtype": options.dtype}
        return _made(adapters.export_lora(model, home / "adapter", options.folder, recipe=recipe, **files))
    made: dict[str, Any] = {"names": options.names, "link": options.link, "dtype": options.dtype}
    return _made(model.export(options.folder, **made, recipe=recipe, engine=options.engine))


def check_lora(options: arguments.CheckLora) -> int:
    from fewstep.cli.pace import telling
    from fewstep.cli.presets import teacher_of
    from fewstep.cli.running import runtime_of
    from fewstep.cli.screen import screen
    from fewstep.evaluate.style import Styled, check_style
    from fewstep.models.bundle import VideoModel
    from fewstep.world.grammar import world_prompts

    given = options.prompt or options.prompt_file
    prompts = _prompts(options.prompt, options.prompt_file) if given else world_prompts(16, 0.5, 0)
    runtime = runtime_of(options, options.student)
    student = _at_steps(
        VideoModel.from_pretrained(options.student, trust=options.trust, runtime=runtime), options.num_inference_steps
    )
    _ran(student)
    teacher = teacher_of(student, options.teacher, trust=options.trust)
    if options.restyled is None:
        tried = Styled.by_lora(student, options.lora)
    else:
        restyled = _at_steps(
            VideoModel.from_pretrained(options.restyled, trust=options.trust, runtime=runtime),
            options.num_inference_steps,
        )
        tried = Styled(student, restyled, "restyled")
    with telling(options.quiet) as progress:
        pair = Styled.by_lora(teacher, options.lora)
        found = check_style(
            pair, tried, prompts, options.output, seeds=options.seeds, features=options.features, progress=progress
        )
    out = screen()
    out.print(
        f"score {found.score:.3f} +- {found.error:.3f} (1 as on the teacher, 0 no trace): direction {found.cosine:.3f}, "
        f"size {found.size:.3f}; {found.n} clips of each kind, features {found.features}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    return _made(options.output / "lora.gif")


def _at_steps(model: VideoModel, steps: int | None) -> VideoModel:
    """The model with another default number of steps. StepCountError if it was not trained for that number."""
    contract = model.card.contract
    contract.times(steps)
    return model.with_card(contract=replace(contract, steps=steps or contract.steps))


def _prompts(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Prompts from the command line, or from a file with one prompt per line."""
    from fewstep.data.prompts import read_prompts

    prompts = (*given, *(read_prompts(file) if file is not None else ()))
    if not prompts:
        raise UsageError('give at least one --prompt "..." or a --prompt-file')
    for prompt in prompts:
        if "\0" in prompt or prompt.encode("utf-8", "ignore").decode() != prompt:
            raise UsageError(f"--prompt {prompt!r} is not UTF-8 text; write it again, or use --prompt-file")
    return prompts


def _made(path: Path) -> int:
    """Print where the result is; with several processes, only the first prints."""
    if place().rank == 0:
        print(path)
    return 0

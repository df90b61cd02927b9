"""Models of the diffusers ecosystem: what diffusers computes is computed here, and everything a run does works on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import DiffusionPipeline
from torch import Tensor

import support_processes
from fewstep import distill
from fewstep.attention import BlockCausal, KVCache, Operation, TopK
from fewstep.cli import main
from fewstep.compress import FrameInput, Int8, ScalarInput, StepScales
from fewstep.compress.step_scales import Scaled
from fewstep.core import Call, Cond, Rng, Seeds
from fewstep.core.build import RecipeError
from fewstep.data import Prompts
from fewstep.data.texts import Texts
from fewstep.diffusion import CFG, Exact
from fewstep.engine import Settings
from fewstep.methods import DMD2, BackwardSimulation
from fewstep.models import Lora, VideoModel, fingerprint
from fewstep.models.adapters import layout
from fewstep.models.bundle import read_card
from fewstep.models.lora import adapt, adapters
from fewstep.models.repattern import repattern
from fewstep.models.source import Diffusers
from fewstep.models.spread import Spread
from tiny_models import TINY, save_tiny, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a  cat walks &amp; walks in the rain"]
EXACT = {"atol": 1e-5, "rtol": 1e-5}
"""float32, sums in another order."""
Rows = list[dict[str, float]]


@pytest.fixture(scope="session", params=list(TINY))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(name: str) -> Path:
    return shared(name)


@pytest.fixture(scope="session")
def source(name: str, folder: Path) -> Diffusers:
    return Diffusers(source=str(folder), text_dtype="float32", **TINY[name].size)


@pytest.fixture(scope="session")
def loaded(source: Diffusers) -> VideoModel:
    return source.load()


@pytest.fixture
def model(loaded: VideoModel) -> VideoModel:
    """A copy, which is made in a fifth of the time that reading takes."""
    return deepcopy(loaded)


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(model: VideoModel, batch: int = 2, frames: int | None = None) -> tuple[Tensor, Tensor, Cond]:
    """Latents, times and conditions of a batch."""
    shape = model.latent_shape(frames)
    return Rng(0).randn((batch, *shape), "x"), torch.tensor([0.3, 0.95])[:batch], model.text.encode(PROMPTS[:batch])


# --- equal to diffusers ---------------------------------------------------------------------------------------------------


def causal_only(name: str) -> None:
    if not TINY[name].causal:
        pytest.skip(f"{name} takes no pattern")


@torch.no_grad()
def test_a_model_of_whole_clips_refuses_what_it_cannot_do(name: str, source: Diffusers, model: VideoModel) -> None:
    if TINY[name].causal:
        return
    x, t, cond = drawn(model)
    with pytest.raises(ValueError, match=r"one time per clip: t must be \[2\], got \(2, \d\)"):
        model.denoiser(x, t[:, None].expand(-1, x.shape[2]), cond)
    with pytest.raises(ValueError, match="sees whole clips and has no past"):
        model.denoiser.recall(KVCache.empty(), x)
    with pytest.raises(
        (RecipeError, ValueError), match="has no pattern; leave it out|would tell the past of the future"
    ):
        replace(source, pattern=BlockCausal(chunk=1)).load()


@torch.no_grad()
def test_a_time_per_frame_is_diffusers_time_per_token(name: str, model: VideoModel) -> None:
    causal_only(name)
    if name == "wan_experts":
        pytest.skip("each frame is compared with its expert in test_adapters_wan.py")
    x, _, cond = drawn(model)
    t = Rng(1).rand((2, x.shape[2]), "t")
    tokens = model.denoiser.backbone.embed(x, t, cond).grid.per_frame
    theirs = model.denoiser.backbone.original().forward(x, t.repeat_interleave(tokens, 1), cond)
    torch.testing.assert_close(model.denoiser(x, t, cond).raw, theirs, **EXACT)


def test_weights_have_diffusers_names(model: VideoModel, pipeline: DiffusionPipeline) -> None:
    backbone = model.denoiser.backbone
    networks = {folder: getattr(pipeline, folder).state_dict() for folder in backbone.folders}
    several = len(networks) > 1
    theirs = {f"{folder}/{n}" if several else n: w for folder, own in networks.items() for n, w in own.items()}
    ours = {backbone.foreign(name): weight for name, weight in backbone.state_dict().items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
def test_text_is_the_pipeline_s(name: str, model: VideoModel, pipeline: DiffusionPipeline) -> None:
    prompts = [*PROMPTS, ""]
    theirs = pipeline.encode_prompt(prompts, **TINY[name].text_arguments)[0]
    cond = model.text.encode(prompts)
    torch.testing.assert_close(cond.text, theirs, **EXACT)
    assert cond.mask.any(1).all() and cond.text.shape == (3, model.text.length, model.text.width)
    assert [x.shape for x in model.text.blank(3).tensors] == [x.shape for x in cond.tensors]


@torch.no_grad()
def test_clips_are_the_pipeline_s(name: str, model: VideoModel, pipeline: DiffusionPipeline) -> None:
    """Same latents, steps and guidance, the scheduler's own times: same latents out, and the same frames."""
    card, steps, tiny = model.card, 4, TINY[name]
    noise = Seeds((5, 6)).randn((2, *model.latent_shape()), "start")
    options = {
        "prompt": PROMPTS, "negative_prompt": card.negative_prompt, "num_frames": card.num_frames, "height": card.height,
        "width": card.width, "num_inference_steps": steps, "guidance_scale": 5.0,
    }  # fmt: skip
    theirs = tiny.sample(pipeline, noise, **options, output_type="latent")
    times = tiny.times(pipeline)
    if not name.startswith("wan"):  # its pipelines leave the ends of the grid to others
        assert card.contract.times(steps) == pytest.approx(times)
    model.card = replace(card, contract=replace(card.contract, grid=Exact(grids=(times,)), steps=steps))
    ours = model.latents(PROMPTS, seed=(5, 6), guidance_scale=5.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    frames = tiny.sample(pipeline, noise, **options, output_type="np").permute(0, 4, 1, 2, 3)
    made = model(PROMPTS, seed=(5, 6), guidance_scale=5.0)
    torch.testing.assert_close((made + 1) / 2, frames, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latents_of_frames_are_the_pipeline_s(name: str, model: VideoModel, pipeline: DiffusionPipeline) -> None:
    card = model.card
    frames = Rng(2).rand((1, 3, card.num_frames, card.height, card.width), "frames") * 2 - 1
    latents = model.codec.encode(frames)
    assert latents.shape[1:] == model.latent_shape()
    torch.testing.assert_close(latents, TINY[name].encode(pipeline, frames), **EXACT)
    assert model.codec.decode(latents).shape == frames.shape


# --- the backbone's contract ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_causal_with_one_chunk_is_bidirectional(name: str, source: Diffusers, model: VideoModel) -> None:
    causal_only(name)
    x, t, cond = drawn(model)
    causal = repattern(model.denoiser, BlockCausal(chunk=x.shape[2]))  # over the very tensors: copies lie otherwise
    assert torch.equal(causal(x, t, cond).raw, model.denoiser(x, t, cond).raw)
    looking_back = replace(source, pattern=BlockCausal(chunk=1)).load().denoiser
    changed = x.clone()
    changed[:, :, -1] += 1
    difference = (looking_back(x, t, cond).raw - looking_back(changed, t, cond).raw).abs().amax((0, 1, 3, 4))
    assert difference[:-1].max() == 0 and difference[-1] > 1e-3


@torch.no_grad()
def test_chunk_by_chunk_with_a_cache_is_one_masked_forward(name: str, source: Diffusers) -> None:
    causal_only(name)
    model = replace(source, pattern=BlockCausal(chunk=2)).load()
    x, _, cond = drawn(model, frames=13)
    t, cache, made = Rng(3).rand((2, x.shape[2]), "t"), KVCache.empty(), []
    for part, times in zip(x.split(2, 2), t.split(2, 1), strict=True):
        prediction = model.denoiser(part, times, cond, Call(kv=model.denoiser.recall(cache, part)))
        cache = cache.commit(prediction.kv, part.shape[2])
        made.append(prediction.raw)
    torch.testing.assert_close(torch.cat(made, 2), model.denoiser(x, t, cond).raw, **EXACT)


@torch.no_grad()
def test_sparse_attention_reaches_every_block(name: str, model: VideoModel) -> None:
    """Reading all blocks of tokens is the network itself; reading some of them is not."""
    x, t, cond = drawn(model)
    if not any(isinstance(module, Operation) for module in model.denoiser.modules()):
        with pytest.raises(ValueError, match="takes no pattern"):
            repattern(model.denoiser, TopK())
        return
    dense, whole = model.denoiser(x, t, cond).raw, repattern(model.denoiser, TopK(block=3, keep=1.0))
    torch.testing.assert_close(whole(x, t, cond).raw, dense, **EXACT)
    few = repattern(model.denoiser, TopK(block=3, keep=0.4))
    assert (few(x, t, cond).raw - dense).abs().max() > 1e-5
    hosts = [block for block in few.backbone.blocks if any(isinstance(m, Operation) for m in block.modules())]
    assert len(hosts) == len(model.denoiser.backbone.blocks)
    torch.testing.assert_close(model.denoiser(x, t, cond).raw, dense, atol=0, rtol=0)  # left as it was


def test_features_gradients_and_checkpointing(name: str, model: VideoModel) -> None:
    x, t, cond = drawn(model)
    start = model.denoiser.backbone.embed(x, t, cond).volume
    feature = model.denoiser.features(x.requires_grad_(), t, cond, [-1])[0]
    assert feature.shape == start.shape and feature.shape[:2] == (2, model.denoiser.backbone.width)
    gradients = []
    for checkpointing in (False, True):
        model.denoiser.zero_grad()
        model.denoiser(x, t, cond, Spread(checkpointing=checkpointing)(Call())).raw.square().mean().backward()
        gradients.append({key: p.grad for key, p in model.denoiser.named_parameters()})
        unread = ("to_k.bias", *TINY[name].unread)
        reached = {key: g for key, g in gradients[-1].items() if not any(part in key for part in unread)}
        assert all(g is not None and g.abs().sum() > 0 for g in reached.values())
    assert all(torch.equal(g, gradients[1][key]) for key, g in gradients[0].items() if g is not None)


def test_every_block_is_one_graph(model: VideoModel) -> None:
    x, t, cond = drawn(model)
    state = model.denoiser.backbone.embed(x, t, cond)
    block = model.denoiser.backbone.blocks[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(state).volume, block(state).volume, rtol=1e-5, atol=1e-5)  # turned otherwise


def test_lora_finds_every_linear_layer_of_the_blocks(model: VideoModel) -> None:
    twin = adapt(model.denoiser, Lora(rank=2, alpha=2.0), Rng(0))
    linear = {n for n, m in model.denoiser.named_modules() if ".blocks." in n and isinstance(m, torch.nn.Linear)}
    assert adapters(twin).keys() == linear and len(linear) >= len(model.denoiser.backbone.blocks)
    x, t, cond = drawn(model)
    assert torch.equal(twin(x, t, cond).raw, model.denoiser(x, t, cond).raw)


def test_it_is_transformed_and_comes_back(model: VideoModel, tmp_path: Path) -> None:
    """Eight bits in every linear layer of the blocks; scalars where they would be read. Elsewhere nobody could build it."""
    changed = model.transformed(Int8())
    x, t, cond = drawn(model)
    plain, made = model.denoiser(x, t, cond).raw, changed.denoiser(x, t, cond).raw
    assert 0 < (made - plain).norm() / plain.norm() < 0.05
    loaded = VideoModel.from_pretrained(changed.save(tmp_path / "small"))
    assert loaded.card.transforms == (Int8(),) and torch.equal(loaded.denoiser(x, t, cond).raw, made)
    with pytest.raises(ValueError, match=r"is transformed \(Int8\)"):
        loaded.export(tmp_path / "out")
    scalar = ScalarInput(name="until", default=0.0)
    if model.denoiser.backbone.takes_scalars:
        other = model.transformed(scalar).denoiser
        assert torch.equal(other(x, t, cond).raw, plain)
        with torch.no_grad():
            other.backbone.scalars["until"].out.weight.add_(0.1)
        assert not torch.equal(other(x, t, cond).raw, plain)
        with pytest.raises(ValueError, match=r"is transformed \(ScalarInput\)"):
            model.with_part("denoiser", other).denoiser.backbone.original()
    else:
        with pytest.raises(ValueError, match="takes no scalar inputs"):
            model.transformed(scalar)


def test_it_reads_numbers_of_every_frame(model: VideoModel) -> None:
    """Where its blocks have a modulation of their own: a frame's numbers change the clip, and at first they do not."""
    (x, t, cond), keys = drawn(model), FrameInput(name="keys", width=2)
    if not model.denoiser.backbone.takes_signals:
        with pytest.raises(ValueError, match="takes no inputs for its frames"):
            model.transformed(keys)
        return
    changed, rng = model.transformed(keys).denoiser, Rng(0)
    told = [cond.with_extra({"keys": rng.rand((len(x), x.shape[2], 2), name)}, framewise=True) for name in "ab"]
    assert torch.equal(changed(x, t, told[0]).raw, model.denoiser(x, t, cond).raw)
    with torch.no_grad():
        changed.backbone.signals[0].out.weight.add_(0.1 * rng.randn(changed.backbone.signals[0].out.weight.shape, "w"))
    assert not torch.equal(changed(x, t, told[0]).raw, changed(x, t, told[1]).raw)


def test_its_linear_layers_know_the_step(model: VideoModel) -> None:
    """Also those that diffusers calls. A step computes what a network with the scales of that step alone does."""
    both, x, t, cond = model.transformed(StepScales(steps=2)).denoiser, *drawn(model)
    plain = model.denoiser(x, t, cond).raw
    for step in range(2):
        assert torch.equal(both(x, t, cond, Call(step=step, steps=2)).raw, plain)
    layers = {n: m for n, m in both.named_modules() if isinstance(m, Scaled)}
    for name, layer in layers.items():
        layer.scale.data += 0.1 * Rng(0).randn(tuple(layer.scale.shape), name)
    made = [both(x, t, cond, Call(step=step, steps=2)).raw for step in range(2)]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], plain)
    for step in range(2):
        alone = model.transformed(StepScales(steps=1)).denoiser
        for name, layer in layers.items():
            alone.get_submodule(name).scale.data.copy_(layer.scale.data[step : step + 1])
        assert torch.equal(alone(x, t, cond).raw, made[step])


# --- folders --------------------------------------------------------------------------------------------------------------


def test_a_card_needs_no_weights(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    card = read_card(folder)
    assert {field: getattr(card, field) for field in TINY[name].card} == TINY[name].card
    assert card.provenance["licence"] and card.sources["text"] == str(folder.resolve())


def test_a_student_has_its_denoiser_and_names_the_rest(model: VideoModel, source: Diffusers, tmp_path: Path) -> None:
    twin = source.load().denoiser
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    saved = model.with_part("denoiser", twin, role="student").save(tmp_path / "student")
    assert sorted(path.name for path in saved.iterdir()) == ["card.json", "denoiser.safetensors"]
    loaded = VideoModel.from_pretrained(saved)
    assert loaded.card.sources.keys() == {"text", "codec"} and loaded.card.role == "student"
    assert loaded.card.fingerprints == {name: fingerprint(part) for name, part in loaded.parts.items()}
    assert loaded.card.fingerprints["denoiser"] == fingerprint(twin)
    clips = [m(PROMPTS[:1], num_inference_steps=2) for m in (loaded, model.with_part("denoiser", twin))]
    torch.testing.assert_close(*clips, **EXACT)  # weights lie elsewhere in memory, so sums may be rounded otherwise
    again = loaded.save(tmp_path / "again")
    assert VideoModel.from_pretrained(again).card == loaded.card


def test_a_student_whose_source_is_gone_says_so(name: str, tmp_path: Path) -> None:
    source = Diffusers(source=str(save_tiny(name, tmp_path / "teacher")), **TINY[name].size)
    saved = source.load().save(tmp_path / "student")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"teacher: no such folder; if it was moved, .*card\.json"):
        VideoModel.from_pretrained(saved)


def test_weights_in_several_files_may_stay_there(
    name: str, model: VideoModel, pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    source = Diffusers(source=str(tmp_path), text_dtype="float32", **TINY[name].size)
    left = source.load(leave=("denoiser",))
    assert all(p.is_meta for p in left.denoiser.parameters()) and not next(left.codec.parameters()).is_meta
    assert left.fingerprint("denoiser") == model.fingerprint("denoiser") == source.load().fingerprint("denoiser")


def test_what_cannot_be_read_is_refused(folder: Path, source: Diffusers, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="height and width must be multiples of"):
        replace(source, height=41).card()
    with pytest.raises(RecipeError, match="folder of fewstep's own; write type: Pretrained"):
        Diffusers(source="world").card()
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(RecipeError, match="is a FluxPipeline; the pipelines that can be read are .*WanPipeline"):
        read_card(tmp_path)
    monkeypatch.setattr(layout, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(FileNotFoundError, match="owner/model: .*the hub did not give it: no network"):
        read_card("owner/model")


def test_sizes_that_wan_cannot_make_are_refused_before_loading(tmp_path: Path) -> None:
    source = Diffusers(source=str(save_tiny("wan", tmp_path)))
    with pytest.raises(ValueError, match="num_frames must be 4 k \\+ 1 .* such as 5, got 7"):
        replace(source, num_frames=7).card()
    with pytest.raises(ValueError, match="multiples of 16, got 40 x 832"):
        replace(source, height=40).card()


def test_what_is_downloaded_is_what_is_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repo: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(layout, "snapshot_download", download)
    card = read_card("owner/model")
    assert card.name == "model" and set(card.sources.values()) == {"owner/model"}
    assert all(pattern.endswith(".json") for patterns in asked for pattern in patterns)
    model = VideoModel.from_pretrained("owner/model")
    parts = [getattr(part, "backbone", part) for part in model.parts.values()]
    assert {f"{folder}/*" for part in parts for folder in part.folders} <= {p for patterns in asked for p in patterns}


def test_importing_fewstep_imports_no_diffusers() -> None:
    code = "import sys, fewstep.catalogue, fewstep.cli; sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_extra_one_is_told_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.startswith("fewstep.models.adapters.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RecipeError, match=r"pip install 'fewstep\[diffusers\]'"):
        read_card(folder)


# --- runs -----------------------------------------------------------------------------------------------------------------


UNLIKE = ("wan", "wan_experts", "hunyuan", "cogvideox15")
"""Families whose blocks are cut into shards, or whose tokens are shared, differently; the others are like one of them."""


def test_the_negative_prompt_is_what_guidance_leads_away_from(model: VideoModel) -> None:
    model.card = replace(model.card, negative_prompt="dark frames")
    (_, sampled), (_, trained) = model.encode_text(PROMPTS), Texts(model, frozenset({"prompts"}))(PROMPTS, "cpu")
    expected = model.text.encode(["dark frames", "dark frames"])
    assert torch.equal(sampled.text, expected.text) and torch.equal(trained.text, expected.text)
    assert torch.equal(trained.mask, expected.mask)


LIKE_OTHERS = ("wan_ti2v", "ltx_condition", "cogvideox")
"""Families that are trained as `wan`, `ltx` and `cogvideox15` are; test_conformance.py tests their gradients."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in TINY], scope="session"
)
def test_distil_in_python(name: str, source: Diffusers, tmp_path: Path) -> None:
    distilled(source, tmp_path, None)


@pytest.mark.parametrize(
    "name", [n if n in UNLIKE else pytest.param(n, marks=pytest.mark.slow) for n in TINY], scope="session"
)
def test_distil_adapters_in_python(name: str, source: Diffusers, tmp_path: Path) -> None:
    distilled(source, tmp_path, Lora(rank=2, alpha=2.0))


def distilled(source: Diffusers, tmp_path: Path, lora: Lora | None) -> None:
    """Two iterations: the student differs from its teacher, and is what its folder holds."""
    file = tmp_path / "prompts.txt"
    file.write_text("a red ball\na blue box\n")
    method = DMD2(critic_updates=1, guidance=CFG(scale=5.0), rollout=BackwardSimulation(grids=((1.0, 0.5),), shift=3.0))
    student = distill(
        model=source, method=method, data=Prompts(path=str(file), text_cache=str(tmp_path / "texts")),
        settings=Settings(steps=2, batch=1, lora=lora, health=None), output=tmp_path / "run", quiet=True,
    )  # fmt: skip
    loaded = VideoModel.from_pretrained(tmp_path / "run" / "student")
    clip = loaded(["a red ball"])
    assert torch.equal(clip, student(["a red ball"])) and clip.shape[2] == source.num_frames
    assert loaded.fingerprint("denoiser") != source.load().fingerprint("denoiser")
    assert loaded.card.provenance["licence"] and "teacher.source" in loaded.card.provenance
    assert (tmp_path / "run" / "student" / "adapter").is_dir() == (lora is not None)


def written(source: Diffusers, folder: Path, settings: str) -> Path:
    """A recipe of two iterations."""
    (folder / "prompts.txt").write_text("a red ball\na blue box\n")
    size = f"num_frames: {source.num_frames}, height: {source.height}, width: {source.width}"
    recipe = folder / "dmd2.yaml"
    recipe.write_text(
        f"model: {{type: Diffusers, source: {source.source}, {size}}}\n"
        "method: {type: DMD2, critic_updates: 1, rollout: {type: BackwardSimulation, grids: [[1.0, 0.5]]}}\n"
        f"data: {{type: Prompts, path: {folder / 'prompts.txt'}}}\n"
        f"settings: {{steps: 2, batch: 1, log_every: 1, health: null, {settings}}}\n"
    )
    return recipe


@pytest.mark.parametrize(
    "name", [n if n == "wan_experts" else pytest.param(n, marks=pytest.mark.slow) for n in TINY], scope="session"
)
def test_explained_and_planned_nothing_is_loaded(
    name: str, source: Diffusers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(written(source, tmp_path, "preview_every: 2"))
    assert main(["explain", recipe]) == 0
    assert main(["distill", recipe, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "text states [B, L, D]" in (said := capsys.readouterr().out) and "nothing was loaded" in said


@pytest.mark.parametrize(
    "name", [n if n == "wan" else pytest.param(n, marks=pytest.mark.slow) for n in TINY], scope="session"
)
def test_distil_and_sample_by_command(name: str, source: Diffusers, tmp_path: Path) -> None:
    """The other families are slow: previews are the teacher's clips, in all its steps. `test_distil_in_python` is not."""
    recipe, run = str(written(source, tmp_path, "preview_every: 2")), str(tmp_path / "run")
    assert main(["distill", recipe, "--output", run, "--quiet"]) == 0
    video = tmp_path / "clip.gif"
    assert main(["sample", f"{run}/student", "--prompt", "a red ball", "--output", str(video)]) == 0
    assert video.stat().st_size > 0


ONCE = {("wan", "{shard: 2}"), ("wan_experts", "{sequence: 2}")}
"""The experts have Wan's blocks: the shards of two of them are tested, and the shared tokens of one."""


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        pytest.param(
            n, parallel, id=f"{parallel[1:-4]}-{n}",
            marks=[pytest.mark.slow] if n not in UNLIKE or (n, parallel) in ONCE else [],
        )
        for n in TINY
        for parallel in ("{shard: 2}", "{sequence: 2}")
    ],
    scope="session",
)  # fmt: skip
def test_two_processes_train_as_one(
    name: str, source: Diffusers, tmp_path: Path, parallel: str, alone: Callable[[], Rows]
) -> None:
    if "sequence" in parallel and not source.load().denoiser.backbone.shares:
        pytest.skip(f"the tokens of {name} cannot be shared")
    together = trained(2, source, tmp_path, f", parallel: {parallel}")
    assert together == [pytest.approx(row, rel=1e-4) for row in alone()]


@pytest.fixture(scope="session")
def alone(source: Diffusers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Rows]:
    """What one process finds, once for all that is compared with it."""
    return cache(lambda: trained(1, source, tmp_path_factory.mktemp("alone"), ""))


def trained(processes: int, source: Diffusers, folder: Path, settings: str) -> Rows:
    """The figures of two iterations in so many processes."""
    recipe = written(source, folder, f"accumulate: 2{settings}")
    support_processes.run(processes, folder, "distill", recipe, "--output", folder / "run", "--quiet")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]

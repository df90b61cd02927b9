"""`fewstep check-model`: every family passes, and each sabotage is caught by the check that is meant for it, and by no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra diffusers")

import support_unets
from fewstep.attention import BlockCausal, Dense, Operation, Site
from fewstep.attention.block_causal import _ChunkByChunk
from fewstep.cli import main
from fewstep.core import Call, Cond
from fewstep.data.video import write_video
from fewstep.diffusion import CFG, Contract, Exact, Heun, Prediction, Shifted
from fewstep.evaluate.conformance import CHECKS, Options, check_model, explain
from fewstep.models import Denoiser, VideoDiT, VideoModel
from fewstep.models.adapters.conditions.t5 import T5Text
from fewstep.models.adapters.dits import wan
from fewstep.models.adapters.dits.wan_block import WanBlock
from fewstep.models.source import Diffusers
from fewstep.models.spec import Spec
from tiny_models import TINY, save_tiny

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
UNETS = {"animatediff": support_unets.animatediff, "stable_diffusion": support_unets.stable_diffusion}
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "cogvideox_2b": ("cogvideox", {"use_rotary_positional_embeddings": False}),
    "hunyuan_not_distilled": ("hunyuan", {"guidance_embeds": False}),
}
UNTRAINED = {"convention", "told_time"}
CAUSAL = {"frame_times", "full_mask", "future", "cache"}
FOREIGN = ("forward", "weights", "times", "pipeline")
SMALL = Options(num_frames=4)
"""A small clip of the built-in world."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the tiny model of a family is saved."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            if name in UNETS:
                UNETS[name]().save_pretrained(made[name])
            else:
                family, config = VARIANTS.get(name, (name, {}))
                save_tiny(family, made[name], **config)
        return made[name]

    return save


@pytest.fixture
def load(folder: Callable[[str], Path]) -> Callable[..., VideoModel]:
    def load(name: str, **options: object) -> VideoModel:
        family, _ = VARIANTS.get(name, (name, {}))
        size = TINY[family].size if family in TINY else {"height": 8, "width": 16}
        source = Diffusers(source=str(folder(name)), **(size | options))  # type: ignore[arg-type]
        card = source.card()
        if name == "hunyuan15":  # reads more than a thousand text tokens, which take all the time
            text = card.parts["text"]
            short = Spec(text.type, {**text.args, "length": 8, "glyphs": 8})
            card = replace(card, parts={**card.parts, "text": short})
        return VideoModel.load(card, source.source)

    return load


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    """The world's; sabotages take a `copy_of`."""
    return VideoModel.from_pretrained("world")


def failures(model: VideoModel, options: Options = Options(), only: tuple[str, ...] = ()) -> set[str]:
    return {finding.name for finding in check_model(model, options, only).failed}


# --- whole models ---------------------------------------------------------------------------------------------------------


DEAR = {"animatediff": pytest.mark.slow}
"""A UNet as Stable Diffusion's, which takes a fifth of the time. That it equals diffusers' is in test_adapters_unet.py."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=DEAR.get(name, ())) for name in sorted({*TINY, *VARIANTS, *UNETS})]
)
def test_every_family_passes(name: str, load: Callable[..., VideoModel]) -> None:
    """And of what does not apply, only that with a reason."""
    model = load(name)
    found = check_model(model)
    assert not found.failed
    figures = {finding.name: finding.figure for finding in found.findings}
    for tight in {
        "forward",
        "pipeline",
        "batch",
        "guidance",
    } & figures.keys():  # the suite's own bounds are for any machine
        assert figures[tight] is None or figures[tight] < 1e-5, (tight, figures[tight])
    skipped = {finding.name for finding in found.findings if finding.outcome == "not applicable"}
    assert skipped == UNTRAINED | (set() if name in TINY and TINY[name].causal else CAUSAL)


def test_the_world_s_teacher_passes(teacher: VideoModel) -> None:
    found = check_model(teacher, SMALL)
    assert not found.failed
    assert {finding.name for finding in found.findings if finding.outcome == "not applicable"} == set(FOREIGN)


def test_a_causal_model_in_double_precision(load: Callable[..., VideoModel]) -> None:
    """Its own pattern is checked, and equality with diffusers, without it."""
    model = load("wan", num_frames=13, pattern=BlockCausal(chunk=3))
    model.denoiser.double()
    found = check_model(model)
    assert not found.failed and found.latents == (4, 4, 4, 6) and found.dtype == "float64"
    figures = {finding.name: finding.figure for finding in found.findings}
    assert figures["cache"] is not None and figures["cache"] < 1e-12


def test_a_student_is_compared_at_its_own_times(load: Callable[..., VideoModel], tmp_path: Path) -> None:
    """Its folder names its teacher's, where the pipeline and its scheduler are."""
    teacher = load("wan")
    contract = Contract(steps=2, grid=Exact(grids=((1.0, 0.7, 0.0),)))
    student = teacher.with_part("denoiser", teacher.denoiser, role="student", contract=contract).save(tmp_path)
    found = {
        finding.name: finding for finding in check_model(VideoModel.from_pretrained(student), only=FOREIGN).findings
    }
    assert {name: f.outcome for name, f in found.items() if f.outcome != "pass"} == dict.fromkeys(
        ("weights", "times"), "not applicable"
    )


def test_a_shift_that_is_of_another_size_is_found(load: Callable[..., VideoModel]) -> None:
    """LTX's times follow from the size of its clip: of its own, at whichever size it is checked."""
    model = load("ltx", num_frames=9)
    assert not failures(model, Options(num_frames=5), ("times",))
    model.card = replace(model.card, contract=load("ltx").card.contract)
    assert failures(model, only=("times",)) == {"times"}


def test_what_diffusers_does_not_do_itself_is_not_compared(load: Callable[..., VideoModel]) -> None:
    """Its DDIM steps by whole strides, which three steps of a thousand timesteps are not; another scheduler does it."""
    (finding,) = check_model(load("cogvideox"), Options(steps=3), ["pipeline"]).findings
    assert finding.outcome == "pass"
    model = load("wan")
    model.card = replace(model.card, contract=replace(model.card.contract, sampler=Heun()))
    (finding,) = check_model(model, Options(steps=3), ["pipeline"]).findings
    assert finding.outcome == "not applicable" and "no scheduler that does what Heun does" in finding.note


def test_the_model_is_left_as_it_is(load: Callable[..., VideoModel]) -> None:
    model = load("wan")
    before, card, pattern = model.fingerprint("denoiser"), model.card, model.denoiser.backbone.pattern
    check_model(model)
    assert model.fingerprint("denoiser") == before and model.card == card
    assert model.denoiser.backbone.pattern is pattern
    assert all(p.grad is None and p.requires_grad for p in model.denoiser.parameters())


@pytest.mark.parametrize("name", ["wan", "animatediff"])
def test_the_original_shares_its_weights(name: str, load: Callable[..., VideoModel]) -> None:
    backbone = load(name).denoiser.backbone
    original = backbone.original()
    assert original is not None
    theirs = {p.data_ptr() for network in original.networks.values() for p in network.parameters()}
    assert theirs == {p.data_ptr() for p in backbone.parameters()}


def test_a_known_clip_of_one_s_own(teacher: VideoModel, tmp_path: Path) -> None:
    clip = teacher(["a small red circle moving slowly right on a black background"], num_inference_steps=8)
    video = write_video(tmp_path / "clip.mp4", clip)
    options = Options(video=video, prompts=("a small red circle moving slowly right on a black background",))
    found = check_model(teacher, options, ["convention"])
    assert [finding.outcome for finding in found.findings] == ["pass"]


# --- sabotages of the tiny Wan --------------------------------------------------------------------------------------------

Sabotage = Callable[[pytest.MonkeyPatch, VideoModel], object]


def embed_with(change: Callable[..., tuple[Tensor, Tensor, Cond]]) -> Sabotage:
    """Something is done to latents, time or text before they are embedded."""

    def apply(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
        embed = wan.Wan.embed
        patch.setattr(wan.Wan, "embed", lambda self, x, t, cond, *call: embed(self, *change(x, t, cond), *call))

    return apply


def head_with(change: Callable[[Tensor], Tensor]) -> Sabotage:
    def apply(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
        head = wan.Wan.head
        patch.setattr(wan.Wan, "head", lambda self, state: change(head(self, state)))

    return apply


def contract(**changes: object) -> Sabotage:
    def apply(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
        patch.setattr(model, "card", replace(model.card, contract=replace(model.card.contract, **changes)))

    return apply


def offset_guidance(self: CFG, net, x_t, t, cond, uncond, *call) -> Prediction:
    words, negative = net(x_t, t, cond), net(x_t, t, uncond)
    return words.with_raw(words.raw + self.scale * (words.raw - negative.raw))


def queries_one_frame_late(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
    positions = Call.positions
    patch.setattr(Call, "positions", lambda c, frames: positions(c, frames) + (1 if c.kv and c.kv.layers else 0))


def masked_attention_of_another_scale(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
    forward = Operation.forward

    def scaled(self: Operation, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return forward(self, q if self.mask(q, k, site) is None else 1.1 * q, k, v, site)

    patch.setattr(Operation, "forward", scaled)


def features_of_every_block(self: Denoiser, x_t, t, cond, layers):
    states = list(self.backbone.walk(self.backbone.embed(x_t, t, cond)))
    return [states[layer].volume for layer in layers]


def another_way_back(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
    forward = WanBlock.forward

    def block(self, state):
        again = torch._C._current_graph_task_id() != -1  # computed once more, on the way back
        return forward(self, replace(state, x_BNE=1.1 * state.x_BNE) if again else state)

    patch.setattr(WanBlock, "forward", block)


def frames_that_know_the_mean(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
    forward = _ChunkByChunk.forward
    patch.setattr(
        _ChunkByChunk,
        "forward",
        lambda self, q, k, v, site: forward(self, q, k, v, site) + 0.1 * v.mean(2, keepdim=True),
    )


def swapped_in_patches(x: Tensor) -> Tensor:
    return x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).transpose(4, 6).flatten(5).flatten(3, 4)


def neighbours_in_text(patch: pytest.MonkeyPatch, model: VideoModel) -> None:
    encode = T5Text.encode
    patch.setattr(T5Text, "encode", lambda self, prompts: _times(encode(self, prompts), len(prompts)))


def _times(cond: Cond, factor: float) -> Cond:
    return Cond(factor * cond.text, cond.mask)


def coarse(x: Tensor) -> Tensor:
    return x.to(torch.float8_e5m2).to(x.dtype) if torch.is_autocast_enabled("cpu") else x


SABOTAGES: dict[str, tuple[str, Sabotage]] = {
    "the timestep without its 1000, in the adapter": ("forward", embed_with(lambda x, t, c: (x, t / 1000, c))),
    "the timestep without its 1000, in the author's mind": (
        "pipeline", lambda patch, model: patch.setattr(wan, "_TIMESTEPS", 1),
    ),
    "rows and columns swapped in patches": ("forward", head_with(swapped_in_patches)),
    "the flow with the other sign": ("forward", head_with(torch.neg)),
    "text states that nobody reads": ("forward", embed_with(lambda x, t, c: (x, t, _times(c, 0)))),
    "x0 for flow": ("pipeline", lambda patch, model: patch.setattr(model.denoiser, "kind", "x0")),
    "the scheduler's shift not read": ("times", contract(grid=Shifted(shift=1.0))),
    "guidance as cond + w (cond - uncond)": (
        "guidance", lambda patch, model: patch.setattr(CFG, "__call__", offset_guidance),
    ),
    "text that depends on its neighbours": ("padding", neighbours_in_text),
    "the first sample's time for all": ("batch", embed_with(lambda x, t, c: (x, t[:1].expand_as(t), c))),
    "a weight that is not the file's": (
        "weights", lambda patch, model: model.denoiser.backbone.blocks[0].attn1.to_q.weight.data.add_(0.01),
    ),
    "a time per frame added up": (
        "frame_times", embed_with(lambda x, t, c: (x, t if t.ndim == 1 else t.sum(1, keepdim=True).expand_as(t), c)),
    ),
    "masked attention of another scale": ("full_mask", masked_attention_of_another_scale),
    "the pattern's mask forgotten": ("future", lambda patch, model: patch.setattr(BlockCausal, "operation", Dense.operation)),
    "values of the future, beside the mask": ("future", frames_that_know_the_mean),
    "queries a frame late beside a cache": ("cache", queries_one_frame_late),
    "latents cut from the graph": ("features", embed_with(lambda x, t, c: (x.detach(), t, c))),
    "features that compute every block": (
        "features", lambda patch, model: patch.setattr(Denoiser, "features", features_of_every_block),
    ),
    "time cut from the graph": ("jvp", embed_with(lambda x, t, c: (x, t.detach(), c))),
    "a head in low precision": ("bf16", head_with(coarse)),
    "blocks that differ on the way back": ("checkpointing", another_way_back),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_sabotage_is_caught_by_its_check(
    name: str, load: Callable[..., VideoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, sabotage = SABOTAGES[name]
    model = load("wan")
    sabotage(monkeypatch, model)
    timeless = {"jvp"} if "1000" in name else set()  # where time hardly counts, finite differences drown in rounding
    assert failures(model) - timeless == {check}


# --- sabotages of the world's trained teacher -----------------------------------------------------------------------------

TOLD = ("text", "batch", "guidance", "convention", "told_time")


@pytest.fixture
def wrong(teacher: VideoModel) -> VideoModel:
    """A teacher to spoil."""
    return VideoModel.from_pretrained("world").with_part("text", teacher.text)


def test_a_flow_of_the_other_sign(wrong: VideoModel) -> None:
    wrong.denoiser.backbone.out.requires_grad_(False).weight.neg_()
    wrong.denoiser.backbone.out.bias.neg_()
    found = check_model(wrong, SMALL, TOLD)
    assert [(f.name, "looks like -flow" in f.note) for f in found.failed] == [("convention", True)]


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_a_swapped_kind(wrong: VideoModel, kind: str) -> None:
    wrong.denoiser.kind = kind  # type: ignore[assignment]
    found = check_model(wrong, SMALL, TOLD)
    assert [(f.name, "looks like flow" in f.note) for f in found.failed] == [("convention", True)]


@pytest.mark.parametrize("told", [lambda t: 1 - t, lambda t: t / 1000], ids=["reversed", "in other units"])
def test_a_time_that_means_something_else(
    wrong: VideoModel, told: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = VideoDiT.embed
    monkeypatch.setattr(VideoDiT, "embed", lambda self, x, t, cond, *call: embed(self, x, told(t), cond, *call))
    assert failures(wrong, SMALL, TOLD) == {"told_time"}


def test_a_prompt_that_is_not_read(wrong: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(self, x, t, cond, *call):
        return embed(self, x, t, Cond(torch.zeros_like(cond.text), torch.ones_like(cond.mask)), *call)

    embed = VideoDiT.embed
    monkeypatch.setattr(VideoDiT, "embed", blind)
    assert failures(wrong, SMALL, TOLD) == {"text"}


def test_a_network_that_does_not_come_back(wrong: VideoModel) -> None:
    wrong.denoiser.backbone.register_buffer("lost", torch.ones(1), persistent=False)
    wrong.denoiser.backbone.args["heads"] = 4
    assert failures(wrong, SMALL, ("batch", "saved")) == {"saved"}


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command(folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    size = [f"--{key.replace('_', '-')}={value}" for key, value in TINY["wan"].size.items()]
    assert main(["check-model", str(folder("wan")), *size, "--only", "forward", "convention"]) == 0
    said = capsys.readouterr().out
    assert "5 frames of 32 x 48, latents (4, 2, 4, 6), float32 on cpu" in said
    assert "1 pass, 1 not applicable" in said and "needs trained weights" in said


def test_the_command_says_what_a_failure_means(
    folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_with(lambda x, t, c: (x, t / 1000, c))(monkeypatch, None)  # type: ignore[arg-type]
    words = ["check-model", str(folder("wan")), "--only", "forward", "pipeline"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "the factor 1000 of the timestep" in said and "correct forward first" in said
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [(f["name"], f["outcome"]) for f in found] == [("forward", "fail"), ("pipeline", "not applicable")]
    assert found[0]["figure"] > 1e-3 and found[0]["bound"] == "<= 1.0e-04" and found[0]["meaning"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "forwards"], "unknown checks: forwards; choose from forward, weights"),
        (["--num-frames", "4"], "num_frames must be 4 k \\+ 1"),
        (["--height", "40"], "multiple"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    words: list[str], said: str, folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-model", str(folder("wan")), *words]) == 2
    pytest.importorskip("re").search(said, capsys.readouterr().err) or pytest.fail(said)


def test_the_guide_says_what_each_check_is_and_what_its_failure_means() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    for check in CHECKS:
        what, meaning = explain(check)
        assert what and meaning and f"| `{check.__name__}` | {what} | {meaning} |" in guide

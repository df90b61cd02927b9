"""Trajectories of a causal teacher: a chunk is a function of its own noise and of clean chunks, which a student can learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import KVCache
from fewstep.cli import main
from fewstep.core import Batch, Call, Cond, KVView, Pairs, Past, Rng, Seeds
from fewstep.data import (
    Clipped,
    Cut,
    DataError,
    PairPlan,
    Preparation,
    StoredPairs,
    make_pairs,
    pairs_cost,
    prepare,
    prepared_clips,
)
from fewstep.data.store import ShardReader
from fewstep.diffusion import CFG, Contract, Euler, Heun, Prediction, Shifted, Stream
from fewstep.engine import train
from fewstep.methods import FromPairs, KnowledgeDistillation, TeacherForced, WholeClip, Work
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel
from fewstep.streaming import Chunks
from fewstep.world.data import world_clips
from support_engine import small, tiny_model
from support_gaussian import RF, minimise
from support_videos import make_videos

pytestmark = pytest.mark.usefixtures("single_thread")
RHO, FRAMES = 0.8, Stream()
HALVES = Stream(chunks=(2,))


class TwoFrames(nn.Module):
    """The exact denoiser of clips of two frames, each of variance 1, with correlation rho: of whole clips, or, in calls that are
    chunks, of a frame after a clean one. Its keys are its latents."""

    def __init__(self) -> None:
        super().__init__()
        self.args: dict[str, Any] = {}
        self.path, self.kind, self.weight = RF, "x0", nn.Parameter(torch.zeros(1))

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return KVView(memory.layers, memory.positions, memory.start)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        x, t = x_t.double(), t.double().reshape(len(t), 1, 1, 1)
        a, s = 1 - t, t
        if call.causal is None:
            # The covariance has eigenvalues 1 + rho and 1 - rho, on the sum and the difference of the frames.
            both = [x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]]
            plus, minus = (a * v / (a * a * v + s * s) * y for v, y in zip((1 + RHO, 1 - RHO), both, strict=True))
            x0 = torch.stack([(plus + minus) / 2, (plus - minus) / 2], 2)
            return Prediction(x0.to(x_t), "x0", x_t, t.flatten().to(x_t), RF)
        past = call.kv.layers[0][0].double() if call.kv is not None and call.kv.layers else torch.zeros_like(x)
        mean, left = RHO * past[:, :, 0], 1 - RHO**2
        first = a / (a * a + s * s) * x[:, :, 0]
        second = mean + a * left / (a * a * left + s * s) * (x[:, :, 1] - a * mean)
        x0 = torch.stack([first, second], 2).to(x_t)
        return Prediction(x0, "x0", x_t, t.flatten().to(x_t), RF, ((x_t, x_t),))


def exact(stream: Stream | None) -> VideoModel:
    """Latents of 4 x 4 x 4 elements, each with its own two frames."""
    parts = {
        "denoiser": TwoFrames(),
        "text": TextEncoder(width=16, length=8, buckets=64, depth=1),
        "codec": FrameAutoencoder(width=8, depth=1),
    }
    contract = Contract(sampler=Heun(), steps=64, stream=stream)
    return VideoModel(Card(name="exact", num_frames=2, height=16, width=16, contract=contract), parts)


def correlated(rows: Sequence[int]) -> Tensor:
    """Clips of the data, by number."""
    first, second = (Seeds(tuple(rows)).randn((len(rows), 4, 1, 4, 4), name) for name in ("first", "second"))
    return torch.cat([first, RHO * first + (1 - RHO**2) ** 0.5 * second], 2)


def two_frames(tmp_path: Path, stream: Stream | None, times: tuple[float, ...]) -> Pairs:
    """64 pairs of the exact teacher: 8 clips, 8 noises each."""
    prompts: Any = [f"clip {n}" for n in range(8)]
    prompts = Clipped(prompts, correlated, "a test") if stream else prompts
    make_pairs(exact(stream), prompts, tmp_path, PairPlan(times=times, per_prompt=8), batch=64)
    reader = ShardReader(tmp_path, "pairs")
    states = reader.read("states", range(64))
    return Pairs(states, times, Past(reader.read("clip", range(64)), (1, 1)) if stream else None)


def test_the_best_causal_fit_of_bidirectional_pairs_is_too_quiet(tmp_path: Path) -> None:
    """Causal Forcing's reason (2602.02214): the end of a bidirectional trajectory is `Sigma^(1/2) eps`, so what a student can
    make of the first frame's own noise has variance `((Sigma^(1/2))_11)^2` = 0.8. That of a causal teacher has the data's, 1."""
    variance = {}
    for name, stream in {"bidirectional": None, "causal": FRAMES}.items():
        states = two_frames(tmp_path / name, stream, (1.0, 0.0)).states.double()
        noise, end = states[:, 0, :, 0].flatten(), states[:, 1, :, 0].flatten()
        variance[name] = float((noise @ end / (noise @ noise)) ** 2)
        assert float(end.square().mean()) == pytest.approx(float(noise.square().mean()), abs=0.05)
    assert variance["bidirectional"] == pytest.approx(RHO, abs=0.02)
    assert variance["causal"] == pytest.approx(1.0, abs=1e-3)


class Linear(nn.Module):
    """A student that is linear in a frame and in the clean frame before it, at each of two times."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.weight = RF, nn.Parameter(torch.zeros(2, 2, 2, dtype=torch.float64))

    recall = TwoFrames.recall

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        x_t = x_t.double()
        if t.ndim == 1:
            return Prediction(x_t, "x0", x_t, t, RF, ((x_t, x_t),))
        assert call.kv is not None
        clean = call.kv.layers[0][0]
        past = torch.cat([torch.zeros_like(clean[:, :, :1]), clean[:, :, :-1]], 2)
        weight = self.weight[(t < 0.75).long(), torch.arange(2)][:, None, :, None, None]
        return Prediction(weight[..., 0] * x_t + weight[..., 1] * past, "x0", x_t, t, RF)


@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.5, 0.0)], ids=["noise", "two times"])
def test_only_causal_pairs_can_be_fitted_by_a_causal_student(times: tuple[float, ...], tmp_path: Path) -> None:
    """With fixed clips and fresh noise the loss goes to 0. That of bidirectional pairs stays at the conditional variance: at the
    first frame `((Sigma^(1/2))_12)^2` = 0.2 from noise, and nothing at the second, which may read the first one's end."""
    left = {}
    method = KnowledgeDistillation(
        rollout=FromPairs(grids=(times[:-1],), history=TeacherForced(stream=FRAMES)), huber=None
    )
    for name, stream in {"bidirectional": None, "causal": FRAMES}.items():
        pairs, student = two_frames(tmp_path / name, stream, times), Linear()
        nobody = Cond(torch.zeros(64, 1, 1), torch.ones(64, 1) > 0)
        batch = Batch(nobody, nobody, (4, 2, 4, 4), pairs=pairs)

        def loss(batch: Batch = batch, student: Linear = student) -> Tensor:
            (losses,) = method.student_loss(SimpleNamespace(student=student), batch, Rng(0))  # type: ignore[arg-type]
            return losses["endpoint"]

        minimise(list(student.parameters()), loss)
        left[name] = float(loss().detach())
    assert left["causal"] < 1e-9
    if len(times) == 2:
        assert left["bidirectional"] == pytest.approx(0.2 / 2, rel=0.05)
    assert left["bidirectional"] > 0.02


# --- real networks --------------------------------------------------------------------------------------------------------

PROMPTS = ("a red ball", "a blue box")


def causal(stream: Stream = HALVES, guidance: CFG = CFG(scale=3.0)) -> VideoModel:
    model = tiny_model()
    contract = Contract(sampler=Euler(), steps=4, grid=Shifted(shift=3.0), guidance=guidance, stream=stream)
    return model.with_part("denoiser", model.denoiser, contract=contract)


def clips(rows: Sequence[int]) -> Tensor:
    return Seeds(tuple(rows)).randn((len(rows), 4, 4, 8, 8), "clip")


@pytest.mark.parametrize("stream", [HALVES, Stream(window=2), Stream(window=3, sink=1)], ids=["all", "window", "sink"])
@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
def test_each_chunk_is_solved_after_the_clean_clip(stream: Stream, guidance: CFG, tmp_path: Path) -> None:
    """As a stream would be whose earlier chunks are those of the clip."""
    model, times = causal(stream, guidance), (1.0, 0.75, 0.0)
    make_pairs(model, Clipped(PROMPTS, clips, "a test"), tmp_path, PairPlan(times=times))
    reader = ShardReader(tmp_path, "pairs")
    states, stored = reader.read("states", [0, 1]), reader.read("clip", [0, 1])
    assert torch.equal(stored, clips([0, 1])), "byte for byte what was read"
    grid = reader.manifest["settings"]["grid"]
    loop = Chunks(network=model.denoiser, contract=model.card.contract, times=tuple(grid))
    cond, uncond = model.conditions(PROMPTS)
    memory, length = loop.begin(), stream.length(0)
    with torch.no_grad():
        for index, low in enumerate(range(0, 4, length)):
            here = slice(low, low + length)
            *_, made = loop.chunk(memory, states[:, 0, :, here], cond, uncond, Seeds((0, 1)))
            torch.testing.assert_close(states[:, -1, :, here], made.x, atol=2e-5, rtol=1e-4)
            (known,) = loop.known(memory, stored[:, :, here], cond, uncond, Seeds((0, 1)), index)
            assert known.memory is not None
            memory = known.memory


def test_the_clip_is_read_once(tmp_path: Path) -> None:
    model, seen = causal(), list[Tensor]()
    model.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    plan = PairPlan(times=(1.0, 0.0))
    made = make_pairs(model, Clipped(PROMPTS, clips, "a test"), tmp_path, plan, batch=2)
    assert [bool(t.any()) for t in seen] == [False, True, True, True, True] and all(len(t) == 4 for t in seen)
    cost = pairs_cost(model, 2, plan)
    assert cost.nfe == sum(map(len, seen)) == 20 and cost.nfe_per_pair == 10
    assert cost.bytes == 2 * 3 * 4 * 4 * 8 * 8 * 4
    assert ShardReader(made.folder, "pairs").manifest["nfe_per_pair"] == 10


def test_a_student_is_trained_on_them_and_streams(tmp_path: Path) -> None:
    model = causal()
    make_pairs(model, world_clips(model, 3, 5), tmp_path / "pairs", PairPlan(times=(1.0, 0.5, 0.0)))
    data = StoredPairs(path=str(tmp_path / "pairs"))
    batch = data.open(model, frozenset({"prompts", "pairs", "x0"})).batch(2, Rng(0))
    past = batch.require("pairs").past
    assert past is not None and past.chunks == (2, 2) and past.clips.shape == (2, 4, 4, 8, 8)
    assert torch.equal(batch.require("x0"), past.clips), "the endpoints are chunks that do not follow each other"
    method = KnowledgeDistillation(rollout=FromPairs(grids=((1.0, 0.5),), history=TeacherForced(stream=HALVES)))
    student = train(model, method, data, small(steps=2), tmp_path / "run", quiet=True)
    assert method.cost() == (Work("student", 6),), "the clean clip is a call, too"
    assert student.card.contract.stream == HALVES and student.card.contract.times(2) == (1.0, 0.5, 0.0)
    assert student.latents(PROMPTS).isfinite().all()


def test_the_student_reads_the_clips_that_the_teacher_read() -> None:
    model, states, read = causal(), torch.zeros(2, 3, 4, 4, 8, 8), list[Tensor]()
    pairs, (cond, uncond) = Pairs(states, (1.0, 0.5, 0.0), Past(clips([0, 1]), (2, 2))), model.conditions(PROMPTS)
    model.denoiser.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    rollout = FromPairs(grids=((1.0, 0.5),), history=TeacherForced(stream=HALVES))
    rollout(model.denoiser, Batch(cond, uncond, (4, 4, 8, 8), pairs=pairs), Rng(0), grad=False)
    assert torch.equal(read[0], clips([0, 1])) and len(read) == 2
    for history in (WholeClip(), TeacherForced(stream=Stream(chunks=(1,)))):
        wrong = FromPairs(grids=((1.0, 0.5),), history=history)
        with pytest.raises(ValueError, match=r"read clean chunks of \[2, 2\] latent frames .* write rollout.history"):
            wrong(model.denoiser, Batch(cond, uncond, (4, 4, 8, 8), pairs=pairs), Rng(0), grad=False)


def test_the_command_takes_clips_for_a_model_that_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    causal().save(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red ball")
    words = [
        "--model",
        str(tmp_path / "teacher"),
        "--output",
        str(tmp_path / "pairs"),
        "--times",
        "1",
        "0.5",
        "0",
        "--quiet",
    ]
    assert main(["pairs", str(tmp_path / "prompts.txt"), *words]) == 2
    assert "have no clips, and 'tiny' streams" in capsys.readouterr().err
    assert main(["pairs", "world:2", *words]) == 0
    assert "2 pairs of 10 network evaluations" in capsys.readouterr().out
    assert torch.equal(
        ShardReader(tmp_path / "pairs", "pairs").read("clip", [0, 1]), world_clips(causal(), 2, 0).latents([0, 1])
    )


def test_prepared_clips_are_those_of_the_folder(tmp_path: Path) -> None:
    model, cut = causal(), Cut(num_frames=4, height=32, width=32)
    prepare(make_videos(tmp_path / "videos", 2), tmp_path / "latents", model.codec, Preparation(cut=cut))
    made, reader = prepared_clips(tmp_path / "latents", model), ShardReader(tmp_path / "latents", "latents")
    assert torch.equal(made.latents([1, 0]), reader.read("latents", [1, 0])) and made[1] == reader.row(1)["caption"]
    make_pairs(model, made, tmp_path / "pairs", PairPlan(times=(1.0, 0.0), steps=2))
    other = causal()
    with torch.no_grad():
        next(other.codec.parameters()).add_(1)
    with pytest.raises(DataError, match="holds latents of autoencoder"):
        prepared_clips(tmp_path / "latents", other)


def test_rendered_clips_do_not_depend_on_their_batch() -> None:
    model = causal()
    made, other = world_clips(model, 4, 5), world_clips(model, 4, 6)
    together = made.latents([2, 0])
    assert torch.equal(together, torch.cat([made.latents([2]), made.latents([0])])) and together.shape == (
        2,
        4,
        4,
        8,
        8,
    )
    assert len(made) == 4 and made[:2] == tuple(made)[:2] and made.origin != other.origin
    assert not torch.equal(made.latents([1]), other.latents([1]))


def test_what_has_no_causal_trajectories_is_refused(tmp_path: Path) -> None:
    plan, shown = PairPlan(times=(1.0, 0.0)), Clipped(PROMPTS, clips, "a test")
    for model, prompts, said in (
        (causal(), PROMPTS, "'tiny' streams: its trajectories need clips"),
        (tiny_model(), shown, "'tiny' makes whole clips and reads none"),
        (causal(Stream(commit="last")), shown, "commit='last'.*Take a model trained with history TeacherForced"),
        (causal(Stream(rolling=2)), shown, "rolling=2"),
        (causal(), Clipped(PROMPTS, lambda rows: clips(rows)[:, :, :2], "short"), r"shape \[4, 2, 8, 8\], and pairs \[4, 4"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            make_pairs(model, prompts, tmp_path, plan)
    make_pairs(causal(), shown, tmp_path / "done", plan)
    with pytest.raises(DataError, match="clips: there a test, here another"):
        make_pairs(causal(), Clipped(PROMPTS, clips, "another"), tmp_path / "done", plan)

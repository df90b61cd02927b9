"""Sampling as a process: a request is checked at once, then sampled step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.attention import NAG
from fewstep.compress.stepwise import knows_steps
from fewstep.core import Call, Cond, Seeds
from fewstep.core.call import Constants, Negative, Runner, Sharing, every_block
from fewstep.diffusion import CFG, Prediction, Step, StepCountError
from fewstep.diffusion.samplers import Denoise
from fewstep.models.images import Images, first_latents
from fewstep.models.served import serving
from fewstep.streaming import LiveSession, LiveSnapshot, Session, Video, fitting
from fewstep.streaming.video import require_noise

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel
    from fewstep.models.card import Card


Texts = Callable[[Sequence[str]], Cond]
"""Conditions of prompts, as a text encoder gives them (`data.text_folder.TextFolder`)."""


@dataclass(frozen=True, eq=False)
class Lead:
    """Another model that makes the first steps, with the guidance of its own card: the teacher, for the composition of a clip."""

    model: VideoModel
    steps: int
    """Number of the first steps, at the times of the student's own grid."""
    texts: Texts | None = None
    """What has its conditions in place of its text encoder."""

    def check(self, model: VideoModel, count: int) -> None:
        """ValueError for a model that cannot make steps of this one's clips, and for all steps or none."""
        if not 1 <= self.steps < count:
            raise ValueError(
                f"a clip of {count} steps can have 1 to {count - 1} of its first by the teacher, not {self.steps}"
            )
        for what, mine, its in (
            ("noise path", model.denoiser.path, self.model.denoiser.path),
            ("latents", model.latent_shape(), self.model.latent_shape()),
        ):
            if mine != its:
                raise ValueError(
                    f"{self.model.card.name!r} cannot make the first steps of {model.card.name!r}: its {what} is {its}, not "
                    f"{mine}; give the teacher that this student was distilled from, at the same size"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Which clips a model shall make, and how. The default is what its card says."""

    prompts: Sequence[str] | Cond
    """Texts, one for each clip; or their conditions, which `VideoModel.conditions` has made (with images, if it has)."""
    negative: Cond | None = None
    """Conditions of the negative prompt, for guidance and `nag`. None: the card's prompt is encoded, where it is read."""
    nag: NAG | None = None
    """Push what tokens read of the prompt away from what they read of the negative one. It needs no second call, so it is for
    students without guidance, too. None: the attention to the prompt is as it was trained."""
    image: Images | None = None
    """First frame for an image-to-video model: one image for all prompts, or one per prompt."""
    last_image: Tensor | None = None
    """Last frame for a model that generates between two images."""
    video: Video | None = None
    """Video to begin with, in place of noise (`models.videos.video_of`): one to change, or, for a student that makes clips sharp
    (`FromVideo`), the low-resolution one."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the model reads (`ScalarInput`), by name, such as a guidance strength that was distilled. Those with a
    default may be left out."""
    seed: int | Sequence[int] = 0
    """One seed per prompt, or the first of consecutive seeds. A clip depends only on its own seed and prompt."""
    force: bool = False
    """Allow what the model was not trained for: another step count or number of frames, or guidance on top of a student's."""
    lead: Lead | None = None
    """Another model for the first steps; None: this one makes all."""
    texts: Texts | None = None
    """What has the conditions of prompts in place of the model's text encoder, which then need not be there."""
    runner: Runner = every_block
    """Runner of the blocks, such as `caching.SkipMiddle().begin()`. A runner with memory serves one request only."""
    shared: Sharing | None = None
    """Processes that generate these clips together; all of them must pass the same arguments."""

    @property
    def seeds(self) -> tuple[int, ...]:
        if isinstance(self.seed, int):
            return tuple(range(self.seed, self.seed + len(self.prompts)))
        return tuple(self.seed)

    def times(self, card: Card) -> tuple[float, ...]:
        """StepCountError for a step count that the model was not trained for."""
        try:
            return card.contract.times(self.num_inference_steps, force=self.force)
        except StepCountError as error:
            raise StepCountError(f"{error} Or pass force (--force) to sample on an untrained grid.") from None

    def guidance(self, card: Card) -> CFG:
        """ValueError for a scale on a student that has its guidance distilled in."""
        own, scale = card.contract.guidance, self.guidance_scale
        if scale is None or own.rescaled(scale) == own:
            return own
        if card.role == "student" and not self.force:
            raise ValueError(
                f"guidance was distilled into this student; guidance_scale={scale} would apply it twice. "
                "Leave it out, or pass force (--force)."
            )
        return own.rescaled(scale)

    def check(self, card: Card) -> None:
        """ValueError for another number of frames than the card's; and, where clips are made chunk by chunk and may be of any
        length, for what is for whole clips."""
        if self.video is not None and self.lead is not None:
            raise ValueError("the first steps are left out where a clip begins with a video; leave out lead, or video")
        if self.video is None:
            require_noise(card.contract.grid)
        if card.contract.stream is None:
            if self.num_frames not in (None, card.num_frames) and not self.force:
                raise ValueError(
                    f"{card.name!r} makes clips of {card.num_frames} frames and was asked for {self.num_frames}, which it was "
                    "not trained for. Leave num_frames out, or pass force (--force)."
                )
            return
        for name in ("image", "last_image", "lead", "nag", "shared"):
            if getattr(self, name) is not None:
                raise ValueError(f"{card.name!r} makes clips chunk by chunk, and takes no {name}; leave it out")
        if self.runner is not every_block:
            raise ValueError("a runner serves one chunk; leave it out, or give a cache policy to `streaming.Session`")


def sampling(model: VideoModel, request: Request) -> Iterator[Step]:
    """The steps of one run. What is refused is refused here; what is returned makes a step whenever it is asked for one."""
    times, guidance = request.times(model.card), request.guidance(model.card)
    request.check(model.card)
    if model.card.contract.stream is not None:
        return without_gradient(_streamed(model, request, guidance))
    denoise = _denoising(model, request, guidance)
    noise, shape = Seeds(request.seeds, device=str(model.device)), model.latent_shape(request.num_frames)
    grid, path = model.card.contract.grid, model.denoiser.path
    with torch.no_grad():
        eps = noise.randn((len(request.prompts), *shape), "start")
        if request.video is None:
            start = path.prior(eps, 1.0 if grid.from_noise else times[0])
        else:
            start, times = request.video.start(0, eps, path, grid, times)
    if request.lead is not None:
        denoise = _led(denoise, model, request, len(times) - 1)
    steps = model.card.contract.sampler.sampling(denoise, start, times, rng=noise)
    return without_gradient(steps)


def streaming(
    model: VideoModel,
    start: Sequence[str] | LiveSnapshot,
    *,
    video: Video | None = None,
    image: Tensor | None = None,
    **options: Any,
) -> LiveSession:
    """A live stream of prompts, or one that goes on after a snapshot, or of a changed `video`; it may begin with an `image`
    (`images.first_latents`). `options` are those of `Session`.

    Chunks are decoded beside the denoiser's calls; on a CPU, whose cores these need, and with offload between them.
    """
    beside = model.runtime.offload == "none" and model.device.type != "cpu"
    if image is not None and (video is not None or isinstance(start, LiveSnapshot)):
        raise ValueError("only a new stream that changes no video begins with an image; leave out the image")
    if isinstance(start, LiveSnapshot):
        return LiveSession.restore(model, start, video=video, beside=beside, **options)
    session = Session(model, start, **options)
    if image is not None:
        session.begin_with(first_latents(model, len(start), image))
    return LiveSession(session, video=video, beside=beside)


def _streamed(model: VideoModel, request: Request, guidance: CFG) -> Iterator[Step]:
    """The steps of all chunks of a clip, one after the other; the latents of each are all that is there by then."""
    contract, frames = model.card.contract, request.num_frames or model.card.num_frames
    assert contract.stream is not None
    try:
        lengths = fitting(contract.stream, frames, lambda count: model.latent_shape(count)[1])
    except ValueError as error:
        raise ValueError(f"{model.card.name!r}: {error}") from None
    with torch.no_grad(), model.runtime.precision():
        conditions = _conditions(model, request, guided=guidance.active)
    session = Session(
        model.with_card(contract=replace(contract, guidance=guidance)), [""] * len(request.prompts), seed=request.seeds,
        conditions=conditions, num_inference_steps=request.num_inference_steps, force=request.force,
    )  # fmt: skip

    counts = session.counts(len(lengths))

    def steps() -> Iterator[Step]:
        done = list[Tensor]()
        for chunk in range(len(lengths)):
            for step in session.steps(request.video, left=len(lengths) - chunk):
                x = torch.cat([*done, step.x], 2)
                yield replace(step, index=sum(counts[:chunk]) + step.index, steps=sum(counts), x=x)
            done.append(step.x)

    return steps()


def _denoising(model: VideoModel, request: Request, guidance: CFG) -> Denoise:
    """What a model predicts in one run of sampling."""
    if request.nag is not None:
        require_nag(type(model.denoiser.backbone))
    with torch.no_grad(), model.runtime.precision():
        cond, uncond = _conditions(model, request, guided=guidance.active or request.nag is not None)
    if request.runner is not every_block and model.denoiser.backbone.flow_head is not None:
        raise ValueError(
            "a cache policy takes each block to run once in a step, which those of a flow head do not; leave it out"
        )
    runner, early = model.runner(request.runner), model.runtime.offload != "block" and not knows_steps(model.denoiser)
    constants = Constants() if early else None
    negative = None if request.nag is None else Negative(uncond, request.nag)

    def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
        call = replace(call, runner=runner, shared=request.shared, constants=constants, negative=negative)
        with serving(model):
            return guidance(model.denoiser, x_t, t, cond, uncond, call, calls=model.runtime.guidance_calls)

    return denoise


def _led(own: Denoise, model: VideoModel, request: Request, count: int) -> Denoise:
    """`own` predictions after those of the request's other model, for the first steps. A runner is for one network: its own."""
    lead = request.lead
    assert lead is not None
    lead.check(model, count)
    theirs = replace(request, scalars={}, runner=every_block, nag=None, texts=lead.texts)
    first = _denoising(lead.model, theirs, lead.model.card.contract.guidance)

    def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
        leads = call.step < lead.steps
        (model if leads else lead.model).bring()  # with offload it makes room for the other
        return (first if leads else own)(x_t, t, call)

    return denoise


def _conditions(model: VideoModel, request: Request, guided: bool) -> tuple[Cond, Cond]:
    """Those of the request, where they are ready; the others are made. ValueError for some that do not fit each other."""
    prompts, negative = request.prompts, request.negative
    if not isinstance(prompts, Cond):
        images = request.image, request.last_image, request.num_frames
        guided = guided and negative is None
        cond, uncond = model.conditions(prompts, *images, scalars=request.scalars, guided=guided, texts=request.texts)
        return cond, uncond if negative is None else negative.to(model.device)
    if request.image is not None or request.last_image is not None or request.scalars or request.texts is not None:
        raise ValueError(
            "these conditions are ready and have their images and scalars already; leave out image, last_image and scalars, and "
            "texts"
        )
    if guided and negative is None:
        what = "guidance" if request.nag is None else "nag"
        raise ValueError(f"{what} reads a negative prompt too; give negative, the second of model.conditions(...)")
    return prompts.to(model.device), (negative or prompts).to(model.device)


def require_nag(network: type[nn.Module]) -> None:
    """ValueError for a denoiser of a class whose attention to the text is not apart from that to the clip."""
    if not getattr(network, "text_first", False):
        raise ValueError(
            f"nag (--nag-scale) changes layers that attend to the text alone, and a {network.__name__} has none that fewstep "
            "reaches; VideoDiT, Wan, WanExperts and LTX have. Leave it out, or apply guidance on top (guidance_scale=2 and "
            "force), which takes two calls per step"
        )


@torch.no_grad()
def without_gradient(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps. Gradients are as they were whenever the caller is at work."""
    yield from steps

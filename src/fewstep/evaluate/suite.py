"""An evaluation suite: what is measured, and on which prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fewstep.diffusion import Contract, Step
from fewstep.evaluate.real import RealClips
from fewstep.models.bundle import VideoModel


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What an evaluation measures, and on how many clips."""

    prompts: int = 64
    """Number of new prompts of the built-in world; `seed` draws scenes and wordings. No training uses this seed."""
    texts: tuple[str, ...] = ()
    """Your own prompts, in place of the world's. Attributes are checked only if the world's grammar understands every
    prompt."""
    paraphrased: float = 0.5
    """Share of the new prompts that are paraphrases of the canonical sentence."""
    seeds_per_prompt: int = 2
    """Clips per prompt; diversity needs two or more."""
    num_frames: int | None = None
    """Frames per clip; None: from the models' cards. Another number is allowed, and the report notes it."""
    seed: int = 2024
    batch: int = 32
    """Clips generated at once."""
    features: str = "auto"
    """Features of the Frechet distance: `pooled`, a file or folder (`extractors.feature_map`), or `auto` (the world's if
    they fit)."""
    real: RealClips | None = None
    """Real videos that distances are measured to, one per prompt. Without `texts`, their captions are the prompts."""
    clip: str = ""
    """Folder of a CLIP model for CLIPScore (`clip_score.ClipScore`); empty: no CLIPScore."""
    reference: str | None = None
    """Row that motion, diversity and flicker are relative to; None: the first row."""
    latency_runs: int = 20
    latency_budget: float = 20.0
    """Seconds for the latency runs of each row; at least 3 runs are made."""
    previews: int = 6
    """Number of prompts shown in the report."""

    def __post_init__(self) -> None:
        counts = {"prompts": self.prompts, "seeds_per_prompt": self.seeds_per_prompt, "batch": self.batch}
        counts |= {} if self.num_frames is None else {"num_frames": self.num_frames}
        low = [f"{name}={value}" for name, value in counts.items() if value < 1]
        if low or not 0 <= self.paraphrased <= 1:
            raise ValueError(
                f"counts must be at least 1, and paraphrased between 0 and 1; wrong: {', '.join(low) or self.paraphrased}"
            )
        if (len(self.texts) or self.prompts) * self.seeds_per_prompt < 4:
            raise ValueError("a Frechet distance needs at least 4 clips; raise prompts or seeds_per_prompt")
        if self.real is not None and self.seeds_per_prompt != 1:
            raise ValueError(
                f"seeds_per_prompt must be 1 with real clips, got {self.seeds_per_prompt}: each prompt has one real clip, and a "
                "distance needs equal numbers; measure diversity in an evaluation without real clips"
            )

    @property
    def distance(self) -> str:
        """Name of the Frechet distance: FVD if it is measured to real clips."""
        return "Frechet" if self.real is None else "FVD"

    @classmethod
    def avdm2(cls, *, real: RealClips, features: str, clip: str, **options: Any) -> Suite:
        """The protocol of AVDM2 (2412.05899): 100 captions of real clips, one clip per caption; FVD to the real clips, CLIPScore.

        The paper's extractor is I3D. The paper does not say which CLIP it uses, or how it cuts real clips. `options` are other
        fields.
        """
        return cls(
            real=real, features=features, clip=clip, **{"prompts": 100, "seeds_per_prompt": 1, "batch": 4, **options}
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row to measure."""

    name: str
    """Name shown in the report, such as "teacher 50"; must be unique."""
    model: VideoModel
    steps: int | None = None
    """Number of steps; None: the default of the model's contract."""
    guidance_scale: float | None = None
    """Guidance scale; None: the contract's."""

    @property
    def contract(self) -> Contract:
        """The model's contract with this entry's steps and guidance."""
        own = self.model.card.contract
        guidance = own.guidance if self.guidance_scale is None else own.guidance.rescaled(self.guidance_scale)
        return replace(own, guidance=guidance, steps=own.steps if self.steps is None else self.steps)

    def sampling(self, prompts: Sequence[str], seeds: Sequence[int], num_frames: int) -> Iterator[Step]:
        """Sample clips of these prompts and seeds, step by step."""
        return self.model.sampling(
            prompts, num_inference_steps=self.contract.steps, guidance_scale=self.guidance_scale, num_frames=num_frames,
            seed=seeds, force=num_frames != self.model.card.num_frames,
        )  # fmt: skip

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)


def entries(teacher: VideoModel, student: VideoModel, counts: Sequence[int] = ()) -> list[Entry]:
    """The rows of a fair comparison: the teacher at its own number of steps (the reference), the teacher at each step count
    of the student (the baseline that training must beat), and the student at each. `counts`: default, all step counts that
    the student was trained for.
    """
    full, contract = teacher.card.contract.steps, student.card.contract
    counts = counts or contract.counts[::-1]
    return [
        Entry(name=f"teacher {full}", model=teacher),
        *(Entry(name=f"teacher {n}", model=teacher, steps=n) for n in counts if n != full),
        *(Entry(name=f"student {n}", model=student, steps=n) for n in counts),
    ]

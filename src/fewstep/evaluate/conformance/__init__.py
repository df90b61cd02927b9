"""Checks that a model follows the conventions that fewstep relies on. Each check is one small function and one line below.

The first paragraph of a check's docstring says what must hold; the second, what a failure usually means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.evaluate.conformance import forward, streaming, trained, training
from fewstep.evaluate.conformance.subject import Fault, Measured, NotApplicable, Options, Subject
from fewstep.models import VideoModel

Check = Callable[[Subject], Measured]
Progress = Callable[[str, int, int], None]
"""Called as `("checks", done, of how many)`."""
Outcome = Literal["pass", "fail", "not applicable"]

CHECKS: tuple[Check, ...] = (
    forward.forward,
    forward.weights,
    forward.times,
    forward.text,
    forward.padding,
    forward.batch,
    forward.guidance,
    forward.pipeline,
    trained.convention,
    trained.told_time,
    streaming.frame_times,
    streaming.full_mask,
    streaming.future,
    streaming.cache,
    training.features,
    training.jvp,
    training.bf16,
    training.checkpointing,
    training.saved,
)
"""All checks, in order: a check may `require` earlier ones."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    outcome: Outcome
    figure: float | None
    """Measured figure; None if nothing was measured."""
    bound: str
    """Bound on the figure, such as `<= 1.0e-04`."""
    note: str
    what: str
    """Property that was checked."""
    meaning: str
    """Usual cause of a failure."""


@dataclass(frozen=True)
class Conformance:
    """All findings on a model, with the size and the precision of the checks."""

    model: str
    network: str
    num_frames: int
    height: int
    width: int
    latents: tuple[int, ...]
    """Shape of the latents, `(C, F, h, w)`."""
    dtype: str
    device: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome == "fail")


def check_model(
    model: VideoModel, options: Options = Options(), only: Sequence[str] = (), progress: Progress | None = None
) -> Conformance:
    """Run all checks, or the named ones, on a model. The model is not changed.

    ValueError names an unknown check, or says why the model cannot be checked at this size.
    """
    known = {check.__name__: check for check in CHECKS}
    if unknown := sorted(set(only) - known.keys()):
        raise ValueError(f"unknown checks: {', '.join(unknown)}; choose from {', '.join(known)}")
    names = [name for name in known if not only or name in only]
    findings = []
    with torch.no_grad():
        s = Subject(model, options)
        for done, name in enumerate(names, 1):
            findings.append(_finding(name, known[name], s))
            if progress is not None:
                progress("checks", done, len(names))
    card = s.model.card
    return Conformance(
        model=card.name, network=type(s.backbone).__name__, num_frames=card.num_frames, height=card.height,
        width=card.width, latents=s.shape, dtype=str(s.dtype).removeprefix("torch."), device=str(s.x_t.device),
        findings=tuple(findings),
    )  # fmt: skip


def explain(check: Check) -> tuple[str, str]:
    """What a check tests, and what a failure usually means."""
    what, _, meaning = (inspect.getdoc(check) or "").partition("\n\n")
    return " ".join(what.split()), " ".join(meaning.split())


def _finding(name: str, check: Check, subject: Subject) -> Finding:
    what, meaning = explain(check)
    try:
        measured = check(subject)
    except NotApplicable as reason:
        return Finding(name, "not applicable", None, "", str(reason), what, meaning)
    except Exception as error:  # a broken model can raise anything, and the other checks must still run
        subject.failed.add(name)
        note = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
        return Finding(name, "fail", None, "", note, what, meaning)
    if not measured.good:
        subject.failed.add(name)
    outcome: Outcome = "pass" if measured.good else "fail"
    bound = f"{'>=' if measured.at_least else '<='} {measured.bound:.1e}"
    return Finding(name, outcome, measured.figure, bound, measured.note, what, meaning)


__all__ = ["CHECKS", "Check", "Conformance", "Finding", "Measured", "Options", "Outcome", "check_model", "explain"]

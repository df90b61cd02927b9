"""Does a model keep the conventions that everything else counts on? One small function per check, one line to add one.

A check's docstring says in its first paragraph what must hold, and in the second what a failure usually means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.evaluate.conformance import forward, streaming, trained, training
from fewstep.evaluate.conformance.subject import Fault, Measured, NotApplicable, Options, Subject
from fewstep.models import VideoModel

Check = Callable[[Subject], Measured]
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
"""In this order: a check may `require` earlier ones."""


@dataclass(frozen=True)
class Finding:
    """What one check says of a model."""

    name: str
    outcome: Outcome
    measured: Measured | None
    """None where the check does not apply, or failed without a figure."""
    note: str
    what: str
    """What was checked."""
    meaning: str
    """What a failure usually means."""


def check_model(model: VideoModel, options: Options = Options(), only: Sequence[str] = ()) -> Iterator[Finding]:
    """Run the checks (those named, or all) on a model, one after the other. The model is left as it is.

    ValueError names an unknown check, or says why the model cannot be checked at this size.
    """
    known = {check.__name__: check for check in CHECKS}
    if unknown := sorted(set(only) - known.keys()):
        raise ValueError(f"there are no checks {', '.join(unknown)}; choose from {', '.join(known)}")
    with torch.no_grad():
        subject = Subject(model, options)
        for name, check in known.items():
            if not only or name in only:
                yield _finding(name, check, subject)


def explain(check: Check) -> tuple[str, str]:
    """What a check is, and what its failure usually means."""
    what, _, meaning = (inspect.getdoc(check) or "").partition("\n\n")
    return " ".join(what.split()), " ".join(meaning.split())


def _finding(name: str, check: Check, subject: Subject) -> Finding:
    what, meaning = explain(check)
    outcome: Outcome
    try:
        measured = check(subject)
        outcome, note = "pass" if measured.good else "fail", measured.note
    except NotApplicable as reason:
        measured, outcome, note = None, "not applicable", str(reason)
    except Exception as error:  # whatever a broken model does: the other checks still say something
        measured, outcome = None, "fail"
        note = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
    if outcome == "fail":
        subject.failed.add(name)
    return Finding(name, outcome, measured, note, what, meaning)


__all__ = ["CHECKS", "Check", "Finding", "Measured", "Options", "Outcome", "check_model", "explain"]

"""Decide whether an evaluation shows enough quality to claim a speed-up."""

from __future__ import annotations

from fewstep.evaluate.results import Report, Row

MARGIN = 0.1
"""By how much the share of clips that are all right may be below the reference's: the whole interval must be above that."""
SEES_TIME = 2.0
"""Features see time where shuffling the frames of true clips moves them so many times the noise floor away."""


def unearned(report: Report, hero: Row) -> str:
    """Why no speed may be claimed for `hero`; empty where its quality has been shown.

    It has been shown by the first of these that was measured: clips are all right about as often as the reference's, or more
    often than the teacher's at the same steps; clips fit their prompts better (CLIPScore) than the teacher's at the same
    steps, or as well as the reference's; their distance, by features that see time, is below the teacher's at the same steps,
    or near the noise floor. Every time the whole 95 % interval must be on the right side. Speed, motion and diversity show
    nothing: noise is fast, moves, and is diverse.
    """
    reference, gain = report.row(report.reference), hero.gain
    if hero.accuracy is not None and hero.accuracy_ci is not None:
        near = hero.accuracy_ci[0] >= (reference.accuracy or 0.0) - MARGIN and hero.accuracy_ci[0] > 0
        better = gain is not None and gain.accuracy_ci is not None and gain.accuracy_ci[0] > 0
        return (
            ""
            if near or better
            else "its clips are neither right as often as the reference's, nor more often than before"
        )
    if hero.clip_score is not None and hero.clip_score_ci is not None:
        near = hero.clip_score_ci[0] >= (reference.clip_score or 0.0)
        better = gain is not None and gain.clip_score_ci is not None and gain.clip_score_ci[0] > 0
        return "" if near or better else "its CLIPScore is not above the teacher's at the same steps"
    if report.frechet_shuffled < SEES_TIME * report.frechet_floor:
        return "nothing but a distance was measured, by features that do not see time"
    near = hero.frechet_ci is not None and hero.frechet_ci[1] <= 2 * report.frechet_floor
    better = gain is not None and gain.frechet_ci is not None and gain.frechet_ci[1] < 0
    return "" if near or better else f"its {report.distance} is not below the teacher's at the same steps"

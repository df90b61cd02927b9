"""Decide whether an evaluation shows enough quality to claim a speed-up."""

from __future__ import annotations

from fewstep.evaluate.results import Report, Row

MARGIN = 0.1
"""Largest gap to the reference's accuracy; the whole interval must be above accuracy minus this."""
SEES_TIME = 2.0
"""Features see time if the distance of true clips with shuffled frames is at least this many times the noise floor."""


def unearned(report: Report, hero: Row) -> str:
    """Why no speed-up may be claimed for `hero`; empty if its quality has been shown.

    The first figure that was measured decides. Accuracy: about as high as the reference's, or higher than the teacher's at the
    same steps. CLIPScore: as high as the reference's, or higher than the teacher's at the same steps. Distance, with features
    that see time: near the noise floor, or below the teacher's at the same steps. The whole 95 % interval must fulfil the
    condition. Speed, motion and diversity prove nothing: noise is fast, moves, and is diverse.
    """
    reference, gain = report.row(report.reference), hero.gain
    if hero.accuracy is not None and hero.accuracy_ci is not None:
        near = hero.accuracy_ci[0] >= (reference.accuracy or 0.0) - MARGIN and hero.accuracy_ci[0] > 0
        better = gain is not None and gain.accuracy_ci is not None and gain.accuracy_ci[0] > 0
        return (
            ""
            if near or better
            else "its accuracy is neither near the reference's nor above that of the teacher at the same steps"
        )
    if hero.clip_score is not None and hero.clip_score_ci is not None:
        near = hero.clip_score_ci[0] >= (reference.clip_score or 0.0)
        better = gain is not None and gain.clip_score_ci is not None and gain.clip_score_ci[0] > 0
        return "" if near or better else "its CLIPScore is not above the teacher's at the same steps"
    if report.frechet_shuffled < SEES_TIME * report.frechet_floor:
        return "only a distance was measured, with features that do not see time"
    near = hero.frechet_ci is not None and hero.frechet_ci[1] <= 2 * report.frechet_floor
    better = gain is not None and gain.frechet_ci is not None and gain.frechet_ci[1] < 0
    return "" if near or better else f"its {report.distance} is not below the teacher's at the same steps"

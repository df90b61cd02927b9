"""Rollouts: how the samples are made that a student is trained on. One per file, listed in ROLLOUTS."""

from fewstep.methods.rollouts.backward_simulation import BackwardSimulation
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit, pick, predict
from fewstep.methods.rollouts.from_data import FromData
from fewstep.methods.rollouts.from_low import FromLow
from fewstep.methods.rollouts.from_pairs import FromPairs
from fewstep.methods.rollouts.grids import NESTED, Grids, exact, student_contract
from fewstep.methods.rollouts.rolling_forced import RollingForced
from fewstep.methods.rollouts.self_forced import SelfForced
from fewstep.methods.rollouts.streaming_long import StreamingLong

ROLLOUTS: tuple[type[Rollout], ...] = (
    BackwardSimulation, FromData, FromLow, FromPairs, RollingForced, SelfForced, StreamingLong,
)  # fmt: skip

__all__ = [
    "NESTED", "ROLLOUTS", "BackwardSimulation", "FromData", "FromLow", "FromPairs", "Grids", "Rolled", "RollingForced", "Rollout",
    "SelfForced", "StreamingLong", "Visit", "exact", "pick", "predict", "student_contract",
]  # fmt: skip

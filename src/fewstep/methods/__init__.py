"""Distillation methods: one file per algorithm, listed in METHODS."""

from fewstep.methods.adversarial import AdversarialDistillation, ProgressiveAdversarial
from fewstep.methods.adversary import Adversary
from fewstep.methods.attributes import ReadAttributes
from fewstep.methods.avdm2 import AVDM2
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.consistency import Consistency
from fewstep.methods.distribution import TDM, MomentMatching, TransitionMatching, TwinFlow
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.feedback import GRPO, PSO, Alternating
from fewstep.methods.flow_matching import FlowMatching
from fewstep.methods.histories import HISTORIES, DiffusionForced, History, MovingBuffer, TeacherForced, WholeClip
from fewstep.methods.knowledge_distillation import KnowledgeDistillation
from fewstep.methods.matching import MATCHINGS, FDivergence, Fisher, Matching, ReverseKL, ScoreImplicit
from fewstep.methods.progressive import Progressive
from fewstep.methods.reconstruction import Reconstruction
from fewstep.methods.recycling import ErrorRecycling
from fewstep.methods.rewards import REWARDS, Feedback, MotionReward, Reward, Reweighting, WorldReward
from fewstep.methods.roles import ROLES, Copy, Decoder, Heads, Judge, Making, Other, Role, Weak
from fewstep.methods.rollouts import (
    ROLLOUTS,
    BackwardSimulation,
    FromData,
    FromLow,
    FromPairs,
    Rolled,
    RollingForced,
    Rollout,
    SelfForced,
    StreamingLong,
)
from fewstep.methods.scorers import Scorers
from fewstep.methods.self_adversarial import SelfAdversarial
from fewstep.methods.upscaling import LatentPixel, TimeAwareDistillation
from fewstep.methods.work import Work, in_forwards

METHODS = (
    FlowMatching, Reconstruction, ReadAttributes, KnowledgeDistillation, Progressive, Consistency, DMD2, AVDM2,
    AdversarialDistillation, ProgressiveAdversarial, TDM, MomentMatching, TransitionMatching, TwinFlow, SelfAdversarial,
    PSO, GRPO, Alternating, LatentPixel, TimeAwareDistillation,
)  # fmt: skip

__all__ = [
    "AVDM2", "DMD2", "GRPO", "HISTORIES", "MATCHINGS", "METHODS", "PSO", "REWARDS", "ROLES", "ROLLOUTS", "TDM",
    "AdversarialDistillation", "Adversary", "Alternating", "BackwardSimulation", "Consistency", "Copy", "Decoder",
    "DiffusionForced", "ErrorRecycling", "FDivergence", "Feedback", "Fisher", "FlowMatching", "FromData", "FromLow",
    "FromPairs", "Heads", "History", "Judge", "KnowledgeDistillation", "LatentPixel", "Making", "Matching", "Method",
    "MomentMatching", "MotionReward", "MovingBuffer", "Nets", "Other", "Progressive", "ProgressiveAdversarial",
    "ReadAttributes", "Reconstruction", "ReverseKL", "Reward", "Reweighting", "Role", "Rolled", "RollingForced", "Rollout",
    "ScoreImplicit", "Scorers", "SelfAdversarial", "SelfForced", "StreamingLong", "Sync", "TeacherForced",
    "TimeAwareDistillation", "TransitionMatching", "TwinFlow", "Update", "Weak", "WholeClip", "Work", "WorldReward",
    "in_forwards",
]  # fmt: skip

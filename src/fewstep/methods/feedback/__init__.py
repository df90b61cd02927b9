"""Methods that train a student that has been distilled on what is better: pairs of outcomes, or a reward."""

from fewstep.methods.feedback.alternating import Alternating
from fewstep.methods.feedback.grpo import GRPO
from fewstep.methods.feedback.pso import PSO

__all__ = ["GRPO", "PSO", "Alternating"]

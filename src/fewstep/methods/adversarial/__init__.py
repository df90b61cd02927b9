"""Methods whose student learns from a discriminator first."""

from fewstep.methods.adversarial.adversarial_distillation import AdversarialDistillation
from fewstep.methods.adversarial.progressive_adversarial import ProgressiveAdversarial

__all__ = ["AdversarialDistillation", "ProgressiveAdversarial"]

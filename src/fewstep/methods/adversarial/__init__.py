"""Methods whose student learns from a discriminator first."""

from fewstep.methods.adversarial.adversarial_distillation import AdversarialDistillation

__all__ = ["AdversarialDistillation"]

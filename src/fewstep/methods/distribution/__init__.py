"""Methods that match distributions, besides DMD2 and what it holds."""

from fewstep.methods.distribution.moment_matching import MomentMatching
from fewstep.methods.distribution.tdm import TDM
from fewstep.methods.distribution.transition_matching import TransitionMatching
from fewstep.methods.distribution.twin_flow import TwinFlow

__all__ = ["TDM", "MomentMatching", "TransitionMatching", "TwinFlow"]

"""How a student's distribution is brought to its teacher's. One per file, listed in MATCHINGS."""

from fewstep.methods.matching.base import Matching, Noised, Point, Scores
from fewstep.methods.matching.f_divergence import FDivergence
from fewstep.methods.matching.fisher import Fisher
from fewstep.methods.matching.reverse_kl import ReverseKL
from fewstep.methods.matching.score_implicit import ScoreImplicit

MATCHINGS: tuple[type[Matching], ...] = (ReverseKL, FDivergence, Fisher, ScoreImplicit)

__all__ = ["MATCHINGS", "FDivergence", "Fisher", "Matching", "Noised", "Point", "ReverseKL", "ScoreImplicit", "Scores"]

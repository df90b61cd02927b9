"""Caches of sampling: results that a step reuses from an earlier step, one policy per file."""

from fewstep.caching.base import CachePolicy
from fewstep.caching.skip_middle import SkipMiddle

CACHES: tuple[type[CachePolicy], ...] = (SkipMiddle,)

__all__ = ["CACHES", "CachePolicy", "SkipMiddle"]

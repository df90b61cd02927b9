"""Causal students that make video chunk by chunk: the loop, and sessions that people watch."""

from fewstep.streaming.blocks import Chunks, Made
from fewstep.streaming.session import Session, Snapshot

__all__ = ["Chunks", "Made", "Session", "Snapshot"]

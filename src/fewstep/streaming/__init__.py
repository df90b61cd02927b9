"""Streaming: causal students that generate video chunk by chunk, and sessions."""

from fewstep.streaming.blocks import Chunks, Made
from fewstep.streaming.session import Session, Snapshot

__all__ = ["Chunks", "Made", "Session", "Snapshot"]

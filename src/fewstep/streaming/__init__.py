"""Streaming: causal students that generate video chunk by chunk, and sessions."""

from fewstep.streaming.blocks import Chunks, Made
from fewstep.streaming.live import LiveChunk, LiveSession, LiveSnapshot, Took
from fewstep.streaming.session import Session, Snapshot, Video

__all__ = ["Chunks", "LiveChunk", "LiveSession", "LiveSnapshot", "Made", "Session", "Snapshot", "Took", "Video"]

"""Streaming: causal students that generate video chunk by chunk, and sessions."""

from fewstep.streaming.blocks import Chunks, Made
from fewstep.streaming.plan import fitting
from fewstep.streaming.rolling import Rolling, Tick
from fewstep.streaming.session import Session, Snapshot
from fewstep.streaming.switch import Fade, Switch

__all__ = ["Chunks", "Fade", "Made", "Rolling", "Session", "Snapshot", "Switch", "Tick", "fitting"]

"""Streaming: causal students that generate video chunk by chunk, and sessions."""

from fewstep.streaming.blocks import Chunks, Flying, Made
from fewstep.streaming.cascade import cascaded
from fewstep.streaming.control import Control
from fewstep.streaming.live import LiveChunk, LiveSession, LiveSnapshot, Took
from fewstep.streaming.pipelined import pipelined
from fewstep.streaming.plan import fitting
from fewstep.streaming.rolling import Rolling
from fewstep.streaming.session import Seen, Session, Snapshot
from fewstep.streaming.switch import Fade, Switch
from fewstep.streaming.video import Video

__all__ = [
    "Chunks", "Control", "Fade", "Flying", "LiveChunk", "LiveSession", "LiveSnapshot", "Made", "Rolling", "Seen", "Session",
    "Snapshot", "Switch", "Took", "Video", "cascaded", "fitting", "pipelined",
]  # fmt: skip

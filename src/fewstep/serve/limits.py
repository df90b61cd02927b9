"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.core.bounds import Count, Positive, require_bounds

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
"""Names of this machine that no other reaches it by."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """For everybody, or for each holder of a key where it says so."""

    streams: Count = 4
    """Streams of one holder, with those that wait."""
    waiting: Count = 16
    """Streams that wait for room."""
    sockets: Count = 2000
    """Connections of viewers."""
    seconds: Positive = 600.0
    """Length of a stream or a clip."""
    idle: Positive = 60.0
    """Seconds after which a stream that its viewer has left paused is ended."""
    grace: Positive = 20.0
    """Seconds that a stream waits for a viewer whose connection was lost."""
    hello: Positive = 10.0
    """Seconds until a new connection must have said `init`."""
    unread: Positive = 20.0
    """Seconds that a message waits for a viewer who reads nothing. Then the connection is dropped."""
    messages: Count = 50
    """Messages of a viewer per second."""
    jobs: Count = 20
    """Clips of one holder that are not finished."""
    kept: Positive = 24 * 3600.0
    """Seconds that finished clips and snapshots of streams are kept."""
    snapshots: Count = 20
    """Snapshots of one holder; the oldest is deleted for another one."""
    upload: Count = 20 << 20
    """Bytes of a request with a picture."""
    pixels: Count = 1 << 25
    """Pixels of a picture, decoded."""
    clip: Count = 10**9
    """Bytes of a clip, decoded."""
    free: Count = 1 << 28
    """Bytes of the disk that must be free before a clip is accepted."""

    def __post_init__(self) -> None:
        require_bounds(self)

"""What `/metrics` tells."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
_LONG = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_MILLISECONDS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)


class Metrics:
    """Of one server; a registry of its own, so that several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.first_frame = Histogram(
            "fewstep_first_frame_seconds",
            "From a stream's request to its first frames",
            buckets=_SECONDS,
            registry=registry,
        )
        self._stage = Histogram(
            "fewstep_chunk_milliseconds", "What a chunk takes", ["stage"], buckets=_MILLISECONDS, registry=registry
        )
        self.streams = Gauge("fewstep_streams", "Streams that are served", registry=registry)
        self.waiting = Gauge("fewstep_streams_waiting", "Streams that wait for room", registry=registry)
        self.load = Gauge("fewstep_load", "Share of the worker's time that streams take", registry=registry)
        self.sockets = Gauge("fewstep_sockets", "Connections of viewers", registry=registry)
        self.deaths = Gauge("fewstep_worker_deaths", "How often the worker has died", registry=registry)
        self.refused = Counter("fewstep_refused", "Streams and clips that were refused", ["code"], registry=registry)
        self.dropped = Counter(
            "fewstep_dropped", "Connections that were dropped because nothing was read", registry=registry
        )
        self.clips_waiting = Gauge("fewstep_clips_waiting", "Clips that wait", registry=registry)
        self.clips = Counter("fewstep_clips", "Clips by how they ended", ["status"], registry=registry)
        self.clip_seconds = Histogram(
            "fewstep_clip_seconds", "From a clip's request to its file", buckets=_LONG, registry=registry
        )

    def chunk(self, denoise: float, commit: float, decode: float, encode: float) -> None:
        """Milliseconds of a chunk's stages."""
        for stage, took in (("denoise", denoise), ("commit", commit), ("decode", decode), ("encode", encode)):
            self._stage.labels(stage).observe(took)

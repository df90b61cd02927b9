"""examples/openai_client.py against the server that it asks for: `fewstep serve world/stream world`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from fewstep.serve.app import Server
from fewstep.serve.worker import Served
from support_serve import running

SCRIPT = Path(__file__).parent.parent / "examples" / "openai_client.py"


@pytest.mark.timeout(240)
def test_the_walk_through_with_openais_client_runs(tmp_path: Path) -> None:
    """It prints what docs/serving.md says, and its videos have the frames that it asked for."""
    served = Served(models=(("world/stream", "world/stream"), ("world", "world")), threads=1)
    with running(Server(served, folder=tmp_path / "served")) as server:
        command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), server.url]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    if path := os.environ.get("FEWSTEP_TRANSCRIPT"):
        Path(path).write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"model world/stream: student, \d+x\d+, [\d.]+ frames per second, steps \[.*\]", lines[0])
    assert lines[1].startswith("model world: teacher") and lines[1].endswith("steps any")
    assert "jobs, newest first: world completed, world/stream completed" in lines
    assert "the same request with one Idempotency-Key makes one job" in lines
    assert [line.partition(":")[0] for line in lines if line.startswith("another ")] == [
        "another steps", "another size", "another field",
    ]  # fmt: skip
    assert lines[-3:] == ["deleted: True"] * 3
    with av.open(str(tmp_path / "world-stream.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 32
    assert (tmp_path / "world.mp4").stat().st_size > 1000

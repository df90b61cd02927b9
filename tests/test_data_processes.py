"""A preparation by several processes is the preparation by one, also when one of them is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import support_prepare
from fewstep.data import texts
from fewstep.data.video import write_video
from support_processes import restarted, together

ROOT = Path(__file__).parent.parent
VIDEOS, CLIPS = 7, 2

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Seven videos of two clips each, all of different greys, and one that is none."""
    folder = tmp_path / "videos"
    for number in range(VIDEOS):
        first, second = (torch.full((3, 4, 16, 16), -0.9 + 0.13 * (2 * number + k)) for k in range(CLIPS))
        path = write_video(folder / f"v{number}.mp4", torch.cat([first, second], 1))
        path.with_suffix(".txt").write_text(f"video number {number}")
    (folder / "v7.mp4").write_text("not a video")
    (folder / "v7.txt").write_text("not a video")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def encoded(output: Path) -> list[str]:
    """What was encoded, by all processes and attempts."""
    return sorted(
        line for file in output.parent.glob(f"{output.name}.encoded.*") for line in file.read_text().splitlines()
    )


@pytest.mark.timeout(600)
def test_two_processes_prepare_what_one_does(videos: Path, tmp_path: Path) -> None:
    """The same bytes, and no clip is encoded twice."""
    whole, both = tmp_path / "whole", tmp_path / "both"
    support_prepare.run(videos, whole)
    together(2, tmp_path, support_prepare.run, videos, both)
    assert contents(both) == contents(whole)
    assert encoded(both) == encoded(whole) and len(encoded(whole)) == VIDEOS * CLIPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_started_again_nothing_is_lost_or_done_twice(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restarted by torchrun's agent. `test_killed_preparation_continues_to_the_same_bytes` kills a single process."""
    whole, killed, parts = tmp_path / "whole", tmp_path / "killed", tmp_path / "parts"
    support_prepare.run(videos, whole)
    once = encoded(whole)
    assert len(once) == len({*once}) == VIDEOS * CLIPS

    # Process 1 has parts 1 and 3, of two shards each; it dies while it encodes its second shard.
    assert restarted(2, tmp_path / "one", support_prepare.run, videos, killed, 1, 4, restarts=1) == ""
    assert contents(killed) == contents(whole)
    again = encoded(killed)
    for clip in {*again}:
        again.remove(clip)
    assert {*encoded(killed)} == {*once}
    assert len(again) <= 2 * support_prepare.PLAN.shard_size  # at most what either process had not yet written

    failed = restarted(2, tmp_path / "two", support_prepare.run, videos, parts, 1, 4)  # no restart: both are gone
    assert failed and not (parts / "index.jsonl").exists()
    before = len(encoded(parts))
    assert before < len(once)
    support_prepare.run(videos, parts)  # one process takes over from two
    assert contents(parts) == contents(whole)
    assert len(encoded(parts)) <= len(once) + 2 * support_prepare.PLAN.shard_size
    monkeypatch.setattr(texts, "_encode", lambda *_: pytest.fail("a prompt was encoded again"))
    support_prepare.run(videos, parts)
    assert contents(parts) == contents(whole)

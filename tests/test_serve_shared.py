"""A table of jobs that several servers share: in an SQLite file, and in PostgreSQL where it is installed."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import support_postgres
from fewstep.cli import main
from fewstep.core.lock import FolderInUse, holding
from fewstep.serve import clips as serve_clips
from fewstep.serve.app import Server
from fewstep.serve.database import Database, SQLite, TableDown, without_password
from fewstep.serve.jobs import Jobs
from fewstep.serve.tables import alone, open_database, table_of
from fewstep.serve.wishes import Wish
from fewstep.serve.worker import Served
from support_engine import tiny_model
from support_serve import Running, running, save_streaming
from test_serve_command import asked, command, until

pytestmark = pytest.mark.timeout(240)
WISH = Wish(model="tiny", prompt="a red ball", frames=8, fps=8.0, width=32, height=32)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def postgres() -> Iterator[support_postgres.Server]:
    if reason := support_postgres.why_not():
        pytest.skip(reason)
    with support_postgres.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Database]]:
    """Opens one empty database, once for each server."""
    made = list[Database]()

    def one() -> Database:
        made.append(SQLite(tmp_path / "jobs.sqlite") if request.param == "sqlite" else open_database(url))
        return made[-1]

    if request.param == "postgres":
        pytest.importorskip("psycopg", reason="needs the extra postgres")
        url = request.getfixturevalue("postgres").url
        for name in ("jobs", "jobs_version", "jobs_table"):
            one().run(f"DROP TABLE IF EXISTS {name}")
    yield one
    for database in made:
        database.close()


@pytest.fixture
def two(opened: Callable[[], Database]) -> tuple[Jobs, Jobs, Clock]:
    """The table as two servers have it."""
    clock = Clock()
    return (
        Jobs(opened(), kept=60.0, clock=clock, lease=30.0),
        Jobs(opened(), kept=60.0, clock=clock, lease=30.0),
        clock,
    )


def state(jobs: Jobs, id: str) -> str:
    found = jobs.get(id)
    assert found is not None
    return found.state


def test_what_one_server_accepts_the_other_has(two: tuple[Jobs, Jobs, Clock]) -> None:
    one, other, _ = two
    wish = replace(WISH, prompt='a "red"\0 ball \N{SNOWMAN}', schedule=((0.5, "a star"),), picture=True)
    job = one.add("ada", wish, picture=b"\x00png", key="k")
    assert other.get(job.id, "ada") == job and job.wish == wish and other.get(job.id, "bob") is None
    assert other.known("ada", wish, picture=b"\x00png", key="k") == job and other.picture(job) == b"\x00png"
    assert other.picture(other.add("ada", WISH)) is None
    with pytest.raises(ValueError, match="is taken"):
        other.add("ada", WISH, key="k")
    assert one.table == other.table and [other.waiting(), one.unfinished("ada")] == [2, 2]
    assert [found.id for found in other.page("ada", after=job, limit=9, newest=False)[0]] == list(one.ids() - {job.id})
    one.remove(job)
    assert other.get(job.id) is None


def test_a_job_is_taken_by_one_server(two: tuple[Jobs, Jobs, Clock]) -> None:
    one, other, _ = two
    job = one.add("ada", WISH)
    assert one.next() == other.next() == job
    assert one.begin(job) and not other.begin(job) and not one.begin(job)
    assert not other.renew(job, 0.5) and not other.put_back(job, counts=False)
    assert not other.complete(job) and not other.fail(job, "x", "y") and state(other, job.id) == "in_progress"
    assert one.renew(job, 0.25)
    found = other.get(job.id)
    assert found is not None and found.done == 0.25  # how far it is can be seen from everywhere
    assert one.complete(job) and state(other, job.id) == "completed"


def test_many_servers_at_once_take_each_job_once(opened: Callable[[], Database]) -> None:
    jobs = [Jobs(opened(), kept=60.0) for _ in range(4)]
    made = [jobs[0].add("ada", WISH).id for _ in range(20)]
    taken: list[list[str]] = [[] for _ in jobs]

    def take(table: Jobs, mine: list[str]) -> None:
        while (job := table.next()) is not None:
            if table.begin(job):
                mine.append(job.id)

    threads = [threading.Thread(target=take, args=pair) for pair in zip(jobs, taken)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id for mine in taken for id in mine) == sorted(made)


def test_the_job_of_a_dead_server_is_given_back_when_its_lease_ends(two: tuple[Jobs, Jobs, Clock]) -> None:
    one, other, clock = two
    job, mine = one.add("ada", WISH), other.add("ada", WISH)
    for ends in ("queued", "failed"):
        assert one.begin(job)
        clock.now += 20
        assert one.renew(job, 0.5)  # it says that it lives, and has it for 30 s from then
        clock.now += 29.9
        other.recover(lapsed=True)
        assert state(other, job.id) == "in_progress"
        clock.now += 0.1
        one.recover(lapsed=True)  # its own is not taken from a server that is alive and late
        assert state(other, job.id) == "in_progress"
        other.recover(lapsed=True)
        assert state(other, job.id) == ends
    failed = other.get(job.id)
    assert failed is not None and failed.code == "interrupted" and failed.expires == clock.now + 60
    assert state(one, mine.id) == "queued"


def test_a_server_that_comes_back_late_does_not_end_what_another_makes(two: tuple[Jobs, Jobs, Clock]) -> None:
    one, other, clock = two
    job = one.add("ada", WISH)
    assert one.begin(job)
    clock.now += 31
    other.recover(lapsed=True)
    assert other.next() == replace(job, begun=1) and other.begin(job)
    assert (
        not one.renew(job, 0.9)
        and not one.complete(job)
        and not one.fail(job, "x", "")
        and not one.put_back(job, counts=True)
    )
    assert other.complete(job) and not one.complete(job) and not one.fail(job, "x", "")
    assert state(one, job.id) == "completed"


def test_a_server_takes_jobs_of_its_own_models(two: tuple[Jobs, Jobs, Clock]) -> None:
    one, other, _ = two
    first, second = one.add("ada", replace(WISH, model="large")), one.add("ada", WISH)
    assert other.next(["tiny"]) == second and other.next(["large", "tiny"]) == first and other.next([]) is None


def test_a_table_of_the_version_before_is_gone_on_with(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as file:
        file.execute(
            "CREATE TABLE jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, holder TEXT NOT NULL, "
            "wish TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, begun INTEGER NOT NULL, ended REAL, expires REAL, "
            "code TEXT NOT NULL, message TEXT NOT NULL, picture BLOB, key TEXT, digest TEXT NOT NULL, UNIQUE (holder, key))"
        )
        wish = json.dumps({"model": "tiny", "prompt": "a", "frames": 8, "fps": 8.0, "width": 32, "height": 32})
        for id, its in (("video_1", "completed"), ("video_2", "in_progress"), ("video_3", "queued")):
            file.execute(
                "INSERT INTO jobs VALUES (NULL, ?, 'ada', ?, ?, 1, 1, NULL, NULL, '', '', NULL, NULL, 'x')",
                (id, wish, its),
            )
        file.execute("PRAGMA user_version = 1")
    for _ in range(2):
        jobs = Jobs(SQLite(tmp_path / "jobs.sqlite"), kept=60.0)
        jobs.recover()
        assert [state(jobs, f"video_{i}") for i in (1, 2, 3)] == ["completed", "queued", "queued"]
        found = jobs.next(["tiny"])
        assert found is not None and found.id == "video_2"


def test_a_folder_belongs_to_one_table(tmp_path: Path) -> None:
    """Else files of clips would be deleted that another table has."""
    own, shared, first, second = tmp_path / "own", tmp_path / "shared", str(tmp_path / "a.db"), str(tmp_path / "b.db")
    table_of(own, None, 1.0).close()
    with pytest.raises(ValueError, match="has a table of jobs of its own"):
        table_of(own, first, 1.0)
    shared.mkdir()
    with holding(shared), pytest.raises(FolderInUse):
        table_of(shared, first, 1.0)
    for _ in range(2):
        table_of(shared, first, 1.0).close()
    with pytest.raises(ValueError, match="of another table of jobs than"):
        table_of(shared, second, 1.0)
    with pytest.raises(ValueError, match="several servers share; give that one by --jobs"):
        table_of(shared, None, 1.0)
    itself = tmp_path / "itself"
    table_of(itself, f"sqlite:///{itself}/jobs.sqlite", 1.0).close()
    with alone(itself, first), alone(itself, first):
        pass
    with alone(own, None), pytest.raises(FolderInUse), alone(own, None):
        pass


def test_a_database_that_cannot_be_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its password."""
    student, words = str(tiny_model().save(tmp_path / "model")), ("--folder", str(tmp_path / "served"), "--jobs")
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql://ada:secret@127.0.0.1:{taken.getsockname()[1]}/fewstep?connect_timeout=1"
        pytest.importorskip("psycopg", reason="needs the extra postgres")
        assert main(["serve", student, *words, url]) == 2
    said = capsys.readouterr().err
    assert (
        "postgresql://ada:***@127.0.0.1" in said
        and "cannot be used as a table of jobs" in said
        and "secret" not in said
    )
    assert main(["serve", student, *words, "mysql://ada:secret@db/x"]) == 2
    said = capsys.readouterr().err
    assert "give the path of an SQLite file, or postgresql://" in said and "secret" not in said
    code = "import sys\nsys.modules['psycopg'] = None\nfrom fewstep.serve.tables import open_database as o\no('postgresql://x/y')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert 'pip install "fewstep[postgres]"' in done.stderr
    assert without_password("postgresql://db/x") == "postgresql://db/x"


def test_a_database_that_is_started_again_has_lost_nothing(postgres: support_postgres.Server) -> None:
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    jobs = Jobs(open_database(postgres.url), kept=60.0)
    job = jobs.add("ada", WISH)
    assert abs(job.created - time.time()) < 5  # by the database's clock
    postgres.stop()
    with pytest.raises(TableDown):
        jobs.get(job.id)
    with pytest.raises(TableDown):
        jobs.add("ada", WISH)
    postgres.start()
    assert jobs.get(job.id) == job and jobs.begin(job) and jobs.complete(job)
    jobs.remove(job)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    """Two servers that share a table and a folder."""
    folder = tmp_path_factory.mktemp("served")
    served = Served(models=(("tiny", str(save_streaming(folder / "student"))),), threads=1)
    table = str(folder / "shared.db")
    servers = [Server(served, folder=folder / "videos", table=table) for _ in range(2)]
    with running(servers[0]) as one, running(servers[1]) as other:
        yield one, other


def made_by(server: Server) -> int:
    return int(server.metrics.clips.labels("completed")._value.get())


def test_two_servers_share_the_work_and_either_is_asked(house: tuple[Running, Running]) -> None:
    one, other = house
    ids = [asked(house[i % 2].url, "/v1/videos", prompt="a", num_frames=60, seed=i)["id"] for i in range(6)]
    found = [until(house[1 - i % 2].url, id, "completed", "failed") for i, id in enumerate(ids)]
    assert [told["status"] for told in found] == ["completed"] * 6
    assert made_by(one.server) + made_by(other.server) == 6 and min(made_by(one.server), made_by(other.server)) > 0
    for id in ids:
        assert asked(one.url, f"/v1/videos/{id}/content") == asked(other.url, f"/v1/videos/{id}/content")
    assert len(asked(other.url, "/v1/videos")["data"]) == 6


def begun(house: tuple[Running, Running]) -> tuple[str, Running, Running]:
    """A long job, who makes it, and who does not."""
    id = asked(house[0].url, "/v1/videos", prompt="a", num_frames=3000)["id"]
    for _ in range(600):
        for maker, other in (house, house[::-1]):
            if maker.server.clips._making is not None and maker.server.clips._done > 0:
                return id, maker, other
        time.sleep(0.05)
    raise AssertionError("it was not begun")


def settled(condition: Callable[[], Any], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def test_progress_and_deletion_reach_the_other_server(
    house: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_clips, "BEAT", 0.2)
    id, maker, other = begun(house)
    assert settled(lambda: asked(other.url, f"/v1/videos/{id}")["progress"] > 0)
    request = urllib.request.Request(f"{other.url}/v1/videos/{id}", method="DELETE")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["deleted"]
    assert settled(lambda: maker.server.clips._making is None), "it is still made"
    assert not list((maker.server.folder / "videos").glob(f"*{id}*"))


def test_a_server_that_says_nothing_loses_its_job_to_the_other(
    house: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other makes it again when the lease is over; one that wakes up later sees that, and stops."""
    monkeypatch.setattr(serve_clips, "BEAT", 0.2)
    for each in house:
        monkeypatch.setattr(each.server.jobs, "_lease", 1.5)
    id, maker, other = begun(house)
    maker.on_loop(maker.server.clips._tasks[1].cancel)
    assert other.server.clips._making is None
    assert settled(lambda: other.server.clips._making is not None and other.server.clips._making.id == id)
    found = other.server.jobs.get(id)
    assert found is not None and found.begun == 2 and maker.server.clips._making is not None

    def wake() -> None:
        maker.server.clips._tasks[1] = asyncio.get_running_loop().create_task(maker.server.clips._beating())

    maker.on_loop(wake)
    assert settled(lambda: maker.server.clips._making is None)
    assert state(maker.server.jobs, id) == "in_progress" and other.server.clips._making is not None
    other.on_loop(lambda: other.server.clips.cancel(found))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_process_that_is_killed_leaves_its_job_to_the_other(tmp_path: Path) -> None:
    student, table = save_streaming(tmp_path / "student"), str(tmp_path / "jobs.db")
    words = (f"tiny={student}", "--folder", str(tmp_path / "served"), "--threads", "1", "--jobs", table)
    with command(*words) as (first, address), command(*words) as (_, other):
        id = asked(address, "/v1/videos", prompt="a red ball", num_frames=400)["id"]
        until(address, id, "in_progress")  # the one that accepts it is the first to know
        first.kill()
        first.wait(30)
        assert asked(other, f"/v1/videos/{id}")["status"] == "in_progress"
        ended = settled(lambda: asked(other, f"/v1/videos/{id}")["status"] in ("completed", "failed"), 240)
        assert ended and asked(other, f"/v1/videos/{id}")["status"] == "completed"
        assert len(asked(other, f"/v1/videos/{id}/content")) > 1000

"""`/v1/videos` of a real server with a real worker: by the openai client, by curl, and what goes wrong."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from fewstep.data.video import to_pixels, write_pixels
from fewstep.models import VideoModel
from fewstep.serve import clips as serve_clips
from fewstep.serve.app import Server
from fewstep.serve.database import TableFull
from fewstep.serve.jobs import Jobs
from fewstep.serve.keys import Door, Keys
from fewstep.serve.limits import Limits
from fewstep.serve.orders import Close
from fewstep.serve.wishes import Wish
from fewstep.serve.worker import Served
from support_engine import tiny_model
from support_serve import Running, running, save_streaming

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]
HOURS = {"num_frames": 3000}
"""A clip of the stream that takes long enough to be interrupted."""


class House(Running):
    """The server, and two holders of keys."""

    keys: dict[str, str]

    def client(self, who: str = "ada", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[who], max_retries=0, **options)

    def curl(self, path: str, *arguments: str, who: str = "ada") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        command = ["curl", "-sS", "-i", "-H", f"Authorization: Bearer {self.keys[who]}", *arguments, self.url + path]
        head, _, body = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.partition(
            b"\r\n\r\n"
        )
        while head.startswith(b"HTTP/1.1 100"):
            head, _, body = body.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body

    def refused(self, *arguments: str, path: str = "/v1/videos", **options: Any) -> dict[str, Any]:
        """The error of a request that is refused."""
        status, _, body = self.curl(path, *arguments, **options)
        assert status >= 400
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and str(self.server.folder) not in error["message"]
        return {"status": status, **error}

    def begun(self, **more: Any) -> Any:
        """A long job that is being made."""
        client = self.client()
        job = client.videos.create(prompt="a red ball", model="tiny", extra_body={**HOURS, **more})
        assert settled(lambda: client.videos.retrieve(job.id).progress > 0), "it was not begun"
        return job


def settled(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(condition())


def ended(client: openai.OpenAI, id: str) -> Any:
    """A job when it has ended."""
    assert settled(lambda: client.videos.retrieve(id).status in ("completed", "failed"))
    return client.videos.retrieve(id)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_streaming(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model().save(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def house(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server that all tests share."""
    folder = tmp_path_factory.mktemp("served")
    keys = {name: Keys.add(folder / "keys", name) for name in ("ada", "bob")}
    served = Served(models=(("tiny", str(student)), ("world/teacher", str(teacher))), threads=1)
    limits = Limits(jobs=3, upload=1 << 20, pixels=100_000, seconds=60)
    with running(Server(served, limits=limits, door=Door(Keys.read(folder / "keys")), folder=folder)) as one:
        house = House(one.server, one.web, one.port, one.loop)
        house.keys = keys
        yield house


@pytest.fixture(autouse=True)
def leaves_nothing(house: House) -> Iterator[None]:
    yield
    for who in ("ada", "bob"):
        client = house.client(who)
        for job in list(client.videos.list(limit=100)):
            client.videos.delete(job.id)
    assert settled(lambda: house.server.clips._making is None), "a clip is still made"
    assert not list((house.server.folder / "videos").iterdir())


def frames_in(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def written(frames: torch.Tensor, fps: float) -> np.ndarray:
    """Frames `[F, H, W, 3]` as they are in a file."""
    with tempfile.TemporaryDirectory() as folder:
        return frames_in(write_pixels(Path(folder) / "x.mp4", frames, fps=fps).read_bytes())


def picture(size: tuple[int, int] = (32, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "png")
    return out.getvalue()


def test_the_openai_client_makes_a_video(house: House, student: Path) -> None:
    client = house.client()
    job = client.videos.create(prompt="a red ball", model="tiny", seconds="2", size="32x32", extra_body={"seed": 3})  # type: ignore[arg-type]
    assert (job.object, job.model, job.prompt, job.seconds, job.size) == ("video", "tiny", "a red ball", "2", "32x32")
    assert job.status in ("queued", "in_progress") and job.progress < 100
    done = ended(client, job.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.expires_at - done.completed_at == 24 * 3600 and abs(done.completed_at - time.time()) < 60
    data = client.videos.download_content(job.id).read()
    with VideoModel.from_pretrained(student).stream(["a red ball"], seed=3) as live:
        expected = torch.cat([chunk.frames[0] for chunk in live.frames(50, last=True)])
    assert np.array_equal(frames_in(data), written(expected, 50)) and len(expected) == 100
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(job.id, variant="thumbnail").read()))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (32, 32))
    assert client.videos.delete(job.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(job.id)


def test_the_openai_client_lists_pages_and_models(house: House) -> None:
    client = house.client()
    made = [client.videos.create(prompt=f"{i}", model="tiny", extra_body={"num_frames": 2}).id for i in range(3)]
    assert [job.id for job in client.videos.list(limit=2)] == made[::-1]  # it asks for the second page itself
    assert [job.id for job in client.videos.list(order="asc", after=made[0])] == made[1:]
    assert [model.id for model in client.models.list()] == ["tiny", "world/teacher"]
    assert client.models.retrieve("world/teacher").id == "world/teacher"
    with pytest.raises(openai.NotFoundError, match="it has tiny, world/teacher"):
        client.models.retrieve("sora-2")
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=video_x"):
        assert house.refused(path=f"/v1/videos?{query}")["param"] == query.partition("=")[0]


def test_curl_makes_a_video_of_json_and_reads_a_part_of_it(house: House) -> None:
    body = {
        "model": "tiny",
        "prompt": "a red ball",
        "num_frames": 6,
        "prompt_schedule": [{"at_s": 0.04, "prompt": "a star"}],
    }
    status, _, told = house.curl("/v1/videos", "-H", "Content-Type: application/json", "-d", json.dumps(body))
    job = json.loads(told)
    assert status == 200 and job["seconds"] == "0.12" and job["fps"] == 50
    assert ended(house.client(), job["id"]).status == "completed"
    status, headers, data = house.curl(f"/v1/videos/{job['id']}/content")
    assert (status, headers["content-type"], len(frames_in(data))) == (200, "video/mp4", 6)
    assert headers["accept-ranges"] == "bytes" and int(headers["content-length"]) == len(data)
    status, headers, part = house.curl(f"/v1/videos/{job['id']}/content", "-H", "Range: bytes=10-19")
    assert (status, headers["content-range"], part) == (206, f"bytes 10-19/{len(data)}", data[10:20])
    assert house.curl(f"/v1/videos/{job['id']}/content", "-H", "Range: bytes=99999999-")[0] == 416
    assert house.refused(path=f"/v1/videos/{job['id']}/content?variant=spritesheet")["param"] == "variant"


def test_curl_makes_a_video_of_a_form_and_waits_for_it(house: House, teacher: Path) -> None:
    fields = {
        "model": "world/teacher", "prompt": "12", "seed": "5", "num_inference_steps": "2", "guidance_scale": "1.5",
        "negative_prompt": "grey", "fps": "4", "seconds": "1", "size": "32x32",
    }  # fmt: skip
    status, headers, data = house.curl("/v1/videos/sync", *(x for k, v in fields.items() for x in ("-F", f"{k}={v}")))
    assert (status, headers["content-type"]) == (200, "video/mp4")
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.video[0].average_rate == 4
    model = VideoModel.from_pretrained(teacher).with_card(negative_prompt="grey")
    clip = model(["12"], seed=5, num_inference_steps=2, guidance_scale=1.5)[0]
    assert np.array_equal(frames_in(data), written(to_pixels(clip), 4))
    assert json.loads(house.curl(f"/v1/videos/{headers['x-video-id']}")[2])["status"] == "completed"


def test_a_schedule_of_prompts_is_the_same_in_json_and_in_a_form(house: House) -> None:
    schedule = json.dumps([{"at_s": 0.08, "prompt": "a blue star"}])
    form = ("-F", "model=tiny", "-F", "prompt=a red ball", "-F", "num_frames=8", "-F", f"prompt_schedule={schedule}")
    body = json.dumps(
        {"model": "tiny", "prompt": "a red ball", "num_frames": 8, "prompt_schedule": json.loads(schedule)}
    )
    made = [
        house.curl("/v1/videos/sync", *arguments)
        for arguments in (form, ("-H", "Content-Type: application/json", "-d", body), (*form[:6],))
    ]
    assert [status for status, _, _ in made] == [200] * 3
    changed, same, plain = (frames_in(data) for _, _, data in made)
    assert np.array_equal(changed, same) and not np.array_equal(changed, plain)
    more = {"num_frames": 8, "prompt_schedule": json.loads(schedule)}  # OpenAI's client writes a field for each value
    job = house.client().videos.create(prompt="a red ball", model="tiny", extra_body=more)
    ended(house.client(), job.id)
    assert np.array_equal(frames_in(house.client().videos.download_content(job.id).read()), changed)
    error = house.refused("-F", "prompt=a", "-F", "model=tiny", "-F", "prompt_schedule[][at_s]=1")
    assert error["param"] == "prompt_schedule" and "1 times and 0 prompts" in error["message"]
    twice = ("-F", "prompt_schedule[][at_s]=1", "-F", "prompt_schedule[][prompt]=b")
    assert "is there twice" in house.refused(*form, *twice)["message"]
    error = house.refused("-F", "prompt=a", "-F", "prompt_schedule[][at_s]=x", "-F", "prompt_schedule[][prompt]=b")
    assert error["param"] == "prompt_schedule" and error["status"] == 400


def test_a_client_that_stops_waiting_cancels(house: House) -> None:
    asked = {"model": "tiny", "prompt": "a", **HOURS}
    with socket.create_connection(("127.0.0.1", house.port)) as client:
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/videos/sync HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {house.keys['ada']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        assert settled(lambda: house.server.clips._making is not None)
    assert settled(lambda: house.server.clips._making is None and not house.client().videos.list().data)


def test_a_job_that_is_deleted_is_no_longer_made(house: House) -> None:
    client, job = house.client(), house.begun()
    waits = client.videos.create(prompt="b", model="tiny", extra_body={"num_frames": 4})
    assert waits.status == "queued" and waits.queue_position == 1  # type: ignore[attr-defined]
    error = house.refused(path=f"/v1/videos/{job.id}/content")
    assert error["code"] == "not_completed" and "in_progress" in error["message"]
    client.videos.delete(job.id)
    assert ended(client, waits.id).status == "completed"


def test_a_job_that_waits_is_deleted(house: House) -> None:
    client, job = house.client(), house.begun()
    waits = client.videos.create(prompt="b", model="tiny")
    client.videos.delete(waits.id)
    client.videos.delete(job.id)
    assert house.refused(path=f"/v1/videos/{waits.id}")["status"] == 404


def test_the_jobs_of_others_are_not_there(house: House) -> None:
    job = house.client().videos.create(prompt="a", model="tiny", extra_body={"num_frames": 2})
    ended(house.client(), job.id)
    assert not house.client("bob").videos.list().data
    for path, more in ((job.id, ()), (f"{job.id}/content", ()), (job.id, ("-X", "DELETE"))):
        assert house.refused(*more, path=f"/v1/videos/{path}", who="bob")["status"] == 404
    assert house.client().videos.retrieve(job.id).status == "completed"
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": house.keys["ada"]}):
        for path in ("/v1/videos", f"/v1/videos/{job.id}/content", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(urllib.request.Request(house.url + path, headers=headers))
    assert house.refused("-H", "Origin: http://evil")["status"] == 403


@pytest.mark.parametrize("name", ["..%2f..%2fkeys", "../keys", "%00", "x" * 3000, "jobs.sqlite", "*"])
def test_files_are_reached_by_the_ids_of_jobs_alone(house: House, name: str) -> None:
    for path in (f"/v1/videos/{name}", f"/v1/videos/{name}/content"):
        assert house.refused("--path-as-is", path=path)["status"] == 404


def test_a_request_that_comes_twice_makes_one_video(house: House) -> None:
    client, headers = house.client(), {"Idempotency-Key": "k1"}
    one, two = (
        client.videos.create(prompt="a", model="tiny", extra_headers=headers, extra_body={"num_frames": 2})
        for _ in "12"
    )
    assert one.id == two.id and len(client.videos.list().data) == 1
    with pytest.raises(openai.UnprocessableEntityError, match="another request"):
        client.videos.create(prompt="b", model="tiny", extra_headers=headers)
    other = house.client("bob").videos.create(prompt="b", model="tiny", extra_headers=headers)
    assert other.id != one.id


def test_what_the_contract_does_not_allow_is_refused_with_what_it_allows(house: House) -> None:
    client = house.client()
    for model, given, param, message in (
        ("tiny", {"num_inference_steps": 3}, "num_inference_steps", "trained for 2 or 1 steps, not for 3"),
        ("tiny", {"guidance_scale": 5.0}, "guidance_scale", "leave it out"),
        ("world/teacher", {"num_frames": 5}, "num_frames", "makes videos of 4 frames"),
        ("world/teacher", {"seconds": "8"}, "seconds", "makes videos of 4 frames"),
        ("tiny", {"size": "1280x720"}, "size", "32x32"),
        ("tiny", {"seconds": "61"}, "seconds", "60 seconds"),
        ("tiny", {"n": 2}, "n", "there is no field 'n'"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.videos.create(prompt="a", model=model, extra_body=given)
        assert refused.value.param == param and refused.value.code == "invalid_value" and message in str(refused.value)
    with pytest.raises(openai.NotFoundError, match="it has tiny, world/teacher") as unknown:
        client.videos.create(prompt="a", model="sora-2")
    assert unknown.value.param == "model"
    assert not client.videos.list().data


def test_bodies_that_are_no_requests_are_refused(house: House) -> None:
    json_, text = ("-H", "Content-Type: application/json"), ("-H", "Content-Type: text/plain")
    for arguments, status, code in (
        ((*json_, "-d", "{"), 400, "invalid_json"),
        ((*json_, "-d", "[" * 100_000), 400, "invalid_json"),
        ((*json_, "-d", "[]"), 400, "invalid_json"),
        ((*json_, "-d", '"x"'), 400, "invalid_json"),
        ((*json_, "-d", "\udcff\udcfe"), 400, "invalid_json"),
        ((*json_, "-d", "{}"), 400, "invalid_value"),
        ((*text, "-d", "{}"), 415, "content_type"),
        (("-d", '{"prompt": "a"}'), 400, "invalid_value"),
        (("-F", "prompt=a", "-F", "prompt=b"), 400, "invalid_value"),
        (("-F", "prompt=@/dev/null;filename=x"), 400, "invalid_value"),
        (("-H", "Content-Type: multipart/form-data; boundary=x", "-d", "--y"), 400, None),
        (("-H", "Idempotency-Key: " + "x" * 201, "-F", "prompt=a"), 400, "invalid_value"),
    ):
        error = house.refused(*arguments)
        assert (error["status"], error["code"] if code else None) == (status, code), (arguments, error)
    assert house.refused("-X", "PUT")["status"] == 405
    assert not house.client().videos.list().data


def test_pictures_that_are_corrupt_or_too_large_are_refused(house: House, tmp_path: Path) -> None:
    good, files = picture(), {"small.png": picture(), "many.png": picture((400, 300)), "huge.png": bytes(2 << 20)}
    for name, data in {**files, "cut.png": good[: len(good) // 2], "text.png": b"hello"}.items():
        (tmp_path / name).write_bytes(data)

    def send(name: str) -> dict[str, Any]:
        return house.refused("-F", "prompt=a", "-F", "model=tiny", "-F", f"input_reference=@{tmp_path / name}")

    assert "takes no picture" in send("small.png")["message"]
    assert "400 x 300 pixels, and at most 100000" in send("many.png")["message"]
    assert (send("huge.png")["status"], send("huge.png")["code"]) == (413, "too_large")
    for name in ("cut.png", "text.png"):
        assert (send(name)["param"], send(name)["code"]) == ("input_reference", "invalid_image")
    chunked = house.refused("-F", "prompt=a", "-F", f"x=@{tmp_path / 'huge.png'}", "-H", "Transfer-Encoding: chunked")
    assert chunked["status"] == 413
    with pytest.raises(openai.BadRequestError, match="takes no picture"):
        house.client().videos.create(prompt="a", model="tiny", input_reference=("a.png", good, "image/png"))
    inline = {"image_url": f"data:image/png;base64,{base64.b64encode(good).decode()}"}
    for reference in ("http://localhost/x.png", "file:///etc/passwd", "/etc/passwd", {"file_id": "x"}, 3, inline):
        body = json.dumps({"prompt": "a", "model": "tiny", "input_reference": reference})
        error = house.refused("-H", "Content-Type: application/json", "-d", body)
        assert error["param"] == "input_reference"
        assert ("takes no picture" if reference is inline else "reads no addresses") in error["message"]


def test_a_holder_has_so_many_jobs(house: House) -> None:
    house.begun()
    client = house.client()
    for _ in range(2):
        client.videos.create(prompt="b", model="tiny")
    with pytest.raises(openai.RateLimitError) as refused:
        client.videos.create(prompt="b", model="tiny")
    assert refused.value.response.headers["retry-after"] == "10"
    house.client("bob").videos.create(prompt="b", model="tiny")


def test_a_job_survives_its_worker_once(house: House) -> None:
    client, job, supervisor = house.client(), house.begun(), house.server.supervisor
    assert supervisor.pid is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    assert settled(lambda: not supervisor.ready)
    assert settled(lambda: client.videos.retrieve(job.id).status == "queued")
    waits = client.videos.create(prompt="b", model="tiny", extra_body={"num_frames": 2})  # while there is no worker
    assert settled(lambda: client.videos.retrieve(job.id).progress > 0)
    house.on_loop(
        lambda: (supervisor._lost(job.id), supervisor._pipe.send(Close(id=job.id)))
    )  # as if it had died again
    failed = ended(client, job.id)
    assert failed.status == "failed" and failed.error.code == "worker_lost"
    assert ended(client, waits.id).status == "completed"


def test_a_stream_is_served_while_a_job_is_made(house: House) -> None:
    job = house.begun()
    headers = {"Authorization": f"Bearer {house.keys['ada']}"}
    viewer = house.connect(additional_headers=headers)
    viewer.say("init", seconds=0.2)
    assert viewer.until("done")["frames"] == 10
    before = house.client().videos.retrieve(job.id)
    assert before.status == "in_progress"
    assert settled(lambda: house.client().videos.retrieve(job.id).progress >= before.progress)


def test_a_disk_that_is_full_fails_the_job_and_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    client = house.client()
    with monkeypatch.context() as full:

        def write(path: Path, *_: Any, **__: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        full.setattr(serve_clips, "write_pixels", write)
        job = client.videos.create(prompt="a", model="tiny", extra_body={"num_frames": 2})
        failed = ended(client, job.id)
    assert failed.error.code == "no_space" and str(house.server.folder) not in failed.error.message
    assert not list((house.server.folder / "videos").iterdir())
    assert house.refused(path=f"/v1/videos/{job.id}/content")["code"] == "no_space"
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 28) - 1))
        error = house.refused("-F", "prompt=a", "-F", "model=tiny")
        assert (error["status"], error["code"], error["type"]) == (507, "no_space", "server_error")
    again = client.videos.create(prompt="a", model="tiny", extra_body={"num_frames": 2})
    assert ended(client, again.id).status == "completed"


@pytest.mark.parametrize("change", ["begin", "complete"])
def test_a_table_that_cannot_be_changed_delays_the_job(
    house: House, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    client, made, tried = house.client(), getattr(Jobs, change), list[int]()

    def full(self: Jobs, job: Any) -> bool:
        tried.append(1)
        if len(tried) < 3:
            raise TableFull("database or disk is full")
        return bool(made(self, job))

    monkeypatch.setattr(Jobs, change, full)
    monkeypatch.setattr(serve_clips, "AGAIN", 0.2)
    monkeypatch.setattr(serve_clips, "BEAT", 0.02)  # a job that is not begun yet is not said to be made
    job = client.videos.create(prompt="a", model="tiny", extra_body={"num_frames": 2})
    assert ended(client, job.id).status == "completed" and len(tried) == 3


def test_what_a_server_had_is_there_after_its_end(house: House) -> None:
    """The restart of all that has a state; the command itself is killed in test_serve_command.py."""
    client = house.client()
    done = client.videos.create(prompt="a", model="tiny", extra_body={"num_frames": 2})
    ended(client, done.id)
    data = client.videos.download_content(done.id).read()
    job = house.begun(num_frames=100)
    stray = house.server.folder / "videos" / ".video_x.draft.mp4"
    stray.write_bytes(b"of a server that was killed")

    async def restart() -> None:
        await house.server.clips.end()
        assert house.server.jobs.waiting() == 1
        house.server.clips.draining = False
        house.server.clips.begin()

    asyncio.run_coroutine_threadsafe(restart(), house.loop).result(30)
    assert client.videos.download_content(done.id).read() == data
    assert ended(client, job.id).status == "completed" and not stray.exists()
    assert len(frames_in(client.videos.download_content(job.id).read())) == 100


def test_finished_jobs_and_their_files_go_after_their_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    client = house.client()
    job = client.videos.create(prompt="a", model="tiny", extra_body={"num_frames": 2})
    ended(client, job.id)
    monkeypatch.setattr(house.server.jobs, "_clock", lambda: time.time() + 24 * 3600)
    assert house.refused(path=f"/v1/videos/{job.id}")["status"] == 404
    house.on_loop(house.server.clips.sweep)
    assert not list((house.server.folder / "videos").iterdir())


def test_what_operators_see(house: House) -> None:
    async def metrics() -> str:
        return bytes((await house.server._metrics(None)).body).decode()  # type: ignore[arg-type]

    def value(name: str) -> float:
        text = asyncio.run_coroutine_threadsafe(metrics(), house.loop).result(10)
        found = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " ")]
        return found[0] if found else 0.0

    names = (
        'fewstep_clips_total{status="completed"}',
        "fewstep_clip_seconds_count",
        'fewstep_refused_total{code="invalid_value"}',
    )
    before = [value(name) for name in names]
    house.curl("/v1/videos/sync", "-F", "prompt=a", "-F", "model=tiny", "-F", "num_frames=2")
    house.refused("-F", "prompt=a", "-F", "model=tiny", "-F", "seed=x")
    assert [value(name) for name in names] == [1 + count for count in before]
    house.begun()
    house.client().videos.create(prompt="a", model="tiny")
    assert value("fewstep_clips_waiting") == 1


def test_the_examples_of_the_page_run(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    ((shell, code),) = zip(re.findall(r"```bash\n(.*?)```", page, re.S), re.findall(r"```py\n(.*?)```", page, re.S))
    monkeypatch.chdir(tmp_path)
    told = {"ADDRESS": house.url, "KEY": house.keys["ada"], "MODEL": "tiny"}
    done = subprocess.run(["bash", "-ec", shell], env=os.environ | told, capture_output=True, text=True, check=True)
    assert '"error": ' not in done.stdout.replace('"error": null', "") and '"error":{' not in done.stdout
    assert done.stdout.count('"object":"video"') == 4 and len(frames_in((tmp_path / "video.mp4").read_bytes())) == 4
    (tmp_path / "video.mp4").unlink()
    exec(compile(code, "serving.md", "exec"), {"address": house.url, "key": house.keys["ada"], "model": "tiny"})
    assert len(frames_in((tmp_path / "video.mp4").read_bytes())) == 4


def test_many_clients_at_once_get_their_own_videos(house: House) -> None:
    found = dict[str, bytes]()

    def one(who: str, seed: int) -> None:
        _, headers, data = house.curl(
            "/v1/videos/sync", "-F", "prompt=a", "-F", "model=tiny", "-F", "num_frames=4", "-F", f"seed={seed}", who=who
        )
        found[headers["x-video-id"]] = data

    threads = [threading.Thread(target=one, args=(who, seed)) for seed, who in enumerate(("ada", "bob") * 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found.values())) == 6


def test_the_picture_of_a_job_is_there_while_it_is_made_and_no_longer(house: House) -> None:
    """The worker of this house has no model that begins with one, and says so; the file reaches it, and goes."""
    supervisor, folder, heard = house.server.supervisor, house.server.folder / "videos", list[bytes]()
    order = supervisor.order

    def listen(what: Any, hear: Any = None) -> None:
        if getattr(what, "image", None) is not None:
            heard.append(what.image.read_bytes())
        order(what, hear)

    wish = Wish(model="world/teacher", prompt="a", frames=4, fps=8, width=32, height=32, picture=True)
    supervisor.order = listen  # type: ignore[method-assign]
    try:
        job = house.on_loop(
            lambda: (house.server.jobs.add("ada", wish, picture=picture()), house.server.clips.wake())[0]
        )
        failed = ended(house.client(), job.id)
    finally:
        supervisor.order = order  # type: ignore[method-assign]
    assert heard == [picture()] and not list(folder.iterdir())
    assert failed.error.code == "invalid_request" and "text-to-video model" in failed.error.message

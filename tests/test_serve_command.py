"""`fewstep serve`: what it refuses, keys, and a server that is killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.cli.host import names_of
from fewstep.serve.keys import Keys
from support_engine import tiny_model
from support_serve import save_streaming


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command that is refused."""
    assert main(["serve", *words]) == 2
    return capsys.readouterr().err


def test_a_server_without_keys_is_for_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = str(tiny_model().save(tmp_path / "model"))
    for host in ("0.0.0.0", "::", "example.com"):
        assert "it has no keys" in said(capsys, student, "--host", host, "--folder", str(tmp_path / "f"))
    (tmp_path / "keys").write_text("# nobody\n")
    words = (student, "--host", "0.0.0.0", "--folder", str(tmp_path / "f"), "--keys", str(tmp_path / "keys"))
    assert "has no keys; add one by" in said(capsys, *words)


def test_a_key_is_printed_once_and_stored_as_a_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert main(["serve", "--keys", str(file), "--new-key", "ada"]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys.read(file).holder(key) == "ada" and key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert "is taken" in said(capsys, "--keys", str(file), "--new-key", "ada")
    assert "--keys FILE" in said(capsys, "--new-key", "bob")


def test_models_have_names_that_are_no_paths(tmp_path: Path) -> None:
    for name in ("runs/mine/student", "runs/other/student", "plain"):
        (tmp_path / name).mkdir(parents=True)
    mine, other, plain = (str(tmp_path / name) for name in ("runs/mine/student", "runs/other/student", "plain"))
    found = dict(names_of((mine, other, plain, "world/stream", f"x={mine}")))
    assert found == {"mine": mine, "other": other, "plain": plain, "world/stream": "world/stream", "x": mine}
    with pytest.raises(ValueError, match="both called 'mine'"):
        names_of((mine, mine))
    for wrong in ((), ("=x",), ("x=",)):
        with pytest.raises(ValueError, match="name a model|NAME=FOLDER"):
            names_of(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", "70000"), "--port must be from 0 to 65535"),
        (("--watch-port", "-1"), "--watch-port must be from 0"),
        (("--threads", "0"), "--threads must be at least 1"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--batch", "2"), "model makes whole clips; leave --batch out"),
        (("--origin", "example.com"), "an origin is http"),
        (("--dtype", "float16"), "invalid choice"),
        (("--offload", "model"), "leave offload out"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    student = str(tiny_model().save(tmp_path / "model"))
    assert main(["serve", student, "--folder", str(tmp_path / "f"), *words]) == 2
    out, err = capsys.readouterr()
    assert message in out + err


def test_a_port_that_is_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        student, port = str(tiny_model().save(tmp_path / "model")), str(taken.getsockname()[1])
        assert "in use; give another --port" in said(capsys, student, "--folder", str(tmp_path / "f"), "--port", port)


def test_a_missing_package_is_said_with_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['starlette.applications'] = sys.modules['uvicorn'] = None\n"
        "from fewstep.cli import main\nsys.exit(main(['serve', 'world']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and 'pip install "fewstep[serve]"' in done.stderr and "Traceback" not in done.stderr


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fewstep serve` in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", "serve", *words, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"fewstep serves tiny at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, process.poll() is not None and process.stderr and process.stderr.read())
        yield process, found[1]
    finally:
        process.kill()
        process.wait(30)


def asked(address: str, path: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        read = answer.read()
    return json.loads(read) if answer.headers["content-type"] == "application/json" else read


def until(address: str, id: str, *states: str) -> Any:
    for _ in range(1200):
        told = asked(address, f"/v1/videos/{id}")
        if told["status"] in states and (told["progress"] or states != ("in_progress",)):
            return told
        time.sleep(0.05)
    raise AssertionError(told)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    words = (f"tiny={save_streaming(tmp_path / 'student')}", "--folder", str(tmp_path / "served"), "--threads", "1")
    with command(*words) as (process, address):
        done = asked(address, "/v1/videos", prompt="a red ball", num_frames=10)["id"]
        until(address, done, "completed")
        video = asked(address, f"/v1/videos/{done}/content")
        long = asked(address, "/v1/videos", prompt="a red ball", num_frames=400)["id"]
        waits = asked(address, "/v1/videos", prompt="a red ball", num_frames=4)["id"]
        until(address, long, "in_progress")
        second = subprocess.run(
            [sys.executable, "-m", "fewstep", "serve", *words], capture_output=True, text=True, check=False
        )
        assert second.returncode == 2 and "in use by another fewstep" in second.stderr
        evil = urllib.request.Request(f"{address}/v1/videos", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):  # a page under a name that leads to this machine
            urllib.request.urlopen(evil)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with command(*words) as (process, address):
        assert asked(address, f"/v1/videos/{done}/content") == video
        assert [until(address, id, "completed")["num_frames"] for id in (long, waits)] == [400, 4]
        unfinished = asked(address, "/v1/videos", prompt="a red ball", num_frames=3000)["id"]
        until(address, unfinished, "in_progress")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    table = tmp_path / "served" / "jobs.sqlite"
    assert not Path(f"/proc/{process.pid}").exists() and table.is_file() and os.listdir(tmp_path / "served" / "videos")

"""What docs/deployment.md says of proxies, services and containers, as far as this machine has them."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.sync.client import connect

from fewstep.serve.app import Server
from fewstep.serve.keys import Door, Keys
from fewstep.serve.worker import Served
from support_serve import Running, Viewer, running, save_streaming

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parent.parent


def example(name: str) -> str:
    """A file that the page links to."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert f"(../examples/deployment/{name})" in page
    return (ROOT / "examples" / "deployment" / name).read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Running], str]]:
    """Two servers that share a table, and a key."""
    folder = tmp_path_factory.mktemp("served")
    key = Keys.add(folder / "keys", "ada")
    served = Served(models=(("tiny", str(save_streaming(folder / "student"))),), threads=1)
    servers = [
        Server(served, folder=folder / "videos", table=str(folder / "jobs.db"), door=Door(Keys.read(folder / "keys")))
        for _ in range(2)
    ]
    with running(servers[0]) as one, running(servers[1]) as other:
        yield [one, other], key


@contextmanager
def nginx(folder: Path, port: int, servers: list[Running]) -> Iterator[None]:
    text = (
        example("nginx.conf")
        .replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
        .replace("/etc/ssl/video.", f"{folder}/video.")
    )
    for number, server in enumerate(servers, 1):
        text = text.replace(f"127.0.0.1:800{number}", f"127.0.0.1:{server.port}")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=video.example.com",
    ]
    command += ["-keyout", f"{folder}/video.key", "-out", f"{folder}/video.pem"]
    subprocess.run(command, check=True, capture_output=True)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; user root;\nevents {{}}\n"
        f"http {{ access_log off;\n{temporary}{text}}}\n"
    )
    with started("nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), port=port):
        yield


@contextmanager
def caddy(folder: Path, port: int, servers: list[Running]) -> Iterator[None]:
    text = example("Caddyfile").replace("video.example.com {", f"https://video.example.com:{port} {{\n    tls internal")
    for number, server in enumerate(servers, 1):
        text = text.replace(f"127.0.0.1:800{number}", f"127.0.0.1:{server.port}")
    head = "{\n    admin off\n    skip_install_trust\n    auto_https disable_redirects\n    default_bind 127.0.0.1\n"
    (folder / "Caddyfile").write_text(f"{head}    storage file_system {folder}/caddy\n}}\n{text}")
    with started("caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile", port=port):
        yield


@contextmanager
def started(*command: str, port: int) -> Iterator[None]:
    """A program that listens at `port` until the block ends. What it says goes to a file: a pipe that nobody reads would fill
    up and stop it."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            for _ in range(200):
                assert process.poll() is None, f"{command[0]} has ended"
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield
        except BaseException:
            said.seek(0)
            print(said.read()[-8000:])
            raise
        finally:
            process.terminate()
            process.wait(20)


class Client:
    """A browser of `video.example.com`, which is this machine, with its cookies; its certificate is not looked at."""

    def __init__(self, port: int, key: str) -> None:
        self.host, self.port, self.key = f"video.example.com:{port}", port, key
        self.tls = ssl.create_default_context()
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        # Not 1.3, which sends session tickets after the handshake: the socket's reading thread takes them while another thread
        # sends, Python's ssl (before 3.13) does not guard that, and one connection of a thousand never gets its answer.
        self.tls.maximum_version = ssl.TLSVersion.TLSv1_2
        self.http = httpx.Client(verify=self.tls, timeout=60, base_url=f"https://127.0.0.1:{port}")
        self.cookies = dict[str, str]()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {
            "Host": self.host,
            "Authorization": f"Bearer {self.key}",
            "Origin": f"https://{self.host}",
        } | self._sent(path)
        answer = self.http.request(
            method, path, headers=headers, extensions={"sni_hostname": "video.example.com"}, **more
        )
        for line in answer.headers.get_list("set-cookie"):
            pair = line.partition(";")[0].partition("=")
            self.cookies[pair[0]] = pair[2]
        return answer

    def _sent(self, path: str) -> dict[str, str]:
        pairs = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return {"Cookie": pairs} if pairs and path.startswith("/v1/stream") else {}

    def viewer(self) -> Viewer:
        """A stream's socket, opened by a ticket as pages do."""
        answer = self.ask("POST", "/v1/stream/tickets")
        assert answer.status_code == 200, answer.text
        link = connect(
            f"wss://{self.host}/v1/stream", sock=socket.create_connection(("127.0.0.1", self.port)), ssl=self.tls,
            server_hostname="video.example.com", origin=f"https://{self.host}",  # type: ignore[arg-type]
            subprotocols=["fewstep.v1", f"ticket.{answer.json()['ticket']}"],  # type: ignore[list-item]
            additional_headers=self._sent("/v1/stream"), max_size=None, legacy=True,
        )  # fmt: skip
        return Viewer(link)


@pytest.mark.parametrize("proxy", [nginx, caddy], ids=["nginx", "caddy"])
def test_jobs_and_streams_go_through_the_proxies_of_the_page(
    house: tuple[list[Running], str], tmp_path: Path, proxy: Any
) -> None:
    name = proxy.__wrapped__.__name__
    for program in (name, "openssl"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    servers, key = house
    folder, port = Path(tempfile.mkdtemp(prefix=f"fewstep-{name}-")), free_port()
    with proxy(folder, port, servers):
        client = Client(port, key)
        page = client.ask("GET", "/")
        assert page.status_code == 200 and "<html" in page.text
        made = client.ask("POST", "/v1/videos/sync", data={"prompt": "a red ball", "num_frames": "4"})
        assert made.status_code == 200 and made.headers["content-type"] == "video/mp4"
        id = made.headers["x-video-id"]
        for _ in range(4):  # whichever is asked
            assert client.ask("GET", f"/v1/videos/{id}").json()["status"] == "completed"
            part = client.ask("GET", f"/v1/videos/{id}/content")
            assert part.content == made.content
        large = client.ask(
            "POST", "/v1/videos", data={"prompt": "a"}, files={"input_reference": b"\0" * ((20 << 20) + 9)}
        )
        assert large.status_code == 413 and large.json()["error"]["code"] == "too_large"  # the server's own words
        for _ in range(5):  # a ticket is known to one server alone
            viewer = client.viewer()
            viewer.say("init", prompt="a red ball", seconds=0.2)
            assert viewer.until("done")["frames"] == 10 and len(viewer.media) == 10
            viewer.close()
        viewer = client.viewer()  # it goes on where it was after its connection was lost, and its snapshot is there
        viewer.say("init", prompt="a red ball", seconds=4, ack=True)
        session = viewer.until("started")["session"]
        viewer.until("chunk")
        viewer.say("snapshot")
        saved = viewer.until("saved")["name"]
        last = viewer.until("stats") and max(told["index"] for told in viewer.heard if told["type"] == "chunk")
        viewer.socket.socket.shutdown(socket.SHUT_RDWR)
        assert client.ask("GET", f"/v1/stream/snapshots/{saved}").status_code == 200
        again = client.viewer()
        again.say("init", session=session, after=last)
        assert again.until("started")["session"] == session
        again.say("stop")
        again.close()
        evil = client.http.get(
            "/v1/videos", headers={"Host": client.host, "Authorization": f"Bearer {key}", "Origin": "https://evil.example"},
            extensions={"sni_hostname": "video.example.com"},
        )  # fmt: skip
        assert evil.status_code == 403
    shutil.rmtree(folder)


def test_the_container_file_copies_what_is_there_and_all_that_the_package_needs() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in shlex.split(line)[1:-1]]
    assert copied and all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "src", project["readme"], *project["license-files"]} <= set(copied)
    (extras,) = re.findall(r"\.\[([\w,]+)\]", "\n".join(lines))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)


def test_the_container_starts_the_server_with_options_that_it_has() -> None:
    from fewstep.cli.serving import Serve

    lines = (ROOT / "Dockerfile").read_text().splitlines()
    command = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(("ENTRYPOINT ", "CMD "))]
    assert command[0] == ["fewstep", "serve"]
    options = dict(zip(command[1][2::2], command[1][3::2]))
    known = {f"--{name.replace('_', '-')}" for name in Serve.__dataclass_fields__}
    assert set(options) <= known and "--keys" in options
    (exposed,) = (line.split()[1:] for line in lines if line.startswith("EXPOSE"))
    assert exposed == [options["--port"], options["--watch-port"]]
    (health,) = (line for line in lines if "urlopen" in line)
    assert f"http://127.0.0.1:{options['--watch-port']}/health" in health


def test_probes_ask_what_the_server_has() -> None:
    spec = yaml.safe_load(example("kubernetes.yaml"))
    watch = {route.path for route in Server.watch(object.__new__(Server)).routes}  # type: ignore[attr-defined]
    ports = {port.get("name"): port["containerPort"] for port in spec["ports"]}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"EXPOSE {ports[None]} {ports['watch']}" in dockerfile
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert spec[kind]["httpGet"]["path"] in watch and spec[kind]["httpGet"]["port"] in ports


def test_the_service_starts_a_server_per_gpu(tmp_path: Path) -> None:
    from fewstep.cli.serving import Serve

    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(example("fewstep@.service"))
    service = unit["Service"]
    words = shlex.split(shlex.split(service["ExecStart"])[2])
    known = {f"--{name.replace('_', '-')}" for name in Serve.__dataclass_fields__}
    assert {word for word in words if word.startswith("--")} <= known
    done = subprocess.run(
        ["sh", "-c", shlex.split(service["ExecStart"])[2].replace("%i", "2").replace("exec ", "env; exit; ")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "CUDA_VISIBLE_DEVICES=1\n" in done.stdout  # the second service has the second one
    assert service["SuccessExitStatus"] == "143"  # as test_serve_command.py sees it after SIGTERM
    if shutil.which("systemd-analyze") is not None:
        text = (
            example("fewstep@.service").replace("/opt/fewstep/bin/fewstep", "/bin/true").replace("User=fewstep\n", "")
        )
        for name in ("fewstep@.service", "fewstep@1.service"):
            (tmp_path / name).write_text(text)
        command = ["systemd-analyze", "verify", str(tmp_path / "fewstep@1.service")]
        verified = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "fewstep@1.service" not in verified.stderr, verified.stderr

"""The live page in a real browser, with a real server and worker: streams, steering, and connections that are lost."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, Page, expect

from fewstep.models import VideoModel
from fewstep.serve.app import Server
from fewstep.serve.keys import Keys
from fewstep.serve.limits import Limits
from fewstep.serve.pace import AHEAD
from fewstep.serve.worker import Served
from fewstep.streaming import Switch
from support_browser import Wire, browsing, chromium
from support_engine import tiny_model
from support_serve import KEYS, Running, running, save_streaming

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(chromium() is None, reason="needs Chromium"),
]
FPS = 5
FIRST = "a red ball"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_streaming(tmp_path_factory.mktemp("models") / "student", fps=FPS)


@pytest.fixture(scope="module")
def model(student: Path) -> VideoModel:
    return VideoModel.from_pretrained(student)


@pytest.fixture(scope="module")
def house(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A student that streams, its teacher, which does not, and a student that is steered by keys."""
    teacher = tiny_model().save(tmp_path_factory.mktemp("models") / "teacher")
    steered = save_streaming(tmp_path_factory.mktemp("models") / "steered", fps=FPS, keys=KEYS)
    served = Served(models=(("tiny", str(student)), ("slow", str(teacher)), ("steered", str(steered))), threads=1)
    with running(Server(served, limits=Limits(streams=8, grace=40), folder=tmp_path_factory.mktemp("served"))) as house:
        house.server.viewers._gate.full = 100.0  # room for two streams, however slow the machine
        yield house


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def wire(house: Running) -> Iterator[Wire]:
    wire = Wire(house.port)
    yield wire
    wire.close()


@pytest.fixture
def visit(house: Running, browser: Browser) -> Iterator[Open]:
    """Opens the page in a new window. Whatever the browser complains about, besides `forgiven`, fails the test."""
    contexts, complaints, forgiven, urls = list[BrowserContext](), list[str](), list[str](), list[str]()

    def visit(url: str = house.url, *, forgive: str = "", **options: object) -> Page:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20000)
        forgiven.append(forgive)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(url)
        return page

    expect.set_options(timeout=20000)
    yield visit
    for context in contexts:
        context.pages[0].evaluate("() => document.getElementById('stop').click()")
        context.close()
    known = [word for word in forgiven if word]
    assert [text for text in complaints if not any(word in text for word in known)] == []
    assert all(re.match(r"(blob:)?http://127\.0\.0\.1:|about:blank", url) for url in urls), (
        "the page loads from elsewhere"
    )
    assert quiet(house), "a stream was left"


def quiet(house: Running, seconds: float = 10.0) -> bool:
    """Whether no stream is served any more, soon."""
    until = time.monotonic() + seconds
    while streams := house.on_loop(lambda: len(house.server.viewers._all)):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return streams == 0


def start(page: Page, prompt: str = FIRST, *, compare: bool = False) -> None:
    expect(page.locator("#state")).to_have_text("Ready.")
    page.get_by_label("Compare with").set_checked(compare)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Start").click()


def chunk(page: Page) -> int:
    """Number of the chunk that is on the screen; -1: none yet."""
    found = re.search(r"chunk (\d+)", page.locator("#clock").inner_text())
    return int(found[1]) if found else -1


def reach(page: Page, number: int, seconds: float = 20.0) -> int:
    """Wait until a chunk, or a later one, is on the screen."""
    until = time.monotonic() + seconds
    while (now := chunk(page)) < number:
        assert time.monotonic() < until, f"only chunk {now} of {number} is shown"
        page.wait_for_timeout(50)
    return now


def downloaded(page: Page) -> tuple[np.ndarray, list[int]]:
    """Frames `[F, H, W, 3]` of the file that the page makes, and their milliseconds."""
    with page.expect_download() as told:
        page.get_by_role("button", name="Download").click()
    assert told.value.suggested_filename.endswith(".webp")
    with Image.open(io.BytesIO(told.value.path().read_bytes())) as film:
        frames = [(np.asarray(frame.convert("RGB")), film.info["duration"]) for frame in ImageSequence.Iterator(film)]
    return np.stack([pixels for pixels, _ in frames]), [duration for _, duration in frames]


def assert_made(
    model: VideoModel,
    frames: np.ndarray,
    changes: dict[int, str] | None = None,
    *,
    first: int = 0,
    seed: int = 0,
    how: Switch = "keep",
) -> None:
    """These are the frames that the model itself makes, from the first one on."""
    with model.stream([FIRST], seed=seed) as live:
        for number, prompt in (changes or {}).items():
            live.prompt(prompt, chunk=number, how=how)
        expected = [shown.frames[0].numpy() for shown in live.frames((first + len(frames)) // 2 + 1)]
    assert np.array_equal(frames, np.concatenate(expected)[first : first + len(frames)])


def test_a_browser_lets_the_page_load_nothing_from_elsewhere(house: Running) -> None:
    for path in ("/", "/main.js", "/style.css", "/icon.svg"):
        with urllib.request.urlopen(house.url + path) as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert b"http://" not in answer.read().replace(b"http://www.w3.org/2000/svg", b"")


def test_a_stream_is_shown_at_its_speed_and_steered_in_two_tabs(visit: Open, house: Running, model: VideoModel) -> None:
    """Twenty seconds of it. The file that is kept is what the model makes, picture by picture."""
    page, other = visit(), visit()
    start(page)
    start(other, "a green square")
    begun = time.monotonic()
    reach(page, 0), reach(other, 0)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a blue star")
    prompt.press("Enter")
    expect(page.locator("#applied")).to_contain_text("“a blue star” applies from chunk ")
    told = re.search(r"chunk (\d+)", page.locator("#applied").inner_text())
    assert told is not None
    reach(page, int(told[1]))
    expect(page.locator("#live-note")).to_have_text("a blue star")
    expect(page.locator("#canvas")).to_have_attribute("aria-label", "Video: a blue star")
    page.wait_for_timeout(max(0.0, 20 - (time.monotonic() - begun)) * 1000)
    lasted = time.monotonic() - begun
    number = chunk(page)
    assert 2 * number <= lasted * FPS + 4, "it plays too fast"
    got = house.on_loop(lambda: max(viewer.frames for viewer in house.server.viewers._all.values()))
    assert 2 * number >= max(got - 2 * (AHEAD + 2), 0.25 * lasted * FPS), "it plays too slowly"
    assert re.match(r"\d+\.\d\d s", page.locator("#first").inner_text())
    for meter in ("#rate", "#chunk", "#lead", "#load", "#memory"):
        assert re.search(r"\d", page.locator(meter).inner_text()), meter
    for chart in ("#rate-chart", "#chunk-chart", "#lead-chart"):
        assert page.locator(f"{chart} > *").count() >= 2, chart
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#state")).to_contain_text("Ended after")
    frames, durations = downloaded(page)
    assert set(durations) == {1000 // FPS} and len(frames) >= 2 * number
    assert_made(model, frames, {int(told[1]): "a blue star"})
    expect(other.locator("#state")).to_contain_text("Live")
    expect(other.locator("#live-note")).to_have_text("a green square")


def answers(page: Page) -> list[dict[str, Any]]:
    """What the server says to prompts and controls from now on."""
    said = list[dict[str, Any]]()

    def hear(text: str | bytes) -> None:
        if isinstance(text, str) and (message := json.loads(text))["type"] == "applied":
            said.append(message)

    page.on("websocket", lambda socket: socket.on("framereceived", hear))
    return said


def wait_for(page: Page, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come true"
        page.wait_for_timeout(20)


def test_keys_and_buttons_steer_and_a_tap_is_not_lost(visit: Open, house: Running) -> None:
    """Held, tapped, by touch and by keyboard: the file has the frames of the model that is told what the page was told."""
    page = visit()
    expect(page.locator("#steering")).to_be_hidden()
    page.get_by_label("Model").select_option("steered")
    up, left = (page.get_by_role("button", name=f"Key {name}") for name in ("up", "left"))
    expect(up).to_be_disabled()
    said = answers(page)
    start(page)
    reach(page, 0)
    page.keyboard.down("ArrowLeft")
    wait_for(page, lambda: len(said) == 1)
    expect(left).to_have_class("held shown")  # the frame on the screen obeys
    page.keyboard.up("ArrowLeft")
    expect(left).not_to_have_class("shown")
    box = up.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.up()  # long before the next chunk
    wait_for(page, lambda: len(said) == 4)
    up.focus()
    page.keyboard.press("Enter")
    wait_for(page, lambda: len(said) == 6)
    page.get_by_label("Prompt", exact=True).press("ArrowDown")  # moves in the text there
    reach(page, said[-1]["chunk"] + 1)
    page.get_by_role("button", name="Stop").click()
    assert [message["keys"] for message in said] == [["left"], [], ["up"], [], ["up"], []]
    assert [b["chunk"] - a["chunk"] for a, b in (said[2:4], said[4:6])] == [1, 1]
    frames, _ = downloaded(page)
    with house.server.served.load()["steered"].stream([FIRST]) as live:
        for message in said:
            live.control("keys", [float(key in message["keys"]) for key in KEYS.words], chunk=message["chunk"])
        expected = np.concatenate([made.frames[0].numpy() for made in live.frames(len(frames) // 2 + 1)])
    assert np.array_equal(frames, expected[: len(frames)])


def test_keys_that_are_held_while_the_connection_is_lost_are_told_again(wire: Wire, visit: Open) -> None:
    page = visit(wire.url, forgive="ERR_")
    page.get_by_label("Model").select_option("steered")
    said = answers(page)
    start(page)
    reach(page, 0)
    wire.cut()
    expect(page.locator("#state")).to_contain_text("Connection lost.")
    page.keyboard.down("ArrowRight")
    wire.mend()
    wait_for(page, lambda: bool(said))
    assert said[0]["keys"] == ["right"]
    page.evaluate("() => dispatchEvent(new Event('blur'))")  # the window loses the keyboard, so it hears of no release
    wait_for(page, lambda: len(said) == 2)
    assert said[1]["keys"] == []


def test_how_a_prompt_changes_can_be_chosen(visit: Open, model: VideoModel) -> None:
    page = visit()
    said = answers(page)
    start(page)
    reach(page, 2)
    page.get_by_label("When the prompt changes").select_option("forget what was seen")
    page.get_by_label("Prompt", exact=True).fill("a blue star")
    page.get_by_role("button", name="Change").click()
    wait_for(page, lambda: len(said) == 1)
    reach(page, said[0]["chunk"] + 1)
    page.get_by_role("button", name="Stop").click()
    frames, _ = downloaded(page)
    assert_made(model, frames, {said[0]["chunk"]: "a blue star"}, how="clear")
    page.get_by_label("Model").select_option("steered")
    ways = page.get_by_label("When the prompt changes").get_by_role("option").all_inner_texts()
    assert ways == ["keep what was seen", "blend over 4 chunks", "forget what was seen"]
    page.get_by_label("Model").select_option("slow")
    expect(page.get_by_label("When the prompt changes")).to_be_hidden()


def test_the_space_bar_pauses_and_goes_on(visit: Open, house: Running) -> None:
    page = visit()
    start(page)
    reach(page, 2)
    page.locator("h1").click()
    page.keyboard.press("Space")
    expect(page.locator("#state")).to_have_text("Paused.")
    number, frames = chunk(page), [house.on_loop(lambda: [v.frames for v in house.server.viewers._all.values()])]
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(1000)
    assert chunk(page) == number
    frames.append(house.on_loop(lambda: [v.frames for v in house.server.viewers._all.values()]))
    assert frames[1][0] - frames[0][0] <= 2, "the server goes on"  # the chunk that was being made
    page.keyboard.press("Space")
    expect(page.locator("#state")).to_contain_text("Live")
    reach(page, number + 2)
    page.get_by_label("Prompt", exact=True).press("Space")  # is text there
    expect(page.locator("#state")).to_contain_text("Live")


def test_a_lost_connection_comes_back_and_no_frame_is_missing(wire: Wire, visit: Open, model: VideoModel) -> None:
    page = visit(wire.url, forgive="ERR_")
    start(page)
    reach(page, 1)
    wire.cut()
    expect(page.locator("#state")).to_contain_text("Connection lost.")
    page.get_by_label("Prompt", exact=True).fill("a blue star")
    page.get_by_role("button", name="Change").click()  # is sent when it is back
    wire.mend()
    expect(page.locator("#state")).to_contain_text("Live")
    expect(page.locator("#applied")).to_contain_text("applies from chunk ")
    applied = int(page.locator("#applied").inner_text().rstrip(".").split()[-1])
    reach(page, applied + 1)
    page.get_by_role("button", name="Stop").click()
    frames, _ = downloaded(page)
    assert_made(model, frames, {applied: "a blue star"})


def test_a_server_that_does_not_come_back_is_told_and_tried_again(wire: Wire, visit: Open) -> None:
    page = visit(wire.url, forgive="ERR_")
    start(page)
    reach(page, 1)
    wire.cut()
    expect(page.get_by_role("alert")).to_contain_text("did not come back")
    number = chunk(page)
    page.wait_for_timeout(1000)  # all that it had is played
    wire.mend()
    page.get_by_role("button", name="Connect again").click()
    expect(page.locator("#state")).to_contain_text("Live")
    expect(page.get_by_role("alert")).to_be_hidden()
    reach(page, number + 2)


def test_a_tab_that_is_left_frees_its_place_at_once(visit: Open, house: Running) -> None:
    page = visit()
    start(page)
    reach(page, 0)
    page.goto("about:blank")
    assert quiet(house, house.server.limits.grace / 2)
    page.go_back()
    expect(page.locator("#state")).to_have_text(re.compile("Ready.|Ended after"))


def test_a_place_in_the_queue_is_told(visit: Open, house: Running) -> None:
    gate = house.server.viewers._gate
    house.on_loop(lambda: gate.enter(100.0))
    page = visit()
    try:
        start(page)
        expect(page.locator("#state")).to_contain_text("In the queue, position 1.")
    finally:
        house.on_loop(lambda: (gate.leave(100.0), house.server.viewers._admit()))
    expect(page.locator("#state")).to_contain_text("Live")
    reach(page, 0)


def test_a_stream_goes_on_from_a_snapshot(visit: Open, model: VideoModel) -> None:
    page = visit()
    page.get_by_label("Seed").fill("7")
    start(page)
    reach(page, 1)
    page.get_by_role("button", name="Snapshot", exact=True).click()
    entry = page.get_by_role("list", name="Snapshots").get_by_role("listitem")
    expect(entry).to_contain_text(FIRST)
    number = int(entry.inner_text().split(":")[0].removeprefix("Chunk "))
    with page.expect_download() as told:
        page.get_by_role("button", name="Keep the file").click()
    assert told.value.path().stat().st_size > 1000
    page.get_by_role("button", name="Go on from here").click()
    reach(page, number + 4)
    page.get_by_role("button", name="Stop").click()
    frames, _ = downloaded(page)
    assert_made(model, frames, first=2 * number, seed=7)


def test_a_key_is_asked_for_and_kept_in_the_tab(visit: Open, house: Running, tmp_path: Path) -> None:
    secret = Keys.add(tmp_path / "keys", "ada")
    house.server.door.keys = Keys.read(tmp_path / "keys")
    try:
        page = visit(forgive="401")
        page.get_by_role("textbox", name="Key").fill("wrong")
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("alert").filter(has_text="does not know that key")).to_be_visible()
        page.get_by_role("textbox", name="Key").fill(secret)
        page.get_by_role("button", name="Continue").click()
        start(page)
        reach(page, 0)
        assert secret not in page.url
        page.reload()
        expect(page.locator("#state")).to_have_text("Ready.")
        page.evaluate("() => sessionStorage.clear()")
        page.reload()
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("alert").filter(has_text="needs a key")).to_be_visible()
    finally:
        house.server.door.keys = None


def test_the_teacher_is_watched_beside_the_stream(visit: Open, house: Running) -> None:
    page = visit()

    asked = re.compile(r"/v1/videos/[^/]+$")

    def on_its_way(route: Any) -> None:
        """What the server would say of a slower teacher."""
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "status": "in_progress", "progress": 40})

    page.route(asked, on_its_way)
    page.get_by_label("steps", exact=True).fill("100")
    start(page, compare=True)
    expect(page.locator("#clip-overlay")).to_have_text("step 40 of 100")
    page.unroute_all(behavior="ignoreErrors")
    expect(page.locator("#live-times")).to_contain_text(" frames after ")
    expect(page.locator("#clip-note")).to_contain_text("finished after")
    page.wait_for_function("() => document.getElementById('clip-video').currentTime > 0")
    expect(page.locator("#state")).to_contain_text("Live")


def test_a_model_without_streams_makes_a_clip(visit: Open, house: Running) -> None:
    page = visit()
    page.get_by_label("Model").select_option("slow")
    page.get_by_label("steps", exact=True).fill("2")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#state")).to_have_text("The clip is ready.")
    with page.expect_download() as told:
        page.get_by_role("button", name="Download").click()
    assert told.value.path().read_bytes()[4:8] == b"ftyp"
    page.get_by_label("steps", exact=True).fill("100")
    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#state")).to_have_text("Ready.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(visit: Open, scheme: str) -> None:
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme)
    start(page)
    reach(page, 0)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    for name in ("Pause", "Stop", "Snapshot", "Download", "Change"):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 32
    expect(page.get_by_role("radio", name="2")).to_be_checked()
    for locator in ("body", "#live-note", "#go", "#pause", "#chunk", "#order label >> nth=0"):
        assert contrast(page, locator) >= 4.5, locator


def contrast(page: Page, locator: str) -> float:
    """Of a text and what is behind it (WCAG 2.2, 1.4.3)."""
    found = page.locator(locator).first.evaluate(
        """(element) => {
            const ink = getComputedStyle(element).color;
            let ground = element;
            while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
            return [ink, getComputedStyle(ground).backgroundColor];
        }"""
    )

    def luminance(colour: str) -> float:
        values = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, found))
    return (high + 0.05) / (low + 0.05)


def test_a_worker_that_dies_is_told_with_what_to_do(visit: Open, house: Running) -> None:
    """The last test here: the worker is started again after it."""
    page = visit()
    start(page)
    reach(page, 0)
    pid = house.server.supervisor.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    expect(page.get_by_role("alert")).to_contain_text("The worker has stopped")
    expect(page.get_by_role("button", name="Start again")).to_be_visible()
    expect(page.locator("#state")).to_have_text("Stopped.")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(FIRST)

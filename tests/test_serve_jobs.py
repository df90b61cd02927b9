"""The table of jobs, and what a request may ask: no server here."""

from __future__ import annotations

import io
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.core.finite import NonFiniteError
from fewstep.data.video import to_pixels
from fewstep.models import VideoModel
from fewstep.models.runtime import decodes_in_chunks
from fewstep.serve import webp
from fewstep.serve.database import SQLite
from fewstep.serve.errors import ApiError
from fewstep.serve.jobs import Job, Jobs, KeyReused
from fewstep.serve.limits import Limits
from fewstep.serve.orders import Facts, Made, Make, News, Progress
from fewstep.serve.tasks import Clip
from fewstep.serve.uploads import picture_of
from fewstep.serve.wishes import Wish, asked_of, wish_of
from fewstep.serve.worker import warm
from support_engine import tiny_model
from support_serve import save_streaming

WISH = Wish(model="tiny", prompt="a red ball", frames=8, fps=8.0, width=32, height=32, schedule=((0.5, "a star"),))
WHOLE = Facts(
    name="whole", role="student", fps=8.0, height=32, width=48, frames=16, steps=(4, 2), guided=False, takes_image=False
)
STREAM = replace(WHOLE, name="stream", chunk_frames=(2, 2))
TEACHER = replace(WHOLE, name="teacher", role="teacher", steps=(), guided=True, guidance=3.0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(tmp_path: Path, clock: Clock) -> Jobs:
    return Jobs(SQLite(tmp_path / "jobs.sqlite"), kept=60.0, clock=clock)


def test_a_job_is_in_the_file_as_it_was_asked_for(jobs: Jobs, tmp_path: Path, clock: Clock) -> None:
    job = jobs.add("ada", WISH, picture=b"png")
    again = Jobs(SQLite(tmp_path / "jobs.sqlite"), kept=60.0, clock=clock)
    found = again.get(job.id)
    assert found == job and found.wish == WISH and again.picture(found) == b"png"
    assert (job.state, job.created, job.begun, job.ended) == ("queued", 1000.0, 0, None)


def test_the_job_of_another_holder_is_not_there(jobs: Jobs) -> None:
    job = jobs.add("ada", WISH)
    assert jobs.get(job.id, "ada") == job and jobs.get(job.id, "bob") is None and jobs.get("video_x", "ada") is None
    assert jobs.page("bob", after=None, limit=9, newest=True) == ([], False)


def test_jobs_are_made_in_their_order_whatever_the_clock_says(jobs: Jobs, clock: Clock) -> None:
    first = jobs.add("ada", WISH)
    clock.now = 10.0  # it was set back
    second = jobs.add("bob", WISH)
    assert [jobs.waiting(first), jobs.waiting(second), jobs.waiting()] == [0, 1, 2]
    assert jobs.next() == first and jobs.begin(first)
    assert jobs.next() == second and jobs.waiting(second) == 0


def test_pages_follow_each_other(jobs: Jobs) -> None:
    made = [jobs.add("ada", WISH).id for _ in range(5)]
    jobs.add("bob", WISH)
    first, more = jobs.page("ada", after=None, limit=2, newest=True)
    rest, last = jobs.page("ada", after=first[-1], limit=3, newest=True)
    assert [j.id for j in first + rest] == made[::-1] and more and not last
    assert [j.id for j in jobs.page("ada", after=None, limit=9, newest=False)[0]] == made


def test_a_request_that_comes_twice_makes_one_job(jobs: Jobs) -> None:
    job = jobs.add("ada", WISH, key="k", picture=b"1")
    assert jobs.known("ada", WISH, key="k", picture=b"1") == job
    assert jobs.known("bob", WISH, key="k") is None and jobs.known("ada", WISH, key="l") is None
    assert jobs.known("ada", WISH) is None  # without a key
    for other in ({"picture": b"2"}, {"picture": None}):
        with pytest.raises(KeyReused):
            jobs.known("ada", WISH, key="k", **other)
    with pytest.raises(KeyReused):
        jobs.known("ada", replace(WISH, seed=1), key="k", picture=b"1")
    with pytest.raises(ValueError, match="taken"):
        jobs.add("ada", WISH, key="k")
    jobs.add("bob", WISH, key="k")


def test_jobs_that_have_ended_are_kept_for_their_time(jobs: Jobs, clock: Clock) -> None:
    done, failed, waits = (jobs.add("ada", WISH, key=str(i), picture=b"x") for i in range(3))
    assert jobs.complete(done) and jobs.fail(failed, "oops", "it failed")
    found = jobs.get(failed.id)
    assert found is not None and (found.state, found.code, found.message) == ("failed", "oops", "it failed")
    assert found.expires == 1060.0 and jobs.picture(found) is None
    clock.now = 1059.9
    assert jobs.get(done.id) is not None
    clock.now = 1060.0
    assert jobs.get(done.id) is None and done.id in jobs.ids()
    again = jobs.add("ada", WISH, key="0")  # its key is free
    assert jobs.ids() == {waits.id, again.id}


def test_a_job_that_was_removed_cannot_be_begun_or_ended(jobs: Jobs) -> None:
    job = jobs.add("ada", WISH)
    jobs.remove(job)
    assert not jobs.begin(job) and not jobs.complete(job) and not jobs.fail(job, "", "") and jobs.next() is None


def test_what_was_being_made_is_made_again_once(jobs: Jobs, tmp_path: Path, clock: Clock) -> None:
    job, done, waits = (jobs.add("ada", WISH) for _ in range(3))
    assert jobs.begin(done) and jobs.complete(done)
    for state in ("queued", "failed"):
        assert jobs.begin(job)
        again = Jobs(SQLite(tmp_path / "jobs.sqlite"), kept=60.0, clock=clock)  # the server was killed
        again.recover()
        assert _state(again, job) == state
        assert _state(again, done) == "completed" and _state(again, waits) == "queued"
    assert again.next() == waits
    failed = again.get(job.id)
    assert failed is not None and failed.code == "interrupted" and failed.expires == 1060.0


def test_an_orderly_end_of_the_server_does_not_count(jobs: Jobs) -> None:
    job = jobs.add("ada", WISH)
    for _ in range(5):
        jobs.put_back(job, counts=False)  # that waits already: nothing happens
        assert jobs.begin(job) and jobs.put_back(job, counts=False)
        jobs.recover()
    found = jobs.get(job.id)
    assert found is not None and found.begun == 0


def _state(jobs: Jobs, job: Job) -> str:
    found = jobs.get(job.id)
    assert found is not None
    return found.state


def test_a_holder_has_so_many_unfinished_jobs(jobs: Jobs) -> None:
    one, two, three = (jobs.add("ada", WISH) for _ in range(3))
    jobs.begin(one)
    jobs.complete(two)
    assert jobs.unfinished("ada") == 2 and jobs.unfinished("bob") == 0 and three


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no table, and long enough to be seen as something else" * 99)
    with pytest.raises(ValueError, match="cannot be used as a table of jobs"):
        Jobs(SQLite(tmp_path / "a"), kept=1.0)
    with sqlite3.connect(tmp_path / "b") as file:
        file.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="another version"):
        Jobs(SQLite(tmp_path / "b"), kept=1.0)


def wish(given: dict[str, Any], facts: Facts = WHOLE, picture: bool = False, **limits: Any) -> Wish:
    return wish_of(asked_of({"prompt": "a ball", **given}), facts, Limits(**limits), picture=picture)


def test_a_request_of_little_is_what_the_model_makes() -> None:
    assert wish({}) == Wish(model="whole", prompt="a ball", frames=16, fps=8.0, width=48, height=32)
    assert wish({}).seconds == 2.0


@pytest.mark.parametrize(
    "read", [lambda value: value, lambda value: value if isinstance(value, str) else json.dumps(value)]
)
def test_json_and_forms_say_the_same(read: Any) -> None:
    given = {
        "seconds": 3, "size": "48x32", "num_frames": 24, "fps": 8, "seed": 7, "num_inference_steps": 2, "width": 48,
        "prompt_schedule": [{"at_s": 1, "prompt": "a star"}, {"at_s": 2.5, "prompt": "true"}],
    }  # fmt: skip
    made = wish({name: read(value) for name, value in given.items()}, STREAM)
    schedule = ((1.0, "a star"), (2.5, "true"))
    assert (made.frames, made.seed, made.steps, made.schedule) == (24, 7, 2, schedule)


def test_prompts_are_texts_whatever_they_look_like() -> None:
    for prompt in ("12", "null", "{a: b}", '"quoted"', "[1]"):
        assert wish({"prompt": prompt}).prompt == prompt


def test_the_rate_of_the_file_is_not_that_of_the_stream() -> None:
    """At 16 frames per second, 2 s of the file are 4 s of a stream of 8."""
    made = wish({"fps": 16, "seconds": 2, "prompt_schedule": [{"at_s": 1, "prompt": "b"}]}, STREAM)
    assert (made.frames, made.fps, made.seconds, made.schedule) == (32, 16.0, 2.0, ((2.0, "b"),))


@pytest.mark.parametrize(
    ("given", "facts", "param", "message"),
    [
        ({"prompt": " "}, WHOLE, "prompt", "1 to 2000 characters"),
        ({"prompt": "x" * 2001}, WHOLE, "prompt", "this one 2001"),
        ({"prompt": 3}, WHOLE, "prompt", "must be"),
        ({"n": 2}, WHOLE, "n", "there is no field 'n'; there are prompt, model, seconds"),
        ({"num_inference_steps": 3}, WHOLE, "num_inference_steps", "trained for 4 or 2 steps, not for 3"),
        ({"num_inference_steps": 0}, TEACHER, "num_inference_steps", "at least 1"),
        ({"num_inference_steps": 201}, TEACHER, "num_inference_steps", "at most 200"),
        ({"num_frames": 17}, WHOLE, "num_frames", "16 frames, 2 seconds at 8 frames per second"),
        ({"seconds": "4"}, WHOLE, "seconds", "16 frames, 2 seconds at 8 frames per second"),
        ({"seconds": 2, "fps": 16}, WHOLE, "seconds", "16 frames, 1 seconds at 16"),
        ({"seconds": 2, "num_frames": 17}, STREAM, "seconds", "2 seconds have 16 frames"),
        ({"seconds": 2.05}, STREAM, "seconds", "give seconds 2 or 2.125"),
        ({"seconds": 1e300}, STREAM, "seconds", "whole number"),
        ({"seconds": "NaN"}, STREAM, "seconds", "finite"),
        ({"seconds": 0}, STREAM, "seconds", "more than 0"),
        ({"seconds": 601}, STREAM, "seconds", "at most 4800 frames here, 600 seconds"),
        ({"size": "32x48"}, WHOLE, "size", "48x32"),
        ({"size": "720x1280"}, WHOLE, "size", "48x32"),
        ({"height": 48}, WHOLE, "height", "48x32"),
        ({"seed": -1}, WHOLE, "seed", "at least 0"),
        ({"seed": 2**63}, WHOLE, "seed", "at most"),
        ({"seed": "x"}, WHOLE, "seed", "whole number"),
        ({"seed": True}, WHOLE, "seed", "whole number"),
        ({"fps": 0.5}, WHOLE, "fps", "at least 1"),
        ({"guidance_scale": 5}, WHOLE, "guidance_scale", "guidance_scale is 1; leave it out"),
        ({"guidance_scale": "Infinity"}, TEACHER, "guidance_scale", "finite"),
        ({"negative_prompt": "x"}, WHOLE, "negative_prompt", "without guidance"),
        ({"negative_prompt": "x", "guidance_scale": 1}, TEACHER, "negative_prompt", "without guidance"),
        ({"negative_prompt": "x" * 2001}, TEACHER, "negative_prompt", "at most 2000"),
        ({"prompt_schedule": [{"at_s": 1, "prompt": "b"}]}, WHOLE, "prompt_schedule", "whole clips"),
        ({"prompt_schedule": [{"at_s": 2, "prompt": "b"}]}, STREAM, "prompt_schedule", "ends at 2 s"),
        ({"prompt_schedule": [{"at_s": 1, "prompt": "b"}] * 2}, STREAM, "prompt_schedule", "later than the one before"),
        ({"prompt_schedule": [{"at_s": -1, "prompt": "b"}]}, STREAM, "prompt_schedule", "at least 0"),
        ({"prompt_schedule": [{"at_s": 1, "prompt": ""}]}, STREAM, "prompt_schedule[0]", "1 to 2000"),
        ({"prompt_schedule": [{"at": 1}]}, STREAM, "prompt_schedule", "at_s"),
        ({"prompt_schedule": "soon"}, STREAM, "prompt_schedule", "list"),
    ],
)  # fmt: skip
def test_what_the_contract_does_not_allow_is_refused_with_what_it_allows(
    given: dict[str, Any], facts: Facts, param: str, message: str
) -> None:
    with pytest.raises(ApiError) as refused:
        wish(given, facts)
    assert refused.value.status_code == 400 and refused.value.param == param and message in refused.value.detail


def test_what_the_contract_allows_is_allowed() -> None:
    assert wish({"guidance_scale": 1.0}).guidance is None
    assert wish({"guidance_scale": 5, "negative_prompt": "grey"}, TEACHER).guidance == 5.0
    assert wish({"guidance_scale": 3, "negative_prompt": "grey"}, TEACHER).negative_prompt == "grey"
    assert wish({"num_inference_steps": 37}, TEACHER).steps == 37
    assert wish({"seconds": "0.333", "fps": 24}, STREAM).frames == 8  # rounded to thousandths
    assert wish({}, replace(WHOLE, takes_image=True), picture=True).picture


def test_a_clip_that_would_take_too_much_memory_is_refused() -> None:
    assert wish({"num_frames": 10}, STREAM, clip=10 * 48 * 32 * 3).frames == 10
    with pytest.raises(ApiError, match="at most 9 frames"):
        wish({"num_frames": 10}, STREAM, clip=10 * 48 * 32 * 3 - 1)


def test_a_picture_is_for_models_that_begin_with_one() -> None:
    for facts, picture, message in (
        (WHOLE, True, "takes no picture"),
        (replace(WHOLE, takes_image=True), False, "send one"),
    ):
        with pytest.raises(ApiError, match=message) as refused:
            wish({}, facts, picture)
        assert refused.value.param == "input_reference"


def _file(pixels: np.ndarray, kind: str = "png", **more: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **more)
    return out.getvalue()


def test_a_picture_is_scaled_to_the_clip_and_stripped() -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 48:144] = 200  # what the centre crop keeps
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    data = picture_of(_file(pixels, exif=exif), WHOLE, Limits())
    made = np.array(Image.open(io.BytesIO(data)))
    assert made.shape == (32, 48, 3) and (made[:, 1:-1] >= 190).all() and b"secret" not in data
    upright = Image.Exif()
    upright[0x0112] = 3  # upside down
    half = np.zeros((32, 48, 3), np.uint8)
    half[:16] = 255
    turned = np.array(Image.open(io.BytesIO(picture_of(_file(half, exif=upright), WHOLE, Limits()))))
    assert turned[0].max() == 0 and turned[-1].min() == 255


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _file(np.zeros((2000, 3000), np.uint8))
    assert len(data) < 20_000  # a small file of many pixels
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ApiError, match="3000 x 2000 pixels") as refused:
        picture_of(data, WHOLE, Limits(pixels=3000 * 2000 - 1))
    assert refused.value.code == "invalid_image"


@pytest.mark.parametrize("more", [{"lossless": True}, {"quality": 90}, {"exif": True}])
def test_a_webp_picture_is_read_like_others(more: dict[str, Any]) -> None:
    """Its three kinds of header."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 48:] = 200
    if "exif" in more:
        more["exif"] = Image.Exif()
        more["exif"][0x010E] = "a secret"
    data = _file(pixels, "webp", **more)
    assert webp.size_of(data) == (96, 64)
    made = np.array(Image.open(io.BytesIO(picture_of(data, WHOLE, Limits()))))
    assert made.shape == (32, 48, 3) and made[:, :22].max() < 20 and made[:, 26:].min() > 180
    with pytest.raises(ApiError, match="96 x 64 pixels, and at most 6143"):
        picture_of(data, WHOLE, Limits(pixels=6143))


def test_a_webp_file_says_its_size_before_its_decoder_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder reserves memory for the canvas when it opens a file."""
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    huge = b"RIFF" + bytes(4) + b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes(4) + b"\xff" * 6
    with pytest.raises(ApiError, match="16777216 x 16777216 pixels"):
        picture_of(huge, WHOLE, Limits())
    for broken in (
        huge[:24],
        huge[:12] + b"VP8 " + huge[16:],
        huge[:20] + b"\x02" + huge[21:],
    ):  # cut, odd, an animation
        with pytest.raises(ApiError, match="no readable picture"):
            picture_of(broken, WHOLE, Limits())
    assert webp.size_of(b"\x89PNG and more") is None


@pytest.mark.parametrize("kind", ["text", "cut", "flipped", "gif", "empty"])
def test_a_picture_that_is_damaged_or_of_another_kind_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    good = _file(noise)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    data = {
        "text": b"<svg/>",
        "cut": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "gif": _file(noise, "gif"),
        "empty": b"",
    }
    with pytest.raises(ApiError, match="no readable picture") as refused:
        picture_of(data[kind], WHOLE, Limits())
    assert refused.value.status_code == 400 and refused.value.param == "input_reference"


def _all_of(task: Clip) -> None:
    while task.work(lambda: 0.0):
        pass


def made_by(model: VideoModel, order: Make) -> tuple[list[Progress], np.ndarray]:
    """What a clip's task tells."""
    heard = list[News]()
    task = Clip(order, model, Path(), heard.append, 0.0)
    _all_of(task)
    *progress, made = heard
    assert isinstance(made, Made)
    return [news for news in progress if isinstance(news, Progress)], made.frames


def test_a_clip_is_what_the_model_makes_of_the_request() -> None:
    model = tiny_model()
    order = Make(
        id="1", model="x", prompt="a red ball", frames=4, seed=3, steps=2, guidance=1.5, negative_prompt="grey"
    )
    progress, frames = made_by(model, order)
    with torch.inference_mode():
        expected = model.with_card(negative_prompt="grey")(
            ["a red ball"], seed=3, num_inference_steps=2, guidance_scale=1.5
        )
    assert np.array_equal(frames, ((expected[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    assert [(p.done, p.of) for p in progress] == [
        (1, 6),
        (2, 6),
        (3, 6),
        (4, 6),
        (5, 6),
    ]  # two steps, four latent frames


@pytest.mark.parametrize("family", ["wan_image", "ltx"])
def test_a_clip_is_decoded_in_pieces_where_they_give_the_same_frames(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pieces the worker says that it lives. A decoder that looks far ahead does it at once."""
    from tiny_models import TINY, shared

    size = {"height": 16, "width": 16, "num_frames": 9} if family == "wan_image" else TINY[family].size
    model, calls = VideoModel.from_pretrained(shared(family)).with_card(**size), list[int]()
    assert decodes_in_chunks(model) == (family == "wan_image")
    decode_next = type(model).decode_next

    def counted(self: VideoModel, latents: torch.Tensor, *given: Any, **named: Any) -> Any:
        calls.append(latents.shape[2])
        return decode_next(self, latents, *given, **named)

    monkeypatch.setattr(type(model), "decode_next", counted)
    latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    task = Clip(Make(id="1", model="x", prompt="a", frames=model.card.num_frames), model, Path(), lambda _: None, 0.0)
    pieces = latents.shape[2] if family == "wan_image" else 1
    frames = torch.cat(list(task._decoded(latents, pieces)), 2)
    assert calls == ([1] * pieces if pieces > 1 else []) and pieces == (3 if family == "wan_image" else 1)
    with torch.no_grad():
        torch.testing.assert_close(frames, model.decode(latents), atol=1e-5, rtol=0)


def test_a_clip_that_is_given_up_while_it_is_decoded_decodes_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    model, heard, calls = tiny_model(), list[News](), list[int]()
    decode_next = type(model).decode_next

    def counted(self: VideoModel, *given: Any, **named: Any) -> Any:
        calls.append(1)
        return decode_next(self, *given, **named)

    monkeypatch.setattr(type(model), "decode_next", counted)
    task = Clip(Make(id="1", model="x", prompt="a", frames=4, steps=2), model, Path(), heard.append, 0.0)
    for done in range(1, 4):
        assert task.work(lambda: 0.0) and len(calls) == max(0, done - 2)  # a piece for each call, after two steps
    task.close()
    assert not task.work(lambda: 0.0) and len(calls) == 1
    assert all(isinstance(news, Progress) for news in heard)


def test_a_clip_begins_with_its_picture(tmp_path: Path) -> None:
    from tiny_models import shared

    model = VideoModel.from_pretrained(shared("wan_image")).with_card(height=16, width=16, num_frames=5)
    facts = warm("x", model)
    assert facts.takes_image
    size = model.card.height, model.card.width
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    order = Make(id="1", model="x", prompt="a duck", frames=facts.frames, seed=3, steps=2, image=tmp_path / "1.png")
    _, made = made_by(model, order)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = to_pixels(model(["a duck"], seed=3, num_inference_steps=2, image=image))[0]
    other = to_pixels(model(["a duck"], seed=3, num_inference_steps=2, image=-image))[0]
    assert np.array_equal(made, expected.numpy()) and not torch.equal(expected, other)


@pytest.mark.parametrize("streams", [False, True])
def test_numbers_that_are_no_pictures_fail_the_clip(tmp_path: Path, streams: bool) -> None:
    model = VideoModel.from_pretrained(save_streaming(tmp_path)) if streams else tiny_model()
    for parameter in model.codec.parameters():
        parameter.data.fill_(torch.nan)
    task = Clip(Make(id="1", model="x", prompt="a", frames=4), model, Path(), lambda news: None, 0.0)
    with pytest.raises(NonFiniteError):
        _all_of(task)


def test_a_clip_of_a_stream_changes_its_prompt_and_ends_with_its_frame(tmp_path: Path) -> None:
    model = VideoModel.from_pretrained(save_streaming(tmp_path))
    order = Make(id="1", model="x", prompt="a red ball", frames=7, seed=3, schedule=((0.07, "a blue star"),))
    _, frames = made_by(model, order)
    with model.stream(["a red ball"], seed=3) as live:
        live.prompt("a blue star", chunk=2)
        expected = torch.cat([chunk.frames[0] for chunk in live.frames(4, last=True)])[:7]
    assert np.array_equal(frames, expected.numpy())


def test_a_clip_that_is_given_up_ends_its_stream(tmp_path: Path) -> None:
    model = VideoModel.from_pretrained(save_streaming(tmp_path))
    task = Clip(Make(id="1", model="x", prompt="a", frames=60), model, Path(), lambda news: None, 0.0)
    task.work(lambda: 0.0)
    task.close()
    assert not task.work(lambda: 0.0)

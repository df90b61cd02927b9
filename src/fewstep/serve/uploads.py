"""The bodies of requests: read up to a limit, as JSON or as a form, with a picture that is checked before it is decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from fewstep.data.video import fit
from fewstep.serve import webp
from fewstep.serve.errors import ApiError
from fewstep.serve.limits import Limits
from fewstep.serve.orders import Facts
from fewstep.serve.wishes import json_or_text

SECONDS = 120.0
"""Longest time that a body may take."""
REFERENCE = "input_reference"
SCHEDULE = "prompt_schedule"
LATER = (f"{SCHEDULE}[][at_s]", f"{SCHEDULE}[][prompt]")
KINDS = ("PNG", "JPEG", *(("WEBP",) if webp.is_safe() else ()))
"""Pictures that are read."""


async def bounded(request: Request, most: int) -> Request:
    """The request, with its body, which has at most so many bytes."""
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(413, f"a request has at most {most} bytes", code="too_large")
    except TimeoutError:
        raise ApiError(408, f"the request did not come within {SECONDS:g} seconds", code="timeout") from None

    async def again() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return Request(request.scope, again)


async def fields_of(request: Request, limits: Limits) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a request, and the file of its picture."""
    request, kind = await bounded(request, limits.upload), request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request)
    if kind.strip().lower() != "application/json":
        raise ApiError(
            415, "send JSON (Content-Type: application/json) or a form (multipart/form-data)", code="content_type"
        )
    try:
        given = await request.json()
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body is a JSON object", code="invalid_json")
    if given.get(REFERENCE) is None:
        given.pop(REFERENCE, None)
        return given, None
    reference = given.pop(REFERENCE)
    return given, _inline(reference.get("image_url") if isinstance(reference, dict) else reference)


async def _form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    given, picture, later = dict[str, Any](), None, {key: list[str]() for key in LATER}
    async with request.form(max_files=1, max_fields=300) as form:
        for name, value in form.multi_items():
            if name in (REFERENCE, f"{REFERENCE}[image_url]"):
                if picture is not None:
                    raise ApiError(400, "a video begins with one picture", param=REFERENCE, code="invalid_value")
                picture = await value.read() if isinstance(value, UploadFile) else _inline(value)
            elif isinstance(value, UploadFile):
                raise ApiError(400, f"only {REFERENCE} is a file", param=name[:40], code="invalid_value")
            elif name in later:
                later[name].append(value)
            elif name in given:
                raise ApiError(400, f"{name[:40]} is there twice", param=name[:40], code="invalid_value")
            else:
                given[name] = value
    if any(later.values()) and SCHEDULE in given:
        raise ApiError(400, f"{SCHEDULE} is there twice", param=SCHEDULE, code="invalid_value")
    return given | _schedule(later), picture


def _schedule(later: Mapping[str, list[str]]) -> dict[str, Any]:
    """Prompts that follow, as OpenAI's client writes a list of objects into a form: a field for each value."""
    times, prompts = later.values()
    if len(times) != len(prompts):
        message = f"{SCHEDULE} has {len(times)} times and {len(prompts)} prompts; give at_s and prompt for each"
        raise ApiError(400, message, param=SCHEDULE, code="invalid_value")
    pairs = [{"at_s": json_or_text(time), "prompt": prompt} for time, prompt in zip(times, prompts)]
    return {SCHEDULE: pairs} if pairs else {}


def _inline(url: Any) -> bytes:
    """The bytes of a picture that is part of the request."""
    head, _, text = url.partition(",") if isinstance(url, str) else ("", "", "")
    try:
        if head not in [f"data:image/{kind.lower()};base64" for kind in KINDS]:
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        message = (
            f"{REFERENCE} is the file of a picture, or data:image/png;base64,... as its image_url; this server reads "
            "no addresses and no files of its own"
        )
        raise ApiError(400, message, param=REFERENCE, code="invalid_value") from None


def picture_of(data: bytes, facts: Facts, limits: Limits) -> bytes:
    """A picture, upright, scaled to cover the size of a model's clips and cropped at the centre: a PNG of nothing else."""
    *kinds, last = KINDS
    problem = f"{REFERENCE} is no readable picture; send a {', '.join(kinds)} or {last} (no animation)"
    too_large = REFERENCE + " has {} x {} pixels, and at most " + f"{limits.pixels} are read"
    try:
        if (size := webp.size_of(data)) is not None and size[0] * size[1] > limits.pixels:
            problem = too_large.format(*size)
            raise ValueError
        with Image.open(io.BytesIO(data), formats=KINDS) as image:  # reads the header only
            if image.width * image.height > limits.pixels:
                problem = too_large.format(*image.size)
                raise ValueError
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        out = io.BytesIO()
        Image.fromarray(fit(pixels, (facts.height, facts.width)).numpy()).save(out, "png")
    except Exception:  # a broken file can make the decoder raise anything
        raise ApiError(400, problem, param=REFERENCE, code="invalid_image") from None
    return out.getvalue()

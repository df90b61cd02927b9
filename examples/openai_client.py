"""A walk through `/v1/videos` with OpenAI's client: start `fewstep serve world/stream world`, then
`python examples/openai_client.py http://127.0.0.1:8000 [KEY]`. It writes two videos into the working folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI


def main(address: str, key: str = "none") -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key=key)  # a server without keys takes any
    for model in client.models.list():
        facts: dict[str, Any] = model.model_extra or {}
        size = f"{facts['width']}x{facts['height']}, {facts['fps']:g} frames per second"
        print(f"model {model.id}: {facts['role']}, {size}, steps {facts['steps'] or 'any'}")

    schedule = [{"at_s": 2, "prompt": "a blue square moves right"}]
    student = made(client, "world/stream", num_frames=32, seed=3, prompt_schedule=schedule)
    teacher = made(client, "world", num_inference_steps=10, seed=3)
    print("jobs, newest first:", ", ".join(f"{job.model} {job.status}" for job in client.videos.list(limit=10)))

    again = client.videos.create(
        prompt="a red circle moves left", model="world/stream", extra_body={"num_frames": 32, "seed": 4},
        extra_headers={"Idempotency-Key": "example-1"},
    )  # fmt: skip
    same = client.videos.create(
        prompt="a red circle moves left", model="world/stream", extra_body={"num_frames": 32, "seed": 4},
        extra_headers={"Idempotency-Key": "example-1"},
    )  # fmt: skip
    print("the same request with one Idempotency-Key makes", "one job" if again.id == same.id else "two jobs")

    for what, given in (("steps", {"num_inference_steps": 3}), ("size", {"size": "1280x720"}), ("field", {"n": 2})):
        try:
            client.videos.create(prompt="a red circle", model="world/stream", extra_body=given)
        except APIStatusError as error:
            told: Any = error.body
            print(f"another {what}: {error.status_code}, {told['param']}: {told['message']}")
    for id in (student, teacher, again.id):
        print("deleted:", client.videos.delete(id).deleted)


def made(client: OpenAI, model: str, **fields: Any) -> str:
    """Make a video, write it to a file, and give its id."""
    job = client.videos.create(prompt="a red circle moves left", model=model, extra_body=fields)
    print(f"{model}: {job.status}, {job.seconds} s of {job.size}")
    shown = -1
    while job.status in ("queued", "in_progress"):
        if job.status == "in_progress" and job.progress >= shown + 25:
            shown = job.progress
            print(f"{model}: {job.progress} %")
        time.sleep(0.1)
        job = client.videos.retrieve(job.id)
    assert job.status == "completed", job.error
    file = Path(f"{model.replace('/', '-')}.mp4")
    client.videos.download_content(job.id).write_to_file(file)
    print(f"{model}: {job.status}, {file} has {file.stat().st_size} bytes")
    return job.id


if __name__ == "__main__":
    main(*sys.argv[1:])

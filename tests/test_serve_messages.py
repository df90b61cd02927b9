"""Messages of viewers are read strictly; keys and tickets let in whom they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.serve import keys as keys_module
from fewstep.serve import protocol
from fewstep.serve.keys import ANYBODY, Door, Keys
from fewstep.serve.sockets import origin_allowed


def test_a_message_is_read() -> None:
    init = protocol.heard('{"type": "init", "prompt": "a red ring", "seed": 3, "ack": true}')
    assert init == protocol.Init(prompt="a red ring", seed=3, ack=True)
    assert protocol.heard('{"type": "ack", "frames": 4}') == protocol.Ack(frames=4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "JSON object"),
        ("[1]", "JSON object"),
        ('"stop"', "JSON object"),
        ("{}", "one of init, prompt, control, ack"),
        ('{"type": "start"}', "one of init, prompt, control, ack"),
        ('{"type": ["init"]}', "one of init, prompt, control, ack"),
        ('{"type": "init", "promt": "a"}', "prompt"),
        ('{"type": "init", "prompt": 3}', "prompt"),
        ('{"type": "init", "prompt": "  "}', "1 to 2000 characters"),
        ('{"type": "init", "prompt": "' + "a" * 2001 + '"}', "and this one 2001"),
        ('{"type": "init", "seed": -1}', "at least 0"),
        ('{"type": "init", "seed": 1.5}', "whole number"),
        ('{"type": "init", "seconds": 0}', "more than 0"),
        ('{"type": "init", "seconds": NaN}', "finite"),
        ('{"type": "init", "media": "gif"}', "webp"),
        ('{"type": "ack"}', "frames"),
        ('{"type": "ack", "frames": -1}', "at least 0"),
        ('{"type": "prompt", "prompt": "a", "how": "slowly"}', "recache"),
        ('{"type": "control"}', "keys"),
        ('{"type": "control", "keys": [1]}', "keys"),
        ('{"type": "control", "keys": [], "chunk": -1}', "at least 0"),
        ('{"type": "init", "ahead": 0}', "at least 1"),
        ('{"type": "init", "ahead": 4}', "at most 3"),
        ("[" * 100_000, "JSON object"),
    ],
)
def test_a_wrong_message_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        protocol.heard(text)


def test_a_control_names_keys_and_maybe_a_chunk() -> None:
    told = protocol.heard('{"type": "control", "keys": ["left", "up"], "chunk": 4, "id": "x"}')
    assert told == protocol.Control(keys=("left", "up"), chunk=4, id="x")


def test_a_message_of_the_server_names_its_type() -> None:
    said = json.loads(protocol.Error(code="busy", message="later", retryable=True).text())
    rest = {"retryable": True, "fatal": True, "id": ""}
    assert said == {"type": "error", "code": "busy", "message": "later"} | rest


def test_a_key_is_stored_as_a_digest_and_lets_its_holder_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    secrets = {name: Keys.add(path, name) for name in ("ada", "bob")}
    text = path.read_text()
    assert not any(secret in text for secret in secrets.values()) and path.stat().st_mode & 0o77 == 0
    door = Door(Keys.read(path))
    for name, secret in secrets.items():
        assert door.enter(f"Bearer {secret}") == name == door.enter(f"bearer  {secret} ")
        assert door.enter(secret) is None and door.enter(f"Basic {secret}") is None
        assert door.enter(f"Bearer {secret}x") is None
    assert door.enter(None) is None and door.enter("Bearer ") is None
    with pytest.raises(ValueError, match="'ada' is none or is taken"):
        Keys.add(path, "ada")
    with pytest.raises(ValueError, match="'a b' is none"):
        Keys.add(path, "a b")


def test_a_digest_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    Keys.add(path, "ada")
    digest = path.read_text().split()[-1]
    assert Door(Keys.read(path)).enter(f"Bearer {digest}") is None


def test_files_without_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no keys; add one by fewstep serve --keys"):
        Keys.read(path)
    path.write_text("ada secret\n")
    with pytest.raises(ValueError, match="line 1: a line has a name"):
        Keys.read(path)


def test_a_server_without_keys_is_for_anybody() -> None:
    assert Door().enter(None) == ANYBODY


def test_a_ticket_opens_one_connection_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(Keys({}))
    word = door.ticket("ada")
    assert door.punch(word) == "ada" and door.punch(word) is None and door.punch("x") is None
    word, now = door.ticket("ada"), keys_module.time.monotonic()
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now + keys_module.TICKET_SECONDS + 1)
    assert door.punch(word) is None
    door.ticket("bob")
    assert len(door.tickets) == 1  # the old one is gone


def test_pages_of_other_origins_may_not_connect() -> None:
    assert origin_allowed({"host": "a:80"}, ())
    assert origin_allowed({"host": "a:80", "origin": "http://a:80"}, ())
    assert not origin_allowed({"host": "a:80", "origin": "http://b"}, ())
    assert not origin_allowed({"host": "a:80", "origin": "null"}, ())
    assert origin_allowed({"host": "a:80", "origin": "http://b"}, ("http://b",))

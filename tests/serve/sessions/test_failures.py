"""A turn that fails, is cancelled or is cut off by a kill leaves its session as its client saw it."""

import errno
from pathlib import Path

import pytest
import torch

from swat_lm.serve.requests import RequestError
from swat_lm.serve.sessions.record import SessionError
from tests.serve.sessions.driver import PLANS, Server, built, capacity, check_holds, flipped, same_state


def test_a_last_text_that_fails_takes_the_turn_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("full"), tmp_path, capacity=20)
    text = "begin" + server.say("a", "begin", max_tokens=2)
    # until its slot is full: the scheduler ends it, and then its text fails
    key, _ = server.begin("a", "on", max_tokens=None)
    server.loop(until=lambda: bool(server.events[key]))

    def no_text(reason: str) -> None:
        raise TypeError("no text")

    monkeypatch.setattr(server.engine._requests[key].replies[0].text, "finish", no_text)
    server.loop()
    assert server.events[key][-1].error == "TypeError: no text"
    assert server.record("a").turns == 1
    assert server.say("a", "on", max_tokens=2) == server.say("b", text + "on", max_tokens=2)


def test_a_slot_that_cannot_be_prepared_gives_nobody_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path, slots=1)
    text = "begin" + server.say("a", "begin")
    server.say("b", "somebody else's words")

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        # of one that comes from its file, of a new one, and of one that is in its slot
        patched.setattr(server.engine.slots, "restore", fails)
        patched.setattr(server.engine.slots, "reset", fails)
        patched.setattr(server.engine.slots, "copy", fails)
        for name in ("a", "new", "a"):
            key, _ = server.begin(name, "?")
            server.loop()
            assert server.events[key][-1].error == "out of memory"
    check_holds(server, "a", text)
    server.say("a", "!")
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.slots, "copy", fails)
        key, _ = server.begin("a", "?")
        server.loop()
        assert server.events[key][-1].error == "out of memory"
    assert server.record("a").turns == 2
    assert server.say("a", "?")


def test_a_state_that_cannot_be_copied_now_is_saved_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path, slots=1)
    server.say("a", "x")
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.slots, "snapshot", lambda slot: (_ for _ in ()).throw(RuntimeError("no memory")))
        key, _ = server.begin("b", "x")
        server.loop()
        assert "no slot is free" in server.events[key][-1].error
    server.now += 11
    assert server.say("b", "x")
    assert server.say("a", "y")


def test_a_step_that_fails_as_a_whole_takes_the_turn_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path)
    text = "begin" + server.say("a", "begin")
    key, _ = server.begin("a", "on")
    server.loop(until=lambda: len(server.events[key]) == 2)
    with monkeypatch.context() as patched:
        patched.setattr(server.engine, "_report", lambda events: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.engine.step()
    (end,) = server.engine.casualties
    server.listening.pop(key)(end)
    check_holds(server, "a", text)
    assert server.say("a", "on")


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_cancelled_turn_is_as_delivered(lag: int, tmp_path: Path):
    server = Server(built("recurrence"), tmp_path)
    first = server.say("a", "begin")
    key, _ = server.begin("a", " go on", max_tokens=50)
    server.loop(until=lambda: len(server.events[key]) == 8)
    got = server.events[key][: 8 - lag]
    text = "".join(event.text for event in got)
    assert server.turns.cancel(key, got[-1].shown, text)
    assert not server.turns.cancel(key)
    server.loop()
    check_holds(server, "a", "begin" + first + " go on" + text)
    assert server.say("a", "?") == server.say("b", "begin" + first + " go on" + text + "?")


def test_a_turn_of_which_nothing_was_delivered_did_not_happen(tmp_path: Path):
    server = Server(built("recurrence"), tmp_path, slots=1)
    first = server.say("a", "begin")
    # in line, while it is read, and before anything was delivered
    for events in (0, 0, 3):
        key, _ = server.begin("a", "y" * 30, max_tokens=9)
        steps = iter(range(2 if events == 0 else 99))
        server.loop(until=lambda steps=steps, key=key, events=events: next(steps, None) is None
                    or bool(events and len(server.events[key]) >= events))  # fmt: skip
        assert server.turns.cancel(key)
        server.loop()
        check_holds(server, "a", "begin" + first)
        assert server.record("a").turns == 1
    key, _ = server.begin("new", "never", max_tokens=9)
    server.loop(until=lambda: bool(server.events[key]))
    server.turns.cancel(key)
    server.loop()
    with pytest.raises(SessionError, match="there is none"):
        server.record("new")
    # its slot is free: somebody else gets it
    assert server.say("other", "x")


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_acknowledged_is_lost_to_a_kill(plan: str, tmp_path: Path):
    model = built(plan)
    server = Server(model, tmp_path / "store", slots=3, capacity=capacity(plan))
    server.say("saved", "x" * 20)
    server.say("other", "yy")
    # of several sizes of batches, and from different rows
    keys = [server.begin(name, f"{name} says things", max_tokens=count)[0]
            for name, count in (("one", 5), ("two", 9), ("saved", 12))]  # fmt: skip
    server.loop()
    assert all(server.events[key][-1].ended for key in keys)
    server.say("one", "more", stop=("\x00",), max_tokens=20)
    names = ("saved", "other", "one", "two")
    before = {name: server.state(name) for name in names}
    key, _ = server.begin("two", "this turn is not acknowledged", max_tokens=30)
    server.loop(until=lambda: len(server.events[key]) > 3)
    server.die()
    again = Server(model, tmp_path / "store", slots=3, capacity=capacity(plan))
    assert again.recovered >= 2
    for name in names:
        assert same_state(again.state(name), before[name]), name
    assert not again.store.journals()
    assert again.say("two", "?")


def test_a_full_disk_fails_the_turn_and_keeps_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    server = Server(built("windows"), tmp_path, slots=1)
    text = "begin" + server.say("a", "begin")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(server.store, "append", full)
        patched.setattr(server.store, "write", full)
        for name in ("a", "a"):
            key, _ = server.begin(name, "more")
            server.loop()
            assert (server.events[key][-1].ended, server.events[key][-1].cause.kind) == ("error", "storage")
            assert "No space left" in server.events[key][-1].error
        # who lacks the slot that cannot be written is told so
        key, _ = server.begin("b", "more")
        server.loop()
        assert "no slot is free" in server.events[key][-1].error
        assert server.events[key][-1].cause.kind == "storage"
    assert len([one for one in caplog.records if "said once" in one.message]) == 1
    check_holds(server, "a", text)
    assert server.record("a").turns == 1
    server.now += 11
    check_holds(server, "a", text + "on" + server.say("a", "on"))
    assert server.say("b", "more")


def test_errors_take_the_turn_back(tmp_path: Path):
    server = Server(built("full"), tmp_path, capacity=60)
    text = "begin" + server.say("a", "begin")
    with pytest.raises(RequestError, match="a slot here holds 60"):
        server.say("a", "x" * 60)
    with pytest.raises(RequestError, match="samples"):
        server.say("a", "x", n=2)
    check_holds(server, "a", text)
    key, future = server.begin("a", "x")
    weight = server.engine.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    server.loop()
    future.result(0)
    assert server.events[key][-1].ended == "error"
    with torch.no_grad():
        weight.copy_(kept)
    check_holds(server, "a", text)
    assert server.say("a", "x")


def test_a_damaged_file_is_named_and_left(tmp_path: Path):
    model = built("windows")
    server = Server(model, tmp_path, slots=1)
    server.say("a", "x")
    server.say("b", "x")
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(SessionError, match="damaged") as refused:
        server.say("a", "x")
    assert refused.value.kind == "damaged"
    assert path.exists()
    assert server.say("b", "x")
    server.done(server.book.delete("a"))
    assert server.say("a", "x")

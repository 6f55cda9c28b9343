"""Sessions at the edges of a life: ends in the middle of a write, listeners that fail, stores that half fail."""

import errno
import logging
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from swat_lm.serve.engine import Event, Generation
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.sessions.outcome import Asked
from swat_lm.serve.sessions.record import Record, SessionError
from swat_lm.serve.sessions.store import FolderStore
from tests.serve.hosting import until
from tests.serve.sessions.driver import TOKENIZER, Server, built, check_holds
from tests.serve.sessions.test_hosted import begin, hosted, whole

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """A store whose second line of a journal waits: set when it does, and what it waits for."""
    waits, goes_on, append, count = threading.Event(), threading.Event(), FolderStore.append, iter(range(99))

    def late(store: FolderStore, *arguments: object) -> None:
        if next(count) == 1:
            waits.set()
            assert goes_on.wait(30)
        append(store, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderStore, "append", late)
    return waits, goes_on


def test_a_turn_that_is_being_written_when_the_time_is_up_is_kept_and_acknowledged(
    slow: tuple[threading.Event, threading.Event], tmp_path: Path
):
    waits, goes_on = slow
    host, sessions = hosted(tmp_path)
    text = "some words" + whole(begin(sessions, "a", "some words", "1"))
    events = begin(sessions, "a", " more", "2")
    assert waits.wait(30)
    described = sessions.describe("a")
    ended = host.drain(0)
    until(lambda: host.status == "stopped")
    goes_on.set()
    text += " more" + whole(events)
    assert described.result(30).record.turns == 2
    ended.result(30)
    host, sessions = hosted(tmp_path)
    assert sessions.describe("a").result(30).record.turns == 2
    assert whole(begin(sessions, "a", "?", "1")) == whole(begin(sessions, "b", text + "?", "2"))
    assert host.stop()


def test_who_cannot_hear_any_more_ends_a_turn(tmp_path: Path):
    host, sessions = hosted(tmp_path)
    heard: list[Event] = []

    def deliver(event: Event) -> None:
        if len(heard) == 3:
            raise RuntimeError("Event loop is closed")
        heard.append(event)

    sampling = Sampling(temperature=0, max_tokens=5000, ignore_end=True, vocab_size=127)
    asked = Asked(Generation("1", TOKENIZER.encode("some words", add_special_tokens=False), sampling))
    text = ""
    for turns in (1, 2):
        heard.clear()
        sessions.turn("a", "text", "1", lambda record: asked, deliver).result(30)
        until(lambda turns=turns: turns in [one.record.turns for one in sessions.all().result(30)])
        text += "some words" + "".join(event.text for event in heard)
    assert whole(begin(sessions, "a", "?", "2")) == whole(begin(sessions, "b", text + "?", "3"))
    assert host.stop()


def test_a_turn_that_is_cancelled_before_it_is_in_line_leaves_nothing(tmp_path: Path, caplog):
    host, sessions = hosted(tmp_path)
    goes_on = threading.Event()

    def prepare(record: Record) -> None:
        assert goes_on.wait(30)

    with caplog.at_level(logging.ERROR):
        begun = sessions.turn("a", "text", "1", prepare, print)  # type: ignore[arg-type]
        assert sessions.cancel("1").result(30)
        goes_on.set()
        with pytest.raises(CancelledError):
            begun.result(30)
        assert whole(begin(sessions, "b", "x", "2"))
    assert not caplog.records
    assert host.stop()


def test_what_goes_wrong_between_two_threads_is_logged(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    host, sessions = hosted(tmp_path)
    monkeypatch.setattr(sessions.book, "works", lambda: 1 / 0)
    begin(sessions, "a", "x", "1")
    until(lambda: any("ZeroDivisionError" in str(one.exc_info) for one in caplog.records))
    assert host.stop()


def test_a_line_of_the_journal_that_failed_after_all_is_replaced_by_the_next(tmp_path: Path):
    model = built("windows")
    server = Server(model, tmp_path)
    text = "begin" + server.say("a", "begin")
    append = server.store.append

    def half(*arguments: object) -> None:
        append(*arguments)  # type: ignore[arg-type]
        raise FULL

    server.store.append = half  # type: ignore[method-assign]
    key, _ = server.begin("a", "never")
    server.loop()
    assert server.events[key][-1].ended == "error"
    server.store.append = append  # type: ignore[method-assign]
    text += " on" + server.say("a", " on")
    server.die()
    again = Server(model, tmp_path)
    assert again.recovered == 1
    check_holds(again, "a", text)
    assert again.record("a").turns == 2


@pytest.mark.parametrize("method", ["remove", "remove_journal"])
def test_a_session_that_could_not_be_deleted_is_not_lost_by_half(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = built("windows")
    server = Server(model, tmp_path, slots=1, every=20)
    text = "x" * 30 + server.say("a", "x" * 30)
    assert server.store.snapshots()
    done = getattr(server.store, method)

    def half(name: str) -> None:
        done(name)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(server.store, method, half)
        with pytest.raises(SessionError, match="Input/output"):
            server.done(server.book.delete("a"))
    text += "on" + server.say("a", "on")
    server.die()
    again = Server(model, tmp_path, slots=1)
    check_holds(again, "a", text)
    assert again.record("a").turns == 2


def test_who_lacks_a_slot_waits_for_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path, slots=2)
    server.say("a", "begin")

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(server.store, "write", full)
    events: list[Event] = []
    sampling = Sampling(temperature=0, max_tokens=12, ignore_end=True, vocab_size=127)
    server.submit(Generation("plain", TOKENIZER.encode("x", add_special_tokens=False), sampling), events.append)
    assert server.say("b", "x")
    assert events[-1].ended == "length"


def test_a_state_that_could_not_be_copied_is_copied_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path, slots=1, idle=5)
    text = "begin" + server.say("a", "begin")

    def lacking(session: object) -> None:
        raise RuntimeError("out of memory")

    server.now += 6
    with monkeypatch.context() as patched:
        patched.setattr(server.book, "tensors", lacking)
        server.book.tick()
    server.now += 11
    assert server.say("b", "x")
    check_holds(server, "a", text)


def test_a_reply_that_is_no_text_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path)
    text = "begin" + server.say("a", "begin")
    key, _ = server.begin("a", " more", max_tokens=9)
    other, _ = server.begin("b", "x", max_tokens=9)
    server.loop(until=lambda: len(server.events[key]) == 3)

    def no_text(*_: object, **__: object) -> None:
        raise TypeError("sequence item 0: expected str instance, NoneType found")

    monkeypatch.setattr(server.engine._requests[key].replies[0].text._assembler, "_decode", no_text)
    server.loop()
    assert server.events[key][-1].ended == "error"
    assert server.events[other][-1].ended == "length"
    check_holds(server, "a", text)
    assert server.say("a", "on")


def test_a_panic_while_a_turn_is_prepared_ends_it_alone(tmp_path: Path):
    class PanicError(BaseException):
        """As bindings to Rust raise."""

    def prepare(record: Record) -> None:
        raise PanicError("index out of bounds")

    host, sessions = hosted(tmp_path)
    with pytest.raises(RuntimeError, match="PanicError: index out of bounds"):
        sessions.turn("a", "text", "1", prepare, print).result(30)  # type: ignore[arg-type]
    assert whole(begin(sessions, "a", "x", "2"))
    assert host.stop()


def test_a_session_whose_journal_cannot_be_read_again_is_never_shown_as_less_than_it_is(tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    server.say("a", "begin")
    server.die()
    strange = Server(built("windows", seed=1), tmp_path)
    for call in (strange.keeper.describe("a"), strange.keeper.export("a")):
        with pytest.raises(SessionError, match="was made by another model"):
            strange.done(call)
    strange.die()
    assert Server(built("windows"), tmp_path).record("a").turns == 1


def test_a_file_with_numbers_that_are_not_finite_is_refused(tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    server.say("a", "begin")
    record, tensors = server.state("a")
    key = next(name for name in tensors if tensors[name].is_floating_point())
    tensors[key] = tensors[key].clone().fill_(float("nan"))
    content = server.book.shelf.content(record.model_copy(update={"session": "a"}), tensors)
    with pytest.raises(SessionError, match="expected finite numbers"):
        server.done(server.keeper.bring_in("b", content))


def test_a_server_that_does_not_wait_keeps_what_was_acknowledged(tmp_path: Path):
    host, sessions = hosted(tmp_path)
    text = "begin" + whole(begin(sessions, "a", "begin", "1"))
    events = begin(sessions, "a", " more", "2", 100_000)
    events.get(timeout=30)
    host.drain(0).result(30)
    while (event := events.get(timeout=30)).ended is None:
        pass
    assert (event.ended, event.error) == ("error", "the server stopped before the reply was whole")
    host, sessions = hosted(tmp_path)
    assert sessions.describe("a").result(30).record.turns == 1
    assert whole(begin(sessions, "a", "?", "1")) == whole(begin(sessions, "b", text + "?", "2"))
    assert host.stop()


def test_who_goes_away_while_the_turn_is_written_leaves_it_whole(tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    key, _ = server.begin("a", "begin")
    server.loop(until=lambda: len(server.events[key]) == 5)
    (event,) = server.engine.step()
    server.listening.pop(key)(event)
    # it is drawn wholly; what the store's thread has done is not taken up yet
    assert event.ended
    assert server.posted
    assert not server.events[key][-1].ended
    assert not server.turns.cancel(key, (1, ""), "x")
    server.loop()
    check_holds(server, "a", "begin" + "".join(event.text for event in server.events[key]))


def test_a_kill_between_a_file_and_its_journal_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = built("recurrence")
    server = Server(model, tmp_path, every=10)
    monkeypatch.setattr(server.store, "remove_journal", lambda name: None)
    text = "begin" + server.say("a", "begin")
    text += " more" + server.say("a", " more")
    assert server.store.snapshots()
    assert server.store.journals()
    server.die()
    again = Server(model, tmp_path)
    assert again.store.journals() == []
    check_holds(again, "a", text)
    assert again.record("a").turns == 2


def test_a_session_that_is_used_does_not_expire(tmp_path: Path):
    server = Server(built("windows"), tmp_path, slots=2, expiry=100)
    text = "begin" + server.say("a", "begin")
    for name in "bc":
        server.say(name, "x")
    server.now += 200
    key, _ = server.begin("a", " on", max_tokens=9)
    server.loop(until=lambda: len(server.events[key]) == 3)
    server.book.tick()
    server.loop()
    check_holds(server, "a", text + " on" + "".join(event.text for event in server.events[key]))
    assert [found.record.session for found in server.done(server.keeper.all())] == ["a"]

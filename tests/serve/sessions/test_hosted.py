"""Sessions of an engine in a thread of its own: everything is done there, nothing is lost at the end."""

import queue
import threading
from pathlib import Path

import pytest

from swat_lm import SwatForCausalLM
from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.host import Host, NotServingError
from swat_lm.serve.requests import Limits
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.sessions.book import Policy
from swat_lm.serve.sessions.hosted import HostedSessions
from swat_lm.serve.sessions.outcome import Asked
from swat_lm.serve.sessions.record import SessionError
from swat_lm.serve.sessions.store import FolderStore
from tests.serve.sessions.driver import TOKENIZER, built

MODEL = built("windows")


def hosted(folder: Path, model: SwatForCausalLM = MODEL, **policy: float) -> tuple[Host, HostedSessions]:
    def open_engine() -> Engine:
        engine = Engine(model, Limits(2, 10, 8), TOKENIZER, [257], restorable=True)
        sessions.attach(engine)
        return engine

    host = Host(open_engine)
    sessions = HostedSessions(host, FolderStore(folder), Policy(**policy))  # type: ignore[arg-type]
    host.start()
    host.wait_ready(30)
    return host, sessions


def begin(sessions: HostedSessions, name: str, text: str, key: str, most: int = 6) -> "queue.Queue[Event]":
    events: queue.Queue[Event] = queue.Queue()
    sampling = Sampling(temperature=0, max_tokens=most, ignore_end=True, vocab_size=127)
    generation = Generation(key, TOKENIZER.encode(text, add_special_tokens=False), sampling)
    sessions.turn(name, "text", key, lambda record: Asked(generation), events.put).result(30)
    return events


def whole(events: "queue.Queue[Event]") -> str:
    text = ""
    while True:
        event = events.get(timeout=30)
        text += event.text
        if event.ended:
            assert event.ended != "error", event
            return text


def test_a_drained_server_has_written_all_and_another_goes_on(tmp_path: Path):
    host, sessions = hosted(tmp_path)
    first = whole(begin(sessions, "a", "some words", "1"))
    last = begin(sessions, "b", "other", "2", 40)
    last.get(timeout=30)
    host.drain(30).result(30)
    assert whole(last)
    assert not list(tmp_path.glob("*.journal"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for call in (sessions.describe("a"), sessions.export("a")):
        with pytest.raises(NotServingError):
            call.result(30)
    again, sessions = hosted(tmp_path)
    assert sessions.describe("a").result(30).record.turns == 1
    second = whole(begin(sessions, "a", " more", "1"))
    assert second == whole(begin(sessions, "c", "some words" + first + " more", "2"))
    assert again.stop()


def test_many_threads_at_once_leave_no_slot_behind(tmp_path: Path):
    host, sessions = hosted(tmp_path, idle=0.01, every=1)
    failed: list[BaseException] = []

    def talk(number: int) -> None:
        try:
            for turn in range(4):
                key = f"{number}-{turn}"
                events = begin(sessions, f"s{number % 5}-{number}", f"hello {turn}", key)
                if number % 3 == 0:
                    event = events.get(timeout=30)
                    sessions.cancel(key, event.shown, event.text).result(30)
                else:
                    whole(events)
        except SessionError as error:
            # who was cancelled may still be on its way to the disk
            if error.kind != "busy":
                failed.append(error)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    gauges = host.gauges()
    assert gauges.free_slots + gauges.kept_slots == 2
    assert len(sessions.all().result(30)) >= 8
    for found in sessions.all().result(30):
        sessions.delete(found.record.session).result(30)
    assert host.gauges().free_slots == 2
    assert host.stop()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]

"""A host: an engine in a thread, from loading to the last request."""

import queue
import threading
import time
from dataclasses import replace

import pytest

from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.host import Host, NotServingError
from swat_lm.serve.requests import RequestError
from swat_lm.serve.sampling import Sampling
from tests.serve.hosting import running_host, tiny_engine, until

ENDLESS = Sampling(temperature=0, ignore_end=True)


def heard(host: Host, generation: Generation) -> "queue.Queue[Event]":
    events: queue.Queue[Event] = queue.Queue()
    host.submit(generation, events.put).result(20)
    return events


def ended(events: "queue.Queue[Event]", replies: int = 1) -> list[Event]:
    """All events until so many replies have ended."""
    found = []
    while sum(event.ended is not None for event in found) < replies:
        found.append(events.get(timeout=20))
    return found


def is_free(host: Host) -> bool:
    return host.gauges().free_slots == 4


@pytest.fixture(scope="module")
def host():
    with running_host() as made:
        yield made


def test_requests_come_and_go_from_any_thread(host: Host):
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        sampling = Sampling(seed=number % 3, max_tokens=5, n=1 + number % 2, ignore_end=True)
        events = ended(heard(host, Generation(("mine", number), [number % 3 + 1] * 40, sampling)), sampling.n)
        found[number] = [event.choice.token for event in events if event.choice and event.sample == 0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    # the same prompt and seed give the same, whoever asked; all is free and nobody is remembered
    assert found[0] == found[3] == found[6]
    assert {len(tokens) for tokens in found.values()} == {5}
    assert is_free(host)
    assert host._listeners == {}
    assert host.counters.tokens_read >= 8 * 40
    assert host.counters.tokens_generated >= 8 * 5


def test_what_is_refused_is_said_by_the_future(host: Host):
    for generation, kind in (
        (Generation("a", []), "invalid"), (Generation("a", [1], Sampling(n=5, max_tokens=1)), "samples"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as refused:
            host.submit(generation, print).result(20)
        assert refused.value.kind == kind
    assert host._listeners == {}
    # it reads only
    assert [event.ended for event in ended(heard(host, Generation("r", [1, 2], Sampling(max_tokens=0))))] == ["read"]


def test_an_abort_frees_the_slot_and_nothing_more_is_heard(host: Host):
    events = heard(host, Generation("gone", [1], ENDLESS))
    events.get(timeout=20)
    assert host.abort("gone").result(20) is True
    assert host.abort("gone").result(20) is False
    count = events.qsize()
    assert is_free(host)
    ended(heard(host, Generation("next", [1], Sampling(max_tokens=2, ignore_end=True))))
    assert events.qsize() == count


def test_who_cannot_hear_ends_alone(host: Host, caplog: pytest.LogCaptureFixture):
    other = heard(host, Generation("other", [1], Sampling(max_tokens=30, ignore_end=True)))

    def deaf(event: Event) -> None:
        raise RuntimeError("deaf")

    host.submit(Generation("deaf", [1], ENDLESS), deaf).result(20)
    assert ended(other)[-1].ended == "length"
    until(lambda: is_free(host))
    assert "nobody hears of request 'deaf'" in caplog.text


def test_anything_runs_between_two_steps(host: Host):
    assert host.call(lambda engine: engine.scheduler.limits.num_slots).result(20) == 4
    with pytest.raises(ZeroDivisionError):
        host.call(lambda engine: 1 // 0).result(20)
    # a call that nobody waits for any more is not done
    block, done = threading.Event(), []
    first = host.call(lambda engine: block.wait(20))
    second = host.call(lambda engine: done.append(1))
    assert second.cancel()
    block.set()
    assert first.result(20)
    host.call(lambda engine: None).result(20)
    assert done == []


def test_it_sleeps_where_nothing_can_be_done():
    def release(engine: Engine) -> None:
        turns.append(time.monotonic())

    turns: list[float] = []
    with running_host(lambda: tiny_engine(slots=1)) as host:
        host.before_step.append(release)
        kept = ended(heard(host, Generation("keep", [1, 2], Sampling(max_tokens=2, ignore_end=True), keep=True)))[-1]
        assert host.gauges().kept_slots == 1
        before = len(turns)
        waiting = heard(host, Generation("waits", [1], Sampling(max_tokens=1)))
        time.sleep(0.1)
        # asked once, not again and again
        assert len(turns) - before <= 2
        assert waiting.empty()
        host.call(lambda engine: engine.scheduler.release(kept.slot)).result(20)
        assert ended(waiting)
        assert host.gauges().waiting == 0


def test_sessions_may_give_a_slot_up_before_a_step():
    def give_up(engine: Engine) -> None:
        for slot in list(engine.scheduler.kept)[: engine.scheduler.lacking_slots]:
            engine.scheduler.release(slot)

    with running_host(lambda: tiny_engine(slots=1)) as host:
        host.before_step.append(give_up)
        ended(heard(host, Generation("keep", [1, 2], Sampling(max_tokens=1), keep=True)))
        assert ended(heard(host, Generation("next", [1], Sampling(max_tokens=1))))[-1].ended in ("length", "end_token")


def test_a_failed_step_ends_its_requests_and_three_end_the_host(caplog: pytest.LogCaptureFixture):
    with running_host() as host:
        engine = host.engine
        right, wrong = engine.scheduler.report, []

        def report(*arguments: object) -> object:
            if wrong:
                wrong.pop()
                raise RuntimeError("broken")
            return right(*arguments)

        engine.scheduler.report = report  # type: ignore[method-assign, assignment]
        wrong.append(1)
        (event,) = ended(heard(host, Generation("a", [1], ENDLESS)))
        assert event.ended == "error"
        assert "RuntimeError: broken" in (event.error or "")
        assert host.status == "ready"
        # it goes on
        assert ended(heard(host, Generation("b", [1], Sampling(max_tokens=2, ignore_end=True))))[-1].ended == "length"
        wrong += [1] * 3
        for key in "cd":
            assert ended(heard(host, Generation(key, [1], ENDLESS)))[-1].ended == "error"
        last = heard(host, Generation("e", [1], ENDLESS))
        assert "the engine has failed: RuntimeError: broken" in (ended(last)[-1].error or "")
        host.ended.result(20)
        assert host.status == "failed"
        with pytest.raises(NotServingError, match="RuntimeError: broken"):
            host.submit(Generation("f", [1]), print).result(20)
        assert "a step has failed" in caplog.text


def test_what_watches_a_step_may_fail_without_harm(caplog: pytest.LogCaptureFixture):
    with running_host() as host:
        failures = [1, 1]
        host.after_step.append(lambda engine, report: failures and 1 // (failures.pop() - 1))
        events = ended(heard(host, Generation("a", [1], Sampling(max_tokens=4, ignore_end=True))))
        assert events[-1].ended == "length"
        assert "ZeroDivisionError" in caplog.text


def test_draining_finishes_what_runs_and_takes_no_more():
    with running_host() as host:
        begun = heard(host, Generation("begun", [1], Sampling(max_tokens=40, ignore_end=True)))
        begun.get(timeout=20)
        future = host.drain(20)
        with pytest.raises(NotServingError, match="shutting down") as refused:
            host.submit(Generation("late", [1]), print).result(20)
        assert refused.value.status == "draining"
        assert ended(begun)[-1].ended == "length"
        future.result(20)
        assert host.status == "stopped"
        with pytest.raises(NotServingError, match="has stopped"):
            host.call(lambda engine: None).result(20)


def test_what_is_left_at_the_end_hears_of_it():
    with running_host() as host:
        events = heard(host, Generation("endless", [1], ENDLESS))
        host.drain(0.05).result(20)
        assert "stopped before the reply was whole" in (ended(events)[-1].error or "")


def test_loading_is_seen_from_outside():
    go = threading.Event()

    def slow() -> Engine:
        go.wait(20)
        raise ValueError("no such weights")

    host = Host(slow)
    host.start()
    assert host.status == "loading"
    assert host.gauges().free_slots == 0
    with pytest.raises(NotServingError, match="being loaded"):
        host.submit(Generation("a", [1]), print).result(20)
    with pytest.raises(NotServingError, match="being loaded"):
        host.wait_ready(0.01)
    go.set()
    with pytest.raises(NotServingError, match="ValueError: no such weights"):
        host.wait_ready(20)
    assert host.status == "failed"
    assert isinstance(host.failure, ValueError)


def test_a_host_that_was_stopped_before_it_began_does_not_load():
    host = Host(lambda: pytest.fail("it loads"))
    assert host.stop()
    host.start()
    host._thread.join(20)
    assert host.status == "stopped"


def test_nobody_who_waits_for_the_end_can_call_it_off():
    host = Host(tiny_engine)
    assert not host.ended.cancel()
    assert host.stop(20)
    assert host.ended.result(20) is None


def test_what_was_checked_is_not_checked_again():
    given = [1, 2]
    checked = Generation("a", given).checked(50)
    given[0] = 99
    assert checked.tokens == (1, 2)
    checked.check(50)
    for wrong in (replace(checked, tokens=(99,)), Generation("a", [1, True]), Generation("a", [50])):
        with pytest.raises(RequestError, match="tokens: expected"):
            wrong.checked(50)
    with pytest.raises(RequestError, match="ids from 0 to 1"):
        checked.check(2)

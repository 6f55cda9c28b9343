"""An engine in a thread of its own, and a front that any thread may call: for a server, a terminal, or a test.

Between two steps it does what was asked of it, then what `before_step` holds; without work it sleeps. Knows neither
HTTP nor asyncio.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from swat_lm.serve.gauges import Counters, Gauges, StepReport
from swat_lm.serve.generation import Event, Generation
from swat_lm.serve.requests import Step

if TYPE_CHECKING:
    from swat_lm.serve.engine import Engine

__all__ = ["Counters", "Gauges", "Host", "NotServingError", "StepReport"]

Status = Literal["loading", "ready", "draining", "stopped", "failed"]
Deliver = Callable[[Event], None]
T = TypeVar("T")
# steps that fail one after another before the engine is given up
MOST_FAILURES = 3
# seconds between calls of `now_and_then`
OFTEN = 1.0

logger = logging.getLogger(__name__)


class NotServingError(RuntimeError):
    """The host takes nothing now; `status` says whether it still loads, drains, has stopped or has failed."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status: Status = status


@dataclass(frozen=True)
class Call:
    """Something to do between two steps."""

    function: "Callable[[Engine], Any]"
    future: Future[Any]

    def run(self, engine: "Engine") -> None:
        """Do it, unless nobody waits for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function(engine)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def refuse(self, error: Exception) -> None:
        """Say that it will not be done."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass
class Listener:
    """Who hears of a request's events."""

    deliver: Deliver
    left: set[int]
    """Replies that have not ended."""


class Host:
    """Runs an engine that `open_engine` makes, in a thread that dies with the process.

    `before_step` and `after_step` hold functions that are called in that thread around each step, for sessions and
    metrics; what they raise is logged, and counts as a step that failed. The first are also called where every request
    waits for a slot that somebody keeps. `now_and_then` are called about every second, also without work. It stops only
    when nothing in `unfinished` says that there is something left to do, or its time is up; `at_end` are called last.
    After three failures in a row the host has `failed`, with all its requests.
    """

    def __init__(self, open_engine: "Callable[[], Engine]", name: str = "engine") -> None:
        self._open = open_engine
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._changed = threading.Condition()
        self._calls: deque[Call] = deque()
        self._listeners: dict[Hashable, Listener] = {}
        self._status: Status = "loading"
        self._deadline: float | None = None
        self._ended: Future[None] = Future()
        # whoever gives up waiting for it would otherwise cancel it for all others
        self._ended.set_running_or_notify_cancel()
        self._engine: Engine | None = None
        self._failures = 0
        self.failure: BaseException | None = None
        """Why it has failed."""
        self.before_step: list[Callable[[Engine], None]] = []
        self.after_step: list[Callable[[Engine, StepReport], None]] = []
        self.now_and_then: list[Callable[[Engine], None]] = []
        self.unfinished: list[Callable[[], bool]] = []
        self.at_end: list[Callable[[Engine], None]] = []
        self._looked = time.monotonic()
        self.counters = Counters()

    @property
    def ended(self) -> Future[None]:
        """Done when the host has stopped or failed."""
        return self._ended

    @property
    def status(self) -> Status:
        """Loading, ready, draining, stopped or failed."""
        return self._status

    @property
    def engine(self) -> "Engine":
        """The engine, for what never changes of it; anything else is asked by `call`. Raises NotServingError."""
        if self._engine is None:
            raise self.refusal()
        return self._engine

    def refusal(self) -> NotServingError:
        """Why nothing is taken now."""
        says = {
            "loading": "the model is being loaded; try again later",
            "ready": "the engine is not open",
            "draining": "the server is shutting down and takes no more requests",
            "stopped": "the server has stopped",
            "failed": f"the engine has failed: {type(self.failure).__name__}: {self.failure}",
        }
        return NotServingError(self._status, says[self._status])

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Until requests are taken. Raises NotServingError where they will not be, or are not after `timeout` s."""
        with self._changed:
            self._changed.wait_for(lambda: self._status != "loading", timeout)
        if self._status != "ready":
            raise self.refusal()

    def submit(self, generation: Generation, deliver: Deliver) -> Future[None]:
        """Put a request in line between two steps; the future fails as `Engine.submit` does, or with NotServingError.

        `deliver` gets the request's events in order, in the engine's thread, so it must not wait; it is forgotten after
        the last. One that raises ends its request.
        """

        return self.call(lambda engine: self.put(engine, generation, deliver), ("ready",))

    def put(self, engine: "Engine", generation: Generation, deliver: Deliver) -> None:
        """What `submit` does, for calls in the engine's thread; raises at once."""
        if self._status != "ready":
            raise self.refusal()
        engine.submit(generation)
        self._listeners[generation.key] = Listener(deliver, set(range(generation.sampling.n)))

    def forget(self, key: Hashable) -> None:
        """Deliver nothing more of a request, for calls in the engine's thread."""
        self._listeners.pop(key, None)

    def abort(self, key: Hashable) -> Future[bool]:
        """End a request in whatever state; nothing more is delivered of it. False where none has this key."""

        def end(engine: "Engine") -> bool:
            self._listeners.pop(key, None)
            return engine.abort(key)

        return self.call(end)

    def call(self, function: "Callable[[Engine], T]", when: tuple[Status, ...] = ("ready", "draining")) -> Future[T]:
        """Run anything between two steps; the future has what it gives or raises, or a NotServingError."""
        future: Future[T] = Future()
        with self._changed:
            if self._status in when:
                self._calls.append(Call(function, future))
                self._changed.notify_all()
                return future
        future.set_exception(self.refusal())
        return future

    def drain(self, timeout: float) -> Future[None]:
        """Take no more requests, finish those that are there, then stop; the future is done when the thread is.

        What is left after `timeout` seconds ends with an error. A later call can only bring the end nearer.
        """
        with self._changed:
            deadline = time.monotonic() + timeout
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            if self._status in ("loading", "ready"):
                self._status = "draining"
            self._changed.notify_all()
        return self._ended

    def stop(self, timeout: float | None = 10) -> bool:
        """End all requests and the thread; False where it still runs after `timeout` seconds."""
        self.drain(0)
        if self._thread.ident is None:
            self._finish("stopped")
        else:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def gauges(self) -> Gauges:
        """How things stand, as of some moment between two changes."""
        if self._engine is None:
            return Gauges()
        scheduler = self._engine.scheduler
        free, kept = scheduler.free_slots, len(scheduler.kept)
        used = max(0, scheduler.limits.num_slots - free - kept)
        return Gauges(scheduler.waiting, scheduler.running, used, kept, free)

    def _run(self) -> None:
        if self._status == "stopped":
            return
        try:
            self._engine = self._open()
        except BaseException as error:
            # whoever opened the host says it, by `failure`
            self._fail(error)
            return
        with self._changed:
            if self._status == "loading":
                self._status = "ready"
            self._changed.notify_all()
        try:
            while not self._turn(self._engine):
                pass
        except BaseException as error:
            logger.exception("the engine has stopped")
            self._fail(error)
            return
        self._finish("stopped")

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._finish("failed")

    def _turn(self, engine: "Engine") -> bool:
        """What was asked since the last step, then a step; whether that was the last turn."""
        self._do_calls(engine, wait=engine.is_idle)
        if self._status == "draining":
            is_late = self._deadline is not None and time.monotonic() >= self._deadline
            if is_late or (engine.is_idle and not self._calls and not self._is_unfinished()):
                return True
        self._look(engine)
        if engine.is_idle:
            return False
        try:
            for function in tuple(self.before_step):
                function(engine)
            step = engine.scheduler.plan()
        except Exception as error:
            self._failed(engine, Step(), error)
            return False
        if step:
            self._step(engine, step)
        else:
            # all wait for slots that are kept: until somebody releases one, or the time to drain is up
            self._do_calls(engine, wait=True)
        return False

    def _is_unfinished(self) -> bool:
        return any(says() for says in self.unfinished)

    def _look(self, engine: "Engine") -> None:
        """What is to be done now and then, if it is time."""
        if not self.now_and_then or time.monotonic() - self._looked < OFTEN:
            return
        self._looked = time.monotonic()
        for function in tuple(self.now_and_then):
            try:
                function(engine)
            except Exception:
                logger.exception("what is done now and then has failed")

    def _do_calls(self, engine: "Engine", wait: bool) -> None:
        with self._changed:
            is_over = self._status == "draining" and engine.is_idle and not self._is_unfinished()
            if wait and not self._calls and not is_over:
                left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                if self.now_and_then:
                    left = OFTEN if left is None else min(left, OFTEN)
                self._changed.wait(left)
            calls, self._calls = self._calls, deque()
        for call in calls:
            call.run(engine)

    def _step(self, engine: "Engine", step: Step) -> None:
        begin = time.monotonic()
        try:
            events = engine.step()
        except Exception as error:
            self._failed(engine, step, error)
            return
        seconds = time.monotonic() - begin
        drawn = sum(event.choice is not None for event in events)
        read = sum(piece.count for piece in step.pieces)
        counters = self.counters
        counters.steps += 1
        counters.tokens_read += read
        counters.tokens_generated += drawn
        for event in events:
            self._deliver(engine, event)
        try:
            for function in tuple(self.after_step):
                function(engine, StepReport(seconds, len(step.rows), read, drawn))
        except Exception as error:
            self._failed(engine, Step(), error)
            return
        self._failures = 0

    def _deliver(self, engine: "Engine", event: Event) -> None:
        listener = self._listeners.get(event.key)
        if listener is None:
            return
        if event.ended is not None:
            listener.left.discard(event.sample)
        if event.ended in ("error", "read") or not listener.left:
            del self._listeners[event.key]
        try:
            listener.deliver(event)
        except Exception:
            logger.exception("nobody hears of request %r any more", event.key)
            self._listeners.pop(event.key, None)
            engine.abort(event.key)

    def _failed(self, engine: "Engine", step: Step, error: Exception) -> None:
        """A step went wrong as a whole: those that had their turn in it end with an error."""
        logger.exception("a step has failed", exc_info=error)
        self._failures += 1
        self.counters.failed_steps += 1
        if self._failures >= MOST_FAILURES:
            raise error
        for event in engine.casualties:
            # with the slots that went back
            self._deliver(engine, event)
        engine.casualties = []
        concerned = {one.key for one in (*step.pieces, *step.rows)}
        self._tell(engine, concerned, f"the engine could not do a step: {type(error).__name__}: {error}")

    def refuse(self, engine: "Engine", key: Hashable, error: Exception) -> None:
        """End a request with an error, for calls in the engine's thread."""
        self._tell(engine, {key}, str(error), error)

    def _tell(self, engine: "Engine | None", keys: set[Any], message: str, cause: Exception | None = None) -> None:
        """End requests with an error."""
        for key in keys & self._listeners.keys():
            listener = self._listeners.pop(key)
            if engine is not None:
                engine.abort(key)
            try:
                listener.deliver(Event(key, ended="error", error=message, cause=cause))
            except Exception:
                logger.exception("nobody hears of request %r any more", key)

    def _finish(self, status: Literal["stopped", "failed"]) -> None:
        """Nothing is taken any more, and whoever waits for anything hears of it."""
        with self._changed:
            self._status = status
            calls, self._calls = self._calls, deque()
            self._changed.notify_all()
        refusal = self.refusal()
        late = "the server stopped before the reply was whole" if status == "stopped" else str(refusal)
        self._tell(self._engine, set(self._listeners), late)
        for call in calls:
            call.refuse(refusal)
        engine = self._engine
        for function in tuple(self.at_end) if engine is not None else ():
            try:
                function(engine)  # type: ignore[arg-type]
            except Exception:
                logger.exception("something at the end has failed")
        if not self._ended.done():
            self._ended.set_result(None)

"""Turns Ctrl-C, SIGTERM and the end of a terminal into a request, granted after a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

__all__ = ["Interruption", "leaving_on_termination"]

# the last comes where a terminal is closed or a connection to one ends; Windows has none
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """While entered, the first of `SIGNALS` sets `requested`; a second SIGINT raises KeyboardInterrupt at once.

    A SIGHUP that is ignored, as under `nohup`, stays so. Outside the main thread (where Python delivers no signals) it
    never becomes requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def leaving_on_termination() -> Iterator[None]:
    """While entered, SIGTERM raises SystemExit with 143, so that what was half done is removed on the way out.

    Outside the main thread nothing changes, nor where SIGTERM is ignored or handled already.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(number: int, frame: FrameType | None) -> None:
    """End as a shell counts a process that a signal ended."""
    raise SystemExit(128 + number)

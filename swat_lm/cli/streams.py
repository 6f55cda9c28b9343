"""The three standard streams, so that none of them ends the work.

Not a closed pipe, a vanished terminal, a full disk, a closed stream, nor a character that an encoding lacks.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["Outlet", "lasting_streams", "reader_is_gone", "remark"]


class Outlet:
    """A stream of output whose writes never raise for what lies behind it; everything else is the stream's own.

    After a write that failed nothing more is written, so that what did come is a beginning of the whole. Characters
    that the encoding lacks come as their escapes, such as `\\u2014`.
    """

    def __init__(self, stream: Any, above: "Outlet | None" = None) -> None:
        """`above`: the outlet of text whose bytes these are; what happens to them has happened to it."""
        self._stream = stream
        self._whole = above or self
        # one that hung up no longer says so
        self._is_terminal = stream.isatty()
        self.is_gone = False
        """Whether the reader went away: its end of the pipe was closed, or the terminal is no longer there."""
        self.failure: OSError | None = None
        """Why the rest could not be written, where somebody may still want it: a full disk, say."""
        self.lacking: str | None = None
        """The first character that the encoding lacks."""

    def write(self, text: Any) -> int:
        """Write as much as can be; returns the length of the text, as if all had been."""
        if self._whole.is_gone or self._whole.failure is not None:
            return len(text)
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                # half a name that is no text, which any encoding lacks, is nothing that another encoding would mend
                unknown = error.object[error.start]
                if not "\ud800" <= unknown <= "\udfff":
                    self.lacking = self.lacking or unknown
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Send on what was written."""
        if self._whole.is_gone or self._whole.failure is not None:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    @property
    def buffer(self) -> "Outlet":
        """The stream of bytes below, which libraries write to where they choose the encoding themselves."""
        return Outlet(self._stream.buffer, self)

    def _give_up(self, error: OSError) -> None:
        vanished = error.errno == errno.EIO and self._is_terminal
        if isinstance(error, ConnectionError) or vanished:
            self._whole.is_gone = True
        else:
            self._whole.failure = error
        # what is still held in buffers would be tried again when Python ends; let that go nowhere
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[Outlet]:
    """Stdout, which is given, and stderr as outlets while entered; what is closed becomes the null device.

    So no file that is opened later takes a closed stream's number, and with it what libraries write there. A closed
    stdin stays None for Python: who reads it can say so.
    """
    before = sys.stdout, sys.stderr
    for number in range(3):
        open_if_closed(number)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, messages = (Outlet(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, messages
        try:
            yield out
        finally:
            out.flush()
            messages.flush()
            sys.stdout, sys.stderr = before


def open_if_closed(number: int) -> None:
    """Give a file descriptor that is closed to the null device, for this process and its children."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        # also where it has the number already: children inherit it then
        os.dup2(opened, number) if opened != number else os.set_inheritable(number, True)
        if opened != number:
            os.close(opened)


def reader_is_gone() -> bool:
    """Whether nothing that is written to stdout arrives any more, so that writing on is of no use."""
    stream = sys.stdout
    return bool(getattr(stream, "is_gone", False)) or getattr(stream, "failure", None) is not None


def remark(stream: Outlet) -> str | None:
    """What is to be said of characters that a stream could not show, if there were any."""
    if stream.lacking is None:
        return None
    return (
        f"stdout is {stream.encoding}, which lacks characters such as {stream.lacking!a}: they are written like that; "
        "PYTHONIOENCODING=utf-8 writes all of them as they are"
    )

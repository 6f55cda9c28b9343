"""The soak of `python -m verification serve_soak` in little: many requests, a SIGKILL, and books that must be right."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.test_serve import PROGRAM
from tests.forked import begin
from verification import serve_soak
from verification.soak_books import Book, Turn
from verification.workplace import CheckFailedError


class Forked:
    """A server that is forked from a process which has imported everything."""

    def __init__(self, arguments: Sequence[str], output: Path) -> None:
        self._process = begin(PROGRAM, *arguments, output=output, environment={"HF_HUB_OFFLINE": "1"})
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def ended(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


def test_nothing_acknowledged_is_lost_and_nothing_is_left_over(tmp_path: Path):
    done: list[str] = []
    serve_soak.run(tmp_path, 200, 0, Forked, done.append)
    said = "\n".join(done)
    found = re.search(r"all ([\d,]+) acknowledged turns of (\d+) sessions are there", said)
    assert found is not None
    assert int(found[1]) >= int(found[2]) >= 5
    assert "exit code 0" in said
    assert "no answer was a 5xx" in said


def test_books_find_what_is_missing_and_what_is_too_much():
    book = Book("a", "chat")
    book.add(Turn("hello", 5), "abcde")
    assert book.text == "[user]hello|[assistant]abcde"
    found = {"kind": "chat", "turns": 1, "tokens": 28, "messages": 2}
    book.check(found)
    for name, wrong in (("turns", 0), ("tokens", 27), ("messages", 4), ("kind", "text")):
        with pytest.raises(CheckFailedError, match="in the books"):
            book.check({**found, name: wrong})
    book.open, book.received = Turn("more", 9), "xy"
    assert book.length_of_reply(found) is None
    # "|[user]more|[assistant]"
    for length in (2, 9):
        assert book.length_of_reply({**found, "turns": 2, "tokens": 28 + 23 + length}) == length
    for turns, tokens in ((2, 28 + 23 + 1), (2, 28 + 23 + 10), (3, 60), (0, 0)):
        with pytest.raises(CheckFailedError, match="in the books"):
            book.length_of_reply({**found, "turns": turns, "tokens": tokens})

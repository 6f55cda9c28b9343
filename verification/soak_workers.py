"""What the clients of the soak do: a seeded mix of requests, with books of what was acknowledged."""

import asyncio
import string
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

from verification.soak_abuse import ask_wrongly, break_off, write_garbage
from verification.soak_books import MODEL, Book, Turn, text_of
from verification.soak_client import Answer, Connection, ServerGoneError
from verification.workplace import CheckFailedError, require

__all__ = ["Soak"]

LIST = "/v1/sessions"
# how many sessions there are at most, and characters that one may have before it is deleted
MOST, LONG = 60, 1500
# between two logits; nearer ones are a tie, which rounding may decide otherwise (docs/serving.md)
TIE = 1e-3
LETTERS = {"type": "regex", "regex": "[a-z]{2,9}"}


class Soak:
    """Workers on one server after another."""

    def __init__(self, seed: int, workers: int) -> None:
        self.port = 0
        self.sent = 0
        """Requests, with those that were broken off."""
        self.is_killed = False
        self.books: dict[str, Book] = {}
        self._free: list[str] = []
        self._seed, self._workers, self._names, self._rounds = seed, workers, 0, 0
        self._kinds: Counter[str] = Counter()

    def summary(self) -> str:
        """What was done how often."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self._kinds.most_common())

    async def work(self, until: int) -> None:
        """Requests until there were so many, or the server is killed. Raises CheckFailedError."""
        self._rounds += 1
        randoms = [Random(f"{self._seed} {self._rounds} {number}") for number in range(self._workers)]
        workers = [asyncio.ensure_future(self._worker(random, until)) for random in randoms]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()

    async def _worker(self, random: Random, until: int) -> None:
        mix: dict[Callable[[Connection, Random], Awaitable[None]], int] = {
            self._plain: 24, self._plain_stream: 12, self._turn: 22, self._abort_plain: 5, self._abort_turn: 9,
            self._collide: 2, self._look: 3, self._fork: 3, self._move: 2, self._delete: 3, ask_wrongly: 9,
            break_off: 4, write_garbage: 2,
        }  # fmt: skip
        async with Connection(self.port) as line:
            while self.sent < until and not self.is_killed:
                what = random.choices([*mix], [*mix.values()])[0]
                self._kinds[what.__name__.strip("_").replace("_", " ")] += 1
                if what in (ask_wrongly, break_off, write_garbage):
                    self.sent += 1
                try:
                    await what(line, random)
                except (ServerGoneError, OSError) as error:
                    if not self.is_killed:
                        raise CheckFailedError(f"{what.__name__}: the server has gone: {error}") from error

    async def _ask(self, line: Connection, method: str, path: str, body: Any = None, status: int = 200) -> Answer:
        self.sent += 1
        answer = await line.ask(method, path, body)
        require(answer.status == status, f"{method} {path} {body!r:.200}: expected {status}, got {answer.status}: "
                                         f"{answer.content[:300]!r}")  # fmt: skip
        return answer

    async def _plain(self, line: Connection, random: Random) -> None:
        """A completion or a chat, whole."""
        more: dict[str, Any] = random.choice((
            {}, {"n": 2}, {"stop": random.choice(string.ascii_letters)}, {"temperature": 0.7, "seed": 5},
            {"logprobs": 2}, {"response_format": LETTERS}, {"prompt": [word(random), word(random)]}, {"top_k": 3},
            {"echo": True}, {"max_tokens": 0},
        ))  # fmt: skip
        if random.random() < 0.3:
            body = {"model": MODEL, "messages": [{"role": "user", "content": word(random)}], "max_tokens": 5}
            found = (await self._ask(line, "POST", "/v1/chat/completions", body)).json()
        else:
            body = {"model": MODEL, "prompt": word(random), "max_tokens": random.randint(1, 9), **more}
            found = (await self._ask(line, "POST", "/v1/completions", body)).json()
        require(bool(found["choices"]), f"{body}: an answer without a choice")

    async def _plain_stream(self, line: Connection, random: Random) -> None:
        """A stream, read to its end."""
        body = {"model": MODEL, "prompt": word(random), "max_tokens": random.randint(1, 9), "stream": True,
                "n": random.choice((1, 1, 2))}  # fmt: skip
        await self._read(line, "/v1/completions", body, None)

    async def _abort_plain(self, line: Connection, random: Random) -> None:
        """A request that is broken off: in a stream after some events, or before its answer."""
        body = {"model": MODEL, "prompt": word(random), "max_tokens": random.choice((3, 200, 2000)), "n": 2,
                "stream": random.random() < 0.7}  # fmt: skip
        if body["stream"]:
            await self._read(line, "/v1/completions", body, random.randint(0, 6))
        else:
            self.sent += 1
            line.drop()
            await line.send("POST", "/v1/completions", body)
            await asyncio.sleep(random.random() * 0.02)
            line.drop()

    async def _read(self, line: Connection, path: str, body: Any, most: int | None) -> str:
        """The text of a stream, or of its first events, after which it is broken off; must end with `[DONE]` if not."""
        self.sent += 1
        text, count, is_whole = "", 0, False
        async for event in line.events(path, body):
            if isinstance(event, Answer):
                raise CheckFailedError(f"{path} {body}: {event.status} {event.content[:300]!r}")
            if event is None:
                is_whole = True
                continue
            require("error" not in event, f"{path} {body}: {event}")
            text, count = text + text_of(event), count + 1
            if most is not None and count >= most:
                break
        require(most is not None or is_whole, f"{path} {body}: the stream has no end")
        if most is not None:
            line.drop()
        return text

    def _take(self, random: Random) -> Book:
        """A session that no other worker has, or a new one."""
        if not self._free or (len(self.books) < MOST and random.random() < 0.1):
            self._names += 1
            book = Book(f"session {self._names}", random.choice(("text", "chat")))
            self.books[book.name] = book
            return book
        return self.books[self._free.pop(random.randrange(len(self._free)))]

    def _give_back(self, book: Book) -> None:
        """Others may have it; one that was never begun, or is deleted, is no session."""
        if book.turns:
            self._free.append(book.name)
        else:
            del self.books[book.name]

    async def _turn(self, line: Connection, random: Random) -> None:
        """A turn of a session, to its end."""
        book, turn = self._take(random), some_turn(random)
        book.open = turn
        path, body = book.request(turn)
        if turn.streamed:
            reply = await self._read(line, path, body, None)
        else:
            reply = text_of((await self._ask(line, "POST", path, body)).json())
        book.add(turn, reply)
        self._give_back(book)

    async def _abort_turn(self, line: Connection, random: Random) -> None:
        """A turn that is broken off; what the server has kept of it must be what came, or more of the same."""
        book, turn = self._take(random), some_turn(random, random.choice((3, 60, 400)))
        book.open = turn
        path, body = book.request(turn)
        if turn.streamed or not book.turns:
            turn = book.open = replace(turn, streamed=True)
            book.received = await self._read(line, *book.request(turn), random.randint(0, 6))
        else:
            self.sent += 1
            line.drop()
            await line.send("POST", path, body)
            # what was sent may be overtaken: only what has begun can be broken off
            async with Connection(self.port) as other:
                while not (found := (await self._ask(other, "GET", place_of(book))).json())["busy"]:
                    if found["turns"] > book.turns:
                        break
            await asyncio.sleep(random.random() * 0.02)
            line.drop()
        # it takes a moment until the server hears of it
        await self._settle(line, book)
        self._give_back(book)

    async def _collide(self, line: Connection, random: Random) -> None:
        """A second request to a session that has one: refused, or served after the end of the first."""
        book, turn = self._take(random), Turn(word(random), 40, streamed=True)
        book.open = turn
        path, body = book.request(turn)
        self.sent += 2
        second: tuple[Turn, str] | None = None
        async for event in line.events(path, body):
            if isinstance(event, Answer):
                raise CheckFailedError(f"{path} {body}: {event.status} {event.content[:300]!r}")
            if event is None:
                continue
            book.received += text_of(event)
            if second is None:
                more = Turn(word(random), 3)
                async with Connection(self.port) as other:
                    answer = await other.ask("POST", *book.request(more))
                require(answer.status in (200, 409), f"{book.name}: {answer.status} {answer.content[:300]!r}")
                second = more, text_of(answer.json()) if answer.status == 200 else ""
        book.add(turn, book.received)
        if second is not None and second[1]:
            book.add(*second)
        self._give_back(book)

    async def _look(self, line: Connection, random: Random) -> None:
        """The list, a description, the numbers."""
        path = random.choice((LIST, "/metrics", "/health", "/v1/models"))
        await self._ask(line, "GET", path)
        book = self._take(random)
        if book.turns:
            book.check((await self._ask(line, "GET", place_of(book))).json())
        self._give_back(book)

    async def _fork(self, line: Connection, random: Random) -> None:
        """A copy, which goes on by itself."""
        book = self._take(random)
        if book.turns and len(self.books) < MOST:
            copy = self._begin_copy(book)
            found = await self._ask(line, "POST", place_of(book) + "/fork", {"to": copy.name})
            copy.uncertain = None
            copy.check(found.json())
            self._give_back(copy)
        self._give_back(book)

    async def _move(self, line: Connection, random: Random) -> None:
        """A copy by a file."""
        book = self._take(random)
        if book.turns and len(self.books) < MOST:
            content = (await self._ask(line, "GET", place_of(book) + "/export")).content
            copy = self._begin_copy(book)
            copy.check((await self._ask(line, "PUT", place_of(copy) + "/import", content)).json())
            copy.uncertain = None
            self._give_back(copy)
        self._give_back(book)

    def _begin_copy(self, book: Book) -> Book:
        self._names += 1
        copy = book.copy(f"session {self._names}")
        copy.uncertain = "begun"
        self.books[copy.name] = copy
        return copy

    async def _delete(self, line: Connection, random: Random) -> None:
        """Remove a session that is long, or any where there are many."""
        book = self._take(random)
        if book.turns and (len(book.text) > LONG or len(self.books) > MOST // 2):
            book.uncertain = "deleted"
            await self._ask(line, "DELETE", place_of(book))
            await self._ask(line, "GET", place_of(book), status=404)
            book.turns = 0
        self._give_back(book)

    async def settle_all(self, was_killed: bool) -> None:
        """See what the server has of every session, and that it goes on as the same text does without one.

        Of turns that were under way when a server was killed nothing need be left.
        """
        self._free = []
        async with Connection(self.port) as line:
            for book in list(self.books.values()):
                await self._settle(line, book, was_killed)
                if book.turns:
                    turn = Turn("and then", 8)
                    prompt = book.text + book.piece(turn)
                    reply = text_of((await self._ask(line, "POST", *book.request(turn))).json())
                    await self._agree(line, book.name, prompt, reply, await self._fresh(line, prompt, turn))
                    book.add(turn, reply)
                    book.check((await self._ask(line, "GET", place_of(book))).json())
                self._give_back(book)
            listed = (await self._ask(line, "GET", LIST)).json()["data"]
            there = {one["id"] for one in listed}
            require(there == self.books.keys(), f"sessions that only one side knows: {there ^ self.books.keys()}")

    async def _settle(self, line: Connection, book: Book, was_killed: bool = False) -> None:
        """What the server has of a session for whose last request no answer came. Raises CheckFailedError."""
        found = await self._rested(line, book, may_begin=book.open is not None and not was_killed)
        if book.uncertain is not None and found is None:
            book.turns = 0
        elif found is None:
            require(book.turns == 0, f"{book.name} is lost; {book.turns} turns of it were acknowledged")
        if book.open is not None:
            await self._settle_turn(line, book, found or {"turns": 0, "tokens": 0}, was_killed)
        book.open, book.received, book.uncertain = None, "", None
        if found is not None:
            book.check(found)

    async def _rested(self, line: Connection, book: Book, may_begin: bool) -> dict[str, Any] | None:
        """The server's description of a session, once it is not busy; None where there is none."""
        for turn in range(1500):
            self.sent += 1
            answer = await line.ask("GET", place_of(book))
            require(answer.status in (200, 404), f"{book.name}: {answer.status} {answer.content[:300]!r}")
            if answer.status == 200 and not answer.json()["busy"]:
                return answer.json()
            # nobody sees a session before its first turn has ended
            if answer.status == 404 and (book.turns or not may_begin or turn > 100):
                return None
            await asyncio.sleep(0.02)
        raise CheckFailedError(f"{book.name} is busy for ever")

    async def _settle_turn(self, line: Connection, book: Book, found: dict[str, Any], was_killed: bool) -> None:
        turn, received = book.open, book.received
        assert turn is not None
        length = book.length_of_reply(found) if found["turns"] or book.turns else None
        if length is None:
            require(was_killed or not received, f"{book.name}: {received!r} came of a reply, and nothing of it is kept")
            return
        reply = received
        if len(received) < length:
            left = Turn("", turn.most - len(received), turn.stop)
            reply += await self._fresh(line, book.text + book.piece(turn) + received, left)
        fits = len(reply) >= length if turn.streamed else len(reply) == length
        require(fits, f"{book.name}: holds {length} tokens of the reply {reply!r}")
        book.add(turn, reply[:length])

    async def _fresh(self, line: Connection, text: str, turn: Turn) -> str:
        """What follows a text without a session."""
        body = {"model": MODEL, "prompt": text, "temperature": 0, "max_tokens": turn.most, "stop": turn.stop}
        return text_of((await self._ask(line, "POST", "/v1/completions", body)).json())

    async def _agree(self, line: Connection, name: str, prompt: str, one: str, other: str) -> None:
        """Raise CheckFailedError unless two replies are the same, or part where two tokens are a tie."""
        if one == other:
            return
        place = next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), 0)  # noqa: B905
        body = {"model": MODEL, "prompt": prompt + one[:place], "temperature": 0, "max_tokens": 1, "logprobs": 2}
        (top,) = (await self._ask(line, "POST", "/v1/completions", body)).json()["choices"][0]["logprobs"][
            "top_logprobs"
        ]
        values = sorted(top.values(), reverse=True)
        require(values[0] - values[1] < TIE, f"{name}: goes on with {one!r}, its text with {other!r} ({top})")
        self._kinds["tie"] += 1


def place_of(book: Book) -> str:
    """The address of a session."""
    return f"{LIST}/{book.name.replace(' ', '%20')}"


def word(random: Random) -> str:
    """A few letters and digits."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=random.randint(1, 30)))


def some_turn(random: Random, most: int | None = None) -> Turn:
    """A turn of any form."""
    stop = random.choice(string.ascii_letters) if random.random() < 0.2 else None
    return Turn(word(random), most or random.randint(1, 12), stop, random.random() < 0.5, random.random() < 0.3)

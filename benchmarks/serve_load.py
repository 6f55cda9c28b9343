"""The load of the serving benchmark: whom to ask what and when, over plain sockets, and what the answers took.

Knows addresses, not servers: anything that streams `POST /v1/completions` as OpenAI does can be asked.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
# words that are one token each for most tokenizers
WORDS = ("the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by",
         "this", "had", "not", "are", "but", "from", "or", "have", "an", "they", "which", "one", "you")  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """A log-normal spread of lengths, by its mean, cut at both ends."""

    mean: float
    sigma: float
    least: int
    most: int

    def draw(self, generator: random.Random) -> int:
        """One length. The mean is that before the ends are cut."""
        drawn = generator.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return min(self.most, max(self.least, round(drawn)))


# means of ShareGPT's prompts and of Alpaca's replies, as the paper of vLLM has them (arXiv 2309.06180, section 6.1);
# ShareGPT's replies, six times as long, would take one core too long
PROMPTS = Lengths(161, 1.0, 8, 600)
REPLIES = Lengths(58, 0.8, 4, 200)


@dataclass(frozen=True)
class Question:
    """A prompt, and how many tokens are to be drawn."""

    prompt: str
    num_tokens: int
    at: float = 0.0
    """Seconds after the beginning, where requests arrive by themselves."""


@dataclass(frozen=True)
class Answer:
    """When a request was sent, and when its texts came, by one clock."""

    sent: float
    texts: tuple[float, ...]
    prompt_tokens: int
    tokens: int
    text: str = ""


@dataclass(frozen=True)
class Server:
    """Where to ask, and what this server wants to be told beside OpenAI's fields."""

    port: int
    model: str
    fields: dict[str, Any] = field(default_factory=dict)


class NotWholeError(RuntimeError):
    """A reply that was refused, broken off, or has another number of tokens than was asked for."""


def questions(count: int, seed: int, rate: float | None = None) -> list[Question]:
    """The same for every server: prompts of random words, lengths of their spreads, arrivals of a Poisson process.

    Args:
        rate: requests per second; None: all at 0.
    """
    generator, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        prompt = words(PROMPTS.draw(generator), generator)
        found.append(Question(prompt, REPLIES.draw(generator), at))
        at += 0.0 if rate is None else generator.expovariate(rate)
    return found


def words(count: int, generator: random.Random) -> str:
    """So many random words."""
    return " ".join(generator.choice(WORDS) for _ in range(count))


async def closed(
    server: Server, asked: Sequence[Question], concurrency: int, seconds: float
) -> tuple[list[Answer], float]:
    """So many at once: the next is sent when one is answered, and none after so many seconds; with the whole time."""
    waiting, answers = list(reversed(asked)), []
    begin = time.monotonic()

    async def one_after_the_other() -> None:
        while waiting and time.monotonic() - begin < seconds:
            answers.append(await ask(server, waiting.pop()))

    await together([one_after_the_other() for _ in range(concurrency)])
    return answers, time.monotonic() - begin


async def arriving(server: Server, asked: Sequence[Question], seconds: float) -> tuple[list[Answer], float]:
    """Each at its time, whatever has been answered; what would come after so many seconds is left out."""
    begin = time.monotonic()

    async def in_time(question: Question) -> Answer:
        await asyncio.sleep(max(0.0, begin + question.at - time.monotonic()))
        return await ask(server, question)

    answers = await together([in_time(question) for question in asked if question.at < seconds])
    return answers, time.monotonic() - begin


async def together(works: Sequence[Any]) -> list[Any]:
    """What all give; the first that fails ends the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
    return [task.result() for task in tasks]


async def ask(server: Server, question: Question) -> Answer:
    """Send one request, and read its stream to the end. Raises NotWholeError."""
    body = {
        "model": server.model, "prompt": question.prompt, "max_tokens": question.num_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, **server.fields,
    }  # fmt: skip
    reader, writer = await asyncio.open_connection(HOST, server.port, limit=2**20)
    try:
        sent = time.monotonic()
        writer.write(http_request("/v1/completions", json.dumps(body).encode()))
        usage, times, texts = None, [], []
        async for event in events(reader):
            if "error" in event:
                raise NotWholeError(f"{server.model}: {json.dumps(event['error'])[:500]}")
            usage = event.get("usage") or usage
            text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
            if text:
                times.append(time.monotonic())
                texts.append(text)
    finally:
        writer.close()
    if usage is None or usage["completion_tokens"] != question.num_tokens or not times:
        raise NotWholeError(f"{server.model}: expected {question.num_tokens} tokens, got {usage} in {len(times)} texts")
    return Answer(sent, tuple(times), usage["prompt_tokens"], usage["completion_tokens"], "".join(texts))


def http_request(path: str, body: bytes) -> bytes:
    """A request after whose answer the connection ends."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events of an HTTP answer, until it ends. Raises NotWholeError where it is none, or breaks off."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise NotWholeError((head + await reader.read(2000)).decode(errors="replace"))
    left = b""
    async for part in parts(reader, b"transfer-encoding: chunked" in head.lower()):
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield json.loads(data)


async def parts(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """An answer's body as it comes."""
    if not is_chunked:
        while part := await reader.read(2**16):
            yield part
        return
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
    except asyncio.IncompleteReadError:
        raise NotWholeError("the connection was closed in the middle of an answer") from None


def figures(answers: Sequence[Answer], seconds: float, cpu_seconds: float) -> dict[str, float]:
    """What a load comes to: tokens drawn per second, and per second that the server computed, which other work on the
    machine does not change; ms to the first text and between texts, median and 99th of 100.
    """
    tokens = sum(answer.tokens for answer in answers)
    first = [answer.texts[0] - answer.sent for answer in answers]
    between = gaps(answers)
    return {
        "requests": len(answers), "tokens/s": tokens / seconds, "tokens/CPU s": tokens / cpu_seconds,
        "first ms p50": 1e3 * quantile(first, 0.5), "first ms p99": 1e3 * quantile(first, 0.99),
        "between ms p50": 1e3 * quantile(between, 0.5), "between ms p99": 1e3 * quantile(between, 0.99),
    }  # fmt: skip


def gaps(answers: Sequence[Answer]) -> list[float]:
    """Seconds between one text and the next of the same answer."""
    return [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.texts, answer.texts[1:], strict=False)
    ]  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

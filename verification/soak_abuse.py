"""Requests that no server can answer well, with the statuses that it may answer them with."""

from random import Random
from typing import Any, NamedTuple

from verification.soak_books import MODEL
from verification.soak_client import Connection
from verification.workplace import require

__all__ = ["ask_wrongly", "break_off", "write_garbage"]

TEXT, CHAT, NONE = "/v1/completions", "/v1/chat/completions", "/v1/sessions/none-of-this-name"
JSON = "application/json"


class Wrong(NamedTuple):
    """One of them."""

    path: str
    body: Any
    statuses: tuple[int, ...] = (400,)
    method: str = "POST"
    content_type: str = JSON


def asked(**fields: Any) -> dict[str, Any]:
    """A request for a completion, with something wrong."""
    return {"model": MODEL, "prompt": "a", "max_tokens": 3, **fields}


WRONG = (
    *(Wrong(TEXT, body) for body in (
        b"", b"{", b"\xff\xfe{}", b"[]", b"null", b'"text"', b'{"model": "tiny", "prompt": "a",', b"[" * 5000,
        b'{"model": "tiny", "prompt": NaN}', b'{"a":' * 3000, b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1',
    )),
    *(Wrong(TEXT, asked(**{name: value})) for name, value in (
        ("prompt", 3.5), ("prompt", []), ("prompt", [[]]), ("prompt", [10**6]), ("prompt", [-1]), ("prompt", [True]),
        ("prompt", {"a": "b"}), ("prompt", None), ("prompt", [1, "a"]), ("max_tokens", 10**9), ("max_tokens", -1),
        ("max_tokens", "many"), ("max_tokens", 1e300), ("temperature", -1), ("temperature", "hot"), ("top_p", 0),
        ("top_p", 7), ("n", 0), ("n", 1000), ("n", 2.5), ("stop", 3), ("stop", [""]), ("stop", ["a"] * 1000),
        ("seed", 2**70), ("logprobs", 1000), ("stream", "yes"), ("session_id", 3), ("session_id", ""),
        ("session_id", "a/b"), ("session_id", "x" * 1000), ("logit_bias", {"a": 1}), ("logit_bias", {"5": 1000}),
        ("no_such_field", 1), ("tempature", 1), ("repetition_penalty", 0), ("min_p", 2), ("suffix", "x"),
        ("response_format", {"type": "regex", "regex": "("}), ("response_format", {"type": "no such"}),
        ("response_format", 5), ("stop_token_ids", [-1]), ("stop_token_ids", "x"),
    )),
    *(Wrong(CHAT, {"model": MODEL, "messages": messages}) for messages in (
        None, [], "hello", [3], [{}], [{"role": "nobody", "content": "a"}], [{"role": "user"}],
        [{"role": "user", "content": 3}], [{"role": 7, "content": "a"}],
    )),
    Wrong(TEXT, asked(model="another"), (404,)), Wrong(TEXT, asked(model=3)),
    Wrong(TEXT, asked(), (415,), content_type="text/plain"), Wrong(TEXT, None, (405,), "GET"),
    Wrong("/v1/no/such/place", asked(), (404,)), Wrong(NONE, None, (404,), "GET"), Wrong(NONE, None, (404,), "DELETE"),
    Wrong(f"{NONE}/export", None, (404,), "GET"), Wrong(f"{NONE}/fork", {"to": "x"}, (404,)), Wrong(f"{NONE}/fork", {}),
    Wrong(f"{NONE}/fork", {"to": "a/b"}), Wrong(f"{NONE}/import", b"no file", (409,), "PUT"),
    Wrong(f"{NONE}/import", b"\xff" * 4000, (409,), "PUT"), Wrong("/tokenize", b"{"),
    Wrong("/detokenize", {"model": MODEL, "tokens": "x"}),
)  # fmt: skip


async def ask_wrongly(line: Connection, random: Random) -> None:
    """One of them; the answer must be an error that says something."""
    wrong = random.choice(WRONG)
    answer = await line.ask(wrong.method, wrong.path, wrong.body, wrong.content_type)
    shown = f"{wrong.method} {wrong.path} {wrong.body!r:.100}"
    require(answer.status in wrong.statuses, f"{shown}: expected {wrong.statuses}, got {answer.status}")
    require(bool(answer.json()["error"]["message"]), f"{shown}: an error without a message")


async def break_off(line: Connection, random: Random) -> None:
    """A request whose end never comes."""
    line.drop()
    body = asked(session_id="none-of-this-name") if random.random() < 0.5 else asked()
    await line.send("POST", TEXT, body, most=random.randint(1, 180))
    line.drop()


async def write_garbage(line: Connection, random: Random) -> None:
    """What is no HTTP: refused or not answered."""
    line.drop()
    await line.write(random.choice((
        b"NONSENSE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", random.randbytes(200) + b"\r\n\r\n", b"\r\n" * 50,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    )))  # fmt: skip
    if random.random() < 0.2:
        found = await line.rest()
        require(not found.startswith(b"HTTP/1.1 5"), f"garbage was answered with {found[:60]!r}")
    line.drop()

"""Sessions over HTTP: what is new is enough, what the client saw is kept, errors say what to do."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from swat_lm.serve.engine import Engine
from swat_lm.serve.generation import Event, Generation
from swat_lm.serve.host import Host
from swat_lm.serve.http.app import create_app
from swat_lm.serve.http.asking import Served
from swat_lm.serve.http.metrics import Metrics
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.http.streams import Running, SessionTurn
from swat_lm.serve.language import Language
from swat_lm.serve.sessions.hosted import HostedSessions
from swat_lm.serve.sessions.store import FolderStore
from tests.serve.hosting import running_host, running_server, send_raw, tiny_engine, until

LETTERS = {"type": "regex", "regex": "[a-z]{6}"}


def hosted(folder: Path, slots: int = 2) -> tuple[Host, HostedSessions]:
    def open_engine() -> Engine:
        made = tiny_engine(slots)
        engine = Engine(made.model, made.scheduler.limits, made.tokenizer, [257], restorable=True)
        sessions.attach(engine)
        return engine

    host = Host(open_engine)
    sessions = HostedSessions(host, FolderStore(folder))
    host.start()
    host.wait_ready(60)
    return host, sessions


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Host, HostedSessions]]:
    host, sessions = hosted(tmp_path_factory.mktemp("sessions"))
    with TestClient(create_app(host, Settings("tiny", 64), sessions)) as client:
        yield client, host, sessions
    assert host.stop(30)


@pytest.fixture
def client(served: tuple[TestClient, Host, HostedSessions]) -> TestClient:
    return served[0]


def text_turn(client: TestClient, session: str, prompt: str, **more: Any) -> Any:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "session_id": session, "response_format": LETTERS,
            **more}  # fmt: skip
    return client.post("/v1/completions", json=body)


def chat_turn(client: TestClient, session: str, *contents: str, **more: Any) -> Any:
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "session_id": session,
            "response_format": LETTERS, **more}  # fmt: skip
    return client.post("/v1/chat/completions", json=body)


def text_of(found: Any) -> str:
    assert found.status_code == 200, found.text
    (choice,) = found.json()["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def error_of(found: Any) -> tuple[int, str, str]:
    error = found.json()["error"]
    return found.status_code, error["code"], error["message"]


def test_a_session_reads_only_what_is_new(client: TestClient):
    first = text_of(text_turn(client, "a", "hello "))
    found = text_turn(client, "a", " and", logprobs=0)
    assert text_of(found) == text_of(text_turn(client, "b", "hello " + first + " and"))
    usage = found.json()["usage"]
    assert usage["prompt_tokens"] == len("hello ") + 6 + len(" and")
    # the last one that was drawn is read with what is new
    assert usage["prompt_tokens_details"] == {"cached_tokens": len("hello ") + 5}
    session = client.get("/v1/sessions/a").json()
    assert (session["turns"], session["tokens"], session["kind"], session["place"]) == (2, 22, "text", "slot")
    assert session["state_bytes"] > 0


def test_a_chat_goes_on_with_its_last_message_or_all_of_them(client: TestClient):
    first = text_of(chat_turn(client, "chat", "one"))
    second = text_of(chat_turn(client, "chat", "two"))
    found = chat_turn(client, "chat", "one", first, "two", second, "three")
    assert text_of(found) == text_of(chat_turn(client, "other", "one", first, "two", second, "three"))
    assert client.get("/v1/sessions/chat").json()["messages"] == 6
    for contents in (("one", "never said", "three"), ("one", first)):
        status, code, message = error_of(chat_turn(client, "chat", *contents))
        assert (status, code) == (409, "session_history")
        assert "not the one of this session" in message


def test_a_message_in_a_session_has_no_name(client: TestClient):
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho", "name": "bob"}]
    found = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "session_id": "named"})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "messages[1].name")
    assert "keeps only roles and texts; put the name into the content, got 'bob'" in error["message"]
    assert client.get("/v1/sessions/named").status_code == 404


def test_an_event_counts_as_seen_when_the_next_one_is_asked_for(served: Any):
    _, host, _ = served
    events = [Event("turn", text=text, shown=(place, text)) for place, text in enumerate("abc", 1)]
    cancelled: list[Any] = []

    class Played:
        def turn(self, session: str, kind: str, key: Any, prepare: Any, deliver: Any) -> Future[None]:
            for event in events:
                deliver(event)
            future: Future[None] = Future()
            future.set_result(None)
            return future

        def cancel(self, *arguments: Any) -> None:
            cancelled.append(arguments)

    async def leave_after_two() -> None:
        language = Language(host.engine.tokenizer, 272)
        ours = Served(host, language, Settings("tiny"), 0, "", Played())  # type: ignore[arg-type]
        turn = SessionTurn("a", "text", Generation("turn", ()), lambda record: pytest.fail("nobody asks"), True)
        running = await Running(ours, Metrics(host), (), {}, turn).start()
        async with running, contextlib.aclosing(running.__aiter__()) as found:  # type: ignore[type-var]
            assert [(await anext(found))[1].text for _ in range(2)] == ["a", "b"]

    asyncio.run(leave_after_two())
    # "b" may not have gone out
    assert cancelled == [("turn", (1, "a"), "a")]


def test_a_request_that_is_sent_again_is_not_read_twice(client: TestClient):
    for turns in (0, 1):
        assert text_of(text_turn(client, "counted", "x", session_turns=turns))
        status, code, message = error_of(text_turn(client, "counted", "x", session_turns=turns))
        assert (status, code) == (409, "session_history")
        assert f"expected {turns + 1}" in message
    assert error_of(text_turn(client, "counted", "x", session_turns="2"))[0] == 400
    assert client.get("/v1/sessions/counted").json()["turns"] == 2


def test_a_stream_is_kept_as_it_was_sent(client: TestClient):
    found = text_turn(client, "stream", "hello", stream=True, stream_options={"include_usage": True})
    blocks = [block.removeprefix("data: ") for block in found.text.strip().split("\n\n")]
    assert blocks[-1] == "[DONE]"
    events = [json.loads(block) for block in blocks[:-1]]
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    assert len(text) == 6
    assert events[-1]["usage"]["prompt_tokens"] == 5
    assert text_of(text_turn(client, "stream", "?")) == text_of(text_turn(client, "again", "hello" + text + "?"))


def test_sessions_are_listed_copied_moved_and_removed(client: TestClient):
    text_of(text_turn(client, "first", "hello"))
    copied = client.post("/v1/sessions/first/fork", json={"to": "copy"})
    assert copied.json()["turns"] == 1
    assert {"first", "copy"} <= {one["id"] for one in client.get("/v1/sessions").json()["data"]}
    content = client.get("/v1/sessions/first/export").content
    # larger than a body may be: its own limit is what a session may have
    assert len(content) < 1 << 20
    assert client.put("/v1/sessions/moved/import", content=content).json()["tokens"] == 11
    replies = {text_of(text_turn(client, name, "?")) for name in ("first", "copy", "moved")}
    assert len(replies) == 1
    assert client.delete("/v1/sessions/copy").json() == {"id": "copy", "object": "session.deleted", "deleted": True}
    for found in (
        client.get("/v1/sessions/copy"),
        client.delete("/v1/sessions/copy"),
        client.get("/v1/sessions/copy/export"),
        client.post("/v1/sessions/copy/fork", json={"to": "x"}),
    ):
        assert error_of(found)[:2] == (404, "session_unknown")  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({"session_id": 3}, 400, None, "session_id: expected a text"),
        ({"session_id": ""}, 400, "session_name", "session_id: expected 1 to 256"),
        ({"session_id": "a/b"}, 400, "session_name", "session_id: expected 1 to 256"),
        ({"n": 2}, 400, None, "n: expected 1 in a session"),
        ({"session_id": None, "session_turns": 1}, 400, None, "session_turns: expected only with session_id"),
        ({"echo": True}, 400, None, "echo: expected false in a session"),
        ({"prompt": ["a", "b"]}, 400, None, "prompt: expected one in a session"),
        ({"prompt": ""}, 400, None, "prompt: expected at least one"),
    ],
)
def test_what_a_session_cannot_be_asked(client: TestClient, body: Any, status: int, code: str | None, said: str):
    found = text_turn(client, "wrong", **{"prompt": "hello", **body})
    assert error_of(found)[:2] == (status, code)
    assert said in error_of(found)[2]
    assert error_of(client.get("/v1/sessions/wrong"))[0] == 404


def test_wrong_files_and_names(client: TestClient):
    text_of(text_turn(client, "named", "hello"))
    content = client.get("/v1/sessions/named/export").content
    for wrong, status in ((b"no file", 400), (content[:-1], 400), (b"x" * (1 << 25), 413)):
        found = client.put("/v1/sessions/new/import", content=wrong)
        assert error_of(found)[0] == status, found.text
    assert error_of(client.put("/v1/sessions/named/import", content=content))[:2] == (409, "session_exists")
    assert error_of(client.post("/v1/sessions/named/fork", json={"to": "named"}))[:2] == (409, "session_exists")
    assert error_of(client.post("/v1/sessions/named/fork", json={}))[0] == 400
    assert error_of(chat_turn(client, "named", "hello"))[:2] == (409, "session_kind")


def test_a_session_is_one_request_s_at_a_time_and_its_slot_is_free_for_others(served: Any):
    client, host, sessions = served
    with running_server(host, Settings("tiny", 64), sessions=sessions) as (_, port):
        body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 60, "session_id": "long", "stream": True,
                           "response_format": {"type": "regex", "regex": "[a-z]{400}"}})  # fmt: skip
        with send_raw(port, "/v1/completions", body.encode()) as connection:
            got = b""
            while b"data:" not in got:
                got += connection.recv(4096)
            found = text_turn(client, "long", "x")
            assert error_of(found)[:2] == (409, "session_busy")
        # it has gone: what it got is kept
        until(lambda: client.get("/v1/sessions/long").json().get("busy") is False)
        kept = client.get("/v1/sessions/long").json()
        assert kept["turns"] == 1
        assert 5 < kept["tokens"] < 65
        assert text_of(text_turn(client, "long", "x"))


def test_without_a_place_for_them_there_are_none():
    with running_host() as host, TestClient(create_app(host, Settings("tiny"))) as client:
        for found in (text_turn(client, "a", "x"), chat_turn(client, "a", "x"), client.get("/v1/sessions")):
            status, code, message = error_of(found)
            assert (status, code) == (400, "no_sessions")
            assert "--sessions FOLDER" in message

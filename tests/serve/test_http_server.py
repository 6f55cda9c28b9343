"""A real server on a port: OpenAI's client, connections that are closed, signals to end."""

import asyncio
import json
import socket
import threading
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from swat_lm.serve.host import Host
from swat_lm.serve.http.app import create_app
from swat_lm.serve.http.server import Server, listen
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.http.streams import EventStream
from swat_lm.serve.language import Language
from tests.serve.hosting import (
    LETTERS,
    running_host,
    running_server,
    send_raw,
    until,
)  # fmt: skip

CHAT: Any = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with running_host() as made:
        yield made


@pytest.fixture(scope="module")
def port(host: Host) -> Iterator[int]:
    with running_server(host, Settings("tiny", 2000)) as (_, made):
        yield made


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as made:
        yield made


def free(host: Host) -> bool:
    gauges = host.gauges()
    return gauges.free_slots == 4 and gauges.running == gauges.waiting == 0


def test_the_client_lists_the_model(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "swat-lm"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")


def test_the_client_chats(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny", "messages": CHAT, "max_completion_tokens": 8, "temperature": 0, "n": 2, "logprobs": True,
        "top_logprobs": 2, "extra_body": {"response_format": LETTERS},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        len("[system]short\n[user]hi\n[assistant]"),
        16,
    )
    for choice in whole.choices:
        text, logprobs = choice.message.content, choice.logprobs
        assert text is not None
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(text) == 8
        assert choice.finish_reason == "length"
        assert "".join(one.token for one in logprobs.content) == text
        assert [one.bytes for one in logprobs.content] == [[ord(letter)] for letter in text]
        assert {len(one.top_logprobs) for one in logprobs.content} == {2}
    texts = {0: "", 1: ""}
    finished = {}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert finished == {0: "length", 1: "length"}
    assert chunk.usage == whole.usage
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    again = client.chat.completions.create(**{**asked, "messages": [CHAT[0], *parts]})
    assert again.choices[0].message.content == whole.choices[0].message.content
    # up to its end, or the server's limit
    ended = client.chat.completions.create(
        model="tiny", messages=CHAT, extra_body={"response_format": {"type": "regex", "regex": "[a-z]{70}"}}
    )
    assert (ended.choices[0].finish_reason, len(ended.choices[0].message.content or "")) == ("stop", 70)


def test_the_client_parses_structured_replies(client: openai.OpenAI):
    class Point(BaseModel):
        kind: bool

    found = client.chat.completions.parse(model="tiny", messages=CHAT, response_format=Point, max_tokens=60)
    assert isinstance(found.choices[0].message.parsed, Point)
    answer = client.responses.parse(model="tiny", input="hi", text_format=Point, max_output_tokens=60)
    assert isinstance(answer.output_parsed, Point)
    with client.responses.stream(model="tiny", input="hi", text_format=Point, max_output_tokens=60) as stream:
        ended = stream.get_final_response()
    assert ended.status == "completed"
    assert isinstance(ended.output_parsed, Point)


def test_the_client_hears_what_is_wrong(client: openai.OpenAI):
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="this server calls no tools") as refused:
        client.chat.completions.create(model="tiny", messages=CHAT, tools=[tool])
    assert refused.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt", prompt="a")
    assert unknown.value.code == "model_not_found"


def test_the_client_completes_and_stops(client: openai.OpenAI):
    more = {"response_format": LETTERS}
    whole = client.completions.create(model="tiny", prompt="x", max_tokens=9, temperature=0, extra_body=more)
    text = whole.choices[0].text
    cut = client.completions.create(
        model="tiny", prompt="x", max_tokens=9, temperature=0, stop=[text[5:8]], stream=True, extra_body=more
    )
    chunks = list(cut)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(text[5:8])]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_client_asks_for_responses(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny", "input": "hi", "instructions": "short", "max_output_tokens": 6, "temperature": 0
    }  # fmt: skip
    whole = client.responses.create(**asked)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (len("[system]short\n[user]hi\n[assistant]"), 6)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    # an answer handed back
    turns = [{"role": "user", "content": "hi"}, *[item.model_dump(exclude_none=True) for item in whole.output],
             {"role": "user", "content": [{"type": "input_text", "text": "more"}]}]  # fmt: skip
    assert client.responses.create(model="tiny", input=turns, max_output_tokens=1).output_text is not None  # type: ignore


def test_a_closed_connection_frees_its_slot(host: Host, port: int, client: openai.OpenAI):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "ignore_eos": True}
    for more in ({"stream": True}, {}, {"stream": True, "n": 4}):
        made = send_raw(port, "/v1/completions", json.dumps({**body, **more}).encode())
        until(lambda: host.gauges().running == 1)
        if more:
            assert made.recv(20).startswith(b"HTTP/1.1 200")
        made.close()
        until(lambda: free(host), 2)
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=2000, stream=True,
                                       extra_body={"ignore_eos": True})  # fmt: skip
    next(iter(stream))
    stream.close()
    until(lambda: free(host), 2)
    # who waits in line leaves it too
    busy = send_raw(port, "/v1/completions", json.dumps({**body, "n": 4}).encode())
    until(lambda: host.gauges().used_slots == 4)
    waiting = send_raw(port, "/v1/completions", json.dumps(body).encode())
    until(lambda: host.gauges().waiting == 1)
    waiting.close()
    until(lambda: host.gauges().waiting == 0, 2)
    busy.close()
    until(lambda: free(host), 2)


def test_a_connection_that_breaks_within_its_body_harms_nobody(port: int, client: openai.OpenAI):
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    made.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                 b"content-length: 100\r\n\r\n{")  # fmt: skip
    made.close()
    assert client.models.list().data


def test_who_goes_before_the_first_byte_ends_the_request_too():
    async def lines() -> AsyncGenerator[str]:
        yield "never"

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    ended: list[int] = []
    scope: Any = {"type": "http", "state": {}}
    asyncio.run(EventStream(lines(), lambda: ended.append(1))(scope, receive, send))
    assert (ended, scope["state"]) == ([1], {"gone": True})


def test_long_texts_are_read_beside_the_loop(port: int, monkeypatch: pytest.MonkeyPatch):
    go, begun = threading.Event(), threading.Event()
    prompt = Language.prompt

    def slow(language: Language, text: str) -> Any:
        begun.set()
        go.wait(20)
        return prompt(language, text)

    monkeypatch.setattr(Language, "prompt", slow)
    body = json.dumps({"model": "tiny", "prompt": "a" * 50, "max_tokens": 0}).encode()
    made = send_raw(port, "/v1/completions", body)
    assert begun.wait(20)
    # others are answered meanwhile
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as found:
        assert json.load(found) == {"status": "ready"}
    go.set()
    assert made.recv(15) == b"HTTP/1.1 200 OK"
    made.close()


def test_the_end_lets_replies_end_and_refuses_others():
    with running_host() as host, running_server(host, Settings("tiny", 2000)) as (server, port):
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt="a", max_tokens=300, stream=True,
                                               extra_body={"ignore_eos": True})  # fmt: skip
            first = next(iter(stream))
            # what a signal does
            server.handle_exit(15, None)
            until(lambda: host.status == "draining")
            with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
                client.completions.create(model="tiny", prompt="a")
            assert refused.value.status_code == 503
            assert [first, *stream][-1].choices[0].finish_reason == "length"
        host.ended.result(20)
        until(lambda: server.should_exit)


def test_a_second_signal_ends_at_once():
    with running_host() as host, running_server(host, Settings("tiny", 2000)) as (server, port):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        made = send_raw(port, "/v1/completions", json.dumps(body).encode())
        until(lambda: host.gauges().running == 1)
        server.handle_exit(2, None)
        server.handle_exit(2, None)
        host.ended.result(5)
        said = b""
        while part := made.recv(1 << 16):
            said += part
        made.close()
        # the stream says why
        assert b"the server stopped before the reply was whole" in said
        assert b"data: [DONE]" in said


def test_a_port_in_use_is_one_sentence(port: int):
    with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is in use; stop what listens there, or give another"):
        listen("127.0.0.1", port)
    with pytest.raises(OSError, match="no such address"):
        listen("no.such.host.invalid", 0)


def test_a_host_that_cannot_load_ends_the_server():
    def fail() -> Any:
        raise ValueError("no weights")

    host, place = Host(fail), listen("127.0.0.1", 0)
    server = Server(create_app(host, Settings("tiny")), host, 1)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([place])), daemon=True)
    thread.start()
    until(lambda: server.started)
    host.start()
    thread.join(20)
    place.close()
    assert not thread.is_alive()
    assert str(host.failure) == "no weights"


def test_texts_become_vectors(host: Host, client: openai.OpenAI):
    # the client asks for base64 by itself
    found = client.embeddings.create(model="tiny", input=["ab", "c" * 70, "ab"], user="me")
    vectors = [one.embedding for one in found.data]
    assert [one.index for one in found.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    assert [len(vector) for vector in vectors] == [32] * 3
    assert sum(value * value for value in vectors[1]) == pytest.approx(1, abs=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens == 74
    plain = client.embeddings.create(model="tiny", input=[97, 98], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)
    alone = TestClient(create_app(host, Settings("tiny")))
    for wrong in ({"input": ""}, {"input": []}, {"input": "a", "dimensions": 3}, {"input": "a", "n": 1}):
        assert alone.post("/v1/embeddings", json={"model": "tiny", **wrong}).status_code == 400
    assert free(host)

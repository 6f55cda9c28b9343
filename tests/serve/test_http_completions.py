"""Completions over HTTP: what is asked is what the engine gives, in OpenAI's words."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from swat_lm.serve.generation import Event, Generation
from swat_lm.serve.http.app import create_app
from swat_lm.serve.http.asking import Prompt, Served
from swat_lm.serve.http.completions import LOWEST
from swat_lm.serve.http.metrics import Metrics
from swat_lm.serve.http.replies import Echo, Reply
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.http.streams import Running
from swat_lm.serve.language import Language
from swat_lm.serve.sampler import Choice, NoTokenError, SamplingError
from tests.serve.hosting import LETTERS, PlayedHost, running_host, tiny_engine

SETTINGS = Settings("tiny")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running_host() as host, TestClient(create_app(host, Settings("tiny", 64))) as made:
        yield made


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    found = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "temperature": 0, **body})
    assert found.status_code == 200, found.text
    return found.json()


def lines(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose last is [DONE]."""
    given = {"model": "tiny", "stream": True, **body}
    found = client.post(path, json=given)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = found.text.removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def test_a_completion_and_its_stream_are_the_same(client: TestClient):
    body = {"prompt": "abc", "max_tokens": 12, "response_format": LETTERS}
    whole = ask(client, **body)
    (choice,) = whole["choices"]
    assert len(choice["text"]) == 12
    assert choice["finish_reason"] == "length"
    assert whole["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert whole["system_fingerprint"] == "swat-tiny-float32-cpu"
    events = lines(client, temperature=0, stream_options={"include_usage": True}, **body)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == choice["text"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 11 + ["length"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1
    # OpenAI's own default
    assert ask(client, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_prompts_come_as_texts_or_tokens(client: TestClient):
    texts = ask(client, prompt=["abc", "x"], n=2, max_tokens=3, seed=1, ignore_eos=True)
    tokens = ask(client, prompt=[[97, 98, 99], [120]], n=2, max_tokens=3, seed=1, ignore_eos=True)
    assert texts["choices"] == tokens["choices"]
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
    # greedy: both replies to a prompt are the same
    assert texts["choices"][0]["text"] == texts["choices"][1]["text"] != texts["choices"][2]["text"]
    assert texts["usage"]["prompt_tokens"] == 4
    assert texts["usage"]["completion_tokens"] == 12
    alone = ask(client, prompt=[97, 98, 99], max_tokens=3, ignore_eos=True)
    assert alone["choices"][0]["text"] == texts["choices"][0]["text"]


def test_prompts_are_weighed_as_the_harness_asks(client: TestClient):
    prompts = [[104, 101, 108, 108, 111], [3]]
    found = ask(client, prompt=prompts, echo=True, logprobs=1, max_tokens=1)
    model = tiny_engine().model
    for choice, prompt in zip(found["choices"], prompts, strict=True):
        logged = choice["logprobs"]
        with torch.no_grad():
            spread = model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
        # one for each token of the prompt and one for the reply, whatever that says
        assert {len(values) for values in logged.values()} == {len(prompt) + 1}
        assert logged["token_logprobs"][0] is logged["top_logprobs"][0] is None
        expected = [float(spread[place, token]) for place, token in enumerate(prompt[1:])]
        assert logged["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in logged["top_logprobs"][1:]]
        assert best == pytest.approx([float(row[:259].max()) for row in spread], abs=1e-4)
    assert found["choices"][0]["text"].startswith("hello")
    assert found["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert found["choices"][0]["logprobs"]["tokens"][:5] == list("hello")
    # only reading
    read = ask(client, prompt="hello", echo=True, logprobs=1, max_tokens=0)
    assert read["choices"][0]["text"] == "hello"
    assert read["choices"][0]["finish_reason"] == "length"
    assert read["choices"][0]["logprobs"]["token_logprobs"] == [
        pytest.approx(value, abs=1e-5) for value in found["choices"][0]["logprobs"]["token_logprobs"][:5]
    ]
    assert read["usage"]["completion_tokens"] == 0
    streamed = lines(client, prompt="hello", echo=True, logprobs=1, max_tokens=0)
    assert streamed[0]["choices"] == read["choices"]


def test_a_text_ends_before_a_stop_string_with_its_log_probabilities(client: TestClient):
    body = {"max_tokens": 12, "response_format": LETTERS, "logprobs": 0}
    whole = ask(client, **body)["choices"][0]["text"]
    cut = ask(client, stop=[whole[4:6]], **body)
    (choice,) = cut["choices"]
    # the first place where it stands
    text = whole[: whole.index(whole[4:6])]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert "".join(choice["logprobs"]["tokens"]) == text
    assert choice["logprobs"]["text_offset"] == list(range(len(text)))
    # drawn all the same
    assert cut["usage"]["completion_tokens"] == len(text) + 2
    events = lines(client, prompt="abc", temperature=0, stop=whole[4:6], **body)
    assert "".join(event["choices"][0]["text"] for event in events) == text
    tokens = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
    assert "".join(tokens) == text
    ended = ask(client, stop_token_ids=[ord(whole[3])], max_tokens=12, response_format=LETTERS)
    assert ended["choices"][0]["text"] == whole[: whole.index(whole[3])]
    assert ended["choices"][0]["finish_reason"] == "stop"


def test_options_reach_the_sampler(client: TestClient):
    one = {"max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    assert ask(client, seed=1, **one)["choices"] == ask(client, seed=1, **one)["choices"]
    assert ask(client, seed=1, **one)["choices"] != ask(client, seed=2, **one)["choices"]
    assert ask(client, logit_bias={"65": 100}, max_tokens=3)["choices"][0]["text"] == "AAA"
    assert ask(client, top_k=1, temperature=5, max_tokens=4)["choices"] == ask(client, max_tokens=4)["choices"]
    barred = ask(client, logit_bias={"65": 100, "66": 99}, frequency_penalty=2, max_tokens=3)["choices"][0]["text"]
    assert "B" in barred
    # what clients send and what changes nothing
    more = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "best_of": 1, "suffix": None}
    assert ask(client, max_tokens=4, **more)["choices"] == ask(client, max_tokens=4)["choices"]
    never = ask(client, max_tokens=64, temperature=3, seed=5, ignore_eos=True, logprobs=0)["choices"][0]
    # ids beyond the tokenizer's are never drawn
    assert len(never["logprobs"]["tokens"]) == 64


def test_structured_replies(client: TestClient):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    found = ask(client, response_format=given, max_tokens=40)
    assert 0 <= json.loads(found["choices"][0]["text"])["a"] <= 9
    assert found["choices"][0]["finish_reason"] == "stop"
    assert ask(client, response_format={"type": "regex", "regex": "[xy]{3}"})["choices"][0]["text"].strip("xy") == ""
    assert ask(client, response_format={"type": "lark", "lark": 'start: "no" | "yes"'})["choices"][0]["text"] in (
        "no", "yes",
    )  # fmt: skip
    assert ask(client, response_format={"type": "text"}, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_an_error_in_the_middle_of_a_stream_has_the_clients_form():
    events = [{"choice": Choice(65), "text": "A"}, {"ended": "error", "error": "it broke"}]
    host = PlayedHost(events)
    client = TestClient(create_app(host, Settings("tiny")))
    first, last = lines(client, prompt="a")
    assert first["choices"][0]["text"] == "A"
    assert last["error"] == {
        "message": "the engine ended this request: it broke", "type": "server_error", "param": None,
        "code": "generation_failed",
    }  # fmt: skip
    found = client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert (found.status_code, found.json()["error"]["code"]) == (500, "generation_failed")


@pytest.mark.parametrize(
    ("cause", "status", "code"),
    [
        (NoTokenError("nothing may come"), 400, "constraint_failed"),
        (SamplingError("logits are not numbers"), 500, "generation_failed"),
        (RuntimeError("CUDA error: out of memory"), 500, "generation_failed"),
    ],
)
def test_only_a_constraint_that_fails_is_the_requests_fault(cause: Exception, status: int, code: str):
    client = TestClient(create_app(PlayedHost([{"ended": "error", "error": str(cause), "cause": cause}]), SETTINGS))
    for path, name, body in (
        ("completions", "response_format", {"prompt": "a", "response_format": LETTERS}),
        ("responses", "text.format", {"input": "a", "text": {"format": {"type": "json_object"}}}),
    ):
        found = client.post(f"/v1/{path}", json={"model": "tiny", **body})
        error = found.json()["error"]
        assert (found.status_code, error["code"]) == (status, code)
        assert error["param"] == (name if status == 400 else None)


def test_what_ends_with_the_server_says_when_to_come_again():
    host = PlayedHost([])
    language = Language(host.engine.tokenizer, 272)
    running = Running(Served(host, language, SETTINGS, 0, ""), Metrics(host), [], {})
    host._status = "draining"
    failed = running._failure(Event("a", ended="error", error="it ended"))
    assert (failed.status, failed.code, failed.headers) == (503, "server_draining", {"Retry-After": "5"})


def test_long_prompts_are_checked_beside_the_engine(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []
    whole = Generation._check_tokens

    def check(self: Generation, vocabulary: int) -> None:
        names.append(threading.current_thread().name)
        whole(self, vocabulary)

    monkeypatch.setattr(Generation, "_check_tokens", check)
    ask(client, prompt=[97] * 5000, max_tokens=0)
    assert len(names) == 1
    assert names != ["engine"]
    found = client.post("/v1/completions", json={"model": "tiny", "prompt": [*[97] * 5000, 272]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "prompt")
    names.clear()
    ask(client, prompt="short", max_tokens=0)
    assert names == ["engine"]


def test_prompts_are_weighed_as_far_as_there_is_memory(client: TestClient):
    host = PlayedHost([{"ended": "read"}])
    small = TestClient(create_app(host, Settings("tiny", max_weighed=5)))
    body = {"model": "tiny", "prompt": ["abc", "def"], "echo": True, "max_tokens": 0}
    found = small.post("/v1/completions", json={**body, "logprobs": 1})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "prompt")
    assert "expected at most 5 tokens of prompts with echo and logprobs, got 6" in found.json()["error"]["message"]
    assert small.post("/v1/completions", json=body).status_code == 200
    # long answers come from another thread, and are the same
    short, long = ({"prompt": "ab" * count, "echo": True, "logprobs": 1, "max_tokens": 0} for count in (20, 600))
    whole, part = ask(client, **long)["choices"][0], ask(client, **short)["choices"][0]
    assert lines(client, **long)[0]["choices"] == [whole]
    assert whole["logprobs"]["tokens"] == list("ab" * 600)
    assert whole["logprobs"]["token_logprobs"][1:30] == pytest.approx(
        part["logprobs"]["token_logprobs"][1:30], abs=1e-5
    )


def events_of(texts: list[str], tokens: list[int], ended: str) -> list[Event]:
    ends = [None] * (len(texts) - 1) + [ended]
    return [
        Event("k", choice=Choice(token, -1.0, ((token, -1.0),)), text=text, ended=end)
        for text, token, end in zip(texts, tokens, ends, strict=True)
    ]


@pytest.mark.parametrize(
    ("texts", "ended", "starts"),
    [
        # held back while it may become a stop string, and given out
        (["", "", "abc"], "length", [0, 1, 2]),
        # cut within the second token's text
        (["", "a", ""], "stop_string", [0]),
        (["a", "b", ""], "end_token", [0, 1]),
    ],
)
def test_log_probabilities_come_with_their_text(texts: list[str], ended: str, starts: list[int]):
    language = Language(tiny_engine().tokenizer, 272, [257])
    reply, given = Reply(language, 1), ""
    found = []
    for event in events_of(texts, [97, 98, 99], ended):
        delta = reply.take(event)
        given += delta.text
        found += delta.logged
        assert all(one.start < len(given) for one in delta.logged)
    assert [one.start for one in found] == starts
    with_end = Reply(language, 1, with_end=True)
    logged = [one for event in events_of(texts, [97, 98, 99], ended) for one in with_end.take(event).logged]
    assert len(logged) == len(starts) + (ended == "end_token")


def test_characters_of_several_tokens_share_their_place():
    language = Language(tiny_engine().tokenizer, 272, [257])
    text = "é€x"
    echo = Echo(language, Prompt.of(language.prompt(text), text), 0)
    echo.take([Choice(token, -1.0) for token in text.encode()[1:]])
    assert [one.start for one in echo.logged()] == [0, 0, 1, 1, 1, 2]
    assert [language.piece(one.token) for one in echo.logged()] == [
        "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "x",
    ]  # fmt: skip
    assert LOWEST == -9999


def test_long_chats_have_log_probabilities_of_every_token(client: TestClient):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64, "temperature": 0,
            "response_format": LETTERS, "logprobs": True, "top_logprobs": 2}  # fmt: skip
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in tokens) == choice["message"]["content"]
    assert [len(one["top_logprobs"]) for one in tokens] == [2] * 64

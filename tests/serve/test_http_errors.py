"""What is wrong is said in OpenAI's form with a status of 4xx and names the field; nothing that is sent gives 5xx."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from swat_lm.serve.host import Host
from swat_lm.serve.http.app import Endpoint, create_app
from swat_lm.serve.http.completions import Completion, CompletionRequest
from swat_lm.serve.http.guard import Rate
from swat_lm.serve.http.settings import Settings
from tests.serve.hosting import ENDPOINTS, running_host, tiny_engine

KEY = "a-key-of-mine"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with running_host() as made:
        yield made


@pytest.fixture(scope="module")
def app(host: Host) -> FastAPI:
    return create_app(host, Settings("tiny", 64, max_body=100_000, max_prompts=8))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as made:
        yield made


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
WRONG: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    ("completions", {"model": "gpt"}, 404, "model", "there is no 'gpt' here; this server has 'tiny'"),
    ("completions", {"prompt": ""}, 400, "prompt", "expected at least one token"),
    ("completions", {"prompt": []}, 400, "prompt", "expected a text, token ids, or a list of either"),
    ("completions", {"prompt": None}, 400, "prompt", "got null"),
    ("completions", {"prompt": [[]]}, 400, "prompt[0]", "expected a text"),
    ("completions", {"prompt": [1, True]}, 400, "prompt", "expected token ids"),
    ("completions", {"prompt": [1, -1]}, 400, "prompt", "got -1"),
    ("completions", {"prompt": [272]}, 400, "prompt", "expected ids from 0 to 271"),
    ("completions", {"prompt": ["a"] * 9}, 400, "prompt", "expected at most 8"),
    ("completions", {"max_tokens": 65}, 400, "max_tokens", "expected at most 64, this server's --max-new-tokens"),
    ("completions", {"max_tokens": 10**400}, 400, "max_tokens", "expected at most 64"),
    ("completions", {"max_tokens": -1}, 400, "max_tokens", "at least 0"),
    ("completions", {"max_tokens": 1.5}, 400, "max_tokens", "got 1.5"),
    ("completions", {"max_token": 5}, 400, "max_token", "did you mean 'max_tokens'?"),
    ("completions", {"zzz": 5}, 400, "zzz", "leave it out"),
    ("completions", {"temperature": "hot"}, 400, "temperature", "got 'hot'"),
    ("completions", {"n": 5}, 400, "n", "at most 4, a slot for each"),
    ("completions", {"n": 0}, 400, "n", "from 1"),
    ("completions", {"best_of": 3}, 400, "best_of", "expected n"),
    ("completions", {"logprobs": 21}, 400, "logprobs", "from 0 to 20"),
    ("completions", {"logit_bias": {"272": 1}}, 400, "logit_bias", "below 259"),
    ("completions", {"stop": [""]}, 400, "stop", "1 to 1,024 characters"),
    ("completions", {"suffix": "x"}, 400, "suffix", "only writes on"),
    ("completions", {"store": True}, 400, "store", "keeps no requests"),
    ("completions", {"stream": "yes"}, 400, "stream", "got 'yes'"),
    ("completions", {"stream_options": {}}, 400, "stream_options", "only with stream true"),
    ("completions", {"ignore_eos": 1}, 400, "ignore_eos", "expected true or false"),
    ("completions", {"repetition_penalty": 1e300}, 400, "repetition_penalty", "expected 0.01 to 100"),
    ("completions", {"response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
    ("completions", {"response_format": False}, 400, "response_format", "got false"),
    ("completions", {"response_format": {"type": "json_schema"}}, 400, "response_format", "with a schema"),
    ("completions", {"response_format": {"type": "regex", "regex": "("}}, 400, "response_format", "cannot be compiled"),
    ("completions", {"response_format": {"type": "regex"}}, 400, "response_format", "expected a text"),
    ("completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}}, 400,
     "response_format", "cannot be compiled"),
    ("completions", {"response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos", "schema"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
    ("chat/completions", {"messages": "hi"}, 400, "messages", "got 'hi'"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "got 'tool'"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     400, "messages[0].content[0].type", "got 'image_url'"),
    ("chat/completions", {"messages": [*CHAT["messages"], {"role": "system", "content": "x"}]}, 400, "messages",
     "refuses these messages: a system message comes first"),
    ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools", "calls no tools"),
    ("chat/completions", {"functions": [{}]}, 400, "functions", "calls no tools"),
    ("chat/completions", {"audio": {"voice": "x"}}, 400, "audio", "text only"),
    ("chat/completions", {"modalities": ["audio"]}, 400, "modalities[0]", "got 'audio'"),
    ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "only with logprobs true"),
    ("chat/completions", {"max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "the same as"),
    ("responses", {"input": []}, 400, "input", "at least 1 item"),
    ("responses", {"input": 5}, 400, "input", "expected a text or a list; got 5"),
    ("responses", {"previous_response_id": "x"}, 400, "previous_response_id", "keeps nothing"),
    ("responses", {"store": True}, 400, "store", "keeps nothing"),
    ("responses", {"messages": []}, 200, None, ""),
    ("responses", {"messages": [1]}, 400, "messages", "/v1/chat/completions"),
    ("responses", {"tools": [{}]}, 400, "tools", "calls no tools"),
    ("responses", {"text": {"format": 0}}, 400, "text.format", "got 0"),
    ("responses", {"text": {"format": {"type": "what"}}}, 400, "text.format", "json_schema"),
]  # fmt: skip
RIGHT: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "a"}, "chat/completions": CHAT, "responses": {"input": "hi"},
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_requests_are_named(client: TestClient, path: str, body: dict, status: int, param: str | None, said: str):
    found = client.post(f"/v1/{path}", content=json.dumps({"model": "tiny", **RIGHT[path], **body}),
                        headers={"content-type": "application/json"})  # fmt: skip
    assert found.status_code == status, found.text
    if status != 200:
        error = found.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert said in error["message"]
        assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"{", 400, "invalid_json"), (b"", 400, "invalid_json"), (b'{"model": "tiny", "prompt": "\xff"}', 400, None),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "invalid_json"), (b"[" * 90_000, 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"), (b"[1]", 400, None), (b"1" * 100_001, 413, "request_too_large"),
        (b'{"model": "tiny", "prompt": [%s]}' % b",".join([b'"x"', b"1"] * 10_000), 400, None),
    ],
    ids=["half", "none", "latin", "surrogate", "deep", "nan", "list", "long", "mixed"],
)  # fmt: skip
def test_bodies_that_are_no_request(client: TestClient, raw: bytes, status: int, code: str | None):
    found = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert found.status_code == status, found.text
    assert code in (None, found.json()["error"]["code"])


def test_a_long_body_without_a_length_is_stopped(client: TestClient):
    found = client.post(
        "/v1/completions", content=iter([b" " * 60_000] * 2), headers={"content-type": "application/json"}
    )
    assert found.status_code == 413
    assert "100,000 bytes" in found.json()["error"]["message"]


def test_addresses_methods_and_forms_that_there_are_not(client: TestClient):
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"), ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"), ("POST", "/v1/completions", 415, "unsupported_media_type"),
    ):  # fmt: skip
        found = client.request(method, path)
        assert (found.status_code, found.json()["error"]["code"]) == (status, code)
        assert found.headers["x-request-id"].startswith("req-")


def test_without_a_template_chats_are_refused_and_slots_that_end_are_named():
    def make() -> Any:
        engine = tiny_engine(window=None, capacity=20)
        engine.tokenizer.chat_template = None
        return engine

    with running_host(make) as host, TestClient(create_app(host, Settings("tiny", 64))) as client:
        found = client.post("/v1/chat/completions", json={"model": "tiny", **CHAT})
        assert found.status_code == 400
        assert "no chat template; use /v1/completions" in found.json()["error"]["message"]
        found = client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 15})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
        found = client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 15, "max_tokens": 6})
        assert found.status_code == 200


def test_a_full_line_says_when_to_come_again():
    with running_host(lambda: tiny_engine(waiting=2)) as host, TestClient(
        create_app(host, Settings("tiny", 64, max_prompts=8))
    ) as client:  # fmt: skip
        found = client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 8, "max_tokens": 64})
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert found.headers["retry-after"] == "1"
        # none of them is left
        host.call(lambda engine: None).result(20)
        assert (host.gauges().running, host.gauges().waiting) == (0, 0)


def test_keys_are_wanted_where_there_are_some():
    with (
        running_host() as host,
        TestClient(create_app(host, Settings("tiny", api_keys=("another-key", KEY)))) as client,
    ):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer "}):
            found = client.get("/v1/models", headers=header)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
            assert found.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/openapi.json", headers={"authorization": f"bearer {KEY}"}).json()["security"] == [
            {"key": []}
        ]
    assert KEY not in repr(Settings("tiny", api_keys=(KEY,)))


def test_callers_have_a_rate():
    now = [0.0]
    rate = Rate(2, lambda: now[0])
    assert [rate.wait("a") for _ in range(3)] == [0, 0, pytest.approx(30)]
    assert rate.wait("b") == 0
    now[0] = 30
    assert (rate.wait("a"), rate.wait("a")) == (0, pytest.approx(30))
    with running_host() as host, TestClient(create_app(host, Settings("tiny", rate_limit=1))) as client:
        assert client.get("/v1/models").status_code == 200
        found = client.get("/v1/models")
        assert (found.status_code, found.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(found.headers["retry-after"]) <= 60
        assert client.get("/ready").status_code == 200


def test_browsers_are_let_in_only_where_it_is_said():
    headers = {"origin": "http://page", "access-control-request-method": "POST"}
    with running_host() as host:
        closed = TestClient(create_app(host, Settings("tiny", api_keys=(KEY,))))
        assert "access-control-allow-origin" not in closed.options("/v1/completions", headers=headers).headers
        opened = TestClient(create_app(host, Settings("tiny", api_keys=(KEY,), cors_origins=("http://page",))))
        found = opened.options("/v1/completions", headers=headers)
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, "http://page")


def test_a_defect_has_the_headers_of_every_answer(host: Host):
    async def broken(request: Any, served: Any) -> Any:
        raise RuntimeError("nobody expected this")

    endpoint = Endpoint("/v1/broken", "Breaks", broken, CompletionRequest, Completion, asks=False)
    client = TestClient(create_app(host, Settings("tiny", cors_origins=("http://page",)), endpoints=(endpoint,)))
    found = client.post("/v1/broken", json={}, headers={"origin": "http://page"})
    assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
    assert found.headers["x-request-id"].startswith("req-")
    assert found.headers["access-control-allow-origin"] == "http://page"
    assert 'swat_requests_total{endpoint="/v1/broken",status="500"} 1.0' in client.get("/metrics").text


def test_who_guesses_keys_has_to_wait(host: Host):
    client = TestClient(create_app(host, Settings("tiny", rate_limit=2, api_keys=(KEY,))))
    right, wrong = {"authorization": f"Bearer {KEY}"}, {"authorization": "Bearer wrong"}
    statuses = [client.get("/v1/models", headers=one).status_code for one in (right, wrong, wrong, wrong, right)]
    # whether the last one is right is not looked at
    assert statuses == [200, 401, 401, 429, 429]


def known_fields() -> list[str]:
    return sorted({name for one in ENDPOINTS for name in (*one.takes.model_fields, *one.takes.refused)} - {"stream"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["user", "text", "json_object", "regex", "tiny", "a", 10**30, -1, [[97]], {"97": 100}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "schema", "json_schema", "regex", "format"])
        | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    endpoint=st.sampled_from(ENDPOINTS),
    body=st.dictionaries(st.sampled_from(known_fields()) | st.text(max_size=4), VALUES, max_size=4),
    whole=st.booleans(),
)
def test_no_body_is_the_servers_fault(client: TestClient, endpoint: Any, body: dict[str, Any], whole: bool):
    if whole:
        given = {"model": "tiny", "prompt": "a", "max_tokens": 2} if endpoint.path == "/v1/completions" else {
            "model": "tiny", **CHAT, "max_tokens": 2} if "chat" in endpoint.path else {
            "model": "tiny", "input": "a", "max_output_tokens": 2}  # fmt: skip
        body = {**{name: value for name, value in given.items() if name in endpoint.takes.model_fields}, **body}
    found = client.post(endpoint.path, json=body)
    assert found.status_code < 500, found.text
    assert found.status_code == 200 or set(found.json()["error"]) == {"message", "type", "param", "code"}

"""What stands around the answers: readiness, numbers, log lines, spans, the OpenAPI document, tokens."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from starlette.testclient import TestClient

from swat_lm.serve.host import Host
from swat_lm.serve.http.app import create_app
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.http.watching import JsonLines
from tests.serve.hosting import ENDPOINTS, running_host, tiny_engine

CHAT: Any = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with running_host() as made:
        yield made


def test_a_span_for_each_request(host: Host, monkeypatch: pytest.MonkeyPatch):
    spans: list[tuple[str, dict[str, Any]]] = []

    class Tracer:
        @contextmanager
        def start_as_current_span(self, name: str, *_: Any) -> Iterator[Any]:
            yield SimpleNamespace(set_attributes=lambda values: spans.append((name, values)))

    monkeypatch.setattr(trace, "get_tracer", lambda name: Tracer())
    client = TestClient(create_app(host, Settings("tiny", log_prompts=True)))
    client.post("/v1/completions", json={"model": "tiny", "prompt": "secret", "max_tokens": 2, "ignore_eos": True})
    client.get("/v1/models/other")
    (first, said), (second, other) = spans
    assert (first, second) == ("POST /v1/completions", "GET /v1/models/{model_id}")
    assert (said["http.response.status_code"], said["swat.completion_tokens"]) == (200, 2)
    assert "secret" not in str(said)
    assert other["http.response.status_code"] == 404


def test_until_it_is_loaded_it_says_so():
    go = threading.Event()

    def slow() -> Any:
        go.wait(20)
        return tiny_engine()

    host = Host(slow)
    host.start()
    client = TestClient(create_app(host, Settings("tiny")))
    try:
        for found in (client.get("/ready"), client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})):
            assert (found.status_code, found.json()["error"]["code"]) == (503, "server_loading")
            assert found.headers["retry-after"] == "5"
        assert client.get("/health").json() == {"status": "loading"}
        assert client.get("/v1/models").status_code == 200
        assert 'swat_status{status="loading"} 1.0' in client.get("/metrics").text
    finally:
        go.set()
    host.wait_ready(20)
    assert client.get("/ready").json() == {"status": "ready"}
    assert host.stop(20)


def test_numbers_for_prometheus(host: Host):
    before, more = host.counters.tokens_generated, {"ignore_eos": True}
    app = create_app(host, Settings("tiny"))
    alone = TestClient(app)
    alone.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 5, "n": 2, **more})
    alone.post("/v1/completions", json={"model": "tiny"})
    alone.get("/v1/other/path")
    alone.get("/v1/sessions/a/export")
    assert host.counters.tokens_generated == before + 10
    text = alone.get("/metrics").text
    for line in (
        'swat_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'swat_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'swat_requests_total{endpoint="other",status="404"} 1.0',
        'swat_requests_total{endpoint="/v1/sessions/{session_id}/export",status="400"} 1.0',
        "swat_time_to_first_token_seconds_count 2.0", "swat_time_between_tokens_seconds_count 8.0",
        'swat_slots{use="free"} 4.0', "swat_queue_length 0.0", 'swat_status{status="ready"} 1.0',
    ):  # fmt: skip
        assert line in text


def test_log_lines_are_json_without_what_was_asked(host: Host, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "swat_lm.serve.access")
    for log_prompts in (False, True):
        caplog.clear()
        client = TestClient(create_app(host, Settings("tiny", log_prompts=log_prompts)))
        client.post("/v1/completions", json={"model": "tiny", "prompt": "secret", "max_tokens": 3, "ignore_eos": True})
        client.get("/ready")
        (record,) = caplog.records
        line = json.loads(JsonLines().format(record))
        assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, 6, 3)
        assert line["path"] == "/v1/completions"
        assert line.get("prompt") == ("secret" if log_prompts else None)


def test_the_document_says_what_there_is(host: Host):
    document = TestClient(create_app(host, Settings("tiny"))).get("/openapi.json").json()
    for endpoint in ENDPOINTS:
        (said,) = document["paths"][endpoint.path].values()
        body = said["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert body == f"#/components/schemas/{endpoint.takes.__name__}"
        properties = document["components"]["schemas"][endpoint.takes.__name__]["properties"]
        assert set(properties) == set(endpoint.takes.model_fields)
        assert {"400", "401", "404", "413", "415", "429", "500", "503"} <= set(said["responses"])
        assert ("text/event-stream" in said["responses"]["200"]["content"]) == endpoint.streams
    # every reference leads somewhere
    text = json.dumps(document)
    for name in {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    assert "422" not in text


def test_tokens_and_back(host: Host):
    client = TestClient(create_app(host, Settings("tiny")))
    found = client.post("/tokenize", json={"prompt": "aé"}).json()
    assert found == {"tokens": [97, 195, 169], "count": 3}
    assert client.post("/detokenize", json={"tokens": [97, 195, 169, 257]}).json() == {"prompt": "aé<|eos|>"}
    chat = client.post("/tokenize", json={"messages": CHAT}).json()
    assert bytes(chat["tokens"]).decode() == "[system]short\n[user]hi\n[assistant]"
    for path, wrong in (
        ("tokenize", {}), ("tokenize", {"prompt": "a", "messages": CHAT}), ("detokenize", {"tokens": 1}),
        ("detokenize", {"tokens": [272]}), ("detokenize", {"tokens": [1], "model": "x"}),
    ):  # fmt: skip
        assert client.post(f"/{path}", json=wrong).status_code in (400, 404)

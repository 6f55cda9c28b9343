"""The serving benchmark's own logic: lengths, arrivals, its reader against a tiny server, figures, forms of a model."""

import argparse
import asyncio
import itertools
import json
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks import models, serve, serve_models
from benchmarks.serve_load import (
    PROMPTS,
    Answer,
    NotWholeError,
    Question,
    Server,
    arriving,
    ask,
    closed,
    figures,
    quantile,
    questions,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def event(text: str = "", usage: int | None = None) -> bytes:
    found = {"choices": [{"text": text}]} if usage is None else {"choices": [], "usage": {"prompt_tokens": 3,
             "completion_tokens": usage}}  # fmt: skip
    return f"data: {json.dumps(found)}\n\n".encode()


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def answered(parts: Sequence[bytes]) -> Answer:
    """What the client makes of an answer that comes in such parts."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(length))
        assert (asked["prompt"], asked["max_tokens"], asked["mine"]) == ("a", 2, 1)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        return await ask(Server(listening.sockets[0].getsockname()[1], "tiny", {"mine": 1}), Question("a", 2))


def test_a_stream_is_read_however_it_is_cut():
    whole = event("one") + event("") + event("two") + event(usage=2) + b"data: [DONE]\n\n"
    ways = (
        [CHUNKED, chunks(whole)],
        [CHUNKED + chunks(whole[:9], whole[9:60], whole[60:])],
        [OK + b"\r\n", whole[:50], whole[50:]],
    )
    for way in ways:
        answer = asyncio.run(answered(way))
        assert (answer.text, answer.tokens, answer.prompt_tokens, len(answer.texts)) == ("onetwo", 2, 3, 2)
        assert answer.sent < answer.texts[0] <= answer.texts[1]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([b"HTTP/1.1 503 no\r\n\r\nloading"], "loading"),
        ([CHUNKED + chunks(event("one"), event(usage=1))], "expected 2 tokens"),
        ([CHUNKED + chunks(event("one"))], "expected 2 tokens, got None"),
        ([CHUNKED + b"ff\r\ndata: "], "closed in the middle"),
        ([CHUNKED + chunks(b'data: {"error": "broken"}\n\n')], "broken"),
    ],
)
def test_what_is_not_whole_is_no_answer(parts, said):
    with pytest.raises(NotWholeError, match=said):
        asyncio.run(answered(parts))


def test_loads_keep_to_their_number_and_their_times(monkeypatch):
    running, most, begun = 0, 0, []

    async def answer(server, question):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        begun.append(question)
        await asyncio.sleep(0.01)
        running -= 1
        return question

    monkeypatch.setattr("benchmarks.serve_load.ask", answer)
    asked = questions(12, seed=1)
    answers, seconds = asyncio.run(closed(Server(0, ""), asked, 4, 60))
    assert (most, begun, len(answers)) == (4, asked, 12)
    assert seconds >= 0.03
    assert asyncio.run(closed(Server(0, ""), asked, 4, 0))[0] == []
    later = [Question("a", 1, at) for at in (0.0, 0.05, 9.0)]
    answers, seconds = asyncio.run(arriving(Server(0, ""), later, 1))
    assert answers == later[:2]
    assert 0.06 <= seconds < 1


def test_questions_are_the_same_for_every_server():
    asked = questions(2000, seed=1, rate=4.0)
    assert asked == questions(2000, seed=1, rate=4.0) != questions(2000, seed=2, rate=4.0)
    between = [b.at - a.at for a, b in itertools.pairwise(asked)]
    assert statistics.mean(between) == pytest.approx(0.25, rel=0.1)
    # a Poisson process: the spread of the gaps is their mean
    assert statistics.stdev(between) == pytest.approx(0.25, rel=0.15)
    lengths = [len(question.prompt.split()) for question in asked]
    assert (min(lengths), max(lengths)) == (PROMPTS.least, PROMPTS.most)
    assert statistics.median(lengths) == pytest.approx(161 * 2.71828**-0.5, rel=0.1)
    # all fit the windows, so that all servers compute the same
    assert all(len(one.prompt.split()) + one.num_tokens < serve_models.WINDOW for one in asked)
    generator = random.Random(0)
    assert statistics.mean(PROMPTS.draw(generator) for _ in range(20000)) == pytest.approx(161, rel=0.15)


def test_figures_of_a_load():
    answers = [Answer(0.0, (1.0, 1.5, 3.5), 9, 3), Answer(2.0, (2.5,), 9, 1)]
    assert figures(answers, 4.0, 2.0) == {
        "requests": 2, "tokens/s": 1.0, "tokens/CPU s": 2.0, "first ms p50": 500.0, "first ms p99": 1000.0,
        "between ms p50": 500.0, "between ms p99": 2000.0,
    }  # fmt: skip
    assert [quantile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]


def test_rows_and_goals():
    rounds = [
        {name: {"tokens/s": speed * drift, "tokens/CPU s": speed * 2} for name, speed in speeds.items()}
        for drift, speeds in ((1, {"swat-lm": 8.0, "llama.cpp": 4.0, "transformers serve": 4.0}),
                              (3, {"swat-lm": 8.0, "llama.cpp": 10.0, "transformers serve": 2.0}))
    ]  # fmt: skip
    rows = serve.load_rows("m", "16 at once", rounds)
    assert [row["swat-lm times its tokens/s"] for row in rows] == pytest.approx([1, (2 + 0.8) / 2, 3])
    deep = [
        {"model": "m", "tokens before": depth}
        | {f"{name}: {what}": value for what in (serve.BETWEEN, serve.COMPUTED)
           for name, value in (("swat-lm", 2.0), ("llama.cpp", other), ("llama.cpp / swat-lm", ratio))}
        for depth, other, ratio in ((10, 1.0, 0.5), (20, 3.0, 1.5), (30, "too slow", None))
    ]  # fmt: skip
    goals = serve.judge([*rows, *deep])
    assert [(goal["measured"], goal["reached"]) for goal in goals] == [
        (1.4, True), (3.0, True), (1.0, True), (1.5, True)
    ]  # fmt: skip


def test_who_is_too_slow_is_left_out_of_a_stream(monkeypatch, capsys):
    class Still:
        computed = 0.0

        def rest(self) -> None: ...

        def wake(self) -> None: ...

        def cpu_seconds(self) -> float:
            self.computed += 1.0
            return self.computed

    asked = []

    def further(process, text, seconds):
        asked.append(text)
        return Answer(0.0, (1.0, 1.5), 9, 2) if len(text.split()) < 20 else None

    monkeypatch.setattr(serve, "further", further)
    options = argparse.Namespace(depths=[4, 40, 80], rounds=2, seconds=60)
    running: Any = {"swat-lm": Still(), "llama.cpp": Still()}
    rows = serve.stream_rows("m", running, options, float("inf"))
    assert [row["swat-lm: ms between tokens"] for row in rows] == [500, "too slow"]
    assert [row["llama.cpp: ms between tokens"] for row in rows] == [500, "too slow"]
    # ours is told what is new, llama.cpp all, of which it has read the most
    assert [len(text.split()) for text in asked] == [4, 4, 5, 1, 1, 6, 34, 40]


def test_forms_of_a_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    vocabulary = ["<end>", "a", "b", "\u00c3", "ab", "\u0120a", "aba"]
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<end>", "special": True}],
        "model": {"vocab": {token: number for number, token in enumerate(vocabulary)},
                  "merges": [["a", "b"], ["\u0120", "a"], ["ab", "a"]]},
    }  # fmt: skip
    shorter = serve_models.shortened(tokenizer, 6)
    assert list(shorter["model"]["vocab"]) == vocabulary[:6]
    assert shorter["model"]["merges"] == [["a", "b"], ["\u0120", "a"]]
    model = models.llama(128, 7, layers=1)
    serve_models.write_gguf(model, tokenizer, tmp_path / "f32.gguf")
    read = gguf.GGUFReader(tmp_path / "f32.gguf")
    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    assert written.keys() == serve_models.tensors(model).keys()
    query = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    # of each head channel 1 and its partner, half a head away, are neighbours
    assert torch.equal(written["blk.0.attn_q.weight"][64 + 2 : 64 + 4], query[[64 + 1, 64 + 33]])
    assert torch.equal(written["output.weight"], model.lm_head.weight)

"""Recall and reach: what is scored, at which distance, with which interval, and that a task can be learnt."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from swat_lm.data.synthetic import Answer, synthetic_task
from swat_lm.data.tokenizer import load_tokenizer
from swat_lm.evaluate.probes import TEXT_TASKS, guessed_share, read_items, synthetic_items, text_items
from swat_lm.evaluate.reach import effective_reach, gradient_norms
from swat_lm.evaluate.recall import RecallCurve, RecallItem, measure_recall, wilson
from swat_lm.evaluate.recall_plots import plot_reach, plot_recall, readable_ticks

from .models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_swat


def encode(text: str) -> list[int]:
    return load_tokenizer("bytes").encode(text, add_special_tokens=False)


@pytest.mark.parametrize("build", [tiny_swat, tiny_llama])
def test_answers_are_scored_as_the_model_would_write_them(build):
    model, random = build(), np.random.default_rng(0)
    items = []
    for length in (9, 20, 14):
        tokens = random.integers(0, VOCABULARY, length)
        with torch.no_grad():
            written = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, -1].argmax().item()
        right = np.append(tokens, written)
        wrong = np.append(tokens, (written + 1) % VOCABULARY)
        items += [
            RecallItem(right, (Answer(length, length + 1, 4),), 0),
            RecallItem(wrong, (Answer(length, length + 1, 6),), 1),
            # one of two answers is right
            RecallItem(np.append(right, 0), (Answer(length, length + 1, 8), Answer(length + 1, length + 2, 8)), 2),
        ]
    curve = measure_recall(model, items, "task", chunk=4, batch_size=2)
    assert [point.distance for point in curve.points] == [4, 6, 8]
    assert [point.num_items for point in curve.points] == [3, 3, 3]
    assert curve.points[0].accuracy == 1
    assert curve.points[1].accuracy == 0
    assert curve.points[2].accuracy >= 0.5
    assert curve.points[2].num_answers == 6
    assert (curve.window, curve.reach) == ((7, 13) if build is tiny_swat else (None, None))
    item = items[4]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(item.tokens)[None]).logits[0, -2]
    alone = measure_recall(model, [item], "task")
    assert alone.points[0].loss == pytest.approx(-logits.log_softmax(-1)[item.tokens[-1]].item(), abs=1e-4)
    assert alone.points[0].loss_error is None


def test_wilson():
    # Wilson's interval of 8 of 10, from tables
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 8) == pytest.approx((0.0, 0.3244), abs=1e-4)
    assert wilson(1.0, 8)[1] == 1
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0.5, 0)


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_texts_have_exact_distances(name: str):
    for item in text_items(name, encode, [150, 400], 3):
        first = item.answers[0]
        assert first.distance == item.group
        for answer in item.answers:
            stored = answer.start - 1 - answer.distance
            assert np.array_equal(
                item.tokens[answer.start : answer.end], item.tokens[stored : stored + answer.end - answer.start]
            )
            # what asks for it stands before it, too
            assert np.array_equal(item.tokens[answer.start - 3 : answer.start], item.tokens[stored - 3 : stored])
    with pytest.raises(ValueError, match=f"{name}: with this tokenizer the distance is"):
        text_items(name, encode, [3], 1)


def test_texts_are_drawn_from_the_seed():
    first, again, other = (text_items("kv", encode, [100], 2, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one.tokens, two.tokens) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[0].tokens, first[1].tokens)
    assert not np.array_equal(first[0].tokens, other[0].tokens)
    with pytest.raises(ValueError, match="expected one of passkey, kv"):
        text_items("recall", encode, [100], 1)


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_files_of_retrieval(tmp_path: Path):
    pairs = [[f"key-{number}", f"value-{number}"] for number in range(9)]
    records = [{"ordered_kv_records": pairs, "key": f"key-{n}", "value": f"value-{n}"} for n in (0, 4, 8)]
    lines = "".join(f"line {word}: REGISTER_CONTENT is <{n}>\n" for n, word in enumerate("abcdef", 100))
    register = {
        "prompt": f"Remember.\n{lines}\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line b? ",
        "expected_number": 101, "correct_line": "line b: REGISTER_CONTENT is <101>\n",
    }  # fmt: skip
    items = read_items(write_records(tmp_path / "a.jsonl", [*records, register]), encode)
    assert len(items) == 4
    for item in items:
        (answer,) = item.answers
        stored = answer.start - 1 - answer.distance
        length = answer.end - answer.start
        assert np.array_equal(item.tokens[answer.start : answer.end], item.tokens[stored : stored + length])
        assert item.group == int(math.log2(answer.distance))
    assert items[0].answers[0].distance > items[1].answers[0].distance > items[2].answers[0].distance
    assert bytes(items[3].tokens[-4:].tolist()) == b"<101"
    assert len(read_items(tmp_path / "a.jsonl", encode, most=2)) == 2


@pytest.mark.parametrize(
    "record",
    [
        {"text": "no retrieval"},
        {"ordered_kv_records": [["a", "b"]], "key": "c", "value": "b"},
        {"ordered_kv_records": [["a", "b"]], "key": "a", "value": "c"},
        {"ordered_kv_records": 3, "key": "a", "value": "c"},
        {"prompt": "x", "expected_number": 3, "correct_line": "line b: <3>"},
    ],
)
def test_files_of_another_layout(tmp_path: Path, record: dict):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected key-value retrieval"):
        read_items(write_records(tmp_path / "a.jsonl", [record]), encode)


def test_what_cannot_be_scored(tmp_path: Path):
    model = tiny_swat()
    for items, message in (
        ([], "expected at least one item"),
        ([RecallItem(np.arange(5), (), 0)], "expected answers within its 5 tokens"),
        ([RecallItem(np.arange(5), (Answer(0, 2, 1),), 0)], "after the first"),
        ([RecallItem(np.arange(5) + 60, (Answer(3, 4, 1),), 0)], "token 64 is not among the 61 of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_recall(model, items, "task")
    with pytest.raises(ValueError, match="no file at"):
        read_items(tmp_path / "none.jsonl", encode)


def test_gradients_end_at_the_reach():
    model = tiny_swat(5)
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    norms = gradient_norms(model, torch.from_numpy(stream)[None])[0]
    # two layers of window 5 reach 9 tokens
    assert len(norms) == 39
    assert (norms[:9] > 0).all()
    assert (norms[9:] == 0).all()
    curve = effective_reach(model, [stream, stream[::-1].copy()])
    assert (curve.window, curve.reach, curve.length, curve.num_streams) == (5, 9, 39, 2)
    assert curve.first[:4] == (0, 1, 2, 4)
    assert curve.last == (0, 1, 3, 7, 15, 31, 38)
    assert curve.share[-2:] == (0, 0)
    counts = [last - first + 1 for first, last in zip(curve.first, curve.last, strict=True)]
    assert sum(share * count for share, count in zip(curve.share, counts, strict=True)) == pytest.approx(1)
    assert 0 <= curve.within["0.5"] <= curve.within["0.9"] <= curve.within["0.99"] <= 8
    assert all(one.grad is None for one in model.parameters())


def test_gradients_are_the_definition():
    model, tokens = tiny_llama(), torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 12))[None]
    norms = gradient_norms(model, tokens)[0]
    embedded = model.get_input_embeddings()(tokens[:, :-1]).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[tokens[0, -1]].backward()
    assert embedded.grad is not None
    torch.testing.assert_close(norms, embedded.grad[0].norm(dim=-1).flip(0), atol=1e-6, rtol=1e-4)
    model.zero_grad()


def test_long_gradients_with_recomputed_layers(monkeypatch):
    model, tokens = tiny_swat(5), torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 30))[None]
    expected = gradient_norms(model, tokens)
    monkeypatch.setattr("swat_lm.evaluate.reach.CHECKPOINT_ABOVE", 10)
    torch.testing.assert_close(gradient_norms(model, tokens), expected)
    assert not model.training
    assert not model.is_activation_checkpointing
    with pytest.raises(ValueError, match="of equal length and at least 3 tokens"):
        effective_reach(model, [np.arange(4), np.arange(5)])
    with pytest.raises(ValueError, match="no position beyond token 128"):
        effective_reach(tiny_gpt2(), [np.zeros(130, dtype=np.int64)])


def test_pictures_and_json(tmp_path: Path):
    model = tiny_swat()
    items = synthetic_items(synthetic_task("synthetic:kv?keys=8&values=8"), [3, 7, 33], 2)
    curve = measure_recall(model, items, "kv")
    assert [point.distance for point in curve.points] == [3, 7, 33]
    curve.save(tmp_path / "recall.json")
    assert RecallCurve.from_json((tmp_path / "recall.json").read_text()) == curve
    plot_recall([curve], tmp_path / "recall.png", title="title")
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    reach = effective_reach(model, [stream])
    reach.save(tmp_path / "reach.json")
    assert json.loads((tmp_path / "reach.json").read_text())["reach"] == 13
    plot_reach(reach, tmp_path / "reach.png")
    for name in ("recall.png", "reach.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_recall([], tmp_path / "a.png")


def test_ticks_are_round_and_several():
    assert readable_ticks(0.01, 30) == pytest.approx([0.01, 0.1, 1, 10])
    assert readable_ticks(0.8, 30) == pytest.approx([1, 2, 5, 10, 20])
    assert readable_ticks(1.7e-2, 2.6e-2) == pytest.approx([0.018, 0.02, 0.022, 0.024])


def test_guessing_is_stated(tmp_path: Path):
    task = synthetic_task("synthetic:mqar?pairs=2&values=16")
    items = synthetic_items(task, [9], 3)
    assert guessed_share(task, items) == pytest.approx(1 / 16)
    code = synthetic_task("synthetic:passkey?digits=2&values=10")
    assert guessed_share(code, synthetic_items(code, [9], 3)) == pytest.approx(1 / 100)
    curve = measure_recall(tiny_swat(vocab_size=task.num_ids), items[:1], "mqar", chance=1 / 16)
    assert curve.chance == 1 / 16
    curve.save(tmp_path / "curve.json")
    assert RecallCurve.from_json((tmp_path / "curve.json").read_text()) == curve

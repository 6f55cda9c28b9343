"""Instruction data: what of a row becomes text, which of its tokens are marked, and what is refused."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from swat_lm.data import Batch, BatchSource, DataError, TokenStore, prepare
from swat_lm.data.instructions import read_marked_pieces
from swat_lm.data.sources import resolve_sources
from swat_lm.recipe import DataRecipe

PAIRS = [{"prompt": f"{n} plus {n}?", "answer": str(2 * n)} for n in range(30)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"{n}"},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": f"{n}\nagain"},
        ]
    }
    for n in range(12)
]


def written(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def recipe(path: Path, form: str, **settings) -> DataRecipe:
    cache = str(path.parent / "cache")
    return DataRecipe(sources=(str(path),), format=form, cache=cache, held_out=0.1, **settings)  # type: ignore[arg-type]


def pieces(data: DataRecipe) -> list[tuple[str, bool, bool]]:
    return [tuple(one) for source in resolve_sources(data.sources) for one in read_marked_pieces(source, data, None)]


def marked_text(store: TokenStore) -> list[str]:
    """What each run of marked tokens says; `$` is the end of a text."""
    assert store.marks is not None
    runs = [store.tokens[first:end].tolist() for first, end in store.marks]
    return ["".join("$" if token == 257 else chr(token) for token in run) for run in runs]


def test_a_pair_is_prompt_line_break_and_marked_answer(tmp_path: Path):
    data = recipe(written(tmp_path, PAIRS, "rows.jsonl.gz"), "prompt_answer")
    assert pieces(data)[:2] == [("0 plus 0?\n", True, False), ("0", False, True)]
    assert marked_text(prepare(data)) == [f"{row['answer']}$" for row in PAIRS]


def test_fields_have_other_names_if_the_recipe_says_so(tmp_path: Path):
    rows = [{"instruction": "Go", "output": "went", "id": 1}]
    data = recipe(written(tmp_path, rows), "prompt_answer", prompt_field="instruction", answer_field="output")
    assert pieces(data) == [("Go\n", True, False), ("went", False, True)]


def test_of_messages_what_the_assistant_says_is_marked(tmp_path: Path):
    data = recipe(written(tmp_path, CHATS), "messages")
    assert "".join(text for text, _, _ in pieces(data)[:8]) == (
        "user: Say 0.\nassistant: 0\nuser: Again.\nassistant: 0\nagain\n"
    )
    expected = [text for n in range(12) for text in (f" {n}\n", f" {n}\nagain\n$")]
    assert marked_text(prepare(data)) == expected


def test_a_document_that_ends_in_a_question_does_not_mark_its_end(tmp_path: Path):
    rows = [{"messages": [*row["messages"], {"role": "user", "content": "Why?"}]} for row in CHATS]
    assert "$" not in "".join(marked_text(prepare(recipe(written(tmp_path, rows), "messages"))))


def test_tables_hold_the_same(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for form, rows in (("prompt_answer", PAIRS), ("messages", CHATS)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{form}.parquet")
        lines = pieces(recipe(written(tmp_path, rows), form))
        assert pieces(recipe(tmp_path / f"{form}.parquet", form)) == lines


@pytest.mark.parametrize("documents", ["separate", "concatenate"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_carry_the_marks_of_their_tokens(tmp_path: Path, documents, shuffle: bool):
    store = prepare(recipe(written(tmp_path, CHATS), "messages"))
    assert store.marks is not None
    truth = torch.zeros(store.num_tokens, dtype=torch.bool)
    for first, end in store.marks:
        truth[first:end] = True
    # every token of the split's stream and its mark, told apart by the tokens around them
    spans = store.split("train").spans
    stream = torch.cat([torch.arange(first, end) for first, end in spans])
    tokens = torch.from_numpy(store.tokens[stream.numpy()].astype("int64"))
    source = BatchSource(store, "train", 29, documents, 3, batch_size=1, shuffle=shuffle)
    for number in range(source.num_rows):
        begin = min(number * 28, len(stream) - 29)
        row = source.rows(np.array([number]))
        assert row.input_ids[0].equal(tokens[begin : begin + 29])
        assert row.loss_mask is not None
        assert row.loss_mask[0].equal(truth[stream[begin : begin + 29]])
    whole = source.batch(5)
    assert whole.loss_mask is not None
    assert whole.loss_mask.equal(source.batch(5).loss_mask)


def test_prefixes_end_where_answers_begin():
    ids = torch.arange(12).reshape(2, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]], dtype=torch.int32)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    batch = Batch(ids, ids, ids, documents, mask)
    found = batch.prefix_lengths()
    assert found is not None
    assert found.tolist() == [[2, 2, 2, 0, 0, 0], [1, 3, 3, 3, 3, 1]]
    together = replace(batch, document_ids=None).prefix_lengths()
    assert together is not None
    assert together[:, 0].tolist() == [2, 4]
    assert replace(batch, loss_mask=None).prefix_lengths() is None
    # micro-batches say the same of their rows
    parts = [one.prefix_lengths() for one in batch.split(1)]
    assert [part.tolist() for part in parts if part is not None] == [[row] for row in found.tolist()]


def test_other_marks_are_other_data_and_plain_text_has_none(tmp_path: Path):
    path = written(tmp_path, [{"text": "a b", "prompt": "a", "answer": "b"}] * 3)
    path.write_text(path.read_text() + json.dumps({"text": "c", "prompt": "c", "answer": "d"}) + "\n")
    plain = prepare(recipe(path, "text"))
    assert plain.marks is None
    assert BatchSource(plain, "train", 4, "separate", 0, batch_size=1).batch(0).loss_mask is None
    one = prepare(recipe(path, "prompt_answer"))
    swapped = prepare(recipe(path, "prompt_answer", prompt_field="answer", answer_field="prompt"))
    assert len({plain.key, one.key, swapped.key}) == 3
    assert prepare(recipe(path, "prompt_answer")).key == one.key


@pytest.mark.parametrize(
    ("form", "row", "said"),
    [
        ("prompt_answer", {"prompt": "a"}, "rows.jsonl:1: no field 'answer'; it has prompt (set data.answer_field)"),
        ("prompt_answer", {"prompt": "a", "answer": ""}, "field 'answer' is empty, so nothing to learn"),
        ("prompt_answer", {"prompt": 3, "answer": "x"}, "field 'prompt' must be text; got int"),
        ("prompt_answer", ["a"], "expected a JSON object with 'prompt' and 'answer'; got list"),
        ("messages", {"text": "a"}, "no field 'messages'; it has text (set data.messages_field)"),
        ("messages", {"messages": []}, "must be a list of messages, each with role and content"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] must have role and content; got role"),
        ("messages", {"messages": ["hi"]}, "messages[0] must have role and content; got str"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "field 'content' must be text; got null"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no message has the role assistant"),
        ("text", {"prompt": "a", "answer": "b"}, "for instruction data set data.format=prompt_answer"),
        ("text", {"messages": []}, "for instruction data set data.format=messages"),
    ],
)
def test_other_rows_are_refused_by_place(tmp_path: Path, form: str, row, said: str):
    with pytest.raises(DataError) as caught:
        prepare(recipe(written(tmp_path, [row]), form))
    assert said in str(caught.value)
    assert "rows.jsonl:1" in str(caught.value)


def test_plain_files_and_fields_named_twice_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a \.txt file has no rows, which data\.format=messages reads"):
        prepare(recipe(tmp_path / "a.txt", "messages"))
    with pytest.raises(DataError, match="both 'prompt'"):
        prepare(recipe(tmp_path / "a.txt", "prompt_answer", answer_field="prompt"))


def test_damaged_marks_are_found(tmp_path: Path):
    data = recipe(written(tmp_path, PAIRS), "prompt_answer")
    folder = prepare(data).folder
    (folder / "marks.npy").unlink()
    with pytest.raises(DataError, match=r"marks\.npy: damaged: it is missing"):
        _ = prepare(data).marks


def test_bad_text_in_messages_of_a_table_is_named_with_its_row(tmp_path: Path):
    raw = pyarrow.array([b"good", b"ab\xff"], pyarrow.binary())
    content = pyarrow.StringArray.from_buffers(2, *raw.buffers()[1:])
    rows = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant"]), content], ["role", "content"])
    messages = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int32()), rows)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 0: field 'messages' is not UTF-8 text \(byte 2"):
        pieces(recipe(path, "messages"))

"""What a model was trained on is recognised by content, however it is stored, cut and tokenised."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from swat_lm.data import DataError, TokenStore, prepare, train_tokenizer
from swat_lm.data.passages import MOST_DOCUMENTS, PassageSample, passages_of
from swat_lm.data.trained import TrainedText, read_trained_text
from swat_lm.recipe import DataRecipe

WORDS = [
    f"{first}{last}" for first in ("gra", "mor", "tel", "vin", "sko", "dup") for last in ("den", "fil", "ra", "os")
]


def text_of(seed: int, words: int = 80) -> str:
    source = random.Random(seed)
    chosen = source.choices(WORDS, k=words)
    return "".join(word + ("\n" if number % 9 == 8 else " ") for number, word in enumerate(chosen)) + "\n"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(text_of(number))
    return folder


def opened(source: Path, held_out: float = 0.0, **settings: str | bool) -> TokenStore:
    data = DataRecipe(sources=(str(source),), held_out=held_out, cache=str(source.parent / "cache"), **settings)
    return prepare(data)


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_are_known_wherever_they_lie(notes: Path, tmp_path: Path):
    store = opened(notes, held_out=0.2)
    held = store.held_out_documents()
    trained = TrainedText.of_store(store)
    texts = [path.read_text() for path in sorted(notes.iterdir())]
    bpe = train_tokenizer([str(notes)], 300, tmp_path / "bpe") and str(tmp_path / "bpe")
    for same in (
        opened(notes, tokenizer=bpe),
        opened(rows(tmp_path / "rows.jsonl", texts)),
        opened(rows(tmp_path / "stripped.jsonl", [text.strip() for text in texts])),
    ):
        found = trained.recognise(same)
        assert (found.trained == ~held).all()
        assert not found.first.any()

    # new documents around and between them
    mixed = [text for number, known in enumerate(texts) for text in (known, text_of(100 + number))]
    found = trained.recognise(opened(rows(tmp_path / "mixed.jsonl", mixed)))
    assert (found.trained[::2] == ~held).all()
    assert not found.trained[1::2].any()
    assert (found.held_out[::2] == held).all()
    assert not found.held_out[1::2].any()


def test_parts_and_joined_documents_are_known_by_their_passages(notes: Path, tmp_path: Path):
    store = opened(notes, held_out=0.2)
    held = store.held_out_documents()
    trained = TrainedText.of_store(store)
    texts = [path.read_text() for path in sorted(notes.iterdir())]
    learnt = [text for text, out in zip(texts, held, strict=True) if not out]

    for name, cut in (
        ("joined", ["".join(texts)]),
        ("part", [learnt[0][60:400]]),
        ("windows", [learnt[0].replace("\n", "\r\n")]),
        ("edited", ["A heading\n" + learnt[1] + "and a last line\n"]),
    ):
        assert trained.recognise(opened(rows(tmp_path / f"{name}.jsonl", cut))).trained.all(), name

    lines = [(line, out) for text, out in zip(texts, held, strict=True) for line in text.splitlines()]
    # a line too short for a passage is known by those around it
    lines.insert(1, ("short", held[0]))
    found = trained.recognise(opened(rows(tmp_path / "lines.jsonl", [line for line, _ in lines])))
    sure = ~found.silent
    assert (found.trained[sure] == ~np.array([out for _, out in lines])[sure]).all()
    assert sure.mean() > 0.95

    some = learnt[2][:180] + text_of(50)
    found = trained.recognise(opened(rows(tmp_path / "some.jsonl", [some])))
    assert not found.trained.any()
    assert 0.1 < found.shared[0] < 1 / 3


def test_a_single_document_is_known_up_to_its_cut(tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text(text_of(1, 600))
    store = opened(book, held_out=0.3)
    trained = TrainedText.of_store(store)
    place = store.split("train").num_tokens
    again = trained.recognise(opened(rows(tmp_path / "row.jsonl", [book.read_text()])))
    assert (again.first.tolist(), again.trained.tolist()) == ([place], [False])

    train_tokenizer([str(book)], 300, tmp_path / "bpe")
    other = opened(book, tokenizer=str(tmp_path / "bpe"), add_eos=False)
    first = trained.recognise(other).first[0]
    assert other.token_bytes is not None
    before = other.token_bytes[other.document(0)[:first]].sum()
    assert place <= before < place + other.token_bytes.max()

    lines = book.read_text().splitlines(keepends=True)
    found = trained.recognise(opened(rows(tmp_path / "lines.jsonl", lines)))
    learnt = np.cumsum([len(line) for line in lines]) <= place
    assert (found.trained == learnt).mean() > 0.97


def test_new_documents_of_one_form_are_new(tmp_path: Path):
    def log(number: int) -> str:
        source = random.Random(number)
        return "".join(
            f"{source.getrandbits(40):x} the request of the user was answered in {source.randint(1, 999)} ms\n"
            for _ in range(20)
        )

    store = opened(rows(tmp_path / "logs.jsonl", [log(number) for number in range(40)]), held_out=0.1)
    trained = TrainedText.of_store(store)
    found = trained.recognise(opened(rows(tmp_path / "more.jsonl", [log(number) for number in range(30, 50)])))
    assert found.trained.tolist() == [*~store.held_out_documents()[30:], *[False] * 10]


def test_a_run_from_another_runs_model_knows_both_texts(notes: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for number in range(8):
        (other / f"{number}.txt").write_text(text_of(number if number < 2 else 200 + number))
    first, second = opened(notes), opened(other, held_out=0.5)
    both = TrainedText.of_store(second).joined(TrainedText.of_store(first))
    assert both.recognise(first).trained.all()
    held = second.held_out_documents()
    # what the first run was trained on is not held out by another's drawing
    assert both.recognise(second).trained.tolist() == [not out or number < 2 for number, out in enumerate(held)]
    path = tmp_path / "record.npz"
    path.write_bytes(both.to_bytes())
    again = read_trained_text(path)
    assert again.to_bytes() == both.to_bytes()
    assert (again.recognise(second).trained == both.recognise(second).trained).all()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"record\.npz: damaged"):
        read_trained_text(path)


def test_stores_of_earlier_versions_are_known_by_whole_documents(notes: Path, tmp_path: Path):
    store = opened(notes, held_out=0.2)
    index = json.loads((store.folder / "index.json").read_text())
    del index["passages_below"]
    (store.folder / "index.json").write_text(json.dumps(index))
    (store.folder / "passages.npy").unlink()
    old = opened(notes, held_out=0.2)
    assert (old.held_out_documents() == store.held_out_documents()).all()
    trained = TrainedText.of_store(old)
    assert not trained.whole
    assert (trained.recognise(old).trained == ~store.held_out_documents()).all()


def test_passages_do_not_depend_on_how_text_arrives(monkeypatch: pytest.MonkeyPatch):
    texts = [text_of(number, 3 + 7 * number).encode() for number in range(12)]

    def sample(block: int, step: int) -> np.ndarray:
        monkeypatch.setattr("swat_lm.data.passages.BLOCK", block)
        passages, byte = PassageSample(), 0
        for text in texts:
            passages.open_document()
            for at in range(0, len(text), step):
                passages.add(text[at : at + step])
            byte += len(text)
            # a document that is taken back leaves no trace
            passages.open_document()
            passages.add(text_of(99).encode())
            passages.drop_document(byte)
        return passages.table()

    whole = sample(1 << 20, 1 << 20)
    assert (whole == sample(50, 33)).all()
    alone = set().union(*(passages_of(text)[0].tolist() for text in texts))
    assert set(whole["hash"].tolist()) == alone


def test_passages_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("swat_lm.data.passages.MOST", 100)
    passages = PassageSample()
    for number in range(40):
        passages.open_document()
        passages.add((text_of(number, 200) + "set phrase " * 9).encode())
    table = passages.table()
    assert len(table) <= 100
    assert (table["hash"] < np.uint64(passages.below)).all()
    assert max(np.unique(table["hash"], return_counts=True)[1]) <= MOST_DOCUMENTS

"""Recall tasks: every answer stands at its distance, rows are a pure function of their number, names are checked."""

import numpy as np
import pytest
import torch

from swat_lm.data.batches import IGNORED
from swat_lm.data.list_operations import CLOSING, DIGITS, NUM_IDS, value_of
from swat_lm.data.sources import DataError, resolve_sources
from swat_lm.data.synthetic import FIRST_KEY, MARK, SyntheticRow, SyntheticSource, is_synthetic, synthetic_task

NAMES = [
    "synthetic:kv", "synthetic:mqar?pairs=4", "synthetic:passkey?digits=3", "synthetic:copy?values=16",
    "synthetic:copy?values=16&distance=7", "synthetic:flag?values=2", "synthetic:selective?pairs=2",
]  # fmt: skip


def check_row(name: str, row: SyntheticRow) -> None:
    """Each token of an answer is the one that stands `distance` before its predictor."""
    task = synthetic_task(name)
    assert row.answers
    assert 0 <= row.tokens.min() <= row.tokens.max() < task.num_ids
    for answer in row.answers:
        for place in range(answer.start, answer.end):
            assert row.tokens[place] == row.tokens[place - 1 - answer.distance]
            assert row.tokens[place] >= task.first_value
        # what asks stands before both
        asked, stored = answer.start - 1, answer.start - 2 - answer.distance
        assert row.tokens[asked] == row.tokens[stored]
        assert row.tokens[asked] == MARK or FIRST_KEY <= row.tokens[asked] < task.first_value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [16, 31, 64])
def test_rows_for_training(name: str, length: int):
    task, seen = synthetic_task(name), set()
    for number in range(40):
        row = task.row(np.random.default_rng(number), length)
        assert len(row.tokens) == length
        check_row(name, row)
        seen |= {answer.distance for answer in row.answers}
    # distances are spread, but for those that are most of the row's length
    if "flag" in name:
        assert seen == {length - 3}
    elif "distance" in name:
        assert seen == {7}
    elif "selective" in name:
        assert min(seen) > length / 2
    else:
        assert max(seen) > 3 * min(seen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [7, 33, 501])
def test_rows_at_a_distance(name: str, distance: int):
    row = synthetic_task(name).row_at(np.random.default_rng(0), distance)
    check_row(name, row)
    assert {answer.distance for answer in row.answers} == {distance}


def test_what_is_worth_keeping_is_told_by_its_mark():
    task = synthetic_task("synthetic:selective?pairs=3")
    row = task.row(np.random.default_rng(0), 48)
    marks = np.flatnonzero(row.tokens < task.first_value)
    # each mark twice, in its order: early, and at the end
    assert (row.tokens[marks] == FIRST_KEY + np.tile(np.arange(3), 2)).all()
    assert marks[2] < 12
    assert list(marks[3:]) == [42, 44, 46]
    # all others are values, and of the marked ones alone is asked
    assert [answer.start for answer in row.answers] == [43, 45, 47]
    assert [int(row.tokens[place + 1]) for place in marks[:3]] == [int(row.tokens[place + 1]) for place in marks[3:]]


def test_operations_have_their_results():
    """Rows are full of them, nested and not; whoever reads them in another way finds the same results."""
    task, depths, lengths = synthetic_task("synthetic:listops?depth=3&arguments=3"), set(), []
    for number in range(40):
        row = task.row(np.random.default_rng(number), 64)
        assert len(row.tokens) == 64
        assert 0 <= row.tokens.min() <= row.tokens.max() < task.num_ids == FIRST_KEY + NUM_IDS
        for answer in row.answers:
            assert row.tokens[answer.start - 1] == MARK
            tokens = (row.tokens[answer.start - 1 - answer.distance : answer.start - 1] - FIRST_KEY).tolist()
            assert row.tokens[answer.start] - FIRST_KEY == value_of(tokens) < DIGITS
            depth = np.cumsum([1 if DIGITS <= token < CLOSING else -1 if token == CLOSING else 0 for token in tokens])
            # one operation, whole
            assert depth[-1] == 0 < depth[:-1].min()
            depths.add(int(depth.max()))
            lengths.append(answer.distance)
    assert depths == {1, 2, 3}
    assert min(lengths) >= 4
    with pytest.raises(DataError, match=r"needs data\.sequence_length of at least 7, got 6"):
        task.row(np.random.default_rng(0), 6)
    # those of Long Range Arena, most of which would be far longer than the row
    assert len(synthetic_task("synthetic:listops?depth=10&arguments=10").row(np.random.default_rng(0), 500).answers) > 3
    with pytest.raises(DataError, match="depth must be at most 100"):
        synthetic_task("synthetic:listops?depth=2000")
    with pytest.raises(DataError, match="no distance to ask for"):
        task.row_at(np.random.default_rng(0), 9)
    with pytest.raises(DataError, match="arguments must be a whole number of at least 2"):
        synthetic_task("synthetic:listops?arguments=1")


def test_operations_by_hand():
    """[MAX 4 [MIN 2 9 ] 1 ] = 4; the median of an even number is the middle's mean without its fraction."""
    low, high, middle, total = range(DIGITS, CLOSING)
    assert value_of([high, 4, low, 2, 9, CLOSING, 1, CLOSING]) == 4
    assert value_of([middle, 9, 2, 5, CLOSING]) == 5
    assert value_of([middle, 9, 2, 5, 8, CLOSING]) == 6
    assert value_of([total, 9, 8, total, 7, 7, CLOSING, CLOSING]) == 1


def test_batches_are_a_pure_function_of_seed_and_step():
    def source(split: str = "train", seed: int = 1) -> SyntheticSource:
        task = synthetic_task("synthetic:mqar?pairs=4")
        return SyntheticSource(task, split, 32, seed, batch_size=6, vocab_size=259)

    batch = source().batch(5)
    assert torch.equal(batch.input_ids, source().batch(5).input_ids)
    assert torch.equal(batch.input_ids[2:4], source().batch(5, range(2, 4)).input_ids)
    for other in (source(seed=2).batch(5), source().batch(6), source("held_out").batch(5)):
        assert not torch.equal(batch.input_ids, other.input_ids)
    assert batch.num_targets == 6 * 4
    answers = batch.labels != IGNORED
    assert torch.equal(batch.labels[answers], batch.input_ids[answers])
    assert batch.document_ids is None
    assert torch.equal(batch.position_ids[3], torch.arange(32))
    passes = [list(source("held_out").pass_over(num_batches=2)) for _ in range(2)]
    assert len(passes[0]) == 2
    assert torch.equal(passes[0][1].input_ids, passes[1][1].input_ids)
    with pytest.raises(DataError, match="non-empty part of range"):
        source().batch(0, range(7))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:mqr", "no task of that name; known: synthetic:kv"),
        ("synthetic:mqar?pair=3", "no setting 'pair'; did you mean 'pairs'"),
        ("synthetic:kv?pairs=3", "no setting 'pairs'; known: keys, values"),
        ("synthetic:mqar?pairs", "write settings as"),
        ("synthetic:mqar?pairs=0", "pairs must be a whole number of at least 1; got '0'"),
        ("synthetic:mqar?keys=1", "at least 2"),
        ("synthetic:mqar?pairs=9&keys=8", "9 pairs need as many keys; got 8"),
        ("synthetic:copy?distance=0", "distance must be a whole number of at least 1; got '0'"),
        ("synthetic:selective?keys=8", "no setting 'keys'; known: pairs, values"),
    ],
)
def test_bad_names(name: str, message: str):
    with pytest.raises(DataError, match=message):
        synthetic_task(name)


def test_bad_uses():
    task = synthetic_task("synthetic:mqar?pairs=4")
    with pytest.raises(DataError, match=r"needs data\.sequence_length of at least 16, got 15"):
        SyntheticSource(task, "train", 15, 0, batch_size=1, vocab_size=259)
    with pytest.raises(DataError, match="needs 137 token ids, the tokenizer has 100"):
        SyntheticSource(task, "train", 16, 0, batch_size=1, vocab_size=100)
    with pytest.raises(DataError, match="at least 7 as distance, got 6"):
        task.row_at(np.random.default_rng(0), 6)
    with pytest.raises(DataError, match="an odd number of at least 1"):
        synthetic_task("synthetic:kv").row_at(np.random.default_rng(0), 8)
    assert is_synthetic(("synthetic:kv",))
    assert not is_synthetic(("text",))
    with pytest.raises(DataError, match="a task is the only source of its run"):
        is_synthetic(("text", "synthetic:kv"))
    with pytest.raises(DataError, match="there is no text to prepare"):
        resolve_sources(["synthetic:kv"])

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swat_lm.data import Batch, BatchSource, TokenStore, prepare
from swat_lm.data.mixing import mix, permute
from swat_lm.data.sources import DataError
from swat_lm.recipe import DataRecipe
from swat_lm.words import counted as in_words

EOS = 257
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def make_store(folder: Path, lengths: list[int], held_out: float = 0.0) -> TokenStore:
    """Byte-token documents of these lengths (without their eos), each of its own letters."""
    texts = ["".join(chr(ord("]") + (7 * i + j) % 30) for j in range(n)) for i, n in enumerate(lengths)]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "documents.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return prepare(DataRecipe(sources=(str(source),), held_out=held_out, cache=str(folder / "cache")))


def stream_of(store: TokenStore, split: str = "train") -> np.ndarray:
    documents = store.split(split)
    return np.concatenate([documents[i] for i in range(len(documents))]).astype(np.int64)


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(lengths=LENGTHS, length=st.integers(2, 33), mode=st.sampled_from(["separate", "concatenate"]))
def test_every_token_is_a_target_exactly_once_per_epoch(tmp_path_factory, lengths, length, mode):
    store = make_store(tmp_path_factory.mktemp("store"), lengths)
    stream = stream_of(store)
    if len(stream) < length:
        with pytest.raises(
            DataError, match=f"has {in_words(len(stream), 'token')} in {in_words(len(lengths), 'document')}; one row"
        ):
            BatchSource(store, "train", length, mode, 0, batch_size=1)
        return
    source = BatchSource(store, "train", length, mode, 0, batch_size=1, shuffle=False)
    counted, openings = np.zeros(len(stream), dtype=int), set(source.starts[:-1].tolist())
    for step in range(source.num_rows):
        batch = source.batch(step)
        begin = min(step * (length - 1), len(stream) - length)
        row = batch.input_ids[0].numpy()
        np.testing.assert_array_equal(row, stream[begin : begin + length])
        targets = np.flatnonzero(batch.labels[0].numpy() != -100)
        np.testing.assert_array_equal(batch.labels[0].numpy()[targets], row[targets])
        counted[begin + targets] += 1
    first = openings if mode == "separate" else {0}
    np.testing.assert_array_equal(counted, [place not in first for place in range(len(stream))])


@relaxed
@given(lengths=LENGTHS, length=st.integers(2, 33), seed=st.integers(0, 2**40))
def test_documents_never_share_an_id_within_a_row(tmp_path_factory, lengths, length, seed):
    store = make_store(tmp_path_factory.mktemp("store"), [*lengths, length])
    source = BatchSource(store, "train", length, "separate", seed, batch_size=3)
    stream = stream_of(store)
    owner = np.repeat(np.arange(len(lengths) + 1), np.diff(source.starts))
    rows = np.lib.stride_tricks.sliding_window_view(stream, length)
    batch = source.batch(seed % 7)
    assert batch.document_ids is not None
    assert batch.document_ids.dtype == torch.int32
    for i in range(3):
        ids, positions = batch.document_ids[i].numpy(), batch.position_ids[i].numpy()
        # the row's place in the stream; equal text elsewhere would have equal owners up to numbering
        places = np.flatnonzero((rows == batch.input_ids[i].numpy()).all(axis=1))
        expected = [owner[p : p + length] - owner[p] for p in places]
        assert any(np.array_equal(ids, one) for one in expected)
        changes = np.flatnonzero(np.diff(ids)) + 1
        assert (batch.labels[i].numpy()[[0, *changes]] == -100).all()
        for begin, end in zip([0, *changes], [*changes, length], strict=True):
            np.testing.assert_array_equal(positions[begin:end], np.arange(end - begin))


def test_concatenated_rows_are_a_plain_stream(tmp_path):
    store = make_store(tmp_path, [5, 3, 9])
    batch = BatchSource(store, "train", 10, "concatenate", 0, batch_size=2, shuffle=False).batch(0)
    assert batch.document_ids is None
    assert batch.position_ids.tolist() == [list(range(10))] * 2
    assert batch.labels[0, 0] == -100
    # the first token after a separator is a target like any other
    assert batch.input_ids[0, 5] == EOS
    assert torch.equal(batch.labels[0, 1:], batch.input_ids[0, 1:])
    assert batch.num_targets == 18


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("shared"), [17, 1, 60, 33, 8, 8, 41, 25] * 6, held_out=0.2)


@relaxed
@given(seed=st.integers(0, 10**6), step=st.integers(0, 500), cut=st.integers(1, 5))
def test_a_batch_is_a_function_of_seed_and_step_alone(store, seed, step, cut):
    source = BatchSource(store, "train", 16, "separate", seed, batch_size=6)
    source.batch(step + 3)
    whole = source.batch(step)
    fresh = BatchSource(TokenStore.open(store.folder, 0.2), "train", 16, "separate", seed, batch_size=6)
    assert_equal(fresh.batch(step), whole)
    parts = [fresh.batch(step, range(cut)), fresh.batch(step, range(cut, 6))]
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_an_epoch_uses_each_row_once_in_its_own_order(store):
    source = BatchSource(store, "train", 16, "concatenate", 3, batch_size=1)
    rows = source.num_rows
    epochs = [
        [tuple(source.batch(step).input_ids[0].tolist()) for step in range(e * rows, (e + 1) * rows)] for e in (0, 1)
    ]
    straight = BatchSource(store, "train", 16, "concatenate", 3, batch_size=1, shuffle=False)
    in_order = [tuple(straight.batch(step).input_ids[0].tolist()) for step in range(rows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(in_order)
    assert epochs[0] != epochs[1]
    assert in_order not in epochs
    other = BatchSource(store, "train", 16, "concatenate", 4, batch_size=1)
    assert [tuple(other.batch(step).input_ids[0].tolist()) for step in range(rows)] != epochs[0]


def test_evaluation_pass_takes_every_target_once_on_any_number_of_processes(store):
    source = BatchSource(store, "held_out", 16, "separate", 0, batch_size=4)
    assert source.num_rows % 4, "the last batch must be a filled one"
    expected = source.num_tokens - len(source.documents)
    batches = list(source.pass_over())
    assert len(batches) == source.num_batches
    assert sum(batch.num_targets for batch in batches) == expected
    shares = [list(source.pass_over(range(first, first + 2))) for first in (0, 2)]
    assert [len(share) for share in shares] == [source.num_batches] * 2
    assert sum(batch.num_targets for share in shares for batch in share) == expected
    assert all(batch.input_ids.shape == (2, 16) for share in shares for batch in share)
    assert_equal(next(iter(source.pass_over(num_batches=1))), batches[0])
    assert len(list(source.pass_over(num_batches=10**6))) == source.num_batches


def test_micro_batches_join_to_the_batch(store):
    batch = BatchSource(store, "train", 16, "separate", 0, batch_size=5).batch(0)
    parts = list(batch.split(2))
    assert [len(part.input_ids) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.position_ids for part in parts]), batch.position_ids)
    assert_equal(batch.to("cpu"), batch)
    assert sum(part.num_targets for part in parts) == batch.num_targets


def test_bad_arguments_are_named(store):
    source = BatchSource(store, "train", 16, "separate", 0, batch_size=4)
    for rows in (range(0), range(3, 5), range(-1, 2)):
        with pytest.raises(DataError, match=r"range\(4\); got range"):
            source.batch(0, rows)
    with pytest.raises(DataError, match="must be separate or concatenate; got 'packed'"):
        BatchSource(store, "train", 16, "packed", 0, batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="split must be one of train, held_out; got 'test'"):
        BatchSource(store, "test", 16, "separate", 0, batch_size=4)
    with pytest.raises(DataError, match=r"the held_out split has \d+ tokens .* one row needs 100000: .*data\.held_out"):
        BatchSource(store, "held_out", 100000, "separate", 0, batch_size=4)
    with pytest.raises(DataError, match="sequence_length >= 2"):
        BatchSource(store, "train", 1, "separate", 0, batch_size=4)


def test_a_batch_far_beyond_the_data_is_named_and_takes_no_memory(store):
    rows = BatchSource(store, "train", 16, "separate", 0, batch_size=4).num_rows
    with pytest.raises(DataError, match=rf"train\.batch_size \(1000000000\) is more than the {rows} rows of 16 tokens"):
        BatchSource(store, "train", 16, "separate", 0, batch_size=10**9)
    # a trial on little text
    assert len(BatchSource(store, "train", 16, "separate", 0, batch_size=1024).batch(0).input_ids) == 1024
    # held-out rows are filled up, so a batch may be larger than they are
    held_out = BatchSource(store, "held_out", 16, "separate", 0, batch_size=10**9)
    assert len(held_out.batch(0, range(10**9 - 3, 10**9)).input_ids) == 3


def test_damaged_tokens_are_named(tmp_path):
    store = make_store(tmp_path, [50, 60])
    path = store.folder / "tokens.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[40] = 65535
    tokens.tofile(path)
    source = BatchSource(TokenStore.open(store.folder), "train", 16, "separate", 0, batch_size=1)
    with pytest.raises(DataError, match=r"tokens\.bin: damaged: it holds token 65535 of a vocabulary of 259; remove"):
        [source.batch(step) for step in range(source.num_rows)]


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**80))
@settings(deadline=None)
def test_permutation_is_one(size, seed):
    assert sorted(permute(np.arange(size), size, seed).tolist()) == list(range(size))


def test_permutation_is_fixed_for_all_time_and_spreads():
    # a change here would change the data that every resumed run sees
    assert permute(np.arange(8), 1000, 5).tolist() == [485, 760, 976, 558, 84, 918, 998, 135]
    assert mix(np.arange(2, dtype=np.uint64), 0).tolist() == [12935080325729570654, 17405687883870564846]
    shuffled = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(np.arange(10_000), shuffled)[0, 1]) < 0.05
    assert (shuffled == np.arange(10_000)).sum() < 10
    assert permute(np.array([0, 10**12 - 1]), 10**12, 0).max() < 10**12

"""Masks, documents and lengths become two integers per row, and mean the same as separate sequences."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_lm.ops import window_attention
from swat_lm.ops.visibility import from_attention_mask, from_cu_seqlens, from_document_ids, from_position_ids


def test_a_mask_of_ones_is_the_default():
    assert from_attention_mask(torch.ones(2, 5)) == (None, None)
    assert from_document_ids(torch.zeros(2, 5, dtype=torch.int64)) == (None, None)


def test_left_and_right_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    first, last = from_attention_mask(mask)
    assert last is None
    assert first.tolist() == [[2, 2, 2, 2, 2], [0, 0, 0, 5, 5], [1, 1, 1, 1, 5], [5, 5, 5, 5, 5]]
    assert from_attention_mask(mask, num_queries=2).first_visible.tolist() == [[2, 2], [5, 5], [1, 5], [5, 5]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), "row 1 has a hole"),
        (torch.tensor([[0.0, -3e38]]), "expected only 0 .* and 1"),
        (torch.ones(1, 1, 3, 3), r"expected a padding mask \[batch, keys\], got shape \[1, 1, 3, 3\]"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        from_attention_mask(mask)


def test_documents():
    ids = torch.tensor([[7, 7, 3, 3, 3], [-1, 0, 0, -1, 4], [1, 1, 1, -1, -1]])
    first, last = from_document_ids(ids)
    assert last is None
    assert first.tolist() == [[0, 0, 2, 2, 2], [1, 1, 1, 4, 4], [0, 0, 0, 5, 5]]
    with pytest.raises(ValueError, match="row 1 returns to document 0 after another one"):
        from_document_ids(torch.tensor([[0, 0, 1], [0, 1, 0]]))
    with pytest.raises(ValueError, match="expected integers"):
        from_document_ids(torch.zeros(2, 3))


def test_lengths_and_positions_say_the_same():
    first = from_cu_seqlens(torch.tensor([0, 3, 3, 5]), 5).first_visible
    assert first.tolist() == [[0, 0, 0, 3, 3]]
    assert from_position_ids(torch.tensor([[0, 1, 2, 0, 1]])).first_visible.tolist() == first.tolist()
    # a row may begin in the middle of a document
    assert from_position_ids(torch.tensor([[5, 6, 0, 1, 2]])).first_visible.tolist() == [[0, 0, 2, 2, 2]]
    with pytest.raises(ValueError, match=r"expected a non-decreasing run from 0 to 5 .* got \[0, 3\]"):
        from_cu_seqlens(torch.tensor([0, 3]), 5)
    with pytest.raises(ValueError, match="non-decreasing"):
        from_cu_seqlens(torch.tensor([0, 4, 3, 5]), 5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 50)),
    score_function=st.sampled_from(["sigmoid", "softmax"]),
)
def test_packed_equals_separate(lengths, window, score_function):
    torch.manual_seed(sum(lengths))
    total = sum(lengths)
    query, key, value = (torch.randn(1, total, 2, 4, dtype=torch.float64) for _ in range(3))
    slopes = torch.tensor([-0.2, 0.1])
    options = {"window": window, "score_function": score_function, "slopes": slopes}
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = window_attention(query, key, value, **options, first_visible=from_cu_seqlens(ends, total).first_visible)
    for begin, end in itertools.pairwise(ends):
        own = slice(int(begin), int(end))
        alone = window_attention(query[:, own], key[:, own], value[:, own], **options)
        torch.testing.assert_close(packed[:, own], alone)


@settings(max_examples=25, deadline=None)
@given(padding=st.lists(st.integers(0, 30), min_size=1, max_size=3), left=st.booleans(), window=st.integers(1, 40))
def test_padded_equals_alone(padding, left, window):
    total = 40
    torch.manual_seed(window)
    query, key, value = (torch.randn(len(padding), total, 2, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(len(padding), total)
    for row, count in enumerate(padding):
        mask[row, slice(0, count) if left else slice(total - count, total)] = 0
    visibility = from_attention_mask(mask)
    slopes = torch.tensor([-0.2, 0.1])
    batch = window_attention(query, key, value, window=window, slopes=slopes, first_visible=visibility.first_visible)
    assert torch.count_nonzero(batch[mask == 0]) == 0
    for row in range(len(padding)):
        own = mask[row] == 1
        alone = window_attention(
            query[row : row + 1, own], key[row : row + 1, own], value[row : row + 1, own], window=window, slopes=slopes
        )
        torch.testing.assert_close(batch[row : row + 1, own], alone)

"""What a chunk says of its tokens, and what a layer that shortens hands on."""

import torch

from swat_lm.layers.chunk import Chunk


def chunk() -> Chunk:
    """A row of a document that goes on, a hole and a new document; and one that begins after padding."""
    first = torch.tensor([[-3, -3, -3, 3, 3, 3], [2, 2, 2, 2, 2, 6]], dtype=torch.int32)
    hidden = torch.tensor([[False, True, False, False, False, False], [False] * 6])
    past = torch.tensor([[True, False], [False, False]])
    return Chunk(torch.arange(6)[None], first, None, hidden, past)


def test_what_is_real_and_where_documents_begin():
    assert chunk().real.int().tolist() == [[1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]
    assert chunk().segments.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    plain = Chunk(torch.arange(6)[None])
    assert (plain.real, plain.segments, plain.first_visible(3), plain.hidden_items(3)) == (None, None, None, None)


def test_a_tail_sees_and_hides_what_the_whole_chunk_does():
    whole = chunk()
    for count in (1, 3, 5, 6):
        tail, start = whole.tail(count), 6 - count
        assert tail.positions.tolist() == [list(range(start, 6))]
        assert torch.equal(tail.real, whole.real[:, start:])
        # places count from the tail's first token; what it leaves behind is its past
        assert torch.equal(tail.first_visible(start + 2), whole.first_visible(2)[:, start:])
        assert torch.equal(tail.hidden_items(start + 2), whole.hidden_items(2))
        # of a longer past nothing is known to be hidden, of a shorter one the last items count
        assert torch.equal(tail.hidden_items(start + 4)[:, 2:], whole.hidden_items(2))
        assert torch.equal(tail.hidden_items(0), whole.hidden_items(0)[:, start:])

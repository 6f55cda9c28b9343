"""The formulas of work against counting, pair by pair and byte by byte."""

import pytest
import torch

from benchmarks.gpu import work
from benchmarks.gpu.shapes import ANCHOR, FULL, QUICK, Shape

SHAPES = [Shape(2, 4, 2, 37, 8, 16), Shape(1, 3, 3, 20, 64, 8, torch.float32), Shape(1, 2, 1, 64, 1, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_useful_flops_count_the_visible_pairs(shape):
    row, key = torch.arange(shape.length)[:, None], torch.arange(shape.length)
    pairs = int(((row - key >= 0) & (row - key < shape.window)).sum())
    forward = 2 * 2 * shape.batch * shape.heads * shape.head_dim * pairs
    assert work.useful_flops(shape, "forward") == forward
    assert work.useful_flops(shape, "backward") == forward * 5 / 2
    step = 2 * 2 * shape.batch * shape.heads * shape.head_dim * min(shape.window, shape.length + 1)
    assert work.useful_flops(shape, "decode") == step
    with pytest.raises(ValueError, match="forward, backward or decode, got 'both'"):
        work.useful_flops(shape, "both")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (16, 8), (8, 32)])
def test_executed_pairs_are_whole_tiles(shape, rows, keys):
    row, key = torch.arange(shape.length)[:, None], torch.arange(-200, shape.length)
    seen = (row - key >= 0) & (row - key < shape.window) & (key >= 0)
    tiles = 0
    for begin in range(0, shape.length, rows):
        block = seen[begin : begin + rows].any(dim=0).nonzero().flatten() - 200
        # the grid of tiles ends with the block's last key
        end = min(begin + rows, shape.length)
        tiles += len({(end - 1 - k) // keys for k in block.tolist()})
    assert work.executed_pairs(shape, rows, keys) == tiles * rows * keys
    assert 0 < work.useful_share(shape, rows, keys) <= 1


def test_share_of_long_sequences_is_the_published_one():
    # specs: w / (w + rows), where the tile of keys divides the window
    long = Shape(1, 1, 1, 2**18, 512, 64)
    assert work.useful_share(long, 128, 128) == pytest.approx(512 / 640, rel=2e-3)
    assert work.useful_share(long, 64, 64) == pytest.approx(512 / 576, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_tensors(shape):
    size = shape.dtype.itemsize
    query = torch.empty(shape.batch, shape.length, shape.heads, shape.head_dim).numel() * size
    key = torch.empty(shape.batch, shape.length, shape.kv_heads, shape.head_dim).numel() * size
    assert work.least_bytes(shape, "forward") == query + key + key + query
    assert work.least_bytes(shape, "backward") == (query + key + key + query) + (query + key + key)
    old = shape.batch * (min(shape.window, shape.length + 1) - 1) * shape.kv_heads * shape.head_dim * size
    token = (2 * query + 4 * key) // shape.length
    assert work.least_bytes(shape, "decode") == 2 * old + token
    with pytest.raises(ValueError, match="got 'prefill'"):
        work.least_bytes(shape, "prefill")


def test_the_roof_is_the_slower_of_products_and_memory():
    flops, moved = work.useful_flops(ANCHOR, "forward"), work.least_bytes(ANCHOR, "forward")
    assert work.roof_seconds(ANCHOR, "forward", flops, moved / 2) == 2
    assert work.roof_seconds(ANCHOR, "forward", flops / 3, moved) == 3


def test_plans_name_every_shape_of_the_issue_once():
    assert FULL.attention[0] == QUICK.attention[0] == ANCHOR
    assert len(set(FULL.attention)) == len(FULL.attention) == 1 + 3 * 4 * 2 * 3
    assert {shape.group for shape in FULL.attention} == {1, 4, 8}
    assert set(QUICK.attention) < set(FULL.attention)
    assert set(QUICK.decode) < set(FULL.decode)
    assert str(ANCHOR) == "B4 H16 K16 T16384 D64 W512"

"""Floors computed from machine code: the tiles they count, the formulas, and the record."""

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import attention_gpu_code, record, table
from benchmarks.gpu.floors import H100, block_bytes, floor, kernel_bytes
from benchmarks.gpu.machine_code import Compiled
from benchmarks.gpu.shapes import Shape
from swat_lm.ops.triton.configurations import Tile
from swat_lm.ops.triton.geometry import far_tiles_of_keys, far_tiles_of_rows


@pytest.mark.parametrize("window", [1, 16, 20, 64, 100])
@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 16), (16, 32)])
def test_tiles_are_those_with_visible_pairs(window, rows, keys):
    distance = lambda row, key: torch.arange(row, row + rows)[:, None] - torch.arange(key, key + keys)[None, :]  # noqa: E731
    seen = lambda d: (d >= 0) & (d < window)  # noqa: E731

    left, right, count = far_tiles_of_keys(window, rows, keys)
    # rows 1000 ..., keys in tiles that end with them
    tiles = [seen(distance(1000, 1000 + rows - (count - n) * keys)) for n in range(-1, count)]
    assert not tiles[0].any()
    assert [bool(t.any()) for t in tiles[1:]] == [True] * count
    assert {n for n in range(count) if tiles[n + 1].all()} == set(range(left, right))

    left, right, count = far_tiles_of_rows(window, rows, keys)
    # keys 1000 ..., rows in tiles that begin with them
    tiles = [seen(distance(1000 + n * rows, 1000)) for n in range(count + 1)]
    assert not tiles[-1].any()
    assert [bool(t.any()) for t in tiles[:-1]] == [True] * count
    assert {n for n in range(count) if tiles[n].all()} == set(range(left, right))


def test_a_floor_by_hand():
    loops = tuple(Counter({"FFMA": others, "MUFU": 32}) for others in (368, 168, 268))
    compiled = Compiled(sum(loops, Counter({"EXIT": 1000})), loops, 168, 56 * 1024)
    # 2 blocks of 64 rows; a window of 512 has 9 tiles of 64 keys, the first and the last masked
    found = floor("forward", Shape(1, 1, 1, 128, 512, 64), Tile(64, 64, 4, 3), compiled)
    clocks = 2 / 132 / 1.83e9
    assert found.products == pytest.approx(clocks * 9 * 2 * 2 * 64**3 / 4096)
    assert found.special == pytest.approx(clocks * 9 * 64 * 64 / 16)
    # 4 warps on 4 schedulers
    assert found.issue == pytest.approx(clocks * (1000 + 2 * 400 + 7 * 200))
    assert found.cache == pytest.approx(clocks * (9 * 2 + 2) * 64 * 64 * 2 / 27.6)
    assert found.memory == pytest.approx(4 * 128 * 64 * 2 / H100.bytes_per_second)
    assert found.seconds == found.cache
    # 3 blocks by registers, 3 by shared memory
    assert found.warps == 12
    one_loop = Compiled(loops[0] + Counter({"EXIT": 1000}), loops[:1], 168, 0)
    assert floor("forward", Shape(1, 1, 1, 128, 128, 64), Tile(64, 64, 4, 3), one_loop).issue == pytest.approx(
        clocks * (1000 + 3 * 400)
    )


def test_bytes():
    grouped = Shape(1, 4, 1, 10, 5, 8)
    query, key = 10 * 4 * 8, 10 * 8
    assert kernel_bytes("forward", grouped) == 2 * (2 * query + 2 * key)
    assert kernel_bytes("backward query", grouped) == 2 * (3 * query + 2 * key)
    assert kernel_bytes("backward key", grouped) == 2 * (2 * query + 4 * key)
    assert kernel_bytes("backward key, five products", grouped) == 2 * (2 * query + 4 * key) + 18 * query
    tile = Tile(16, 32, 4, 2)
    assert block_bytes("forward", grouped, tile, 3) == 2 * 8 * (3 * 32 * 2 + 16 * 2)
    assert block_bytes("backward query", grouped, tile, 3) == 2 * 8 * (3 * 32 * 2 + 16 * 3)
    assert block_bytes("backward key", grouped, tile, 3) == 2 * 8 * 3 * 16 * 2 + 4 * 2 * 8 * 32 // 4
    added = 3 * 16 * 8 * 4
    assert block_bytes("backward key, five products", grouped, tile, 3) == (
        block_bytes("backward key", grouped, tile, 3) + added
    )


def test_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "OWN", tmp_path)
    monkeypatch.setattr(attention_gpu_code, "SHAPES", (Shape(1, 1, 1, 4096, 1024, 64), Shape(1, 1, 1, 4096, 128, 128)))
    monkeypatch.delenv("SWAT_LM_BACKWARD", raising=False)
    assert attention_gpu_code.main([]) == 0
    result = json.loads((tmp_path / "attention_gpu_code.json").read_text())
    kernels = [row["kernel"] for row in result["rows"]]
    assert kernels == ["forward", "backward key, five products", "forward", "backward query", "backward key"]
    for row in result["rows"]:
        parts = [row[key] for key in ("ms of products", "of tanh", "of issuing", "of the cache", "of memory")]
        assert row["floor ms"] == max(parts)
        assert min(parts) > 0
    assert "attention_gpu_code.json" in capsys.readouterr().out
    page = table.fill("<!-- attention_gpu_code:begin -->\n<!-- attention_gpu_code:end -->\n", tmp_path)
    assert "| forward | B1 H1 K1 T4096 D64 W1024 |" in page

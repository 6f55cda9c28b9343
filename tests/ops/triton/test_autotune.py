"""Tuned tiles: measured only when asked, kept by problem, and used in place of the table's."""

import json

import pytest
import torch

from swat_lm.ops.triton import configurations
from swat_lm.ops.triton.autotune import CANDIDATES, tune
from swat_lm.ops.triton.configurations import Problem, Tile, configuration, tuned_key

PROBLEM = Problem(1000, 64, 2, torch.bfloat16, False, (9, 0), True, "NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def _no_file(monkeypatch):
    monkeypatch.delenv(configurations.TILES_VARIABLE, raising=False)


def test_the_fastest_tile_is_kept_and_used(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.errors import OutOfResources

    path = tmp_path / "folder" / "tiles.json"
    wanted = {"forward": Tile(128, 64, 8, 2), "backward key": Tile(32, 128, 8, 3)}

    def measure(run):
        run()
        tiles = {kernel: configuration(kernel, PROBLEM) for kernel in CANDIDATES}
        if tiles["forward"] == Tile(128, 128, 8, 2):
            raise OutOfResources(300, 227, "shared memory")
        return 5.0 - sum(tiles[kernel] == tile for kernel, tile in wanted.items())

    calls, seen = [], []
    best = tune(lambda: calls.append(1), PROBLEM, tuple(wanted), path, measure, seen.append)
    assert best == wanted
    assert len(calls) == len(seen) >= len(CANDIDATES["forward"]) + len(CANDIDATES["backward key"])
    assert [m.milliseconds for m in seen if m.tile == Tile(128, 128, 8, 2)] == [None]
    assert configuration("forward", PROBLEM) != wanted["forward"]

    monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
    assert configuration("forward", PROBLEM) == wanted["forward"]
    # the window's bucket is shared, another card and another head size are not
    assert configuration("forward", PROBLEM._replace(gpu="NVIDIA H200")) == Tile(64, 64, 4, 3, 168)
    assert configuration("forward", PROBLEM._replace(window=600)) == wanted["forward"]
    assert configuration("forward", PROBLEM._replace(head_dim=128)) == Tile(64, 64, 4, 2)
    # a second tuning keeps what is there
    tune(lambda: None, PROBLEM._replace(head_dim=128), ("backward query",), path, lambda run: 1.0)
    assert set(json.loads(path.read_text())) >= {tuned_key(kernel, PROBLEM) for kernel in wanted}
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing to measure under Triton's interpreter"):
        tune(lambda: None, PROBLEM._replace(hardware=False), ("forward",), tmp_path / "x")
    with pytest.raises(ValueError, match=r"^kernels: expected some of forward, .* got sideward"):
        tune(lambda: None, PROBLEM, ("sideward",), tmp_path / "x")
    bad = ("[1]", "{", '{"x": 1}', '{"x": [64, 64, 4]}', '{"x": [64, 48, 4, 2]}', '{"x": ["64", "64", "4", "2"]}')
    for number, text in enumerate(bad):
        path = tmp_path / f"bad {number}"
        path.write_text(text)
        monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
        with pytest.raises(ValueError, match=r"^SWAT_LM_TILES: expected a file written by .*autotune"):
            configuration("forward", PROBLEM)
        # told before anything is measured, and left as it is
        with pytest.raises(ValueError, match="expected a file written by"):
            tune(lambda: None, PROBLEM, ("forward",), path, lambda run: pytest.fail("measured"))
        assert path.read_text() == text
    monkeypatch.setenv(configurations.TILES_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^SWAT_LM_TILES: .*No such file"):
        configuration("forward", PROBLEM)


def test_what_does_not_fit_is_said_and_what_was_measured_is_kept(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.errors import PTXASError

    path = tmp_path / "tiles.json"
    path.write_text("{}")
    monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
    default = configuration("forward", PROBLEM)
    measured = []

    def measure(run):
        tile = configuration("forward", PROBLEM)
        measured.append(tile)
        # of the first kernel one tile does not compile, of the second none
        if tile == default or len(measured) > len({default, *CANDIDATES["forward"]}):
            raise PTXASError("too many registers")
        return float(tile != Tile(64, 32, 4, 3))

    with pytest.raises(ValueError, match="no tile of the kernel 'backward query' fits this GPU"):
        tune(lambda: None, PROBLEM, ("forward", "backward query"), path, measure)
    # without starting anew, although the file was read before
    assert configuration("forward", PROBLEM) == Tile(64, 32, 4, 3)


def test_the_backward_form(monkeypatch):
    form = configurations.backward_form
    monkeypatch.delenv("SWAT_LM_BACKWARD", raising=False)
    assert form(PROBLEM) == "two kernels"
    assert form(PROBLEM._replace(window=1024)) == "five products"
    for change in ({"dtype": torch.float32}, {"softmax": True}, {"capability": (8, 0)}, {"head_dim": 128}):
        assert form(PROBLEM._replace(window=1024, **change)) == "two kernels"
    torch.use_deterministic_algorithms(True)
    try:
        assert form(PROBLEM._replace(window=1024)) == "two kernels"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("SWAT_LM_BACKWARD", "three kernels")
    with pytest.raises(ValueError, match="SWAT_LM_BACKWARD: expected one of two kernels, five products"):
        form(PROBLEM)

"""Tuned tiles and forms: measured only when asked, kept by problem, and used in place of the table's."""

import json
import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from swat_lm.ops.triton import autotune, configurations
from swat_lm.ops.triton.autotune import BACKWARD, CANDIDATES, FIVE_PRODUCTS, KERNELS, Calls, check_gpu, tune
from swat_lm.ops.triton.configurations import FORM, Problem, Tile, backward_form, configuration, tuned_key

PROBLEM = Problem(1000, 64, 2, torch.bfloat16, False, (9, 0), True, "NVIDIA H100 80GB HBM3")


NOTHING = Calls(lambda: None, lambda: None)


@pytest.fixture(autouse=True)
def _no_file(monkeypatch):
    monkeypatch.delenv(configurations.TILES_VARIABLE, raising=False)
    monkeypatch.delenv(configurations.FORM_VARIABLE, raising=False)


def test_the_fastest_tile_is_kept_and_used(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.errors import OutOfResources

    path = tmp_path / "folder" / "tiles.json"
    wanted = {"forward": Tile(64, 64, 4, 3), "backward key": Tile(32, 128, 8, 3)}

    def measure(run):
        run()
        tiles = {kernel: configuration(kernel, PROBLEM) for kernel in CANDIDATES}
        if tiles["forward"] == Tile(128, 128, 8, 2):
            raise OutOfResources(300, 227, "shared memory")
        return 5.0 - sum(tiles[kernel] == tile for kernel, tile in wanted.items())

    ran, seen = [], []
    calls = Calls(lambda: ran.append("forward"), lambda: ran.append("backward"))
    best = tune(calls, PROBLEM, tuple(wanted), path, measure, lambda t: seen.append((t.kernel, len(t.times), t.best)))
    assert best == wanted
    # each kernel by the call that it is part of, and told about from the first on
    counts = [len({configuration(kernel, PROBLEM), *CANDIDATES[kernel]}) for kernel in wanted]
    assert ran == ["forward"] * counts[0] + ["backward"] * counts[1]
    assert [(kernel, done) for kernel, done, _ in seen] == [
        (kernel, done) for kernel, count in zip(wanted, counts, strict=True) for done in range(count + 1)
    ]
    assert seen[0][2] is None
    assert seen[-1][2] == wanted["backward key"]
    assert configuration("forward", PROBLEM) != wanted["forward"]

    monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
    assert configuration("forward", PROBLEM) == wanted["forward"]
    # the window's bucket is shared, another card and another head size are not
    assert configuration("forward", PROBLEM._replace(gpu="NVIDIA H200")) == Tile(128, 64, 8, 2)
    assert configuration("forward", PROBLEM._replace(window=600)) == wanted["forward"]
    assert configuration("forward", PROBLEM._replace(head_dim=128)) == Tile(128, 64, 8, 2)
    # a second tuning keeps what is there
    tune(NOTHING, PROBLEM._replace(head_dim=128), ("backward query",), path, lambda run: 1.0)
    assert set(json.loads(path.read_text())) >= {tuned_key(kernel, PROBLEM) for kernel in wanted}
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing to measure under Triton's interpreter"):
        tune(NOTHING, PROBLEM._replace(hardware=False), ("forward",), tmp_path / "x")
    with pytest.raises(ValueError, match=r"^kernels: expected some of forward; .* got sideward$"):
        tune(NOTHING, PROBLEM, ("sideward",), tmp_path / "x")
    bad = (
        "[1]",
        "{",
        '{"x": 1}',
        '{"x": "three kernels"}',
        '{"x": null}',
        '{"x": [64, 64, 4]}',
        '{"x": [64, 48, 4, 2]}',
        '{"x": ["64", "64", "4", "2"]}',
    )
    for number, text in enumerate(bad):
        path = tmp_path / f"bad {number}"
        path.write_text(text)
        monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
        with pytest.raises(ValueError, match=r"^SWAT_LM_TILES: expected a file written by `swat-lm tune`"):
            configuration("forward", PROBLEM)
        # told before anything is measured, and left as it is
        with pytest.raises(ValueError, match="expected a file written by"):
            tune(NOTHING, PROBLEM, ("forward",), path, lambda run: pytest.fail("measured"))
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
        tune(NOTHING, PROBLEM, ("forward", "backward query"), path, measure)
    # without starting anew, although the file was read before
    assert configuration("forward", PROBLEM) == Tile(64, 32, 4, 3)


def times_of(form_times):
    """A timer that runs the backward in the form at hand; five products fit no card where they take no time."""

    def measure(run):
        from triton.runtime.errors import OutOfResources

        run()
        milliseconds = form_times[backward_form(WIDE)]
        if milliseconds is None:
            raise OutOfResources(300, 227, "shared memory")
        return milliseconds + (configuration("backward key", WIDE) != Tile(32, 128, 8, 3))

    return measure


WIDE = PROBLEM._replace(window=2048)


@pytest.mark.parametrize(
    ("form_times", "fastest"),
    [((2.0, 1.0), "five products"), ((1.0, 2.0), "two kernels"), ((1.0, None), "two kernels")],
)
def test_the_faster_form_is_measured_and_kept(tmp_path, monkeypatch, form_times, fastest):
    pytest.importorskip("triton", reason="triton is not installed")
    path, seen = tmp_path / "tiles.json", {}
    # neither of them decides what is measured
    monkeypatch.setenv(configurations.FORM_VARIABLE, "two kernels")
    torch.use_deterministic_algorithms(True)
    try:
        times = dict(zip(configurations.BACKWARD_FORMS, form_times, strict=True))
        best = tune(NOTHING, WIDE, BACKWARD, path, times_of(times), lambda t: seen.setdefault(t.kernel, t))
    finally:
        torch.use_deterministic_algorithms(False)
    assert best[FORM] == fastest
    # every kernel was measured in its own form, and the forms on the tiles that were found
    assert set(seen["backward query"].times.values()) == {times["two kernels"] + 1}
    assert seen["backward key"].times[Tile(32, 128, 8, 3)] == times["two kernels"]
    assert list(seen[FORM].times) == ["five products", "two kernels"], "the rule's first"
    assert seen[FORM].times["two kernels"] == times["two kernels"]
    assert (FIVE_PRODUCTS in best) == (form_times[1] is not None)
    assert json.loads(path.read_text())[tuned_key(FORM, WIDE)] == fastest

    monkeypatch.delenv(configurations.FORM_VARIABLE)
    assert backward_form(WIDE) == "five products", "the rule, without the file"
    monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
    assert backward_form(WIDE) == fastest
    assert backward_form(WIDE._replace(window=1500)) == fastest
    assert backward_form(WIDE._replace(window=1000)) == "two kernels", "the rule: another problem was measured"
    assert backward_form(WIDE._replace(hardware=False)) == "five products"
    # the environment and determinism go before what was measured
    other = next(one for one in configurations.BACKWARD_FORMS if one != fastest)
    monkeypatch.setenv(configurations.FORM_VARIABLE, other)
    assert backward_form(WIDE) == other
    monkeypatch.delenv(configurations.FORM_VARIABLE)
    torch.use_deterministic_algorithms(True)
    try:
        assert backward_form(WIDE) == "two kernels"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_file_of_tiles_alone_leaves_the_form_to_the_rule(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({tuned_key("forward", PROBLEM): [64, 32, 4, 3, None]}))
    monkeypatch.setenv(configurations.TILES_VARIABLE, str(path))
    assert configuration("forward", PROBLEM) == Tile(64, 32, 4, 3)
    assert [backward_form(PROBLEM._replace(window=window)) for window in (1000, 1024)] == [
        "two kernels", "five products",
    ]  # fmt: skip


def test_an_interruption_keeps_what_was_finished(tmp_path):
    path = tmp_path / "tiles.json"

    def measure(run):
        if backward_form(PROBLEM) == "five products":
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune(NOTHING, PROBLEM, KERNELS, path, measure)
    kept = [key.partition(" | ")[0] for key in json.loads(path.read_text())]
    assert kept == ["backward key", "backward query", "forward"]
    assert [one.name for one in tmp_path.iterdir()] == ["tiles.json"]
    assert not configurations._in_use


def check_calls(softmax, rotary, packed):
    from swat_lm.ops.triton import backward, forward
    from swat_lm.ops.triton.autotune import call_for
    from swat_lm.ops.triton.geometry import Rows

    os.environ[configurations.FORM_VARIABLE] = "two kernels"
    problem = Problem(7, 8, 2, torch.float32, softmax, (0, 0), False, rotary=rotary)
    calls = call_for(problem, num_tokens=20, num_heads=4, batch=2, packed=packed)
    with (
        patch.object(forward, "configuration", wraps=configuration) as of_forward,
        patch.object(backward, "configuration", wraps=configuration) as of_backward,
        patch.object(Rows, "of_keys", autospec=True, side_effect=Rows.of_keys) as tables,
    ):
        output, lse, *_ = calls.forward()
        gradients = calls.backward()
    assert output.shape == (2, 20, 4, 8)
    assert (lse.numel() > 0) == softmax
    assert [t.shape for t in gradients[:3]] == [(2, 20, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8)]
    assert all(t.isfinite().all() and t.count_nonzero() for t in gradients[:3])
    # what is looked up is what `tune` writes
    asked = [call.args for mock in (of_forward, of_backward) for call in mock.call_args_list]
    assert [kernel for kernel, _ in asked] == ["forward", "backward query", "backward key"]
    assert {tuned_key("", asks) for _, asks in asked} == {tuned_key("", problem)}
    assert asked[0][1].rotary == rotary
    assert [call.args[0].last is not None for call in tables.call_args_list] == [packed]


@pytest.mark.parametrize(
    ("softmax", "rotary", "packed"), [(False, False, False), (False, True, True), (True, True, False)]
)
def test_the_calls_are_the_problem(interpreted, softmax, rotary, packed):
    interpreted(check_calls, softmax, rotary, packed)


def test_a_window_longer_than_the_call_is_another_problem():
    from swat_lm.ops.triton.autotune import call_for

    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(ValueError, match=r"expected a window of at most num_tokens \(512\), got 1000"):
        call_for(PROBLEM, num_tokens=512, num_heads=4)


@pytest.mark.parametrize(("milliseconds", "count"), [(0.5, 30), (20.0, 10), (500.0, 5)])
def test_the_clock(monkeypatch, milliseconds, count):
    """On a card of ours, two of whose runs are slow: a cold cache, the host ahead of the card, and a median."""
    queue, durations = [], iter([milliseconds, *[milliseconds * 3] * 2, *[milliseconds] * 40])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("event")

        def synchronize(self):
            assert queue == ["cache", "sleep", "event", "run", "event"]
            queue.clear()

        def elapsed_time(self, end):
            return next(durations)

    cache = SimpleNamespace(zero_=lambda: queue.append("cache"))
    cuda = SimpleNamespace(Event=Event, synchronize=queue.clear, _sleep=lambda cycles: queue.append("sleep"))
    monkeypatch.setattr(
        autotune, "torch", SimpleNamespace(cuda=cuda, empty=lambda *_, **__: cache, int8=None, Tensor=torch.Tensor)
    )
    runs = []
    assert autotune._bench(lambda: (runs.append(1), queue.append("run"))) == milliseconds
    assert len(runs) == 2 + count


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^tune measures on an NVIDIA GPU, and PyTorch sees none here: run it on"):
        check_gpu()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(ValueError, match=r"^tune: the GPU is older than the Ampere generation"):
        check_gpu()


def test_the_backward_form(monkeypatch):
    form = backward_form
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

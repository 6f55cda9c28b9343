"""The benchmark for GPUs on a CPU: its clock is a fake, everything else is real, on shapes that take milliseconds."""

import json

import pytest
import torch

from benchmarks import attention_gpu, measure, record, table
from benchmarks.gpu import comparison, decoding, device, peers, training
from benchmarks.gpu.candidates import Inputs, Rotation
from benchmarks.gpu.shapes import Plan, Shape

from .fake_gpu import DEFECTS, RINGS, ROOF, SHAPE, FakeDevice, candidate, inputs, wrapped


def test_the_fastest_setting_stands_for_a_peer_and_failures_are_named():
    slow, fast = (candidate(lambda q, k, v: q * 1.0, "peer", settings=s) for s in ("slow", "fast"))
    broken = candidate(lambda q, k, v: (_ for _ in ()).throw(RuntimeError("no kernel\nfor this")), "broken")
    shape_inputs = inputs()
    rotations = [(c.name, c.settings, Rotation(c, "forward", shape_inputs)) for c in (slow, fast, broken)]
    speed = {"slow": 0.004, "fast": 0.002}
    fake = FakeDevice(lambda run: speed[run.candidate.settings] * run.repeats)
    result = comparison.take_turns(rotations, fake, rounds=3)
    assert result.settings == {"peer": "fast"}
    assert result.timings["peer"].median == pytest.approx(0.002)
    # a round of 20 ms
    assert rotations[1][2].repeats == 10
    assert result.absent == {"broken": "RuntimeError: no kernel"}


def test_a_row_has_figures_by_the_formulas():
    forward = Shape(1, 1, 1, 100, 100, 8)
    result = comparison.Result({"ours": measure.Timing((2e-6,)), "peer": measure.Timing((6e-6,))}, {}, {})
    row = comparison.make_row(forward, "forward", result, ROOF, "ours")
    assert row["ms"] == pytest.approx(2e-3)
    assert row["TFLOP/s"] == pytest.approx(4 * 8 * 5050 / 2e-6 / 1e12)
    assert row["share of products"] == pytest.approx(row["TFLOP/s"])
    assert row["share of memory"] == pytest.approx(4 * 100 * 8 * 2 / 1e11 / 2e-6)
    assert row["share of roof"] == pytest.approx(max(row["share of memory"], row["share of products"]))
    assert (row["peer ms"], row["times peer"]) == (pytest.approx(6e-3), pytest.approx(3))


@pytest.mark.parametrize("shape", [RINGS, Shape(3, 4, 4, 20, 5, 8, torch.float32)], ids=str)
def test_steps_are_verified_and_timed(shape):
    blocked = {"ours": decoding.ours("blocked"), "sdpa": decoding.sdpa}
    fake = FakeDevice()
    result = decoding.compare_steps(shape, fake, blocked, rounds=2)
    assert set(result.timings) == {"swat-lm sigmoid, blocked", "SDPA"}
    assert result.absent == {}

    def forgets_to_write(shape, slopes):
        def step(inputs):
            return decoding.ours("blocked")(shape, slopes).step(inputs._replace(key_ring=inputs.key_ring.clone()))

        return decoding.StepCandidate("swat-lm sigmoid", step, "sigmoid", True)

    result = decoding.compare_steps(shape, fake, {"swat-lm sigmoid": forgets_to_write}, rounds=1)
    assert result.timings == {}
    assert result.absent["swat-lm sigmoid"].startswith("refused, the key ring is wrong by")


def test_training_step_of_every_model():
    tiny = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "sliding_window": 8,
    }  # fmt: skip
    full = {"transformer-340m": None}
    builders = {name: value for name, value in training.BUILDERS.items() if value[0] not in full}
    rows, absent = training.compare_training(2, 24, FakeDevice(), ROOF, 2e12, 1, builders, **tiny)
    assert [row["training step"] for row in rows] == ["swat-lm sigmoid window", "swat-lm softmax window"]
    assert rows[0]["tokens/s"] == pytest.approx(2 * 24 / 0.01)
    assert rows[0]["MFU"] == pytest.approx(rows[0]["share of products"] / 2)
    assert absent == {"Mistral, FlashAttention-2 window": "a window with FlashAttention needs the package flash-attn"}
    tiny["sliding_window"] = None
    llama = {"Llama, SDPA full attention": training.BUILDERS["Llama, SDPA full attention"]}
    (row,), _ = training.compare_training(1, 24, FakeDevice(), ROOF, None, 1, llama, **tiny)
    assert row["MFU"] is None


def run(tmp_path, monkeypatch, peer=None, **more):
    monkeypatch.setattr(record, "OWN", tmp_path / "results")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "record")
    plan = Plan((SHAPE, Shape(1, 2, 2, 64, 16, 8, torch.float32)), (RINGS,), ((1, 16),), rounds=2, thorough=False)
    monkeypatch.setattr(attention_gpu, "measure_roof", lambda fake: ROOF)

    def train(batch, length, fake, roof, peak, rounds):
        assert peak == 989.4e12
        return [{"training step": "ours", "batch": batch, "ms": 3.0}], {"theirs": "not installed"}

    return attention_gpu.run(
        FakeDevice(),
        plan,
        peers={peers.OURS: peer or peers.ours("blocked"), "SDPA with a mask": peers.sdpa, "fla": peers.fla},
        step_peers={peers.OURS: lambda *a: named(decoding.ours("blocked")(*a)), "SDPA": decoding.sdpa},
        measure_training=train,
        **more,
    )


def named(step):
    return decoding.StepCandidate(peers.OURS, step.step, step.score_function, step.has_slopes)


def test_a_run_is_saved_and_shown(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "without fla: not installed" in out
    result = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    tasks = [(row["task"], row["ms"]) for row in result["rows"] if "task" in row]
    assert [task for task, _ in tasks] == ["forward", "backward", "decode", "forward", "backward"]
    assert result["gpu"] == {"name": "Fake H100", "driver_version": "1.2"}
    assert result["settings"]["left out for want of time"] == result["settings"]["failed"] == "nothing"
    assert result["details"][0]["settings"] == {"swat-lm sigmoid": "", "SDPA with a mask": ""}
    # a window of at most 256 is judged by memory, a step of 64 streams too
    assert [line["goal"].split(":")[1] for line in result["goals"]] == [" share of memory"] * 5
    page = tmp_path / "page.md"
    page.write_text("<!-- attention_gpu:begin -->\n<!-- attention_gpu:end -->\n")
    assert table.main(["--page", str(page), "--results", str(tmp_path / "results")]) == 0
    text = page.read_text()
    assert "Fake H100 (driver version: 1.2); " in text
    assert text.count("| shape | task | setting | ms |") == text.count("| training step | batch | ms |") == 1
    assert f"| {SHAPE} | backward | " in text


def test_a_wrong_kernel_has_no_figures(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, wrapped(DEFECTS["the gradient of the value is wrong"])) == 1
    result = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    rows = [row for row in result["rows"] if row.get("task") in ("forward", "backward")]
    assert len(rows) == 4
    for row in rows:
        # nor has a peer beside it
        assert row["ms"] is row["TFLOP/s"] is row["SDPA ms"] is None
        assert "refused, the gradient of the value is wrong by" in row["no figures"]
    assert capsys.readouterr().err.count("no figures for swat-lm sigmoid, ") == 4


def test_a_run_out_of_time_says_what_it_left_out(tmp_path, monkeypatch):
    assert run(tmp_path, monkeypatch, deadline=0.0) == 0
    result = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    assert result["rows"] == []
    left_out = result["settings"]["left out for want of time"]
    assert left_out.startswith(f"attention {SHAPE}; decode {RINGS}; training step (1, 16); attention ")


def test_a_part_that_would_not_end_in_time_is_not_begun(tmp_path, monkeypatch):
    # every look at the clock takes ten seconds: so does a part
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(attention_gpu.time, "monotonic", lambda: next(ticks))
    assert run(tmp_path, monkeypatch, deadline=65.0) == 0
    result = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    # the second attention shape would begin at 60 and end at 70
    assert result["settings"]["left out for want of time"] == "attention B1 H2 K2 T64 D8 W16"
    assert [row.get("task") for row in result["rows"]] == ["forward", "backward", "decode", None]


def test_a_part_that_does_not_fit_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    def draw(shape, *rest):
        if shape == SHAPE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")
        return Inputs(shape, *rest)

    monkeypatch.setattr(comparison, "Inputs", draw)
    assert run(tmp_path, monkeypatch) == 1
    result = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    reason = f"attention {SHAPE}: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert result["settings"]["failed"] == reason
    assert [row.get("task") for row in result["rows"]] == ["decode", None, "forward", "backward"]
    assert reason in capsys.readouterr().err


def test_a_candidate_that_does_not_fit_takes_no_other_with_it():
    class Narrow(Inputs):
        def arranged(self, candidate):
            if candidate.heads_first:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.sets

    copied = candidate(lambda q, k, v: q * 1.0, "copied", heads_first=True)
    rest = candidate(lambda q, k, v: q * 1.0, "rest")
    shape_inputs = Narrow(SHAPE, torch.device("cpu"), 2)
    rotations = [(c.name, "", Rotation(c, "forward", shape_inputs)) for c in (copied, rest)]
    result = comparison.take_turns(rotations, FakeDevice(), rounds=1)
    assert set(result.timings) == {"rest"}
    assert result.absent == {"copied": "out of memory: CUDA out of memory"}

    # nor does what it has made stay behind
    def fail(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backward = Rotation(rest, "backward", inputs())
    with pytest.raises(torch.OutOfMemoryError):
        backward.timed_by(fail)
    assert backward.outputs == []


def test_the_gpu_waits_until_the_host_has_queued(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(cycles))
    assert measure.cuda_clock(lambda: said.append("run"), 7) == 0.003
    assert said == ["wait", 7, "record", "run", "record", "wait"]


def test_without_a_gpu_one_line_says_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "require_green_tests", lambda *paths: pytest.fail("nothing to test"))
    assert attention_gpu.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs an NVIDIA GPU" in error


def test_roof_and_peak():
    roof = device.measure_roof(FakeDevice(), size=64, copy_bytes=1000, rounds=1, repeats=1)
    assert (roof.flops_per_second, roof.bytes_per_second) == (pytest.approx(2 * 64**3 / 0.01), pytest.approx(2e5))
    assert device.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert device.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert device.peak_flops("Some card") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "OWN", tmp_path)
    shape = Shape(1, 4, 2, 512, 128, 64)
    plan = Plan((shape,), (Shape(8, 4, 2, 512, 128, 64),), (), rounds=2, thorough=False)
    assert attention_gpu.run(device.CudaDevice(), plan) == 0

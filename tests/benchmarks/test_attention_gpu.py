"""The benchmark for GPUs on a CPU: its clock is a fake, everything else is real, on shapes that take milliseconds."""

import json

import pytest
import torch

from benchmarks import attention_gpu, measure, table
from benchmarks.gpu import comparison, decoding, device, peers, training
from benchmarks.gpu.candidates import Candidate, Inputs, NotHereError, Rotation, sets_that_leave_the_cache
from benchmarks.gpu.shapes import Plan, Shape
from benchmarks.gpu.verify import WrongResultError, check_against, verify
from swat_lm.ops.triton.configurations import BACKWARD_FORMS

SHAPE = Shape(2, 4, 2, 150, 40, 8, torch.float32)
RINGS = Shape(64, 2, 1, 32, 8, 16, torch.float32)
ROOF = device.Roof(1e12, 1e11)


class FakeDevice:
    """A CPU whose clock says what it likes, after running what it should time."""

    torch_device = torch.device("cpu")
    cache_bytes = 2**10

    def __init__(self, seconds=lambda run: 0.01):
        self.seconds, self.runs = seconds, []

    def clock(self, run):
        run()
        self.runs.append(run)
        return self.seconds(run)

    def capture(self, run):
        run()
        return run

    def compile(self, function, thorough):
        return function

    def free(self):
        pass

    def forget_compiled(self):
        pass

    def describe(self):
        return {"name": "Fake H100", "driver_version": "1.2"}


def candidate(attend, name="swat-lm sigmoid", score_function="sigmoid", **more):
    return Candidate(name, attend, score_function, **more)


def wrapped(change):
    """The blocked backend with a defect."""
    exact = peers.ours("blocked")

    def build(shape, slopes, fake, thorough):
        (right,) = exact(shape, slopes, fake, thorough)
        return [candidate(lambda q, k, v: change(right.attend, q, k, v), has_slopes=True)]

    return build


def inputs():
    return Inputs(SHAPE, torch.device("cpu"), 2)


def built(peer, fake=None):
    shape_inputs = inputs()
    return peer(SHAPE, shape_inputs.slopes, fake or FakeDevice(), False), shape_inputs


@pytest.mark.parametrize(
    "peer",
    [peers.ours("blocked"), peers.ours("reference"), peers.ours_softmax("blocked"), peers.sdpa],
    ids=["blocked", "reference", "softmax", "sdpa"],
)
def test_right_candidates_pass(peer):
    candidates, shape_inputs = built(peer)
    for right in candidates:
        verify(right, shape_inputs, backward=True)


@pytest.mark.parametrize("peer", [peers.flex, peers.flex_sigmoid], ids=["softmax", "sigmoid"])
def test_flex_attention_computes_what_it_is_said_to(peer):
    # on a CPU its eager form has no backward
    candidates, shape_inputs = built(peer)
    for right in candidates:
        verify(right, shape_inputs, backward=False)


def shift(attend, q, k, v):
    """A window that is one key too long, as a wrong convention makes it."""
    return attend(torch.cat((q[:, :1], q), 1), torch.cat((k[:, :1], k), 1), torch.cat((v[:, :1], v), 1))[:, 1:]


DEFECTS = {
    "the output is not finite": lambda attend, q, k, v: attend(q, k, v) / (v.sum() * 0),
    "the output is wrong": lambda attend, q, k, v: attend(q, k, v) * 1.001,
    "the gradient of the key is wrong": lambda attend, q, k, v: attend(q, k.detach() + 0.999 * (k - k.detach()), v),
    "the gradient of the value is wrong": lambda attend, q, k, v: attend(q, k, v.detach() + 1.1 * (v - v.detach())),
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_wrong_candidates_are_refused(reason):
    (wrong,), shape_inputs = built(wrapped(DEFECTS[reason]))
    with pytest.raises(WrongResultError, match=reason):
        verify(wrong, shape_inputs, backward=True)


def test_defects_in_the_middle_are_refused():
    long = Shape(1, 2, 1, 600, 40, 8, torch.float32)
    shape_inputs = Inputs(long, torch.device("cpu"), 1)
    (right,) = peers.ours("blocked")(long, shape_inputs.slopes, FakeDevice(), False)
    scale = torch.ones(600, 1, 1)
    scale[350] = 1.001
    for reason, change in {
        "the output is wrong": lambda q, k, v: right.attend(q, k, v) * scale,
        "the gradient of the query is wrong": lambda q, k, v: right.attend(q.detach() + (q - q.detach()) * scale, k, v),
    }.items():
        with pytest.raises(WrongResultError, match=reason):
            verify(candidate(change, has_slopes=True), shape_inputs, backward=True)
    verify(right, shape_inputs, backward=True)


def test_a_window_of_another_length_is_refused():
    (longer,), _ = built(peers.ours_softmax("blocked"))
    for window in (39, 41):
        other = Shape(2, 4, 2, 150, window, 8, torch.float32)
        with pytest.raises(WrongResultError, match="the output is wrong by"):
            verify(longer, Inputs(other, torch.device("cpu"), 1), backward=False)


def test_errors_are_compared_with_those_of_the_same_precision():
    exact = torch.linspace(1, 2, 9, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    check_against("x", rounded, rounded, exact)
    check_against("x", rounded * 1.001, rounded, exact)
    with pytest.raises(WrongResultError, match=r"^the x is wrong by"):
        check_against("x", (exact * 1.05).to(torch.bfloat16), rounded, exact)
    with pytest.raises(WrongResultError, match="nan"):
        check_against("x", rounded * float("nan"), rounded, exact)


def test_rotation_uses_every_set_and_hides_the_forward_from_the_clock():
    calls = []
    watched = candidate(lambda q, k, v: calls.append((q.data_ptr(), torch.is_grad_enabled())) or q * k.sum() * v.sum())
    shape_inputs = inputs()
    forward = Rotation(watched, "forward", shape_inputs)
    forward.repeats = 5
    assert forward.timed_by(FakeDevice().clock) == 0.01 / 5
    assert len({pointer for pointer, _ in calls}) == 2
    assert len(calls) == 5
    assert not any(grad for _, grad in calls)
    calls.clear()
    backward = Rotation(watched, "backward", shape_inputs)
    backward.repeats = 3
    during = []
    backward.timed_by(lambda run: during.append(len(calls)) or run() or 1.0)
    # the outputs existed before the clock was asked, none was made under it
    assert during == [2] == [len(calls)]
    assert backward.outputs == []


def test_inputs_rotate_past_the_cache():
    assert sets_that_leave_the_cache(10, 100) == 16
    assert sets_that_leave_the_cache(100, 100) == 3
    assert sets_that_leave_the_cache(10**6, 100) == 2


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("SWAT_LM_BACKWARD", BACKWARD_FORMS[0])
    changed = candidate(lambda q, k, v: q, environment=(("SWAT_LM_BACKWARD", BACKWARD_FORMS[1]), ("SWAT_LM_X", "1")))
    with changed.applied():
        assert (measure.os.environ["SWAT_LM_BACKWARD"], measure.os.environ["SWAT_LM_X"]) == (BACKWARD_FORMS[1], "1")
    assert measure.os.environ["SWAT_LM_BACKWARD"] == BACKWARD_FORMS[0]
    assert "SWAT_LM_X" not in measure.os.environ
    variants = peers.ours()(SHAPE, inputs().slopes, FakeDevice(), True)
    assert [v.settings for v in variants] == ["exact", "exact, two kernels", "exact, five products"]


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


def test_peers_that_are_not_installed_say_so():
    for name in ("flash-attn 2", "flash-attn 3", "flash-attn 4", "FlashSigmoid", "fla parallel attention"):
        with pytest.raises(NotHereError, match="not installed: No module named"):
            built(peers.PEERS[name])
    with pytest.raises(NotHereError, match="a mask of 65536 x 65536"):
        peers.sdpa(Shape(1, 1, 1, 65536, 8, 16), inputs().slopes, FakeDevice(), False)


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
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
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


def test_a_run_is_recorded_and_shown(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "without fla: not installed" in out
    record = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    tasks = [(row["task"], row["ms"]) for row in record["rows"] if "task" in row]
    assert [task for task, _ in tasks] == ["forward", "backward", "decode", "forward", "backward"]
    assert record["gpu"] == {"name": "Fake H100", "driver_version": "1.2"}
    assert record["settings"]["left out for want of time"] == record["settings"]["failed"] == "nothing"
    assert record["details"][0]["settings"] == {"swat-lm sigmoid": "", "SDPA with a mask": ""}
    # a window of at most 256 is judged by memory, a step of 64 streams too
    assert [line["goal"].split(":")[1] for line in record["goals"]] == [" share of memory"] * 5
    page = tmp_path / "page.md"
    page.write_text("<!-- attention_gpu:begin -->\n<!-- attention_gpu:end -->\n")
    assert table.main(["--page", str(page), "--results", str(tmp_path / "results")]) == 0
    text = page.read_text()
    assert "Fake H100 (driver version: 1.2); " in text
    assert text.count("| shape | task | setting | ms |") == text.count("| training step | batch | ms |") == 1
    assert f"| {SHAPE} | backward | " in text


def test_a_wrong_kernel_has_no_figures(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, wrapped(DEFECTS["the gradient of the value is wrong"])) == 1
    record = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    rows = [row for row in record["rows"] if row.get("task") in ("forward", "backward")]
    assert len(rows) == 4
    for row in rows:
        # nor has a peer beside it
        assert row["ms"] is row["TFLOP/s"] is row["SDPA ms"] is None
        assert "refused, the gradient of the value is wrong by" in row["no figures"]
    assert capsys.readouterr().err.count("no figures for swat-lm sigmoid, ") == 4


def test_a_run_out_of_time_says_what_it_left_out(tmp_path, monkeypatch):
    assert run(tmp_path, monkeypatch, deadline=0.0) == 0
    record = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    assert record["rows"] == []
    left_out = record["settings"]["left out for want of time"]
    assert left_out.startswith(f"attention {SHAPE}; decode {RINGS}; training step (1, 16); attention ")


def test_a_part_that_would_not_end_in_time_is_not_begun(tmp_path, monkeypatch):
    # every look at the clock takes ten seconds: so does a part
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(attention_gpu.time, "monotonic", lambda: next(ticks))
    assert run(tmp_path, monkeypatch, deadline=65.0) == 0
    record = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    # the second attention shape would begin at 60 and end at 70
    assert record["settings"]["left out for want of time"] == "attention B1 H2 K2 T64 D8 W16"
    assert [row.get("task") for row in record["rows"]] == ["forward", "backward", "decode", None]


def test_a_part_that_does_not_fit_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    def draw(shape, *rest):
        if shape == SHAPE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")
        return Inputs(shape, *rest)

    monkeypatch.setattr(comparison, "Inputs", draw)
    assert run(tmp_path, monkeypatch) == 1
    record = json.loads((tmp_path / "results" / "attention_gpu.json").read_text())
    reason = f"attention {SHAPE}: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert record["settings"]["failed"] == reason
    assert [row.get("task") for row in record["rows"]] == ["decode", None, "forward", "backward"]
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


def test_candidates_of_one_layout_share_their_inputs():
    shape_inputs = inputs()
    first, second = (candidate(lambda q, k, v: q, name, heads_first=True) for name in "ab")
    assert shape_inputs.arranged(first) is shape_inputs.arranged(second)
    assert shape_inputs.arranged(first)[1][0].shape == (2, 4, 150, 8)


@pytest.mark.parametrize(("length", "window", "block"), [(150, 40, 32), (256, 64, 64), (300, 1, 64), (300, 1000, 128)])
def test_blocks_of_a_window_are_those_of_all_its_pairs(length, window, block):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = peers._block_mask(Shape(1, 1, 1, length, window, 8), FakeDevice(), block)
    expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for ours, theirs in (
        ((mask.kv_num_blocks, mask.kv_indices), (expected.kv_num_blocks, expected.kv_indices)),
        ((mask.full_kv_num_blocks, mask.full_kv_indices), (expected.full_kv_num_blocks, expected.full_kv_indices)),
        ((mask.q_num_blocks, mask.q_indices), (expected.q_num_blocks, expected.q_indices)),
    ):
        assert torch.equal(ours[0], theirs[0])
        for row, count in enumerate(ours[0][0, 0].tolist()):
            assert torch.equal(ours[1][0, 0, row, :count], theirs[1][0, 0, row, :count])


def test_a_compiled_backward_can_be_taken_again():
    """By default PyTorch's compiled backward gives away what the forward saved, and refuses a second pass."""
    attend = candidate(device.compile_to_repeat(lambda q, k, v: (q @ k.mT).sin() @ v, backend="aot_eager"))
    shape_inputs = Inputs(Shape(1, 2, 2, 4, 4, 8, torch.float32), torch.device("cpu"), 2)
    # as verification takes it
    leaves = [t.detach().requires_grad_() for t in shape_inputs.sets[0][:3]]
    torch.autograd.grad(attend.attend(*leaves), leaves, shape_inputs.sets[0][3])
    backward = Rotation(attend, "backward", shape_inputs)
    backward.repeats = 5
    assert backward.timed_by(FakeDevice().clock) == 0.01 / 5


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


def test_a_step_is_verified_on_a_few_sequences_of_the_whole_batch(monkeypatch):
    batches = []
    definition = decoding.window_attention_step

    def watched(query, *rest, **options):
        batches.append((options["backend"], query.shape[0]))
        return definition(query, *rest, **options)

    monkeypatch.setattr(decoding, "window_attention_step", watched)
    slopes = torch.full((RINGS.heads,), -0.1)
    decoding.verify_step(decoding.ours("blocked")(RINGS, slopes), RINGS, slopes)
    assert batches == [("reference", 3), ("reference", 3), ("blocked", 64)]


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
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    shape = Shape(1, 4, 2, 512, 128, 64)
    plan = Plan((shape,), (Shape(8, 4, 2, 512, 128, 64),), (), rounds=2, thorough=False)
    assert attention_gpu.run(device.CudaDevice(), plan) == 0

"""The candidates of the benchmark for GPUs: each is verified before it is timed, wrong ones are refused."""

import pytest
import torch

from benchmarks import measure
from benchmarks.gpu import decoding, device, peers
from benchmarks.gpu.candidates import Inputs, NotHereError, Rotation, sets_that_leave_the_cache
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.verify import WrongResultError, check_against, verify
from swat_lm.ops.triton.configurations import BACKWARD_FORMS

from .fake_gpu import DEFECTS, RINGS, SHAPE, FakeDevice, built, candidate, inputs, wrapped


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


def test_peers_that_are_not_installed_say_so():
    for name in ("flash-attn 2", "flash-attn 3", "flash-attn 4", "FlashSigmoid", "fla parallel attention"):
        with pytest.raises(NotHereError, match="not installed: No module named"):
            built(peers.PEERS[name])
    with pytest.raises(NotHereError, match="a mask of 65536 x 65536"):
        peers.sdpa(Shape(1, 1, 1, 65536, 8, 16), inputs().slopes, FakeDevice(), False)


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

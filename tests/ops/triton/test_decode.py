"""The decoding kernel against the definition, under the interpreter, and compiled for GPUs that are not there."""

import pytest
import torch

from benchmarks.gpu.machine_code import POINTERS, compile_kernel
from swat_lm.ops.calls import StepCall
from tests.ops.triton.steps import Step, check, tensors_of

# slots, W, H, K, D: one head per key/value head, a group, a group that is no power of two, a window of one place
RINGS = [(5, 137, 2, 2, 24), (4, 150, 4, 2, 16), (3, 20, 6, 1, 80), (4, 1, 4, 2, 8)]


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("rings", RINGS)
def test_step(interpreted, rings, score_function):
    interpreted(check, Step(rings, torch.float32, score_function))


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("rings", RINGS[:2])
def test_split_windows(interpreted, rings, score_function):
    # three programs: a new stream has places for one, a young one for two; the last ends inside a tile
    interpreted(check, Step(rings, torch.float32, score_function, 3))


@pytest.mark.parametrize("rings", RINGS[:3])
def test_rotates_query_and_key(interpreted, rings):
    interpreted(check, Step(rings, splits=2, rotary=True))


def test_any_strides(interpreted):
    interpreted(check, Step(RINGS[1], head_major=False))


@pytest.mark.parametrize(
    ("rings", "dtype", "score_function"),
    # one head has no product on tensor cores, whose bfloat16 the interpreter computes wrongly
    [
        (RINGS[0], torch.bfloat16, "sigmoid"),
        (RINGS[0], torch.bfloat16, "softmax"),
        (RINGS[2], torch.float16, "softmax"),
    ],
)
def test_half_precision(interpreted, rings, dtype, score_function):
    interpreted(check, Step(rings, dtype, score_function, 2))


def run_stream():
    from swat_lm.ops import window_attention
    from swat_lm.ops.ring import empty_ring
    from swat_lm.ops.triton import decode

    torch.manual_seed(0)
    length, window = 17, 7
    query, key, value = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16), torch.randn(2, length, 2, 16)
    slopes = torch.tensor([-0.5, -0.25, 0.5, 0.25])
    expected = window_attention(query, key, value, window=window, slopes=slopes, score_bias=-0.5)
    rings = [empty_ring(2, window, 2, 16, query) for _ in range(2)]
    for t in range(length):
        now = slice(t, t + 1)
        call = StepCall(
            query[:, now], key[:, now], value[:, now], *rings, torch.tensor([1, 0]), torch.full((2,), t),
            "sigmoid", 0.25, slopes, bias=-0.5,
        )  # fmt: skip
        output, _ = decode.step(call)
        torch.testing.assert_close(output, expected[:, now], atol=1e-5, rtol=1e-5)

    # no sequence at all
    nothing = query[:0, :1], key[:0, :1], value[:0, :1]
    numbers = torch.zeros(0, dtype=torch.int64)
    output, lse = decode.step(StepCall(*nothing, *rings, numbers, numbers, "softmax", 0.25, slopes))
    assert (output.shape, lse.shape) == ((0, 1, 4, 16), (0, 1, 4))


def test_token_by_token_is_one_pass(interpreted):
    interpreted(run_stream)


def check_entry():
    from swat_lm.ops import window_attention_step
    from swat_lm.ops.rotary import rotary_angles

    tensors, slopes, bias = tensors_of(Step(RINGS[2]))
    tensors[3:5] = (ring.nan_to_num(0.0) for ring in tensors[3:5])
    angles = rotary_angles(tensors[6][:, None], RINGS[2][-1])
    options = {"score_function": "softmax", "slopes": slopes, "score_bias": bias, "return_lse": True, "rotary": angles}
    results = {}
    for backend in ("triton", "blocked"):
        rings = [ring.clone() for ring in tensors[3:5]]
        call = (*tensors[:3], *rings, *tensors[5:])
        results[backend] = *window_attention_step(*call, backend=backend, **options), *rings
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # a pool's rings and a joined projection are views
    wide = torch.cat([t.flatten(2) for t in tensors[:3]], dim=-1).split([6 * 80, 80, 80], dim=-1)
    views = [t.unflatten(2, (-1, 80)) for t in wide]
    rings = [ring.clone() for ring in tensors[3:5]]
    output, _ = window_attention_step(*views, *rings, *tensors[5:], backend="triton", **options)
    assert torch.equal(output, results["triton"][0])
    call = StepCall(*tensors, "sigmoid", 0.3, slopes, bias, backend="triton")
    torch.library.opcheck(torch.ops.swat_lm.window_attention_step, tuple(call))


def test_the_entry_dispatches_to_the_kernel(interpreted):
    interpreted(check_entry)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "score_function"),
    [
        (4, 4, torch.bfloat16, "sigmoid"),
        (4, 4, torch.float32, "softmax"),
        (8, 2, torch.bfloat16, "softmax"),
        (32, 1, torch.float16, "sigmoid"),
    ],
)
def test_on_a_gpu(heads, kv_heads, dtype, score_function, head_dim):
    for window, splits in ((1, None), (300, None), (1000, 1), (1000, 5)):
        check(Step((5, window, heads, kv_heads, head_dim), dtype, score_function, splits, rotary=True), "cuda")
    check(Step((5, 1000, heads, kv_heads, head_dim), dtype, score_function, head_major=False), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("batch", [1, 200])
def test_a_captured_step_is_right_at_every_position(batch):
    from swat_lm.ops import window_attention_step
    from swat_lm.ops.ring import empty_ring

    torch.manual_seed(0)
    window, like = 300, torch.empty(0, device="cuda")
    query, key, value = (torch.randn(batch, 1, heads, 64, device="cuda") for heads in (4, 2, 2))
    rings = [empty_ring(batch, window, 2, 64, like) for _ in range(2)]
    expected_rings = [ring.clone() for ring in rings]
    slot = torch.arange(batch, device="cuda")
    position = torch.randint(0, 2 * window, (batch,), device="cuda")
    start = position.clone()

    def step(rings, backend):
        output = window_attention_step(query, key, value, *rings, slot, position, backend=backend)
        position.add_(1)
        return output

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(rings, "triton")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step(rings, "triton")
        position.copy_(start)
        for ring in rings:
            ring.zero_()
        results = []
        for _ in range(5):
            for tensor in (query, key, value):
                tensor.normal_()
            before = position.clone()
            graph.replay()
            results.append(output.clone())
            position.copy_(before)
            torch.testing.assert_close(results[-1], step(expected_rings, "reference"), atol=1e-4, rtol=1e-4)
    assert len({float(result.sum()) for result in results}) == 5


def test_windows_are_split_until_the_device_is_full():
    decode = pytest.importorskip("swat_lm.ops.triton.decode", reason="triton is not installed")
    assert decode.num_splits(8 * 16, 1024, 132) == 3
    assert decode.num_splits(64 * 16, 1024, 132) == 1
    assert decode.num_splits(1, 4096, 132) == 32
    # a program of fewer places costs more than it saves
    assert decode.num_splits(1, 128, 132) == 1
    assert decode.num_splits(1, 1, 132) == 1


def arguments(dtype, group, head_dim, softmax):
    """A launch of the decoding kernel, in the compiler's words."""
    from swat_lm.ops.triton import decode

    tile = decode.DecodeTile.of(group, head_dim, getattr(torch, dtype).itemsize)
    kernel = decode._decode
    described: dict = dict.fromkeys(kernel.arg_names, "i32:16")
    described |= dict.fromkeys(("query", "key", "value", "key_ring", "value_ring", "output"), POINTERS[dtype])
    described |= dict.fromkeys(("slopes", "cos", "sin", "lse", "maxima", "totals"), "*fp32")
    described |= {"parts": "*fp32", "arrivals": "*i32"}
    described |= {"slot": "*i64", "position": "*i64", "score_bias": None, "scale": "fp32", "bias": "fp32"}
    described |= {"num_kv_heads": "i32", "key_channel": 1, "value_channel": 1}
    described |= {
        "GROUP": group, "HEAD_DIM": head_dim, "SOFTMAX": softmax, "HAS_SLOPES": True, "HAS_SCORE_BIAS": False,
        "ROTARY": True, "SPLIT": True, "HARDWARE": True, "ROWS": tile.rows, "BLOCK_DIM": tile.block_dim,
        "PLACES": tile.places, "STAGES": tile.stages,
    }  # fmt: skip
    return kernel, described, tile


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "softmax"),
    [("bfloat16", 1, 64, False), ("bfloat16", 8, 128, False), ("float16", 1, 128, True)],
)
def test_compiles_without_spills(capability, dtype, group, head_dim, softmax):
    pytest.importorskip("triton", reason="triton is not installed")
    kernel, described, tile = arguments(dtype, group, head_dim, softmax)
    compiled = compile_kernel(kernel, described, capability, tile.warps, tile.stages)
    assert compiled.spills == 0
    assert bool(compiled.tensor_core_products) == (group > 1)
    # tiles are on their way while others are used
    assert compiled.instructions["LDGSTS"] > 0

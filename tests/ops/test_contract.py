"""The wrapper: bad input, autocast, torch.compile and the checks of torch.library."""

import logging
from types import SimpleNamespace

import pytest
import torch

from swat_lm.ops import dispatch, window_attention, window_attention_step
from swat_lm.ops.calls import AttentionCall, StepCall
from swat_lm.ops.library import Cotangents
from swat_lm.ops.rotary import apply_rotary, rotary_angles


def tensors(heads=4, kv_heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(2, 10, heads, 8, dtype=dtype),
        torch.randn(2, 10, kv_heads, 8, dtype=dtype),
        torch.randn(2, 10, kv_heads, 8, dtype=dtype),
    )


BAD = [
    ({"window": 0}, r"^window: expected at least 1 .* got 0"),
    ({"window": -3}, r"^window: expected at least 1 .* got -3"),
    ({"window": 2.5}, r"^window: expected an integer .* got 2.5"),
    ({"window": True}, r"^window: expected an integer .* got True"),
    ({"score_function": "tanh"}, r"^score_function: expected one of sigmoid, softmax; got 'tanh'"),
    ({"backend": "cuda"}, r"^backend: expected one of auto, reference, blocked, triton; got 'cuda'"),
    ({"precision": "half"}, r"^precision: expected one of"),
    ({"precision": "fast"}, r"^precision: 'fast' serves bfloat16 and float16 inputs only, got torch.float32"),
    ({"slopes": torch.zeros(3)}, r"^slopes: expected one number per query head, shape \[4\], got \[3\]"),
    ({"slopes": torch.zeros(4, dtype=torch.int64)}, r"^slopes: expected a floating-point tensor"),
    ({"slopes": torch.zeros(4, device="meta")}, r"^slopes: expected the query's device cpu, got meta"),
    ({"score_bias": torch.zeros(1)}, r"^score_bias: expected one number per query head"),
    ({"score_bias": float("nan")}, r"^score_bias: expected a finite number"),
    (
        {"first_visible": torch.zeros(2, 9, dtype=torch.int32)},
        r"^first_visible: expected \[batch, queries\] = \[2, 10\]",
    ),
    ({"last_visible": torch.zeros(2, 10)}, r"^last_visible: expected int32"),
    (
        {"skip_saturated": True, "score_function": "softmax"},
        r"^skip_saturated: only sigmoid weights saturate",
    ),
    ({"softcap": 0.0}, r"^softcap: expected a positive number, or None to cap no scores; got 0.0"),
    ({"softcap": 5.0, "backend": "triton"}, r"^backend: 'triton' cannot serve this call: softcap is served"),
    ({"hidden": torch.zeros(2, 9, dtype=torch.bool)}, r"^hidden: expected bool \[batch, keys\] = \[2, 10\]"),
    ({"hidden": torch.zeros(2, 10)}, r"^hidden: expected bool .* got torch.float32"),
    ({"hidden": torch.zeros(2, 10, dtype=torch.bool), "backend": "triton"}, r"cannot serve .*: hidden is served"),
    ({"return_lse": True}, r"^return_lse: only softmax has a normaliser"),
    ({"query": torch.zeros(2, 10, 8)}, r"^query: expected 4 dimensions"),
    ({"query": torch.zeros(2, 10, 3, 8)}, r"^query: 3 query heads cannot be shared evenly by 2"),
    ({"query": torch.zeros(2, 11, 4, 8)}, r"^query: 11 queries over 10 keys"),
    ({"key": torch.zeros(2, 10, 2, 8, dtype=torch.float64)}, r"^key: expected the query's dtype torch.float32"),
    ({"key": torch.zeros(2, 10, 2, 8, device="meta")}, r"^key: expected the query's device cpu, got meta"),
    ({"key": torch.zeros(1, 10, 2, 8), "value": torch.zeros(1, 10, 2, 8)}, r"^key: expected the query's batch"),
    ({"value": torch.zeros(2, 9, 2, 8)}, r"^value: expected the key's shape"),
    ({"query": torch.zeros(2, 10, 4, 8, dtype=torch.int64)}, r"^query: expected a floating-point"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    query, key, value = tensors()
    arguments = {"query": query, "key": key, "value": value, "window": 4, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


def test_autocast_casts_query_key_and_value_only():
    query, key, value = tensors()
    slopes = torch.tensor([-0.3, -0.1, 0.1, 0.3]).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = window_attention(query, key, value, window=4, slopes=slopes)
    assert output.dtype == torch.bfloat16
    assert torch.autograd.grad(output.float().sum(), slopes)[0].dtype == torch.float32
    expected = window_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), window=4, slopes=slopes)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_opcheck(score_function):
    query, key, value = (t.requires_grad_() for t in tensors())
    slopes, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    first = torch.zeros(2, 10, dtype=torch.int32)
    plain = AttentionCall(query, key, value, 4, score_function, 0.3, backend="blocked")
    for call in (
        plain._replace(slopes=slopes, score_bias=bias, first_visible=first),
        plain,
        plain._replace(slopes=slopes.detach(), score_bias=bias, last_visible=first),
        plain._replace(softcap=0.5, hidden=torch.arange(20).view(2, 10) % 3 == 0),
    ):
        torch.library.opcheck(torch.ops.swat_lm.window_attention, tuple(call))


def test_results_have_the_strides_the_fake_kernels_promise():
    """Inductor asserts them; opcheck compares shapes only."""
    query, key, value = tensors()
    query, key, value = query.transpose(1, 2).contiguous().transpose(1, 2), key, value
    call = AttentionCall(query, key, value, 4, "softmax", 0.3, backend="blocked")
    results = torch.ops.swat_lm.window_attention(*call)
    given = Cotangents(torch.ones_like(query), None, None, None, *[False] * 3)
    grads = torch.ops.swat_lm.window_attention_backward(*given, *call)
    for result in (*results, *grads):
        assert result.is_contiguous()


def test_opcheck_of_the_step():
    query, key, value = (t[:, :1] for t in tensors())
    rings = torch.zeros(2, 3, 4, 2, 8)
    places = torch.tensor([0, 2]), torch.tensor([5, 1])
    call = StepCall(query, key, value, *rings, *places, "softmax", 0.3, backend="blocked")
    for one in (call, call._replace(softcap=0.5)):
        torch.library.opcheck(torch.ops.swat_lm.window_attention_step, tuple(one))


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_compiles_to_one_graph(softcap):
    query, key, value = (t.requires_grad_() for t in tensors())
    slopes = torch.randn(4, requires_grad=True)

    def loss(query, key, value, slopes):
        output, lse = window_attention(
            query, key, value, window=3, score_function="softmax", slopes=slopes, softcap=softcap, return_lse=True
        )
        return output.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(query, key, value, slopes), (query, key, value, slopes))
    gradients = torch.autograd.grad(compiled(query, key, value, slopes), (query, key, value, slopes))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_step_compiles_and_mutates_its_rings():
    query, key, value = (t[:, :1].contiguous() for t in tensors())
    position, slot = torch.tensor([0, 3]), torch.tensor([0, 1])

    def run(step):
        rings = torch.zeros(2, 2, 4, 2, 8)
        with torch.no_grad():
            return step(query, key, value, rings[0], rings[1], slot, position), rings

    compiled = torch.compile(window_attention_step, fullgraph=True, backend="aot_eager")
    (expected, expected_rings), (output, rings) = run(window_attention_step), run(compiled)
    torch.testing.assert_close(output, expected)
    assert torch.equal(rings, expected_rings)
    assert rings.count_nonzero() > 0


def test_a_slower_path_is_announced_once_by_name(caplog):
    dispatch._announced.clear()
    query = torch.zeros(1, 1, 1, 8, device="meta")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch.choose_backend("auto", query) == "blocked"
    assert len(caplog.records) == 1
    assert "slower 'blocked' PyTorch backend: the kernels are for NVIDIA GPUs" in caplog.text
    assert dispatch.choose_backend("reference", query) == "reference"


def test_what_kernels_lack_is_served_without_them_on_a_gpu_too(caplog):
    dispatch._announced.clear()
    # of a query only these are looked at, and here is no GPU
    query = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(2, 10, 4, 64))
    with caplog.at_level(logging.WARNING):
        assert dispatch.choose_backend("auto", query, "softcap") == "blocked"
    assert "slower 'blocked' PyTorch backend: softcap is served by 'blocked' and 'reference' alone" in caplog.text
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot serve this call: softcap is served by 'blocked'"):
        dispatch.choose_backend("triton", query, "softcap")
    assert dispatch.choose_backend("reference", query, "softcap") == "reference"


def test_triton_is_refused_where_it_cannot_run():
    query, key, value = tensors()
    message = r"^backend: 'triton' cannot serve this call: .*(interpreter runs the kernels|triton is not installed)"
    with pytest.raises(ValueError, match=message):
        window_attention(query, key, value, window=4, backend="triton")


def test_why_the_kernels_cannot_serve_a_gpu(monkeypatch):
    availability = pytest.importorskip("swat_lm.ops.triton.availability")
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.device("cuda", 0)
    assert availability.why_not(gpu, torch.bfloat16, 128) is None
    assert "up to 65,535 sequences" in availability.why_not(gpu, torch.bfloat16, 128, True)
    assert "up to 256 channels, these have 320" in availability.why_not(gpu, torch.bfloat16, 320)
    assert "float64" in availability.why_not(gpu, torch.float64, 128)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "on CPU tensors only; unset it" in availability.why_not(gpu, torch.bfloat16, 128)


def test_sizes_may_be_symbols():
    """torch.compile(dynamic=True): the backend is chosen once, whatever the sizes."""
    step = (torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8), torch.arange(2), torch.arange(2))

    def choose(query):
        return query + 1 if dispatch.choose_backend("auto", query) == "blocked" else query

    def take_step(query, key, value):
        return window_attention_step(query, key, value, *step)

    query = torch.zeros(2, 10, 4, 8, device="meta")
    assert torch.compile(choose, fullgraph=True, dynamic=True, backend="eager")(query).shape == query.shape
    first = [t[:, :1] for t in tensors()]
    compiled = torch.compile(take_step, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*first), take_step(*first))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("shared", [False, True])
def test_rotary_is_a_rotation_before_the_call(backend, shared):
    query, key, value = (t.requires_grad_() for t in tensors())
    positions = torch.arange(3, 13) if shared else torch.stack((torch.arange(10), torch.arange(7, 17)))
    angles = rotary_angles(positions, 8)
    fused = window_attention(query, key, value, window=4, rotary=angles, backend=backend)
    rotated = (apply_rotary(query, *angles), apply_rotary(key, *angles))
    assert torch.equal(fused, window_attention(*rotated, value, window=4, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 4, 8)}, r"^rotary: serves queries and keys of the same tokens, got 4 queries"),
        ({"last_visible": torch.zeros(2, 10, dtype=torch.int32)}, r"^rotary: serves .* and last_visible; rotate both"),
        ({"rotary": (torch.zeros(10, 8), torch.zeros(10, 4))}, r"^rotary: expected the cosine \[T, D/2\].*\[10, 8\]"),
        ({"rotary": (torch.zeros(10, 4), torch.zeros(10, 4).long())}, r"^rotary: expected the sine as a floating"),
        ({"rotary": (torch.zeros(10, 4), torch.zeros(10, 4).requires_grad_())}, r"^rotary: angles get no gradient"),
    ],
)
def test_bad_rotary(change, message):
    query, key, value = tensors()
    angles = (torch.ones(10, 4), torch.zeros(10, 4))
    arguments = {"query": query, "key": key, "value": value, "window": 4, "rotary": angles, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)

"""The pieces of a Mamba-2 layer put together: equal to the layer of transformers, and to the plain recurrence."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from swat_lm.ops import gated_norm
from swat_lm.ops.gated_norm import gated_rms_norm
from swat_lm.ops.short_convolution import short_convolution, short_convolution_step
from swat_lm.ops.state_space import state_space_scan, state_space_step
from tests.exactness import assert_as_exact_as_pytorch

WIDTH, HEADS, HEAD_DIM, GROUPS, STATE = 32, 8, 8, 2, 16


@pytest.fixture(scope="module")
def mixer():
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=HEADS, head_dim=HEAD_DIM, n_groups=GROUPS, state_size=STATE, expand=2,
        chunk_size=16, num_hidden_layers=1, vocab_size=64,
    )  # fmt: skip
    mixer = Mamba2Mixer(config, 0)
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(mixer.D)
    return mixer


def layer(mixer, hidden, convolve, scan):
    """Mamba-2 (arXiv 2405.21060, section 7) out of a convolution and a scan, in the dtype of `hidden`."""
    weights = {name: x.to(hidden.dtype) for name, x in mixer.named_parameters()}
    inner, states = HEADS * HEAD_DIM, GROUPS * STATE
    gate, mixed, step_size = F.linear(hidden, weights["in_proj.weight"]).split([inner, inner + 2 * states, HEADS], -1)
    mixed = convolve(mixed, weights["conv1d.weight"][:, 0], weights["conv1d.bias"])
    value, key, query = mixed.split([inner, states, states], -1)
    value, key, query = (
        value.unflatten(-1, (HEADS, -1)),
        key.unflatten(-1, (GROUPS, -1)),
        query.unflatten(-1, (GROUPS, -1)),
    )
    step_size = F.softplus(step_size + weights["dt_bias"])
    output = scan(query, key, value, -step_size * weights["A_log"].exp(), step_size)
    output = (output + weights["D"][:, None] * value).flatten(2)
    output = gated_rms_norm(
        output, gate, weights["norm.weight"], eps=mixer.norm.variance_epsilon, group_size=inner // GROUPS
    )
    return F.linear(output, weights["out_proj.weight"])


def test_a_layer_is_that_of_transformers_with_every_gradient(mixer):
    hidden = torch.randn(2, 37, WIDTH, requires_grad=True)
    leaves = [hidden, *mixer.parameters()]

    def ours(hidden, backend="chunked"):
        return layer(
            mixer, hidden, lambda *x: short_convolution(*x)[0], lambda *x: state_space_scan(*x, backend=backend)[0]
        )

    results = []
    for output in (mixer(hidden), ours(hidden)):
        results.append((output, *torch.autograd.grad(output.sin().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
    recomputed = torch.autograd.grad(checkpoint(ours, hidden, use_reentrant=False).sin().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(recomputed, results[1][1:], strict=True))
    exact = ours(hidden.double(), backend="reference")
    torch.testing.assert_close(ours(hidden.double()), exact, atol=1e-10, rtol=1e-10)
    assert_as_exact_as_pytorch(ours(hidden).detach(), mixer(hidden).detach(), exact.detach())


def test_left_padding_prefill_and_steps_are_those_of_transformers(mixer):
    hidden = torch.randn(2, 23, WIDTH)
    mask = torch.ones(2, 23, dtype=torch.int64)
    mask[1, :6] = 0
    cache = DynamicCache(config=Mamba2Config(num_hidden_layers=1))
    conv_pool = torch.zeros(4, 3, HEADS * HEAD_DIM + 2 * GROUPS * STATE)
    pool, slot = torch.zeros(4, HEADS, HEAD_DIM, STATE), torch.tensor([2, 0])
    real = mask != 0

    def convolve(x, weight, bias):
        output, conv_pool[slot] = short_convolution(x, weight, bias, real=real)
        return output

    def scan(*x):
        output, pool[slot] = state_space_scan(*x, real=real)
        return output

    with torch.no_grad():
        expected = mixer(hidden, cache_params=cache, attention_mask=mask)
        ours = layer(mixer, hidden, convolve, scan)
        torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-5)
        for _ in range(3):
            token = torch.randn(2, 1, WIDTH)
            expected = mixer(token, cache_params=cache)
            ours = layer(
                mixer, token, lambda *x: short_convolution_step(*x, conv_pool, slot),
                lambda *x: state_space_step(*x, pool, slot),
            )  # fmt: skip
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool[slot], cache.get_recurrent_state(0, state_idx=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [12, 4, None])
def test_the_gated_norm(dtype, group_size):
    x, gate, weight = (t.to(dtype).double() for t in (torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.rand(12)))
    theirs = MambaRMSNormGated(12, group_size or 12, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    results = {}
    for before in (False, True):
        gated = [t.to(dtype).requires_grad_() for t in (x, gate, weight)]
        ours = gated_rms_norm(*gated, eps=1e-5, group_size=group_size, norm_before_gate=before)
        assert ours.dtype == dtype
        groups = (x if before else x * F.silu(gate)).unflatten(-1, (-1, group_size or 12))
        exact = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
        exact = exact * F.silu(gate) if before else exact
        assert torch.autograd.grad(ours.sum(), gated)[2].dtype == dtype
        results[before] = (ours.detach(), exact)
    assert_as_exact_as_pytorch(results[False][0], theirs(x.to(dtype), gate.to(dtype)).detach(), results[False][1])
    torch.testing.assert_close(results[True][0], results[True][1].to(dtype))


@pytest.mark.parametrize("group_size", [4, 12])
def test_gradients_of_the_gated_norm(monkeypatch, group_size):
    """Those of its definition, over rows that fill no block, also of a gate that is part of a wider row; one op."""
    monkeypatch.setattr(gated_norm, "BLOCK_BUDGET", 50)
    wide, x, weight = (torch.randn(*size, dtype=torch.float64) for size in ((2, 7, 30), (2, 7, 12), (12,)))
    gate = wide[..., 3:15]
    leaves = [tensor.requires_grad_() for tensor in (x, gate, weight)]
    groups = (x * F.silu(gate)).unflatten(-1, (-1, group_size))
    exact = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    ours = gated_rms_norm(x, gate, weight, eps=1e-5, group_size=group_size)
    torch.testing.assert_close(ours, exact, atol=1e-13, rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(gated_rms_norm(x, gate, weight, eps=1e-5, group_size=group_size), ours)
    pairs = zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, exact)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    torch.library.opcheck(torch.ops.swat_lm.gated_rms_norm, (x, gate, weight, 1e-5, group_size))


BAD = [
    (
        {"x": torch.zeros(3, 6, dtype=torch.int64)},
        r"^x: expected a tensor of float32, float64, bfloat16 or float16, got torch.int64",
    ),
    ({"gate": torch.zeros(3, 1)}, r"^gate: expected the shape of x, \[3, 6\], got \[3, 1\]"),
    ({"weight": torch.zeros(3)}, r"^weight: expected one number per channel, \[6\], got \[3\]"),
    ({"group_size": 4}, r"^group_size: expected a divisor of the 6 channels, got 4"),
    ({"group_size": 0}, r"^group_size: expected a divisor of the 6 channels, got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_the_norm_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(
            **{"x": torch.zeros(3, 6), "gate": torch.zeros(3, 6), "weight": torch.zeros(6), "eps": 1e-5, **change}
        )

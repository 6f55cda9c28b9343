"""Decoding over rings equals the first entry over the whole stream, at every step."""

import pytest
import torch

from swat_lm.ops import window_attention, window_attention_step
from swat_lm.ops.ring import empty_ring
from swat_lm.ops.rotary import apply_rotary, rotary_angles


def stream(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(batch, length, heads, 8, generator=generator)  # noqa: E731
    return draw(4), draw(2), draw(2), torch.tensor([-0.5, -0.25, 0.5, 0.25])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (2, None), (7, None), (64, None), (7, 0.5)])
def test_every_step_equals_the_full_pass(window, softcap, score_function, backend):
    length = min(5 * window + 3, 200) if window < 64 else 330
    query, key, value, slopes = stream(2, length)
    options = {"score_function": score_function, "slopes": slopes, "score_bias": -0.3, "softcap": softcap}
    full = window_attention(query, key, value, window=window, **options)
    key_ring, value_ring = torch.zeros(2, window, 2, 8), torch.zeros(2, window, 2, 8)
    slot = torch.tensor([1, 0])
    for t in range(length):
        now = slice(t, t + 1)
        output = window_attention_step(
            query[:, now], key[:, now], value[:, now], key_ring, value_ring, slot, torch.full((2,), t),
            backend=backend, **options,
        )  # fmt: skip
        torch.testing.assert_close(output, full[:, now], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("slots", [[0, 1, 2], [5, 0, 3], [2, 1, 0]])
@pytest.mark.parametrize("positions", [[2, 19, 7], [13, 13, 13], [3, 3, 3]])
@pytest.mark.parametrize(("head_major", "softcap"), [(False, None), (True, None), (False, 0.5), (True, 0.5)])
def test_positions_and_slots_agree_with_the_first_entry(slots, positions, score_function, head_major, softcap):
    """Sequences at different places of their streams, some younger than the window, in any slots of a larger pool."""
    window = 6
    query, key, value, slopes = stream(3, 20)
    make = (lambda: empty_ring(7, window, 2, 8, query)) if head_major else (lambda: torch.zeros(7, window, 2, 8))
    key_ring, value_ring = make().fill_(float("nan")), make().fill_(float("nan"))
    for b, (s, p) in enumerate(zip(slots, positions, strict=True)):
        key_ring[s], value_ring[s] = 0.0, 0.0
        for t in range(p):
            key_ring[s, t % window], value_ring[s, t % window] = key[b, t], value[b, t]
    pick = torch.tensor(positions)
    rows = torch.arange(3)
    output, *lse = _pair(
        window_attention_step(
            query[rows, pick, None],
            key[rows, pick, None],
            value[rows, pick, None],
            key_ring,
            value_ring,
            torch.tensor(slots),
            pick,
            score_function=score_function,
            slopes=slopes,
            softcap=softcap,
            return_lse=score_function == "softmax",
        )
    )
    # the same three rows by the first entry: one query each, its last visible key given
    expected, *expected_lse = _pair(
        window_attention(
            query[rows, pick, None],
            key,
            value,
            window=window,
            score_function=score_function,
            slopes=slopes,
            last_visible=pick[:, None].to(torch.int32),
            softcap=softcap,
            return_lse=score_function == "softmax",
        )
    )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(lse, expected_lse, strict=True):
        torch.testing.assert_close(ours, theirs)
    # rings of other slots are never touched
    others = [s for s in range(7) if s not in slots]
    assert key_ring[others].isnan().all()


def _pair(result):
    return result if isinstance(result, tuple) else (result,)


def test_half_precision_rings():
    query, key, value, slopes = (t.to(torch.bfloat16) for t in stream(1, 12))
    full = window_attention(query, key, value, window=5, slopes=slopes.float())
    rings = torch.zeros(2, 1, 5, 2, 8, dtype=torch.bfloat16)
    for t in range(12):
        now = slice(t, t + 1)
        output = window_attention_step(
            query[:, now], key[:, now], value[:, now], rings[0], rings[1], torch.tensor([0]), torch.tensor([t]),
            slopes=slopes.float(),
        )  # fmt: skip
        torch.testing.assert_close(output, full[:, now], atol=0.02, rtol=0.01)


@pytest.mark.parametrize("positions", [[2, 19, 7], [13, 13, 13]])
@pytest.mark.parametrize("slots", [[0, 1, 2], [5, 0, 3]])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_autocast_changes_nothing(slots, positions, score_function):
    """Whatever way the rows are decoded: at one place, at several, in order or not."""
    query, key, value, slopes = stream(3, 20)
    found = []
    for enabled in (False, True):
        rings = [empty_ring(7, 6, 2, 8, query).fill_(0.3) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(window_attention_step(
                query[:, :1], key[:, :1], value[:, :1], *rings, torch.tensor(slots), torch.tensor(positions),
                score_function=score_function, slopes=slopes,
            ))  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("shared", [False, True])
def test_rotates_when_asked_to(backend, shared):
    query, key, value, slopes = stream(3, 1)
    position = torch.tensor([9, 9, 9] if shared else [4, 0, 12])
    angles = rotary_angles(position[:1] if shared else position[:, None], 8)
    slot = torch.tensor([0, 1, 2])
    rings = torch.zeros(2, 2, 3, 5, 2, 8)
    expected = window_attention_step(
        apply_rotary(query, *angles), apply_rotary(key, *angles), value, *rings[0], slot, position, slopes=slopes
    )
    output = window_attention_step(
        query, key, value, *rings[1], slot, position, slopes=slopes, rotary=angles, backend=backend
    )
    torch.testing.assert_close(output, expected)
    assert torch.equal(rings[0], rings[1])
    with pytest.raises(ValueError, match=r"^rotary: expected the cosine"):
        window_attention_step(query, key, value, *rings[0], slot, position, rotary=(angles[0][..., :2], angles[1]))


def test_refusals():
    query, key, value, slopes = stream(2, 1)
    ring = torch.zeros(3, 4, 2, 8)
    slot, position = torch.tensor([0, 1]), torch.tensor([0, 0])
    call = lambda *args, **kw: window_attention_step(*args, **kw)  # noqa: E731
    with pytest.raises(ValueError, match=r"^query: a step takes one token"):
        call(query.repeat(1, 2, 1, 1), key, value, ring, ring.clone(), slot, position)
    with pytest.raises(ValueError, match=r"^key_ring: expected \[slots, window, 2, 8\].*got \[3, 4, 1, 8\]"):
        call(query, key, value, ring[:, :, :1], ring, slot, position)
    with pytest.raises(ValueError, match=r"^position: expected int64 \[2\]"):
        call(query, key, value, ring, ring.clone(), slot, position.int())
    with pytest.raises(ValueError, match=r"^slot: 2 sequences cannot own 1 ring, one each"):
        call(query, key, value, ring[:1], ring[:1].clone(), slot, position)
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot serve this call: .*TRITON_INTERPRET=1"):
        call(query, key, value, ring, ring.clone(), slot, position, backend="triton")
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot serve this call: softcap is served by 'blocked'"):
        call(query, key, value, ring, ring.clone(), slot, position, softcap=2.0, backend="triton")
    with pytest.raises(ValueError, match="for inference"):
        call(query, key.requires_grad_(), value, ring, ring.clone(), slot, position)
    with pytest.raises(ValueError, match=r"^slopes: expected one number per query head, shape \[4\], got \[3\]"):
        call(query, key.detach(), value, ring, ring.clone(), slot, position, slopes=slopes[:3])


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_step_of_no_sequence(backend, score_function):
    query, key = torch.randn(0, 1, 4, 8), torch.randn(0, 1, 2, 8)
    rings = [torch.zeros(3, 5, 2, 8) for _ in range(2)]
    nobody = torch.zeros(0, dtype=torch.int64)
    output = window_attention_step(
        query, key, key, *rings, nobody, nobody, score_function=score_function, backend=backend
    )
    assert output.shape == query.shape
    assert not rings[0].any()


@pytest.mark.parametrize("slopes", [None, (-0.5, -0.25, 0.5, 0.25)], ids=["plain", "slopes"])
@pytest.mark.parametrize(("score_function", "softcap"), [("sigmoid", None), ("softmax", None), ("softmax", 0.5)])
def test_a_row_is_the_same_to_the_bit_whatever_its_mates_hold(score_function, softcap, slopes):
    """And wherever it stands among them; and it is what a row by itself is, but for rounding."""
    window, place, found = 21, 13, []
    query, key, value, _ = stream(1, 1)
    options = {
        "score_function": score_function, "softcap": softcap, "return_lse": score_function == "softmax",
        "slopes": None if slopes is None else torch.tensor(slopes),
    }  # fmt: skip
    ring = torch.randn(2, window, 2, 8)
    for own, (slots, positions) in enumerate([([2, 4, 0], [place, 3, 99]), ([1, 3, 5], [40, place, 0])]):
        rings = torch.randn(2, 6, window, 2, 8).transpose(2, 3).contiguous().transpose(2, 3)
        rings[:, slots[own]] = ring
        new = [torch.randn(3, 1, *x.shape[2:]) for x in (query, key, value)]
        for x, mine in zip(new, (query, key, value), strict=True):
            x[own] = mine[0]
        at = torch.tensor(slots), torch.tensor(positions)
        found.append([x[own] for x in _pair(window_attention_step(*new, *rings, *at, **options, batch_invariant=True))])
        alone = rings[:, slots[own]].clone().unsqueeze(1)
        at = torch.tensor([0]), torch.tensor([place])
        for mine, expected in zip(
            found[-1], _pair(window_attention_step(query, key, value, *alone, *at, **options)), strict=True
        ):
            torch.testing.assert_close(mine, expected[0], atol=1e-6, rtol=1e-6)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

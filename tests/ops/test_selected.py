"""Selected attention against attention row by row over what the definition selects: values and every gradient."""

import pytest
import torch

from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.ops import selected_attention as dense
from swat_lm.ops.capped_simplex import NONE, capped_simplex
from swat_lm.ops.selected import selected_attention
from swat_lm.ops.selected_attention import MASKINGS

# rows, window, k, M, block, items before, heads alike
SHAPES = {
    "ragged": (13, 3, 3, 7, 4, 0),
    "no window": (21, 0, 2, 5, 8, 0),
    "one block": (9, 5, 4, 5, 16, 3),
    "nothing selected": (17, 2, 0, 0, 4, 2),
    "one row": (1, 3, 3, 6, 1, 3),
}


def row_by_row(query, key, value, scores, kept_key, kept_value, *, window, segments, first_visible, hidden, **how):
    batch, num_rows, heads, _ = query.shape
    num_past, most, group = key.shape[1] - num_rows, scores.shape[-1] - num_rows, heads // key.shape[2]
    count, output = kept_key.shape[2], torch.zeros_like(query)
    for b, row, h in torch.cartesian_prod(*map(torch.arange, (batch, num_rows, key.shape[2]))).tolist():
        owner = [0] * most + ([0] * num_rows if segments is None else segments[b].tolist())
        candidates = [s for s in range(most + row + 1) if scores[b, h, s] > NONE and owner[s] == owner[most + row]]
        candidates = sorted(candidates, key=lambda s: (-scores[b, h, s].item(), s))[:most]
        mask = capped_simplex(scores[b, h, candidates], count)[:count] if count and candidates else scores[b, h, :0]
        if how["masking"] == "straight":
            mask = 1 + mask - mask.detach()
        places = [num_past + s - most - window for s in candidates[:count]]
        keys, values = (
            [kept[b, h, s] if s < most else items[b, place, h] for s, place in zip(candidates, places, strict=False)]
            for kept, items in ((kept_key, key), (kept_value, value))
        )
        own = [
            j for j in range(max(0, int(first_visible[b, row]), num_past + row - window + 1), num_past + row + 1)
            if hidden is None or not hidden[b, j]
        ]  # fmt: skip
        keys, values = keys + [key[b, j, h] for j in own], values + [value[b, j, h] for j in own]
        if not keys:
            continue
        mask = torch.cat((mask, mask.new_ones(len(own))))
        for head in range(h * group, (h + 1) * group):
            products = how["scale"] * (torch.stack(keys) @ query[b, row, head])
            if how["masking"] == "both":
                products = products * mask
            products = products + how["score_bias"]
            weights = products.softmax(0) if how["score_function"] == "softmax" else products.sigmoid()
            output[b, row, head] = (weights * mask) @ torch.stack(values)
    return output


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_over_what_is_selected(shape, masking, score_function):
    num_rows, window, count, most, block, num_past = SHAPES[shape]
    torch.manual_seed(len(shape))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    query, key, value = draw(2, num_rows, 4, 4), draw(2, num_past + num_rows, 2, 4), draw(2, num_past + num_rows, 2, 4)
    kept = draw(2, 2, count, 4), draw(2, 2, count, 4)
    segments = hidden = None
    if shape in ("no window", "one block"):
        segments = (torch.rand(2, num_rows) < 0.2).cumsum(1)
    # the first row of each row's document; that of the one before the rows lies before them
    first = torch.full((2, num_rows), -num_past)
    if segments is not None:
        begins = torch.stack([torch.searchsorted(own, own) for own in segments])
        first = torch.where(segments > 0, begins, first)
    entering = 0.7 * torch.randn(2, 2, num_rows, dtype=torch.float64)
    entering = entering.masked_fill(((torch.arange(num_rows) - window)[None] < first)[:, None], NONE)
    if shape == "one block":
        hidden = torch.rand(2, num_past + num_rows) < 0.2
        of_entering = torch.cat((torch.zeros(2, window - num_past, dtype=torch.bool), hidden), dim=1)[:, :num_rows]
        entering = entering.masked_fill(of_entering[:, None], NONE)
    before = torch.full((2, 2, most), NONE, dtype=torch.float64)
    if shape != "ragged" and most:
        before[..., : most - 1] = torch.randn(2, 2, most - 1, dtype=torch.float64).sort(descending=True).values
    scores = torch.cat((before, entering), dim=-1).requires_grad_()
    inputs = query, key, value, scores, *kept
    how = {
        "window": window, "segments": segments, "first_visible": (first + num_past).int(), "hidden": hidden,
        "scale": 0.7, "score_bias": -0.5 if score_function == "sigmoid" else 0.0, "score_function": score_function,
        "masking": masking,
    }  # fmt: skip
    found, expected = selected_attention(*inputs, block=block, **how), row_by_row(*inputs, **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    along = torch.randn_like(found)
    mine = torch.autograd.grad((found * along).sum(), inputs)
    theirs = torch.autograd.grad((expected * along).sum(), inputs, allow_unused=True)
    for name, one, other in zip(
        ("query", "key", "value", "scores", "kept key", "kept value"), mine, theirs, strict=True
    ):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


ADVERSARIAL = {
    "ties": lambda drawn: (drawn * 4).round() / 4,
    "flat": torch.zeros_like,
    "apart": lambda drawn: 20 * drawn,
    # the next candidate is exactly 1 away, where a mask begins or ends
    "whole": lambda drawn: (3 * drawn).round(),
}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("scores", ADVERSARIAL)
def test_adversarial_scores(scores: str, masking: str, documents: bool):
    num_rows, window, count, most, block = 29, 3, 3, 9, 6
    generator = torch.Generator().manual_seed(len(scores))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()

    query, key, value = draw(1, num_rows, 2, 4), draw(1, num_rows, 2, 4), draw(1, num_rows, 2, 4)
    kept = draw(1, 2, count, 4), draw(1, 2, count, 4)
    # one document ends in each block, anywhere in it
    segments = None if not documents else ((torch.arange(num_rows) + 2) // block)[None]
    first = torch.zeros(1, num_rows, dtype=torch.int64)
    if segments is not None:
        first = torch.searchsorted(segments[0], segments[0])[None]
    entering = ADVERSARIAL[scores](torch.randn(1, 2, num_rows, dtype=torch.float64, generator=generator))
    entering = entering.masked_fill(((torch.arange(num_rows) - window)[None] < first)[:, None], NONE)
    before = torch.randn(1, 2, most, dtype=torch.float64, generator=generator)
    before = ADVERSARIAL[scores](before).sort(descending=True).values
    inputs = query, key, value, torch.cat((before, entering), dim=-1).requires_grad_(), *kept
    how = {
        "window": window, "segments": segments, "first_visible": first.int(), "hidden": None, "scale": 0.7,
        "score_bias": 0.0, "score_function": "softmax", "masking": masking,
    }  # fmt: skip
    found, expected = selected_attention(*inputs, block=block, **how), row_by_row(*inputs, **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    along = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    mine, theirs = (torch.autograd.grad((each * along).sum(), inputs) for each in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_blocks_change_nothing():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 50, 2, 4, dtype=torch.float64) for _ in range(3))
    scores = torch.cat((torch.full((1, 2, 12), NONE), torch.randn(1, 2, 50)), dim=-1).double()
    scores[..., 12:17] = NONE
    kept = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    results = [
        selected_attention(query, key, value, scores, kept, kept, window=5, scale=0.5, block=block)
        for block in (1, 7, 16, 64)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-13)


def test_memory_is_linear_in_the_rows():
    """Forward and backward hold so many bytes a row, whatever the length."""

    def held(num_rows: int) -> int:
        query, key, value = (torch.randn(1, num_rows, 2, 8, requires_grad=True) for _ in range(3))
        entering = torch.randn(1, 2, num_rows, dtype=torch.float64)
        scores = torch.cat((torch.full((1, 2, 16), NONE, dtype=torch.float64), entering), dim=-1).requires_grad_()
        kept = torch.zeros(1, 2, 4, 8)
        with LiveBytes() as live:
            selected_attention(query, key, value, scores, kept, kept, window=4, scale=0.5).sum().backward()
        return live.peak

    short, long, longest = (held(num_rows) for num_rows in (4096, 8192, 16384))
    assert long < 2.1 * short
    assert longest < 2.1 * long


def test_refusals():
    query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 5, 2, 4)
    scores, kept = torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="key: expected at most 2 items before the rows, got 3"):
        selected_attention(query, key, key, scores, kept, kept, window=2, scale=1.0)
    with pytest.raises(ValueError, match="scores: expected at least 3 candidates from before, got 2"):
        selected_attention(query, key, key, scores, kept, kept, window=3, scale=1.0)
    with pytest.raises(ValueError, match="masking: expected one of value, both, straight; got 'soft'"):
        selected_attention(query, key, key, scores, kept, kept, window=3, scale=1.0, masking="soft")


def test_it_compiles_and_counts_for_ragged_rows():
    """What the op says of its results before it runs is what it gives, forward and backward."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 100, 2, 4, requires_grad=True) for _ in range(3))
    scores = torch.cat((torch.full((2, 2, 12), NONE), torch.randn(2, 2, 100)), dim=-1).double()
    scores[..., 12:17] = NONE
    prefixes = torch.ops.swat_lm.capped_simplex_prefixes
    torch.library.opcheck(prefixes, (scores, None, 12, 3, 64), test_utils=("test_schema", "test_faketensor"))
    tau, _, full, free, chosen, held = prefixes(scores, None, 12, 3, 64)
    kept = torch.zeros(2, 2, 3, 4)
    call = (
        query,
        key,
        value,
        kept,
        kept.clone(),
        scores,
        tau,
        chosen,
        held,
        full,
        free,
        None,
        None,
        5,
        64,
        0.5,
        0.0,
        True,
        "value",
    )
    torch.library.opcheck(
        torch.ops.swat_lm.selected_attention,
        call,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("softmax", [True, False])
def test_a_step_is_the_same_wherever_a_row_stands(softmax):
    torch.manual_seed(0)
    rows = 5
    window = [torch.randn(rows, *size) for size in ((1, 4, 8), (4, 2, 8), (4, 2, 8))]
    scores = torch.randn(rows, 2, 12).double().sort(descending=True).values
    given = [*window, torch.ones(rows, 4).bool(), scores, torch.randn(rows, 2, 3, 8), torch.randn(rows, 2, 3, 8)]
    how = {"scale": 0.3, "score_bias": 0.0, "softmax": softmax, "masking": "value"}
    found = dense.step(*given, **how, row_by_row=True)
    assert torch.equal(dense.step(*(x.flip(0) for x in given), **how, row_by_row=True).flip(0), found)
    torch.testing.assert_close(dense.step(*given, **how), found)


def test_nothing_of_nothing():
    key, kept = torch.zeros(2, 3, 2, 4), torch.zeros(2, 2, 2, 4)
    scores = torch.full((2, 2, 5), NONE).double()
    assert selected_attention(key[:, :0, :], key, key, scores, kept, kept, window=3, scale=1.0).shape == (2, 0, 2, 4)
    empty = [x[:0] for x in (key, key, key, torch.full((2, 2, 8), NONE).double(), kept, kept)]
    assert selected_attention(*empty, window=3, scale=1.0).shape == (0, 3, 2, 4)


def test_under_autocast_products_keep_the_dtype_of_scores():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 20, 2, 4, requires_grad=True) for _ in range(3))
    scores = torch.cat((torch.full((1, 2, 12), NONE), torch.randn(1, 2, 20)), dim=-1).double()
    kept = torch.zeros(1, 2, 3, 4)

    def read() -> torch.Tensor:
        return selected_attention(query, key, value, scores, kept, kept, window=5, scale=0.5)

    expected = read()
    with torch.autocast("cpu", torch.bfloat16):
        found = read()
        gradients = torch.autograd.grad(found.sum(), (query, key, value))
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected.sum(), (query, key, value))))


def test_far_into_a_stream_only_differences_count():
    """Scores of 10^8 in the last block, which is not whole: float32 holds what is left of them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 100, 2, 4) for _ in range(3))
    kept = torch.zeros(1, 2, 3, 4)
    own = torch.arange(100.0).double().expand(1, 2, -1)

    def read(position: float) -> torch.Tensor:
        scores = torch.cat((torch.full((1, 2, 12), NONE).double(), (own + position).clone()), dim=-1)
        scores[..., 12:17] = NONE
        return selected_attention(query, key, value, scores, kept, kept, window=5, scale=0.5)

    torch.testing.assert_close(read(1e8), read(0.0), rtol=0, atol=1e-6)

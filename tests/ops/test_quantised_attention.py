"""Attention over quantised keys: linear form against one dense softmax, in values and every gradient; codebooks."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.ops.codebook import Codebook, Seen, absorbed, nearest_codes, perplexity, seen_of, unit_keys
from swat_lm.ops.flops import quantised_flops
from swat_lm.ops.quantised_attention import Laid, QuantisedCall, code_sums, dense_attention, quantised_attention
from tests.exactness import assert_as_exact_as_pytorch

BLOCK, CODES, KEY, VALUE = 4, 7, 5, 6


def drawn(num_rows: int, both_ways: bool, seed: int = 0, num_codes: int = CODES) -> dict[str, Tensor]:
    """Arguments of a call, float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "query": (3, num_rows, KEY), "value": (3, num_rows, VALUE), "codes": (num_codes, KEY),
        "bias": (2 * BLOCK - 1 if both_ways else BLOCK,),
    }  # fmt: skip
    found = {name: torch.randn(size, dtype=torch.float64, generator=generator) for name, size in sizes.items()}
    found["code"] = torch.randint(num_codes, (3, num_rows), generator=generator)
    found["key"] = found["codes"][found["code"]].clone()
    # the last row sees nothing at all
    found["seen"] = torch.rand(3, num_rows, generator=generator) > torch.tensor([[-1.0], [0.3], [1.0]])
    return found


def dense(both_ways: bool, *, query, key, value, code, codes, bias, seen) -> Tensor:
    """All pairs; what is far has no gradient of its key."""
    place = torch.arange(query.shape[1])
    distance = (place[:, None] - place)[None]
    block = place // BLOCK
    near = (block[:, None] - block <= 1) & (block - block[:, None] <= both_ways)
    visible = seen[:, None] & ((distance >= 0) | both_ways)
    return dense_attention(query, key, value, bias, visible, distance, both_ways, codes[code], near[None])


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 9, 21])
def test_it_is_dense_attention_over_quantised_keys(num_rows, both_ways, monkeypatch):
    """Also where blocks are processed one by one."""
    given = drawn(num_rows, both_ways)
    inputs = [given[name].requires_grad_() for name in ("query", "key", "value", "bias")]
    expected = dense(both_ways, **given)
    wanted = gradients(expected, inputs)
    for most in (2**20, 1):
        monkeypatch.setattr("swat_lm.ops.quantised_attention.ELEMENTS", most)
        output = quantised_attention(**given, block=BLOCK, both_ways=both_ways)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        assert not output[2].any()
        for found, one in zip(gradients(output, inputs), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=1e-12)


def test_without_a_cut_only_the_keys_gradient_is_another():
    """Far keys count by code, which has no gradient: outputs, values, queries and biases do not know of it."""
    given = drawn(30, False)
    inputs = [given[name].requires_grad_() for name in ("query", "value", "bias", "key")]
    place = torch.arange(30)
    distance = (place[:, None] - place)[None]
    visible = given["seen"][:, None] & (distance >= 0)
    whole = dense_attention(given["query"], given["key"], given["value"], given["bias"], visible, distance)
    *alike, key = gradients(whole, inputs)
    *others, cut = gradients(quantised_attention(**given, block=BLOCK), inputs)
    for found, one in zip(others, alike, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-12)
    assert (cut - key).norm() > 0.1 * key.norm()


def test_sums_from_before_stand_for_rows_from_before():
    """Counts and sums are additive, so a row may be cut where a block ends, in values and gradients."""
    given = drawn(24, False)
    inputs = [given[name].requires_grad_() for name in ("query", "key", "value", "bias")]
    whole = quantised_attention(**given, block=BLOCK)
    cut = 4 * BLOCK
    counts, totals = code_sums(
        given["code"][:, : cut - 2 * BLOCK], given["value"][:, : cut - 2 * BLOCK], given["seen"][:, : cut - 2 * BLOCK],
        CODES,
    )  # fmt: skip
    items = {name: given[name][:, cut - 2 * BLOCK :] for name in ("key", "value", "code", "seen")}
    end = quantised_attention(
        given["query"][:, cut:], codes=given["codes"], bias=given["bias"], block=BLOCK, counts=counts, totals=totals,
        **items,
    )  # fmt: skip
    torch.testing.assert_close(end, whole[:, cut:], rtol=0, atol=1e-12)
    weights = torch.randn(end.shape, dtype=end.dtype)
    found = torch.autograd.grad((end * weights).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((whole[:, cut:] * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_as_pytorch_does(dtype):
    given = drawn(40, False)
    narrow = {name: one.to(dtype) if one.is_floating_point() else one for name, one in given.items()}
    exact = dense(False, **{name: one.double() if one.is_floating_point() else one for name, one in narrow.items()})
    output = quantised_attention(**narrow, block=BLOCK)
    assert output.dtype == dtype
    assert_as_exact_as_pytorch(output, dense(False, **narrow).to(dtype), exact)


def test_the_op_is_one_that_tools_understand():
    given = drawn(9, False)
    totals = torch.zeros(3, CODES, VALUE, dtype=torch.float64)
    ops, how = torch.ops.swat_lm, ("test_schema", "test_autograd_registration", "test_faketensor")
    for name in ("query", "key", "value", "bias"):
        given[name].requires_grad_()
    order = [given.get(name) for name in QuantisedCall._fields[:7]]
    for far in ((None, None), (torch.zeros(3, CODES, dtype=torch.int64), totals.requires_grad_())):
        torch.library.opcheck(ops.quantised_attention.default, (*order, *far, BLOCK, False), test_utils=how)
    torch.library.opcheck(ops.nearest_codes.default, (given["query"].detach(), given["codes"]), test_utils=how)


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_backward_op_gives_what_compilers_are_told(both_ways):
    """Strides too, of several blocks and sequences, with sums from before."""
    given = drawn(6 * BLOCK, both_ways)
    order = [given.get(name) for name in QuantisedCall._fields[:7]]
    for far in ((None, None), (torch.ones(3, CODES).long(), torch.ones(3, CODES, VALUE, dtype=torch.float64))):
        if both_ways and far[0] is not None:
            continue
        call = (*order, *far, BLOCK, both_ways)
        output, lse = torch.ops.swat_lm.quantised_attention(*call)
        torch.library.opcheck(
            torch.ops.swat_lm.quantised_attention_backward.default, (torch.ones_like(output), output, lse, *call),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_the_backward_pass_holds_sums_of_the_square_root_of_all_blocks(monkeypatch):
    """64 groups of one block: 8 sums are kept and 8 formed again, beside what each group needs."""
    monkeypatch.setattr("swat_lm.ops.quantised_attention.ELEMENTS", 1)
    blocks, codes, size = 64, 64, 32
    given = drawn(blocks * BLOCK, False, num_codes=codes)
    given["value"] = torch.randn(3, blocks * BLOCK, size, dtype=torch.float64)
    call = (*(given.get(name) for name in QuantisedCall._fields[:7]), None, None, BLOCK, False)
    output, lse = torch.ops.swat_lm.quantised_attention(*call)
    laid = Laid(QuantisedCall(*call))
    forwards = list(laid.starts(laid.groups(), laid.begun()))
    for (group, before), (other, again) in zip(forwards, reversed(list(laid.starts_backwards())), strict=True):
        assert group == other
        assert all(torch.equal(one, same) for one, same in zip(before, again, strict=True))
    del forwards, laid
    with LiveBytes() as live:
        torch.ops.swat_lm.quantised_attention_backward(output, output, lse, *call)
    assert live.peak < 0.6 * blocks * 3 * codes * (size + 1) * 8


def test_useful_products_are_counted():
    """What rows see: their pairs counted one by one."""
    for both_ways in (False, True):
        for length in (3, 8, 13, 30):
            place = torch.arange(length)
            block = place // BLOCK
            near = (block[:, None] - block <= 1) & (block - block[:, None] <= both_ways)
            later = place > place[:, None]
            far = ~near if both_ways else ~near & ~later
            pairs = int((near if both_ways else near & ~later).sum()) + CODES * int(far.any(1).sum())
            assert quantised_flops(KEY, VALUE, length, BLOCK, CODES, 0, both_ways) == 2 * (KEY + VALUE) * pairs
            given = drawn(length, both_ways)
            with FlopCounterMode(display=False) as counted:
                quantised_attention(**given, block=BLOCK, both_ways=both_ways)
            assert counted.get_total_flops() == 3 * 2 * (KEY + VALUE) * pairs
    parts = [quantised_flops(KEY, VALUE, count, BLOCK, CODES, past) for past, count in ((0, 5), (5, 1), (6, 20))]
    assert sum(parts) == quantised_flops(KEY, VALUE, 26, BLOCK, CODES)


def test_memory_is_linear_in_rows():
    """No table of a whole row: groups of blocks hold a bounded number of sums."""
    for num_rows in (512, 4096):
        shape = (1, num_rows, 16)
        code = torch.zeros(1, num_rows, dtype=torch.int64)
        call = QuantisedCall(
            torch.zeros(shape), torch.zeros(shape), torch.zeros(1, num_rows, 64), code, torch.zeros(128, 16),
            torch.zeros(32), None, None, None, 32, False,
        )  # fmt: skip
        laid = Laid(call)
        assert all(group.stop - group.start <= laid.groups()[0].stop for group in laid.groups())
        assert laid.groups()[0].stop <= 2**20 // (128 * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(3, 9, KEY)}, r"key: expected 8 items, or 8 \(two blocks\) before them, got 9"),
        ({"value": torch.zeros(3, 7, VALUE)}, r"value: expected values and codes of \[3, 8\] items"),
        ({"bias": torch.zeros(3)}, "bias: expected 4 distances, got 3"),
        ({"counts": torch.zeros(3, CODES)}, "totals: expected counts and sums together"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        quantised_attention(**{**drawn(8, False), **change}, block=BLOCK)


def keys(count: int, seed: int = 0) -> Tensor:
    return unit_keys(torch.randn(2, count, KEY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def told(key: Tensor, codes: Tensor, real: Tensor | None = None, seed: int = 3) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    # as many numbers for every part of the same keys
    waits = torch.rand(key.shape[:2], dtype=torch.float64, generator=generator).log().neg()
    places = torch.randint(len(codes), key.shape[:2], generator=generator)
    return seen_of(key, nearest_codes(key, codes), codes, waits, places, real)


def test_codes_are_the_nearest_and_keys_have_one_length():
    key, codes = keys(50), keys(4, seed=1)[0]
    assert torch.equal(nearest_codes(key, codes), torch.cdist(key, codes.expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(key.norm(dim=-1), torch.full((2, 50), KEY**0.25, dtype=torch.float64), rtol=1e-4, atol=0)


def test_autocast_chooses_the_same_codes():
    key, codes = keys(400).float(), keys(64, seed=1)[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_codes(key, codes)
    assert torch.equal(found, nearest_codes(key, codes))


def test_a_codebook_follows_running_averages():
    """The published update, where no code is dead: c <- g c + (1 - g) sum, C = c_sum / c_count."""
    key, codes = keys(60), keys(4, seed=1)[0]
    code = nearest_codes(key, codes)
    counts, totals = torch.full((4,), 2.0, dtype=torch.float64), codes * 2
    book = absorbed(Codebook(codes, counts, totals), told(key, codes), 0.9, 0.0)
    chosen = torch.nn.functional.one_hot(code.flatten(), 4).double()
    wanted_counts = 0.9 * counts + 0.1 * chosen.sum(0)
    wanted_totals = 0.9 * totals + 0.1 * chosen.t() @ key.flatten(0, 1)
    torch.testing.assert_close(book.counts, wanted_counts)
    torch.testing.assert_close(book.codes, wanted_totals / wanted_counts[:, None])
    # nothing has come to a code of no count, so it stays where it is
    empty = absorbed(Codebook(codes, counts * 0, totals * 0), told(key[:, :0], codes), 0.9, 0.5)
    assert torch.equal(empty.codes, codes)


def test_what_is_seen_adds_up_and_padding_is_not():
    key, codes = keys(30), keys(6, seed=1)[0]
    real = torch.rand(2, 30, generator=torch.Generator().manual_seed(5)) > 0.4
    whole, noisy = told(key, codes, real), told(torch.where(real[..., None], key, torch.nan), codes, real)
    for one, other in zip(whole, noisy, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    masks = [real & (torch.arange(30) % 2 == parity) for parity in (0, 1)]
    for name in Seen._fields:
        parts = sum(getattr(told(key, codes, mask), name) for mask in masks)
        torch.testing.assert_close(parts, getattr(whole, name), rtol=1e-12, atol=0)


def test_dead_codes_begin_anew_at_keys_of_the_step():
    """Nearly always at one key: of those drawn for a place, one outweighs the others."""
    key = keys(400)
    codes = torch.cat((key[0, :2], -100 * key[0, :6]))
    seen = told(key, codes)
    book = absorbed(Codebook(codes, torch.zeros(8).double(), torch.zeros(8, KEY).double()), seen, 0.99, 0.1)
    revived = book.codes[2:]
    torch.testing.assert_close(book.counts[2:], (0.01 * seen.counts.mean()).expand(6))
    distance = torch.cdist(revived, key.flatten(0, 1)).min(1).values
    assert distance.median() < 1e-3
    assert distance.max() < 0.5
    # another key for each
    assert len(torch.cdist(revived, key.flatten(0, 1)).argmin(1).unique()) == 6
    # nor are codes planted where no key is: of weights that are all but zero the quotient would be the origin
    faint = seen._replace(spare_weight=seen.spare_weight * 0 + 1e-320, spare_totals=seen.spare_totals * 0 + 1e-320)
    book = absorbed(Codebook(codes, codes[:, 0] * 0, codes * 0), faint, 0.99, 0.1)
    assert torch.equal(book.codes[2:], codes[2:])
    # keys that are codes already are never drawn: there is nothing to gain
    exact = absorbed(Codebook(codes, codes[:, 0] * 0, codes * 0), told(key[:, :0], codes), 0.99, 0.1)
    assert torch.equal(exact.codes, codes)
    assert not told(codes[:2].expand(2, 2, -1), codes).spare_weight.any()


def test_perplexity_is_how_many_codes_are_in_use():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 0.0]).double()).item() == pytest.approx(3)
    assert perplexity(torch.zeros(3).double()).item() == 1

"""S4's state space against HiPPO's own matrices and a plain recurrence in float64, with every gradient."""

import math

import pytest
import torch

from swat_lm.ops.long_convolution import long_convolution
from swat_lm.ops.sequences import unpack
from swat_lm.ops.structured_state import cauchy, spans
from swat_lm.ops.structured_state.cauchy import taps_by_cauchy, taps_by_powers
from swat_lm.ops.structured_state.products import squares
from swat_lm.ops.structured_state.system import System, discretise, hippo_legs, legs_matrices, reading
from tests.exactness import assert_as_exact_as_pytorch

STEPS = (0.001, 0.03, 0.4)


def leaves(state_size=8, diagonal=False, seed=0):
    """A system that training has moved away from its start, with C; as leaves."""
    begin, generator = hippo_legs(state_size), torch.Generator().manual_seed(seed)
    channels = len(STEPS)

    def moved(x):
        shape = (channels, *x.shape)
        return (x * (1 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64))).requires_grad_()

    exit = torch.randn(channels, state_size // 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    step = torch.tensor(STEPS, dtype=torch.float64).requires_grad_()
    low_rank = None if diagonal else moved(begin.low_rank)
    return System(moved(begin.decay), moved(begin.angle), low_rank, moved(begin.entry), step), exit


def dense(system, exit):
    """Discrete complex matrices over both of each pair, by solving: `[M, N, N]`, `[M, N]`, `[M, N]`."""
    both = lambda x: torch.cat((x, x.conj()), dim=1)  # noqa: E731
    pairs = lambda x: torch.complex(x[..., 0], x[..., 1])  # noqa: E731
    matrix = torch.diag_embed(both(torch.complex(-system.decay, system.angle)))
    if system.low_rank is not None:
        low = both(pairs(system.low_rank))
        matrix = matrix - low[:, :, None] * low.conj()[:, None]
    one, half = torch.eye(matrix.shape[1], dtype=torch.complex128), system.step[:, None, None] / 2
    moved = torch.linalg.solve(one - half * matrix, one + half * matrix)
    entry = torch.linalg.solve(one - half * matrix, 2 * half * both(pairs(system.entry))[..., None])[..., 0]
    return moved, entry, both(pairs(exit))


def plain_taps(system, exit, length):
    matrix, state, row = dense(system, exit)
    found = []
    for _ in range(length):
        found.append((row * state).sum(1).real)
        state = (matrix @ state[..., None])[..., 0]
    return torch.stack(found, dim=1)


def recurrence(x, system, exit, state=None):
    """Outputs `[B, T, M]` token by token, and the state after them."""
    matrix, entry, row = dense(system, exit)
    state = torch.zeros(x.shape[0], *entry.shape, dtype=torch.complex128) if state is None else state
    found = []
    for token in x.unbind(1):
        state = (matrix @ state[..., None])[..., 0] + token[..., None] * entry
        found.append((row * state).sum(2).real)
    return torch.stack(found, dim=1), state


def test_the_start_is_hippo_in_another_basis():
    """For N = 8 and 64: the taps of the structured form are those of the original matrices, discretised by solving."""
    for state_size in (8, 64):
        matrix, entry, low_rank = legs_matrices(state_size)
        skew = matrix + torch.outer(low_rank, low_rank) + torch.eye(state_size) / 2
        assert (skew + skew.T).abs().max() < 1e-11
        begin, step = hippo_legs(state_size), torch.tensor([0.02], dtype=torch.float64)
        system = System(*(x[None] for x in begin), step)
        structured = discretise(system)
        one = torch.eye(state_size, dtype=torch.float64)
        dense_matrix = torch.linalg.solve(one - 0.01 * matrix, one + 0.01 * matrix)
        state = torch.linalg.solve(one - 0.01 * matrix, 0.02 * entry)
        ours = structured.entry[0]
        # what both remember: a system's energy is the same in every orthonormal basis
        for _ in range(20):
            torch.testing.assert_close((2 * ours.square().sum()).sqrt(), state.norm(), atol=1e-10, rtol=1e-10)
            ours, state = structured.matrix[0] @ ours, dense_matrix @ state
        torch.testing.assert_close(structured.matrix[0].trace(), dense_matrix.trace(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True], ids=["s4", "s4d"])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 99])
def test_taps_are_those_of_the_recurrence(length, diagonal, monkeypatch):
    """By sums and by powers, even lengths with their bin at -1 and odd ones; in values and in every gradient."""
    monkeypatch.setattr(cauchy, "BLOCK_BUDGET", 100)
    found = []
    for way in ("plain", "cauchy", "powers"):
        system, exit = leaves(diagonal=diagonal)
        if way == "plain":
            taps = plain_taps(system, exit, length)
        else:
            discrete = discretise(system)
            powers = squares(discrete.matrix, length.bit_length())
            row = reading(exit)
            taps = (
                taps_by_cauchy(system, row, powers, length)
                if way == "cauchy"
                else taps_by_powers(row, discrete.entry, powers, length)
            )
        inputs = [x for x in (*system, exit) if x is not None]
        weight = torch.linspace(0.5, 1.5, length, dtype=torch.float64)
        found.append((taps.detach(), *torch.autograd.grad((taps * weight).sin().sum(), inputs)))
    for other in found[1:]:
        for ours, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)


def test_a_convolution_is_the_recurrence():
    """Lengths below, at and beyond that of a kernel that is made once; float32 by the rule of all tests."""
    system, exit = leaves()
    with torch.no_grad():
        discrete = discretise(system)
        taps = taps_by_cauchy(system, reading(exit), squares(discrete.matrix, 9), 300)
        for length in (1, 40, 299, 300):
            x = torch.randn(2, length, len(STEPS), dtype=torch.float64)
            expected, _ = recurrence(x, system, exit)
            torch.testing.assert_close(long_convolution(x, taps), expected, atol=1e-12, rtol=1e-12)
        narrow = long_convolution(x.float(), taps)
        state, matrix, outputs = torch.zeros(2, len(STEPS), 8), discrete.matrix.float(), []
        for token in x.float().unbind(1):
            state = (matrix @ state[..., None])[..., 0] + token[..., None] * discrete.entry.float()
            outputs.append((state * reading(exit).float()).sum(2))
        exact, _ = recurrence(x.float().double(), system, exit)
        assert_as_exact_as_pytorch(
            narrow, torch.stack(outputs, dim=1), exact, summed=math.sqrt(300) * exact.std().item()
        )


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 70, 200])
def test_chunks_and_steps_after_a_state_are_the_recurrence(num_tokens):
    """Rows of several lengths; what a chunk adds and what it makes of the state before it, and token by token."""
    system, exit = leaves()
    with torch.no_grad():
        discrete, row = discretise(system), reading(exit)
        length = spans.span_length(num_tokens)
        made = spans.make_spans(discrete, row, squares(discrete.matrix, length.bit_length()), length, torch.float64)
        counts = torch.tensor([num_tokens, num_tokens // 2, 0])
        x = torch.randn(3, num_tokens, len(STEPS), dtype=torch.float64)
        x[torch.arange(num_tokens) >= counts[:, None]] = 0
        before = torch.randn(3, len(STEPS), 8, dtype=torch.float64)
        complex_before = torch.complex(before[..., :4], before[..., 4:])
        own, added = spans.run(x, counts, made)
        seen, moved = spans.passed(before, counts, num_tokens, made)
        for r, count in enumerate(counts.tolist()):
            state = torch.cat((complex_before[r], complex_before[r].conj()), dim=1)[None]
            if count:
                expected, state = recurrence(x[r : r + 1, :count], system, exit, state)
                torch.testing.assert_close((own + seen)[r, :count], expected[0], atol=1e-11, rtol=1e-11)
            after = torch.cat((state[0, :, :4].real, state[0, :, :4].imag), dim=1)
            torch.testing.assert_close((added + moved)[r], after, atol=1e-11, rtol=1e-11)
        if num_tokens == 3:
            state, steps = before[:1], []
            for place, token in enumerate(x[:1].unbind(1)):
                read, state = spans.step(token, discrete.matrix, discrete.entry, row, state, place == 1)
                steps.append(read)
            torch.testing.assert_close(torch.stack(steps, dim=1), (own + seen)[:1], atol=1e-11, rtol=1e-11)
            torch.testing.assert_close(state, (added + moved)[:1], atol=1e-11, rtol=1e-11)


def test_documents_are_taken_out_and_put_back():
    segments = torch.tensor([[0, 0, 7, 7, 9, 9], [1, 1, 1, 2, 2, 3], [0, 0, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    x = torch.arange(1, 19.0).view(3, 6, 1)
    found = unpack(segments, real, 3, 6, x.device)
    taken = sorted(
        (int(row), int(document), rows[:count, 0].tolist(), rows[count:].any().item())
        for group in found.groups
        for row, document, count, rows in zip(group.row, group.document, group.count, group.take(x), strict=True)
    )
    assert taken == [
        (0, 0, [1.0, 2.0], False), (0, 1, [3.0], False), (0, 2, [5.0, 6.0], False), (1, 1, [8.0], False),
        (1, 2, [10.0, 11.0], False),
    ]  # fmt: skip
    assert found.last.tolist() == [2, 2, 0]
    assert found.going_on.tolist() == [2, 0, 0]
    back = torch.zeros_like(x)
    for group in found.groups:
        back = group.put(group.take(x), back)
    assert torch.equal(back, x * real[..., None])


def test_the_ops_are_as_torch_library_asks():
    sums = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    size, slope = (torch.rand(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.swat_lm.cauchy_sums, (sums, size, slope, torch.rand(5, dtype=torch.float64)))
    torch.library.opcheck(torch.ops.swat_lm.state_product, (sums, sums))
    with pytest.raises(ValueError, match=r"^state_size: expected an even number of at least 2 .*, got 7"):
        hippo_legs(7)

"""What softmax's gradients need of a row, as one kernel: against the formula, in every layout, without a copy."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.machine_code import compile_kernel
from tests.exactness import assert_as_exact_as_pytorch

# B, T, H, D: rows that fill no tile, more rows than a tile, heads that are no power of two
SHAPES = [(2, 5, 3, 8), (1, 130, 2, 24), (2, 70, 1, 64), (1, 33, 2, 160), (1, 3, 1, 1)]


class LargestFloat32(TorchDispatchMode):
    """Watches for the largest float32 tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32:
                self.numbers = max(self.numbers, one.numel())
        return result


def formula(grad_output, grad_lse, output, lse):
    shift = (grad_output * output).sum(dim=-1)
    shift = shift if grad_lse is None else shift - grad_lse
    return torch.where(lse == float("-inf"), 0.0, shift)


def transposed(tensor):
    """The same numbers with heads before rows."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def layouts(grad_output):
    yield grad_output
    yield transposed(grad_output)
    # the gradients of sums: over rows, over heads and rows, and over everything but sequences
    yield grad_output[:, :1].expand_as(grad_output)
    yield grad_output[:, :1, :1].expand_as(grad_output)
    yield grad_output[:1].expand_as(grad_output)


def check(shape, dtype):
    from swat_lm.ops.triton.softmax_rows import softmax_rows

    generator = torch.Generator().manual_seed(0)
    output, given = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    lse, given_lse = (torch.randn(shape[:3], generator=generator) for _ in range(2))
    lse[:, 1], output[:, 1] = float("-inf"), 0.0
    # whatever comes for a row that sees nothing reaches nothing
    given_lse[:, 1] = float("nan")
    no_lse = (None, given_lse, transposed(given_lse.unsqueeze(-1)).squeeze(-1), given_lse[:1].expand_as(given_lse))
    for grad_output, grad_lse in itertools.product(layouts(given), no_lse):
        with LargestFloat32() as largest:
            finite_lse, shift = softmax_rows(grad_output, grad_lse, output, lse)
        # no float32 copy of the output or its gradient; the interpreter itself copies in the dtype that comes
        assert largest.numbers <= shift.numel() or dtype == torch.float32
        assert torch.equal(finite_lse, torch.where(lse == float("-inf"), float("inf"), lse))
        assert shift.is_contiguous()
        arguments = [grad_output, grad_lse, output]
        plain, exact = (
            formula(*(None if t is None else t.to(kind) for t in arguments), lse)
            for kind in (torch.float32, torch.float64)
        )
        assert_as_exact_as_pytorch(shift, plain, exact, "shift", shape[3] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula_in_every_layout(interpreted, shape, dtype):
    interpreted(check, shape, dtype)


def check_gradient_of_a_sum():
    from swat_lm.ops import window_attention
    from tests.ops.test_backends import make_inputs

    def gradients(dtype, backend, reduce):
        tensors = [t.to(dtype).requires_grad_() for t in make_inputs((2, 20, 20, 4, 2, 8))]
        output, lse = window_attention(
            *tensors[:3], window=7, score_function="softmax", slopes=tensors[3], return_lse=True, backend=backend
        )
        return torch.autograd.grad(reduce(output) + reduce(lse), tensors[:3])

    # of which every number, every row, and every head has the same gradient
    weights = torch.arange(1.0, 9.0)
    for reduce in (lambda t: t.sum(), lambda t: (t.sum((0, 1, 2)) * weights.to(t.dtype)[: t.dim() * 2]).sum()):
        exact, plain = (gradients(dtype, "reference", reduce) for dtype in (torch.float64, torch.float32))
        for ours, theirs, true in zip(gradients(torch.float32, "triton", reduce), plain, exact, strict=True):
            assert_as_exact_as_pytorch(ours, theirs, true, summed=8.0)


def test_the_gradient_of_a_sum(interpreted):
    interpreted(check_gradient_of_a_sum)


def check_far_heads():
    from swat_lm.ops.triton.softmax_rows import softmax_rows

    # the third head begins 2**31 elements into its tensor; memory that nobody touches costs nothing
    apart = 2**30
    near = torch.randn(2, 20, 3, 16, generator=torch.Generator().manual_seed(0)).half()
    far = torch.empty(2 * apart + 2 * 20 * 16, dtype=torch.float16).as_strided((2, 20, 3, 16), (320, 16, apart, 1))
    far.copy_(near)
    lse = torch.zeros(2, 20, 3)
    expected = softmax_rows(near, None, near, lse)
    for ours in (softmax_rows(far, None, near, lse), softmax_rows(near, None, far, lse)):
        assert torch.equal(ours[1], expected[1])


def test_heads_beyond_32_bits(interpreted):
    interpreted(check_far_heads)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills(capability, head_dim):
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton import softmax_rows

    for pointer, grad_lse in (("*bf16", None), ("*fp16", "*fp32"), ("*fp32", "*fp32")):
        block_dim = 1 << (head_dim - 1).bit_length()
        values = {
            "grad_output_ptr": pointer, "output_ptr": pointer, "grad_lse_ptr": grad_lse, "lse_ptr": "*fp32",
            "finite_lse_ptr": "*fp32", "shift_ptr": "*fp32", "HEAD_DIM": head_dim, "BLOCK_DIM": block_dim,
            "BLOCK_ROWS": min(softmax_rows._TILE // block_dim, softmax_rows._MOST_ROWS),
        }  # fmt: skip
        strides = {name: "i32:16" for name in softmax_rows._rows.arg_names if name.startswith("stride_")}
        arguments = {"num_rows": "i32", "num_heads": "i32", **strides, **values}
        compiled = compile_kernel(
            softmax_rows._rows, {name: arguments[name] for name in softmax_rows._rows.arg_names}, capability, 4, 3
        )
        assert compiled.spills == 0, f"{pointer}: {compiled.spills} of {compiled.registers}"

"""What softmax's gradients need of each row: its lse and its normaliser's part, read once from memory.

With weights p and dP = dO . v, a score's gradient is p (dP - shift), where shift = sum(dO * O) - d(lse) is one number
for all keys of a row. Sums are float32; no float32 copy of the output or its gradient is made.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from swat_lm.ops.triton.configurations import FUSED
from swat_lm.ops.triton.device import SIZES, load_tile, on_device, with_dense_channels

# numbers of a tile, of which four warps hold two in registers, and its rows at most
_TILE = 4096
_MOST_ROWS = 64


def softmax_rows(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lse as the backward kernels take it and the shift of every row, float32 `[B, T, H]`, contiguous.

    A row that sees nothing has an infinite lse, which makes its weights 0, and a shift of 0, whatever the gradient of
    its lse is.

    Args:
        grad_output: `[B, T, H, D]`, dense in the channels of a head only.
        grad_lse: `[B, T, H]` of any layout, or None.
        output, lse: of the forward.
    """
    batch, num_rows, num_heads, head_dim = output.shape
    output, lse = with_dense_channels(output), lse.contiguous()
    finite_lse, shift = torch.empty_like(lse), torch.empty_like(lse)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_rows = min(_TILE // block_dim, _MOST_ROWS)
    with on_device(output):
        # the heads of the same rows lie next to each other in memory
        _rows[(triton.cdiv(num_rows, block_rows) * num_heads, batch)](
            grad_output, output, grad_lse, lse, finite_lse, shift, *grad_output.stride()[:3], *output.stride()[:3],
            *((0, 0, 0) if grad_lse is None else grad_lse.stride()), num_rows, num_heads,
            HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_ROWS=block_rows, **FUSED,
        )  # fmt: skip
    return finite_lse, shift


@triton.jit(do_not_specialize=(*SIZES, "num_heads"))
def _rows(
    grad_output_ptr, output_ptr, grad_lse_ptr, lse_ptr, finite_lse_ptr, shift_ptr, stride_gb, stride_gt, stride_gh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh, num_rows, num_heads, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row = tl.program_id(0) // num_heads * BLOCK_ROWS
    sequence = tl.program_id(1).to(tl.int64)
    grad_output_ptr += sequence * stride_gb + head * stride_gh
    output_ptr += sequence * stride_ob + head * stride_oh
    d_out = load_tile(grad_output_ptr, first_row, stride_gt, num_rows, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True)
    out = load_tile(output_ptr, first_row, stride_ot, num_rows, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True)
    shift = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    exists = row < num_rows
    if grad_lse_ptr is not None:
        places = sequence * stride_lb + row.to(tl.int64) * stride_lt + head * stride_lh
        shift -= tl.load(grad_lse_ptr + places, mask=exists, other=0.0).to(tl.float32)
    places = (sequence * num_rows + row) * num_heads + head
    lse = tl.load(lse_ptr + places, mask=exists, other=0.0)
    is_empty = lse == float("-inf")
    tl.store(finite_lse_ptr + places, tl.where(is_empty, float("inf"), lse), mask=exists)
    tl.store(shift_ptr + places, tl.where(is_empty, 0.0, shift), mask=exists)

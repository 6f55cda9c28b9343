"""The sums of the short convolution as one `torch.library` op: forward and recomputing backward, in plain PyTorch.

The rows go through in blocks: on a CPU in float32 as PyTorch's convolution by channel, wherever one document fills a
block, else in blocks that a cache holds with each tap as a product and sum. The backward keeps what came in and nothing
else. Skipped tokens are the wrapper's business (`short_convolution.py`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import sum_dtype

# numbers in a block on a CPU
BLOCK_BUDGET = 2**17
# so many times as many go through PyTorch's convolution at once, whose calls cost more
BY_CHANNEL = 8


class Rows(NamedTuple):
    """What the taps read: `x [B, T, C]` behind `past [B, reach, C]`, and the document of each token or None."""

    x: Tensor
    past: Tensor
    documents: Tensor | None

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first token of every block and the one after its last."""
        batch, num_tokens, num_channels = self.x.shape
        length = num_tokens
        if self.x.device.type == "cpu":
            budget = BLOCK_BUDGET * (BY_CHANNEL if self.documents is None and self.by_channel(0, num_tokens) else 1)
            length = max(1, budget // max(1, batch * num_channels))
        for start in range(0, num_tokens, length):
            yield start, min(start + length, num_tokens)

    def behind(self, start: int, stop: int) -> Tensor:
        """Return the block's tokens behind the `reach` before them, `[B, reach + block, C]`, in the sums' precision."""
        reach = self.past.shape[1]
        if start >= reach:
            rows = self.x[:, start - reach : stop]
        else:
            rows = torch.cat((self.past[:, start:], self.x[:, :stop]), dim=1)
        return rows.to(sum_dtype(self.x))

    def by_channel(self, start: int, stop: int) -> bool:
        """Whether a block goes through PyTorch's convolution: float32 on a CPU, and one document with what it reads."""
        if (
            self.x.device.type != "cpu"
            or sum_dtype(self.x) != torch.float32
            or not torch.backends.mkldnn.is_available()
        ):
            return False
        if self.documents is None:
            return True
        reach = self.past.shape[1]
        # the past is document 0's, and numbers do not decrease
        first = self.documents[:, start - reach] if start >= reach else 0
        return bool((self.documents[:, stop - 1] == first).all())

    def within(self, start: int, stop: int, distance: int) -> Tensor | None:
        """Return 1 where what is `distance` before a token of the block is of its document, else 0, `[B, block, 1]`."""
        if self.documents is None or distance == 0:
            return None
        documents = F.pad(self.documents, (distance, 0))
        # a number: multiplied, it costs a third of what filling by a mask does
        return (documents[:, start:stop] == self.documents[:, start:stop])[..., None].to(sum_dtype(self.x))


def forward(rows: Rows, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return the output `[B, T, C]`, as in the contract."""
    output = torch.empty_like(rows.x, memory_format=torch.contiguous_format)
    columns = _columns(rows, weight, bias)
    for start, stop in rows.blocks():
        sums = _sums(rows, rows.behind(start, stop), columns, start, stop)
        output[:, start:stop].copy_(F.silu(sums, inplace=True) if silu else sums)
    return output


def backward(
    grad_output: Tensor, rows: Rows, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, past, weight and bias (zeros where there is none), last block first."""
    reach = rows.past.shape[1]
    columns = _columns(rows, weight, bias)
    d_x = torch.empty_like(rows.x, memory_format=torch.contiguous_format)
    d_columns = torch.zeros_like(columns)
    # what the taps of later blocks give to the last tokens of the one at hand
    carry = torch.zeros_like(rows.past, dtype=columns.dtype)
    for start, stop in reversed(list(rows.blocks())):
        d_sums, inputs = grad_output[:, start:stop].to(columns.dtype), rows.behind(start, stop)
        if silu:
            d_sums = torch.ops.aten.silu_backward(d_sums, _sums(rows, inputs, columns, start, stop))
        if rows.by_channel(start, stop):
            d_inputs = _by_channel_backward(d_sums, inputs, columns, d_columns)
        else:
            d_inputs = _by_tap_backward(rows, d_sums, inputs, columns, d_columns, start, stop)
        d_inputs[:, stop - start :] += carry
        d_x[:, start:stop].copy_(d_inputs[:, reach:])
        carry = d_inputs[:, :reach]
    d_weight = d_columns[:-1].t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    d_bias = d_columns[-1].to(weight.dtype if bias is None else bias.dtype, copy=True)
    return d_x, carry.to(rows.past.dtype, copy=True), d_weight, d_bias


def _columns(rows: Rows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the weights of every tap and the bias below them, `[kernel + 1, C]`."""
    columns = weight.new_zeros(weight.shape[1] + 1, weight.shape[0], dtype=sum_dtype(rows.x))
    columns[:-1] = weight.t()
    if bias is not None:
        columns[-1] = bias
    return columns


def _sums(rows: Rows, inputs: Tensor, columns: Tensor, start: int, stop: int) -> Tensor:
    """Return the bias and all taps of a block, `[B, block, C]`, from what is `behind` it."""
    reach = rows.past.shape[1]
    if rows.by_channel(start, stop):
        return _tokens(F.conv2d(_image(inputs), _filters(columns), columns[-1], groups=columns.shape[1]))
    sums = torch.addcmul(columns[-1], inputs[:, reach:], columns[reach])
    for tap in range(reach):
        read, within = inputs[:, tap : tap + stop - start], rows.within(start, stop, reach - tap)
        sums.addcmul_(read if within is None else read * within, columns[tap])
    return sums


def _by_tap_backward(
    rows: Rows, d_sums: Tensor, inputs: Tensor, columns: Tensor, d_columns: Tensor, start: int, stop: int
) -> Tensor:
    """Return the gradient of what is `behind` a block, `[B, reach + block, C]`; add that of the columns."""
    d_inputs, reach = torch.zeros_like(inputs), rows.past.shape[1]
    d_columns[-1] += d_sums.sum((0, 1))
    for tap in range(reach + 1):
        here = slice(tap, tap + stop - start)
        within = rows.within(start, stop, reach - tap)
        d_tap = d_sums if within is None else d_sums * within
        d_inputs[:, here].addcmul_(d_tap, columns[tap])
        d_columns[tap] += (d_tap * inputs[:, here]).sum((0, 1))
    return d_inputs


def _by_channel_backward(d_sums: Tensor, inputs: Tensor, columns: Tensor, d_columns: Tensor) -> Tensor:
    """The same of a block of one document; PyTorch's own gradient of such filters takes twenty times as long."""
    found = torch.ops.aten.convolution_backward(
        _image(d_sums), _image(inputs), _filters(columns), None, [1, 1], [0, 0], [1, 1], False, [0, 0],
        columns.shape[1], [True, False, False],
    )[0]  # fmt: skip
    batch, num_tokens, num_channels = d_sums.shape
    length = max(1, BLOCK_BUDGET // max(1, 2 * batch * num_channels))
    product = torch.empty_like(d_sums[:, :length])
    for start in range(0, num_tokens, length):
        some = d_sums[:, start : start + length]
        d_columns[-1] += some.sum((0, 1))
        for tap in range(len(columns) - 1):
            read = inputs[:, start + tap : start + tap + some.shape[1]]
            d_columns[tap] += torch.mul(some, read, out=product[:, : some.shape[1]]).sum((0, 1))
    return _tokens(found)


def _image(rows: Tensor) -> Tensor:
    """`[B, T, C]` as PyTorch's convolutions take it, `[B, C, 1, T]`, with the channels of a token side by side."""
    return rows.contiguous().transpose(1, 2)[:, :, None]


def _tokens(image: Tensor) -> Tensor:
    """The way back."""
    return image[:, :, 0].transpose(1, 2)


def _filters(columns: Tensor) -> Tensor:
    """The taps `[kernel + 1, C]` as filters, `[C, 1, 1, kernel]`."""
    return columns[:-1].t()[:, None, None].contiguous()


@torch.library.custom_op("swat_lm::short_convolution", mutates_args=())
def _short_convolution(
    x: Tensor, past: Tensor, documents: Tensor | None, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    # PyTorch's convolution is one of the products that autocast narrows
    with torch.autocast(x.device.type, enabled=False):
        return forward(Rows(x, past, documents), weight, bias, silu)


@_short_convolution.register_fake
def _(x, past, documents, weight, bias, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("swat_lm::short_convolution_backward", mutates_args=())
def _short_convolution_backward(
    grad_output: Tensor,
    x: Tensor,
    past: Tensor,
    documents: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return backward(grad_output, Rows(x, past, documents), weight, bias, silu)


@_short_convolution_backward.register_fake
def _(grad_output, x, past, documents, weight, bias, silu):
    d_bias = weight.new_empty(weight.shape[:1]) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), past.new_empty(past.shape), weight.new_empty(weight.shape), d_bias


def _setup_context(ctx, inputs, output):
    x, past, documents, weight, bias, silu = inputs
    ctx.save_for_backward(x, past, documents, weight, bias)
    ctx.silu = silu


def _backward(ctx, grad_output):
    # asked for once: activation checkpointing recomputes them, and refuses to do so twice
    saved = ctx.saved_tensors
    d_x, d_past, d_weight, d_bias = torch.ops.swat_lm.short_convolution_backward(grad_output, *saved, ctx.silu)
    return d_x, d_past, None, d_weight, None if saved[4] is None else d_bias, None


_short_convolution.register_autograd(_backward, setup_context=_setup_context)

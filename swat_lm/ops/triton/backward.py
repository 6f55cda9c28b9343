"""The backward of windowed attention on a GPU: which kernels run, on which tiles, and what they are given.

Sigmoid needs the queries, keys and values only, softmax also its output and lse. The kernels: backward_kernels.py.
"""

# how kernels are launched is beyond a checker of Python
# pyright: reportCallIssue=false

import torch
import triton
from torch import Tensor

from swat_lm.ops.calls import AttentionCall
from swat_lm.ops.head_bias import HeadBias
from swat_lm.ops.triton.backward_kernels import backward_key, backward_query
from swat_lm.ops.triton.configurations import Problem, backward_form, configuration, is_one_loop, launch_options
from swat_lm.ops.triton.device import on_device, with_dense_channels
from swat_lm.ops.triton.geometry import Rows
from swat_lm.ops.triton.precision import is_fast, is_folded
from swat_lm.ops.triton.rotation import angle_stride, rotate
from swat_lm.ops.triton.saturation import largest_norms
from swat_lm.ops.triton.softmax_rows import softmax_rows


def backward(
    call: AttentionCall,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor | None,
    lse: Tensor | None,
    needs_per_head: bool,
) -> tuple[Tensor, Tensor, Tensor, HeadBias]:
    """Return the gradients of query, key, value and of the bias (zeros unless `needs_per_head`).

    `output` and `lse` are those of the forward for softmax and unused for sigmoid. With angles the call's query and key
    are the rotated ones, and the gradients those of the unrotated.
    """
    query, key, value, cos, sin, scale, softmax = (
        call.query, call.key, call.value, call.cos, call.sin, call.scale, call.softmax
    )  # fmt: skip
    bias, skip_saturated = call.head_bias(), call.skip_saturated
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1], key.shape[2]
    contiguous = torch.contiguous_format
    grad_bias = HeadBias(*(torch.zeros_like(t, dtype=torch.float64) for t in bias[:2]))
    if 0 in (query.numel(), key.numel()):
        d_query, d_key, d_value = (torch.zeros_like(t, memory_format=contiguous) for t in (query, key, value))
        return d_query, d_key, d_value, grad_bias
    query, key, value, grad_output = (with_dense_channels(t) for t in (query, key, value, grad_output))
    bias, rows, fast = HeadBias(*(t.contiguous() for t in bias[:2])), Rows.of(call), is_fast(call)
    problem = Problem.of(query, key, rows.window, call.score_function)
    # to rotate a padded head back in registers would spill a hundred of them: it takes passes of its own, in float32
    rotates = cos is not None and head_dim == problem.block_dim
    grad_dtype = query.dtype if cos is None or rotates else torch.float32
    grad_key = torch.empty(key.shape, dtype=grad_dtype, device=key.device)
    grad_value = torch.empty_like(value, memory_format=contiguous)
    accumulates_query = backward_form(problem) == "five products"
    shift = None
    if softmax:
        assert output is not None
        assert lse is not None
        lse, shift = softmax_rows(grad_output, grad_lse, output, lse)
    query_norms, key_norms = (largest_norms(t) if skip_saturated else None for t in (query, key))
    group = num_heads // num_kv_heads
    common = {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_DIM": problem.block_dim, "SOFTMAX": softmax,
        "FAST": fast, "RAGGED": rows.last is not None, "ROTARY": rotates,
        "SKIP": skip_saturated, "HARDWARE": problem.hardware,
        "INPUT_PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    tensors = (query, key, value, grad_output)
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    sizes = (num_queries, num_keys, rows.offset, rows.window, scale)
    if accumulates_query:
        grad_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    else:
        grad_query = torch.empty(query.shape, dtype=grad_dtype, device=query.device)
        tile = configuration("backward query", problem)
        grid = (triton.cdiv(num_queries, tile.rows) * group, num_kv_heads, batch)
        one_loop = is_one_loop("backward query", problem, tile)
        with on_device(query):
            backward_query[grid](
                *tensors, grad_query, lse, shift, bias.slopes, bias.constant, rows.lower, rows.last, cos, sin,
                key_norms, *strides, *grad_query.stride()[:3], angle_stride(cos), *sizes, **common,
                BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys, ONE_LOOP=one_loop,
                FOLDED=is_folded(scale, fast, one_loop),
                **launch_options(tile),
            )  # fmt: skip
    name = "backward key, five products" if accumulates_query else "backward key"
    tile = configuration(name, problem)
    one_loop = is_one_loop(name, problem, tile)
    blocks = -(-num_keys // tile.keys)
    per_head = query.new_zeros((batch, num_heads, blocks, 2) if needs_per_head else (0,), dtype=torch.float32)
    with on_device(query):
        backward_key[(blocks, num_kv_heads, batch)](
            *tensors, grad_key, grad_value, grad_query, per_head, lse, shift, bias.slopes, bias.constant,
            rows.last, rows.of_keys(num_keys), cos, sin,
            query_norms, key_norms,
            *strides, *grad_key.stride()[:3], *grad_query.stride()[:3], angle_stride(cos), *sizes, **common,
            BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys, PER_HEAD=needs_per_head, QUERY=accumulates_query,
            REGULAR_LAST=rows.is_last_regular, ONE_LOOP=one_loop,
            FOLDED=is_folded(scale, fast, one_loop),
            **launch_options(tile),
        )  # fmt: skip
    if needs_per_head:
        # one number per head out of a whole call's pairs, whose signs cancel
        grad_bias = HeadBias(*per_head.double().sum(dim=(0, 2)).unbind(dim=-1))
    if cos is not None and sin is not None:
        if accumulates_query or not rotates:
            grad_query = rotate(grad_query, cos, sin, query.dtype, back=True)
        if not rotates:
            grad_key = rotate(grad_key, cos, sin, key.dtype, back=True)
    return grad_query.to(query.dtype), grad_key, grad_value, grad_bias

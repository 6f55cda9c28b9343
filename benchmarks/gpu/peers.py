"""Everything that computes windowed attention on a GPU and is installed, each at its best settings.

A peer is a function of the shape that returns candidates; the fastest that passes verification stands for it.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.candidates import Candidate, NotHereError
from benchmarks.gpu.device import Device
from benchmarks.gpu.shapes import Shape
from swat_lm.ops import window_attention
from swat_lm.ops.triton.configurations import BACKWARD_FORMS

Peer = Callable[[Shape, Tensor, Device, bool], list[Candidate]]
# a mask of T * T costs time in the square of the length, and says nothing new where that is long
LONGEST_MASK = 16384
OURS, OURS_SOFTMAX = "swat-lm sigmoid", "swat-lm softmax"
OURS_SKIPPING = f"{OURS} that skips saturated tiles"


def ours(backend: str = "triton") -> Peer:
    """The operator with balanced slopes: exact, with the hardware's tanh, and with either form of the backward."""

    def build(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
        if backend != "triton":
            return [Candidate(OURS, _operator(backend, shape, slopes=slopes), "sigmoid", True)]
        precisions = ("exact",) if shape.dtype == torch.float32 else ("exact", "fast")
        return [
            Candidate(
                OURS, _operator(backend, shape, slopes=slopes, precision=precision), "sigmoid", True,
                precision if form is None else f"{precision}, {form}",
                environment=() if form is None else (("SWAT_LM_BACKWARD", form),),
            )
            for precision in precisions
            for form in ((None, *BACKWARD_FORMS) if thorough else (None,))
        ]  # fmt: skip

    return build


def ours_skipping(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
    """The operator that leaves out products where the slope alone decides the weight: what that saves."""
    attend = _operator("triton", shape, slopes=slopes, skip_saturated=True)
    return [Candidate(OURS_SKIPPING, attend, "sigmoid", True)]


def ours_softmax(backend: str = "triton") -> Peer:
    """The operator as the peers' own function."""

    def build(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
        return [Candidate(OURS_SOFTMAX, _operator(backend, shape, score_function="softmax"), "softmax")]

    return build


def _operator(backend: str, shape: Shape, **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = window_attention(query, key, value, window=shape.window, backend=backend, **options)
        assert isinstance(output, Tensor)
        return output

    return attend


def flex(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
    """FlexAttention with a softmax window, over the block sizes of its mask."""
    from torch.nn.attention.flex_attention import flex_attention

    candidates = []
    for block in (128, 64) if thorough else (128,):
        mask = _block_mask(shape, device, block)
        compiled = device.compile(flex_attention, thorough)

        def attend(query: Tensor, key: Tensor, value: Tensor, compiled: Any = compiled, mask: Any = mask) -> Tensor:
            return compiled(query, key, value, block_mask=mask, enable_gqa=shape.group > 1)

        candidates.append(Candidate("FlexAttention", attend, "softmax", False, f"block {block}", heads_first=True))
    return candidates


def flex_sigmoid(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
    """Sigmoid by FlexAttention: softmax of log(sigmoid(score)) times its own normaliser, exp(lse)."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    except ImportError:
        raise NotHereError("returning the lse as AuxRequest asks needs PyTorch 2.9") from None

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return F.logsigmoid(score + slopes[head] * (row - key))

    mask = _block_mask(shape, device, 128)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, aux = flex_attention(
            query, key, value, score_mod=score_mod, block_mask=mask, enable_gqa=shape.group > 1,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert aux.lse is not None
        return (output.float() * aux.lse.exp().unsqueeze(-1)).to(query.dtype)

    compiled = device.compile(attend, thorough)
    return [Candidate("FlexAttention sigmoid", compiled, "sigmoid", True, heads_first=True)]


def _block_mask(shape: Shape, device: Device, block: int) -> Any:
    """The window in blocks, formed from their corners: by way of all pairs, a long sequence's would not fit a GPU."""
    from torch.nn.attention.flex_attention import BlockMask

    def inside(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (row >= key) & (row - key < shape.window)

    first = torch.arange(0, shape.length, block, device=device.torch_device)
    last = (first + block - 1).clamp_max(shape.length - 1)
    # a block of rows against all blocks of keys: from the oldest row to the newest key, and the other way round
    nearest, farthest = first[:, None] - last, last[:, None] - first
    some = (farthest >= 0) & (nearest < shape.window)
    is_whole = first + block <= shape.length
    every = (nearest >= 0) & (farthest < shape.window) & is_whole & is_whole[:, None]
    blocks = []
    for chosen in (some & ~every, every):
        blocks += [
            chosen.sum(dim=1, dtype=torch.int32),
            chosen.int().argsort(dim=1, descending=True, stable=True).int(),
        ]
    return BlockMask.from_kv_blocks(
        *(t[None, None] for t in blocks), BLOCK_SIZE=block, mask_mod=inside, seq_lengths=(shape.length, shape.length)
    )  # fmt: skip


def flash(name: str, module: str) -> Peer:
    """One generation of FlashAttention, which all count the window without the query's own key."""

    def build(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
        function = import_peer(module, "flash_attn_func")
        window = (shape.window - 1, 0)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            result = function(query, key, value, causal=True, window_size=window)
            # some versions return the lse too
            return result[0] if isinstance(result, tuple) else result

        return [Candidate(name, attend, "softmax")]

    return build


def flash_sigmoid(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
    """Apple's FlashSigmoid, with its ALiBi: it subtracts `slope * distance`."""
    function = import_peer("flash_sigmoid", "flash_attn_func")

    def attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None = None) -> Tensor:
        return function(
            query, key, value, causal=True, window_size=(shape.window - 1, 0), alibi_slopes=slopes, sigmoid_bias=0.0
        )  # fmt: skip

    return [Candidate("FlashSigmoid", lambda q, k, v: attend(q, k, v, -slopes), "sigmoid", True)]


def sdpa(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
    """PyTorch's scaled_dot_product_attention with a mask, as its own choice and with cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if shape.length > LONGEST_MASK:
        raise NotHereError(f"a mask of {shape.length} x {shape.length} is not measured")
    index = torch.arange(shape.length, device=device.torch_device)
    distance = index[:, None] - index
    mask = (distance >= 0) & (distance < shape.window)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # its fused kernels with a mask take as many key/value heads as query heads
        key, value = (t.repeat_interleave(shape.group, dim=1) if shape.group > 1 else t for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def attend_by_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(query, key, value)

    candidates = [Candidate("SDPA with a mask", attend, "softmax", heads_first=True)]
    if thorough:
        candidates.append(Candidate("SDPA with a mask", attend_by_cudnn, "softmax", settings="cuDNN", heads_first=True))
    return candidates


def fla(shape: Shape, slopes: Tensor, device: Device, thorough: bool) -> list[Candidate]:
    """flash-linear-attention's parallel softmax attention."""
    function = import_peer("fla.ops.attn", "parallel_attn")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(query, key, value, window_size=shape.window, scale=1 / math.sqrt(shape.head_dim))

    return [Candidate("fla parallel attention", attend, "softmax")]


def import_peer(module: str, name: str) -> Callable:
    """A function of another package.

    Raises:
        NotHereError: the package or the function is missing.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotHereError(f"not installed: {error}") from None


# the most telling first: a run that is out of time leaves the last out
PEERS: Mapping[str, Peer] = {
    OURS: ours(),
    OURS_SKIPPING: ours_skipping,
    OURS_SOFTMAX: ours_softmax(),
    "flash-attn 3": flash("flash-attn 3", "flash_attn_interface"),
    "flash-attn 4": flash("flash-attn 4", "flash_attn.cute"),
    "flash-attn 2": flash("flash-attn 2", "flash_attn"),
    "FlexAttention": flex,
    "FlashSigmoid": flash_sigmoid,
    "FlexAttention sigmoid": flex_sigmoid,
    "fla parallel attention": fla,
    "SDPA with a mask": sdpa,
}

"""What a task costs at least, as formulas: useful and executed FLOPs, and the bytes that have to cross memory.

A FLOP count of the backward pass is 2.5 times the forward's, as the literature on attention kernels counts it: five
products, the scores' recomputation among them (`swat_lm.model.cost` counts a model's useful work, without it).
"""

from benchmarks.gpu.shapes import Shape
from swat_lm.ops.flops import attention_flops

BACKWARD_PRODUCTS = 5


def useful_flops(shape: Shape, task: str) -> float:
    """FLOPs of the pairs inside the window; of decoding, those of one step over full rings.

    Raises:
        ValueError: a task that is not forward, backward or decode.
    """
    heads = shape.batch * shape.heads
    if task == "decode":
        return attention_flops(heads, shape.head_dim, 1, shape.window, num_past=shape.length)
    forward = attention_flops(heads, shape.head_dim, shape.length, shape.window)
    if task == "forward":
        return forward
    if task == "backward":
        return forward * BACKWARD_PRODUCTS / 2
    raise ValueError(f"task: expected forward, backward or decode, got {task!r}")


def executed_pairs(shape: Shape, rows: int, keys: int) -> int:
    """Pairs per head that tiles of `rows` queries and `keys` keys compute, from a block's last key backwards."""
    pairs = 0
    for begin in range(0, shape.length, rows):
        end = min(begin + rows, shape.length)
        visible = end - max(0, begin - shape.window + 1)
        pairs += rows * keys * -(-visible // keys)
    return pairs


def useful_share(shape: Shape, rows: int, keys: int) -> float:
    """The part of the executed forward pairs that lies inside the window."""
    executed = 4 * shape.batch * shape.heads * shape.head_dim * executed_pairs(shape, rows, keys)
    return useful_flops(shape, "forward") / executed


def least_bytes(shape: Shape, task: str) -> int:
    """Bytes of every input read once and every result written once, by a sigmoid, which keeps no statistics.

    Forward: q, k, v in, o out. Backward: q, k, v, do in, dq, dk, dv out. A step: both rings, and the new tokens.

    Raises:
        ValueError: a task that is not forward, backward or decode.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tokens = shape.batch * shape.length
    if task == "forward":
        elements = tokens * (2 * query + 2 * key)
    elif task == "backward":
        elements = tokens * (3 * query + 4 * key)
    elif task == "decode":
        # the new key and value are read and written; the place they take is not read
        elements = shape.batch * (2 * (min(shape.window, shape.length + 1) - 1) * key + 2 * query + 4 * key)
    else:
        raise ValueError(f"task: expected forward, backward or decode, got {task!r}")
    return elements * shape.dtype.itemsize


def roof_seconds(shape: Shape, task: str, flops_per_second: float, bytes_per_second: float) -> float:
    """The least time the card's own rates allow: useful products or bytes, whichever takes longer."""
    return max(useful_flops(shape, task) / flops_per_second, least_bytes(shape, task) / bytes_per_second)

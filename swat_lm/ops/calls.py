"""The operator's calls as records: what backends are given, and the arguments of the ops of `torch.library`.

An op takes positional arguments; their order and names are said here and nowhere else.
"""

from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from swat_lm.ops.head_bias import HeadBias, head_bias

_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", int: "SymInt",
    int | None: "SymInt?", str: "str", bool: "bool",
}  # fmt: skip


class AttentionCall(NamedTuple):
    """A checked call of `window_attention`; the arguments are explained there, here is what differs."""

    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None
    score_function: str
    scale: float
    slopes: Tensor | None = None
    score_bias: Tensor | None = None
    """`[H]`; None: it is a number, `bias`."""
    bias: float = 0.0
    first_visible: Tensor | None = None
    last_visible: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    """Contiguous `[B or 1, T, D/2]`, to rotate query and key on the way; in a backward they are rotated already."""
    precision: str = "auto"
    backend: str = "auto"
    """"blocked" or "triton": it was chosen."""
    skip_saturated: bool = False
    softcap: float | None = None
    hidden: Tensor | None = None
    relative_bias: Tensor | None = None

    def head_bias(self: "AttentionCall | StepCall") -> HeadBias:
        """Slope and constant of every head, and its bias of each distance."""
        return head_bias(self.slopes, self.score_bias, self.bias, self.query, self.relative_bias)

    @property
    def softmax(self: "AttentionCall | StepCall") -> bool:
        """Whether weights share their sum."""
        return self.score_function == "softmax"


class Attended(NamedTuple):
    """What `window_attention` computes; what a call does not have is empty."""

    output: Tensor
    lse: Tensor
    rotated_query: Tensor
    rotated_key: Tensor


class StepCall(NamedTuple):
    """A checked call of `window_attention_step`; the arguments are explained there, here is what differs."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_ring: Tensor
    value_ring: Tensor
    slot: Tensor
    position: Tensor
    score_function: str
    scale: float
    slopes: Tensor | None = None
    score_bias: Tensor | None = None
    """`[H]`; None: it is a number, `bias`."""
    bias: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None
    """`[B, 1, D/2]`, to rotate query and key on the way."""
    backend: str = "auto"
    """"blocked" or "triton": it was chosen."""
    softcap: float | None = None
    batch_invariant: bool = False
    relative_bias: Tensor | None = None

    head_bias = AttentionCall.head_bias
    softmax = AttentionCall.softmax


def schema(*records: type, num_results: int, mutates: tuple[str, ...] = ()) -> str:
    """What `torch.library` is told of an op that takes the fields of records, in order, and returns tensors.

    `mutates` are the arguments that it changes in place.
    """
    arguments = []
    for record in records:
        for name, kind in get_type_hints(record).items():
            alias = f"(a{len(arguments)}!)" if name in mutates else ""
            arguments.append(f"{_TYPES[kind]}{alias} {name}")
    return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * num_results)})"

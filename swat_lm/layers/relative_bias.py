"""T5's relative bias as a module: a number for every bucket of distances and head, of one layer or shared by several.

Legend: H query heads, W distances.
"""

import torch
from torch import Tensor, nn

from swat_lm.layers.base import Shared
from swat_lm.layers.chunk import Chunk
from swat_lm.ops.relative_position import NUM_BUCKETS, relative_buckets, relative_buckets_both_ways

RELATIVE_BIASES = ("none", "own", "shared")
SHARED = "relative_bias"
"""Under which name the model owns what layers share."""


class RelativeBias(nn.Embedding):
    """What is added to the scores of each head, by bucket: `[buckets, H]`."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(NUM_BUCKETS, num_heads)

    def forward(self, window: int, both_ways: bool = False) -> Tensor:  # type: ignore[override]
        """`[H, W]`, by distance back; both ways `[H, 2 W - 1]`, from the farthest key after the query on."""
        made = relative_buckets_both_ways if both_ways else relative_buckets
        return super().forward(made(window, device=self.weight.device)).t()


class BiasOfLayer(nn.Module):
    """A layer's hold on its bias: its own, or the model's, which is no parameter of the layer."""

    def __init__(self, kind: str, num_heads: int, shared: Shared) -> None:
        """Raises ValueError for layers that share one and differ in their number of heads."""
        super().__init__()
        self.table: RelativeBias | None = None
        if kind == "own":
            self.table = RelativeBias(num_heads)
        else:
            found = shared.once(SHARED, lambda: RelativeBias(num_heads))
            if found.embedding_dim != num_heads:
                raise ValueError(
                    f"relative_bias: shared by layers of {found.embedding_dim} and of {num_heads} heads; give them "
                    "equal num_attention_heads, or relative_bias: own"
                )
            # in a tuple, so that it is registered where it is owned and nowhere else
            self._shared = (found,)

    def forward(self, window: int, both_ways: bool, chunk: Chunk | None) -> Tensor:
        """As `RelativeBias`; made once per pass where no gradient is asked for."""
        table = self._shared[0] if self.table is None else self.table
        if chunk is None or torch.is_grad_enabled():
            return table(window, both_ways)
        return chunk._once((SHARED, id(table), window, both_ways), lambda: table(window, both_ways))

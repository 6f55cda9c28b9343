"""Layers over the paged cache of `transformers`' continuous batching (`generate_batch`).

It hands over tokens of several sequences in one row, and answers with the keys that each may see, sequence by sequence.
Legend: T tokens of the row, S keys that the cache answers with, N sequences, M model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swat_lm.layers.attention import AttentionLayer
from swat_lm.layers.base import Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.pasts import CachePast

PAGED = "paged|eager"
"""What continuous batching sets as attention implementation where it is to build no other library's arguments."""


def check_paged(config: SwatConfig) -> None:
    """Raise ValueError unless continuous batching can hold what the layers keep."""
    plan = config.plan()
    for index, (kind, _) in enumerate(plan):
        if not issubclass(kind, AttentionLayer):
            raise ValueError(
                f"continuous batching: layer {index} is {kind.name}, and transformers' paged cache holds keys and "
                "values of attention alone; use generate(), or streams of swat_lm"
            )
    for index, (_, settings) in enumerate(plan):
        if settings.sinks:
            raise ValueError(
                f"continuous batching: layer {index} keeps {settings.sinks} first tokens beside its window (sinks), "
                "and transformers' paged cache has no place for them; use generate(), or streams of swat_lm"
            )
    kept = {"sliding_window": "window", "num_key_value_heads": "number of key/value heads", "head_dim": "head size"}
    for name, what in kept.items():
        found = {getattr(settings, name) for _, settings in plan} - {None}
        if len(found) > 1:
            raise ValueError(
                f"continuous batching: layers differ in their {what} ({', '.join(map(str, sorted(found)))}), and "
                "transformers' paged cache has one for all; use generate(), or streams of swat_lm"
            )


@dataclass
class PagedChunk(Chunk):
    """T tokens of N sequences in one row `[1, T]`, each after a past of its own."""

    first_key: Tensor | None = None
    """int32 `[1, T]`, into the S keys: the first of the token's sequence."""
    last_key: Tensor | None = None
    """int32 `[1, T]`, into the S keys: the token's own."""

    def first_visible(self, num_past: int) -> Tensor | None:
        """The first key of the token's sequence."""
        return self.first_key

    def last_visible(self, num_past: int) -> Tensor | None:
        """The token's own key, after which its distances and window count."""
        return self.last_key


class PagedPast(CachePast):
    """One layer's past in a paged cache."""

    def __init__(self, layer_index: int, given: dict[str, Any]) -> None:
        super().__init__(given["cache"], layer_index, 0)
        self._given = given

    def extend(self, **new: Tensor) -> tuple[dict[str, Tensor], int]:
        """The S keys and values that the row's sequences may see, and S - T."""
        key, value = (tensor.transpose(1, 2) for tensor in (new["key"], new["value"]))
        # it writes into the arguments what another library's kernels would need
        keys, values = self._cache.update(key, value, self._layer_index, dict(self._given))  # type: ignore[arg-type]
        items = {"key": keys.transpose(1, 2), "value": values.transpose(1, 2)}
        return items, keys.shape[2] - key.shape[2]


def run_paged(layers: Sequence[Layer], config: SwatConfig, hidden: Tensor, positions: Tensor, given: Any) -> Tensor:
    """Hidden states `[1, T, M]` through all layers; `given` are the arguments that continuous batching makes."""
    begins = given["cu_seq_lens_q"].long()
    place = torch.arange(hidden.shape[1], device=hidden.device)
    # tokens that only fill up the row belong to the last sequence, where they harm nobody
    sequence = (torch.searchsorted(begins, place, right=True) - 1).clamp(max=len(begins) - 2)
    chunks = {}
    for layer_type, key_begins in given["cu_seq_lens_k"].items():
        ends = key_begins.long()[1:]
        first = key_begins.long()[:-1][sequence]
        last = ends[sequence] - begins[1:][sequence] + place
        first, last = (keys.to(torch.int32).unsqueeze(0) for keys in (first, last))
        chunks[layer_type] = PagedChunk(positions.long(), first_key=first, last_key=last)
    assert config.layer_types is not None
    for index, (layer, layer_type) in enumerate(zip(layers, config.layer_types, strict=True)):
        hidden = layer(hidden, chunks[layer_type], PagedPast(index, given)).hidden
    return hidden

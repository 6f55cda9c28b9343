"""A fingerprint of a model: equal for equal weights on any device, cheap enough to bind every saved state to it.

It is no proof against forgery: it tells models apart that were mistaken for each other.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from swat_lm.model.modeling import SwatForCausalLM

__all__ = ["fingerprint"]

# elements read of one weight; of larger ones (of a vocabulary, or wider than 2,048) evenly spread rows
MOST_ELEMENTS = 1 << 22
# settings of layers that change nothing but rounding, or nothing outside of training
HOW = ("attention_backend", "chunk_size", "taps", "execution", "budget_weight", "temperature")
# settings that came later, and what they say where they change nothing: states of before still belong to their models
LATER = {
    "output_bias": None, "attention_multiplier": None, "residual_multiplier": 1.0, "norm_placement": "pre",
    "qk_norm_over": "head", "hidden_act": "silu", "attn_logit_softcapping": None, "norm": "rms",
    "feed_forward": "gated", "sinks": 0, "sink_positions": "cache", "relative_bias": "none", "bidirectional": False,
    "slope_span": 16.0, "positive_slope_span": None, "learned_slopes": False, "learned_score_bias": False,
    "output_gate": False, "layer_scale": None,
}  # fmt: skip
# elements at the beginning of a row that tell whether a weight has changed since
GLIMPSE = 8


def fingerprint(model: "SwatForCausalLM") -> str:
    """Name, dtype, shape and bits of every weight, and the settings of every layer, as 32 hexadecimal digits.

    Of the bits, the sum of every row, so that one pass at the speed of memory is enough: half a second for 374M
    parameters on one core, once; weights of more than 4M elements by evenly spread rows. It is kept with the model
    until the weights change. A cast, a merged adapter or another step of training gives another one.
    """
    now = glimpse(model)
    known = model._known_fingerprint
    if known is None or known[0] != now:
        known = model._known_fingerprint = now, whole_fingerprint(model)
    return known[1]


def glimpse(model: "SwatForCausalLM") -> bytes:
    """A few elements of every weight and how often each was written: what a change does not leave as it is.

    Without the elements, what writes through `weight.data`, as merging an adapter does, would be missed.
    """
    weights = [weight.detach() for _, weight in named_weights(model)]
    parts = [as_bytes(weight[row, ...].reshape(-1)[:GLIMPSE]) for weight in weights for row in ends(weight)]
    # what was made for inference alone is not counted, and hardly written
    versions = [0 if weight.is_inference() else weight._version for weight in weights]
    return f"{versions} {[str(weight.dtype) for weight in weights]}".encode() + together(parts)


def named_weights(model: "SwatForCausalLM") -> Iterator[tuple[str, Tensor]]:
    """Everything that is saved: what is trained, and what is frozen."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def ends(weight: Tensor) -> tuple[int, ...]:
    """First, middle and last row; of a vector, elements."""
    rows = weight.shape[0] if weight.dim() else 0
    return (0, rows // 2, rows - 1) if rows else ()


def whole_fingerprint(model: "SwatForCausalLM") -> str:
    """The fingerprint, formed anew."""
    found = hashlib.sha256()
    for entry in model.config.plan():
        # what says how, not what
        settings = {name: value for name, value in asdict(entry.settings).items() if name not in HOW}
        if settings.get("slope_schedule") != "window":
            # nothing reads it
            settings.pop("slope_span", None)
        settings = {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}
        found.update(json.dumps([entry.kind.name, settings], sort_keys=True, default=str).encode())
    scaled = [model.config.embedding_multiplier, model.config.logits_scaling]
    if model.config.final_logit_softcapping is not None:
        scaled.append(model.config.final_logit_softcapping)
    if scaled != [1, 1]:
        found.update(json.dumps(scaled).encode())
    sums = []
    for name, weight in named_weights(model):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        sums.append(as_bytes(row_sums(weight.detach())))
    found.update(together(sums))
    return found.hexdigest()[:32]


def row_sums(weight: Tensor) -> Tensor:
    """The bits of a vector, or for each row of a matrix their sum modulo 2^32, which no order of adding changes."""
    if weight.dim() < 2:
        return weight.reshape(-1)
    rows = weight.flatten(1)
    count = max(1, MOST_ELEMENTS // max(1, rows.shape[1]))
    if rows.shape[0] > count:
        rows = rows[torch.arange(count, device=rows.device) * rows.shape[0] // count]
    rows = rows.contiguous()
    # 32 bits at a time: other sums of integers run at a twentieth of memory's speed on a CPU
    is_whole = rows.shape[1] * rows.element_size() % 4 == 0
    words = rows.view(torch.int32) if is_whole else rows.view(torch.uint8).int()
    # as they are in the first row: sums alone would not see its columns change places
    return torch.cat((words.sum(1, dtype=torch.int32), words[:1].reshape(-1)))


def as_bytes(values: Tensor) -> Tensor:
    """The bits of a vector."""
    return values.contiguous().view(torch.uint8)


def together(parts: list[Tensor]) -> bytes:
    """Vectors of bytes as one, fetched from the device at once."""
    devices = {part.device for part in parts}
    if len(devices) > 1:
        return b"".join(part.cpu().numpy().tobytes() for part in parts)
    return torch.cat(parts).cpu().numpy().tobytes() if parts else b""

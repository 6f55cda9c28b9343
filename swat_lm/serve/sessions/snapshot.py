"""A session as one safetensors file: what its slot holds and what is known beside, under a checksum."""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from swat_lm.model.slots import Slots
from swat_lm.serve.sessions.record import Record, SessionError

__all__ = ["HEAD", "Head", "decode", "encode", "read_head", "trimmed"]

FORMAT = "swat-lm session 1"
# of the header that says what the file holds; what is pending of a session stands in it
MOST_HEADER = 1 << 26
HEAD = 1 << 16
"""Bytes that hold the header of an ordinary session."""


def encode(record: Record, tensors: Mapping[str, Tensor], model: str) -> bytes:
    """A session's file.

    Args:
        tensors: `Slots.snapshot` of its one slot, `trimmed`.
        model: the fingerprint of the weights.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = record.model_dump_json()
    metadata = {"format": FORMAT, "model": model, "session": text, "checksum": checksum(text, model, tensors)}
    return save(tensors, metadata)


def decode(content: bytes, model: str, slots: Slots, vocabulary: int) -> tuple[Record, dict[str, Tensor]]:
    """The session and the tensors of its slot, from a file that may come from anywhere.

    Args:
        model: the fingerprint of the weights here.
        slots: such as it is to go into.
        vocabulary: how many tokens the model knows.

    Raises:
        SessionError: `damaged`, no such file, or values that no session has; `model`, of other weights.
    """
    metadata = header(content).get("__metadata__", {})
    record = record_of(metadata)
    if metadata.get("model") != model:
        raise SessionError(
            "model", "the session's state was made by another model, or by other weights: serve that one, or begin anew"
        )
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(str(error)) from error
    if checksum(metadata["session"], model, tensors) != metadata.get("checksum"):
        raise damaged("its checksum is not that of its content")
    try:
        check(record, tensors, slots, vocabulary)
    except ValueError as error:
        raise damaged(str(error)) from error
    return record, tensors


class Head(NamedTuple):
    """What a file says of its session."""

    record: Record
    model: str
    """The fingerprint of the weights."""


def read_head(content: bytes) -> Head | None:
    """What a file's first bytes tell; None where the header is longer than these.

    Raises SessionError (`damaged`).
    """
    if len(content) >= 8 and len(content) < 8 + struct.unpack("<Q", content[:8])[0] <= MOST_HEADER:
        return None
    metadata = header(content).get("__metadata__", {})
    return Head(record_of(metadata), str(metadata.get("model")))


def header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    size = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else MOST_HEADER + 1
    try:
        found = json.loads(content[8 : 8 + size]) if size <= MOST_HEADER else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged("it is no safetensors file")
    return found


def record_of(metadata: Any) -> Record:
    """What a header says of the session; raises SessionError."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise damaged("it is a safetensors file, but not a session")
    try:
        return Record.model_validate_json(metadata["session"])
    except (KeyError, TypeError, ValidationError) as error:
        raise damaged(f"what it says of the session cannot be: {error}") from error


def damaged(why: str) -> SessionError:
    """Nobody can go on from this."""
    return SessionError("damaged", f"the session's file is damaged or none: {why}")


def checksum(record: str, model: str, tensors: Mapping[str, Tensor]) -> str:
    """Of everything that a file says; tensors on the CPU."""
    found = hashlib.blake2b(f"{model} {record}".encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def trimmed(tensors: Mapping[str, Tensor], slots: Slots) -> dict[str, Tensor]:
    """The tensors of one slot without places that nothing has been written to."""
    position = int(tensors["position"][0])
    found = dict(tensors)
    for index, spec in enumerate(slots.specs):
        for name, entry in spec.items():
            if entry.kind != "summary":
                key = f"layers.{index}.{name}"
                found[key] = tensors[key][:, : min(position, tensors[key].shape[1])]
    return found


def check(record: Record, tensors: Mapping[str, Tensor], slots: Slots, vocabulary: int) -> None:
    """Raise ValueError unless these are one slot of this kind that has read what the record says."""
    slots.check_tensors({name: tensor for name, tensor in tensors.items() if tensor.dim()})
    for name in ("position", "skipped"):
        if name not in tensors or tensors[name].shape != (1,) or tensors[name].dtype != torch.int64:
            raise ValueError(f"{name}: expected one whole number")
    position = int(tensors["position"])
    if position != record.held:
        raise ValueError(f"its state has read {position} tokens, the session {record.held}")
    # nothing is hidden in a server's slots
    if int(tensors["skipped"]) or "hidden" in tensors:
        raise ValueError("its state hides tokens")
    if any(token >= vocabulary for token in record.pending):
        raise ValueError(f"pending: expected tokens below {vocabulary}")
    for index, spec in enumerate(slots.specs):
        for name, entry in spec.items():
            kept, there = tensors[f"layers.{index}.{name}"], slots.layers[index][name]
            if kept.is_floating_point() and not kept.isfinite().all():
                raise ValueError(f"layers.{index}.{name}: expected finite numbers")
            if kept.shape[0] != 1 or kept.dtype != there.dtype:
                raise ValueError(f"layers.{index}.{name}: expected one slot of {there.dtype}, got {kept.dtype}")
            places = min(position, there.shape[1]) if entry.kind != "summary" else None
            if places is not None and kept.shape[1] != places:
                raise ValueError(f"layers.{index}.{name}: expected {places} items, got {kept.shape[1]}")

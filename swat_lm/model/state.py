"""The state of endless streams: rings made from what the mixers keep, their bytes, and their way to disk and back.

Constant in size where every layer has a window. Legend: B sequences, T tokens, W window, K key/value heads, D head.
"""

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ReferenceType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swat_lm.mixers.protocol import RingMemory, StateTensor
from swat_lm.model.fingerprint import fingerprint
from swat_lm.model.weight_files import check_readable, give_usual_permissions
from swat_lm.ops.ring import empty_ring

FIRST_CAPACITY = 64
FORMAT = "swat-lm stream state 1"
UNBOUND = "this state does not say which model made it, so one of other weights but the same shape would go on with it"


@dataclass
class StreamState:
    """What B streams keep of their past: rings per layer, and how many tokens each has seen.

    Constant in size where every layer has a window. A full-attention layer's ring is doubled before it would wrap.
    """

    rings: list[dict[str, Tensor]]
    """Per layer, by the names of the mixer's state: `[B, W, K, D]`."""
    windows: tuple[int | None, ...]
    position: Tensor
    """int64 `[B]`: real tokens seen; the position of the next one."""
    num_columns: int = 0
    """Tokens fed to each stream, padding included."""
    ragged: bool = False
    """Whether padding has set the streams apart."""
    logits: Tensor | None = None
    """`[B, V]` after the last token, where whoever stopped put them; gone as soon as the state reads another."""
    fits: "ReferenceType[Any] | None" = None
    """The model that made the state, or has found it to be its own."""
    fingerprint: str | None = None
    """Of the model that made a state read from a file (swat_lm/model/fingerprint.py); None where that is not known."""
    _memories: list[RingMemory] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes held for all streams: rings and positions, which is all that reading on needs."""
        tensors = [tensor for layer in self.rings for tensor in layer.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, self.position))

    @property
    def grows(self) -> bool:
        """Whether any layer keeps everything, so that the state grows with the stream (in blocks)."""
        return None in self.windows

    @property
    def dtype(self) -> torch.dtype:
        """Of the rings."""
        return next(tensor for layer in self.rings for tensor in layer.values()).dtype

    @property
    def batch_size(self) -> int:
        """B."""
        return self.position.shape[0]

    def common_position(self) -> int | None:
        """Where all streams stand, or None where they stand apart."""
        positions = set(self.position.tolist())
        return positions.pop() if len(positions) == 1 else None

    def step_memories(self) -> list[RingMemory]:
        """The layers' memories for one more token, made once."""
        self._reserve(1)
        if not self._memories:
            self._memories = self._new_memories(None)
        return self._memories

    def chunk_memories(self, num_tokens: int, num_real: Tensor | None) -> list[RingMemory]:
        """The layers' memories for a chunk of T tokens."""
        self._reserve(num_tokens)
        return self._new_memories(num_real)

    def _new_memories(self, num_real: Tensor | None) -> list[RingMemory]:
        slot = torch.arange(self.batch_size, device=self.position.device)
        return [
            RingMemory(
                layer["key"],
                layer["value"],
                slot,
                self.position,
                num_real,
                reach_back=min(self.num_columns, layer["key"].shape[1] - 1),
            )
            for layer in self.rings
        ]

    def _reserve(self, num_tokens: int) -> None:
        """Enlarge the rings of full-attention layers; places are positions until they wrap, so copying is enough."""
        needed = self.num_columns + num_tokens
        for window, layer in zip(self.windows, self.rings, strict=True):
            if window is not None or layer["key"].shape[1] >= needed:
                continue
            capacity = layer["key"].shape[1]
            while capacity < needed:
                capacity *= 2
            for name, ring in layer.items():
                larger = _zeros(ring.shape[0], (capacity, *ring.shape[2:]), ring)
                larger[:, : ring.shape[1]] = ring
                layer[name] = larger
            self._memories = []


def empty_rings(
    specs: Iterable[tuple[StateTensor, ...]], batch_size: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Tensor]]:
    """Zeroed rings for B streams, one mapping per layer, from what each mixer says it keeps."""
    like = torch.empty(0, dtype=dtype, device=device)
    return [{tensor.name: _zeros(batch_size, _capacity(tensor), like) for tensor in spec} for spec in specs]


def made_by(state: StreamState) -> str | None:
    """The fingerprint of the model that made a state, as its weights are now; None where that is not known."""
    model = None if state.fits is None else state.fits()
    return state.fingerprint if model is None else fingerprint(model)


def save_state(state: StreamState, path: str | Path) -> None:
    """Write a state as one safetensors file, beside and then renamed.

    With it goes the fingerprint of its model, so that no other one goes on with it; a warning says where that model is
    gone already.
    """
    path = Path(path)
    tensors = {
        f"layers.{i}.{name}": ring.contiguous() for i, layer in enumerate(state.rings) for name, ring in layer.items()
    }
    metadata = {
        "format": FORMAT,
        "windows": json.dumps(state.windows),
        "num_columns": str(state.num_columns),
        "ragged": json.dumps(state.ragged),
    }
    maker = made_by(state)
    if maker is None:
        warnings.warn(f"{path}: {UNBOUND}: save a state while its model is there", stacklevel=2)
    else:
        metadata["fingerprint"] = maker
    if state.logits is not None:
        # files of before lack them, and a stream that goes on with a text does not need them
        tensors["logits"] = state.logits.contiguous()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({**tensors, "position": state.position}, beside, metadata)
        give_usual_permissions(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_state(path: str | Path, device: torch.device | str = "cpu") -> StreamState:
    """Read a state that `save_state` wrote; with the model that made it, the stream continues bit for bit.

    Any other model refuses it. Files of before do not say which model that was: a warning says so.

    Raises:
        ValueError: not such a file, or a damaged one.
        OSError: the file cannot be read.
    """
    check_readable(Path(path))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a stream state, or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not a stream state of swat-lm")
    windows = tuple(json.loads(metadata["windows"]))
    position, logits = tensors.pop("position"), tensors.pop("logits", None)
    rings: list[dict[str, Tensor]] = [{} for _ in windows]
    for name, tensor in tensors.items():
        _, index, short = name.split(".")
        # in the layout of a new state, so that the same kernels run and the stream continues bit for bit
        rings[int(index)][short] = _zeros(tensor.shape[0], tuple(tensor.shape[1:]), tensor).copy_(tensor)
    maker = metadata.get("fingerprint")
    if maker is None:
        warnings.warn(f"{path}: {UNBOUND}", stacklevel=2)
    return StreamState(
        rings, windows, position, int(metadata["num_columns"]), json.loads(metadata["ragged"]), logits,
        fingerprint=maker,
    )  # fmt: skip


def _zeros(batch_size: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return empty_ring(batch_size, *shape, like) if len(shape) == 3 else like.new_zeros(batch_size, *shape)


def _capacity(tensor: StateTensor) -> tuple[int, ...]:
    return tuple(FIRST_CAPACITY if size is None else size for size in tensor.shape)

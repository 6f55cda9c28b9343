"""Where a pass over chunks keeps what its layers hand from chunk to chunk: in main memory, or in a file on disk.

The file has no name, so whatever ends the process ends it too.
"""

import errno
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Carries", "CarriesInMemory", "CarriesOnDisk"]

Kept = Sequence[Mapping[str, Tensor]]
"""By layer, its tensors by name."""


class Carries(ABC):
    """Carries in the order of their chunks; none belongs to a graph."""

    @abstractmethod
    def put(self, kept: Kept) -> None:
        """Keep a copy of the next carry. Raises OSError where there is no room."""

    @abstractmethod
    def take(self, index: int, device: torch.device) -> list[dict[str, Tensor]]:
        """Carry number `index` in tensors of its own."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all of them."""


class CarriesInMemory(Carries):
    """In main memory, also those of a model on a GPU."""

    def __init__(self) -> None:
        self.held: list[list[dict[str, Tensor]]] = []

    def put(self, kept: Kept) -> None:
        """Copy to main memory."""
        # contiguous: what comes is a view that would hold a whole chunk
        copies = [{name: in_memory(tensor).clone() for name, tensor in layer.items()} for layer in kept]
        self.held.append(copies)

    def take(self, index: int, device: torch.device) -> list[dict[str, Tensor]]:
        """Copy to the device."""
        return [{name: tensor.to(device, copy=True) for name, tensor in layer.items()} for layer in self.held[index]]

    def close(self) -> None:
        """Let go of all of them."""
        self.held.clear()


class Place(NamedTuple):
    """Where in the file a tensor lies."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class CarriesOnDisk(Carries):
    """In one file without a name in `folder`."""

    def __init__(self, folder: str | Path | None, expected: int) -> None:
        """`expected` carries will come, for which there must be room; None: the system's folder for such files.

        Raises OSError naming the folder where no file can be made.
        """
        self.folder, self.expected = Path(gettempdir() if folder is None else folder), expected
        self.places: list[list[dict[str, Place]]] = []
        self.size = 0
        try:
            self.file = TemporaryFile(dir=self.folder, prefix=".tmp-carries-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep carries in {self.folder}: {error.strerror}; name a folder that can be written to in "
                "execution_settings.folder, or keep them in memory (carries: memory)",
            ) from None

    def put(self, kept: Kept) -> None:
        """Write it behind the others.

        Raises OSError, with the sizes and the folder, where the disk is full; what was written is gone then.
        """
        if not self.places:
            self._check_room(kept)
        try:
            self.places.append([{name: self._write(tensor) for name, tensor in layer.items()} for layer in kept])
        except OSError as error:
            written = self.size
            self.file.close()
            raise OSError(
                error.errno,
                f"carries fill {self.folder}: {error.strerror} after {written} bytes of carry {len(self.places) + 1} "
                f"of {self.expected}; free space, name another folder in execution_settings.folder, keep them in "
                "memory (carries: memory), or take larger chunks (chunk_size)",
            ) from None

    def take(self, index: int, device: torch.device) -> list[dict[str, Tensor]]:
        """Read it."""
        return [{name: self._read(place, device) for name, place in layer.items()} for layer in self.places[index]]

    def close(self) -> None:
        """Close the file, which is its end."""
        self.places.clear()
        self.file.close()

    def _check_room(self, kept: Kept) -> None:
        """Raise OSError where all the carries will not fit, before hours of work find out."""
        need = self.expected * sum(tensor.nbytes for layer in kept for tensor in layer.values())
        free = shutil.disk_usage(self.folder).free
        if need > free:
            self.file.close()
            raise OSError(
                errno.ENOSPC,
                f"carries need {need} bytes in {self.folder}, where {free} are free: free space, name another folder "
                "in execution_settings.folder, or take larger chunks (chunk_size)",
            )

    def _write(self, tensor: Tensor) -> Place:
        tensor = in_memory(tensor).contiguous()
        place = Place(self.size, tensor.shape, tensor.dtype)
        rest = as_bytes(tensor)
        while rest:
            written = self.file.write(rest)
            rest, self.size = rest[written:], self.size + written
        return place

    def _read(self, place: Place, device: torch.device) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self.file.seek(place.offset)
        rest = as_bytes(tensor)
        while rest:
            read = self.file.readinto(rest)  # type: ignore[attr-defined]
            assert read, "a carry is shorter than it was"
            rest = rest[read:]
        return tensor.to(device)


def in_memory(tensor: Tensor) -> Tensor:
    """The numbers on the CPU, outside of any graph."""
    return tensor.detach().cpu()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data

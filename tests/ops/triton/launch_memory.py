"""Checks of memory that an interpreter does not make: nothing outside a tensor, no two programs on one number.

Programs of a launch run in no order on a GPU. What one of them stores, no other may store, and may read only after an
atomic operation that acquires.
"""

import numpy as np
import torch

# bytes of the narrowest number
_UNIT = 2


class LaunchMemory:
    """The tensors of one launch and who has written where."""

    def __init__(self) -> None:
        # of a tensor by number: where it begins and ends
        self._coming: list[tuple[int, int]] = []
        self._tensors: list[tuple[int, int]] = []
        # views of one memory share a region: where it begins, and of every unit the program that stored it, from 1 on
        self._regions: list[tuple[int, np.ndarray]] = []
        self._region_of: list[int] = []
        self._program = 0
        self._has_acquired = False

    def add(self, tensor: torch.Tensor) -> int:
        """Permit the tensor's memory to the coming launch; return the number by which accesses name it."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_bytes = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self._coming.append((tensor.data_ptr(), tensor.data_ptr() + num_bytes))
        return len(self._coming) - 1

    def begin(self) -> None:
        """Begin the launch of the tensors added."""
        self._tensors, self._coming = self._coming, []
        self._regions, self._region_of = [], [0] * len(self._tensors)
        end_of_region = -1
        for begin, end, number in sorted((*ends, number) for number, ends in enumerate(self._tensors)):
            if begin >= end_of_region:
                self._regions.append((begin, np.zeros(0, dtype=np.int32)))
            end_of_region = max(end, end_of_region)
            self._region_of[number] = len(self._regions) - 1

    def begin_program(self, number: int) -> None:
        """Say which program, counted from 1, comes next."""
        self._program, self._has_acquired = number, False

    def acquire(self) -> None:
        """From here on the program may read what others have stored."""
        self._has_acquired = True

    def load(self, tensor: int, pointers: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        """Check that a program may read these numbers."""
        active = self._inside(tensor, pointers, mask, num_bytes, "loads")
        begin, owners = self._regions[self._region_of[tensor]]
        if owners.size and active.size and not self._has_acquired:
            units = (active - np.uint64(begin)).astype(np.int64) // _UNIT
            owner = owners[units[units < owners.size]]
            if ((owner != 0) & (owner != self._program)).any():
                raise MemoryError(f"program {self._program} reads what program {owner.max()} stored")

    def store(self, tensor: int, pointers: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        """Check that a program may write these numbers, and remember that it did."""
        active = self._inside(tensor, pointers, mask, num_bytes, "stores")
        if not active.size:
            return
        region = self._region_of[tensor]
        begin, owners = self._regions[region]
        units = (active - np.uint64(begin)).astype(np.int64) // _UNIT
        missing = (self._tensors[tensor][1] - begin) // _UNIT - owners.size
        if missing > 0:
            owners = np.concatenate((owners, np.zeros(missing, dtype=np.int32)))
            self._regions[region] = begin, owners
        if ((owners[units] != 0) & (owners[units] != self._program)).any():
            raise MemoryError(f"program {self._program} stores where program {owners[units].max()} did")
        owners[units] = self._program

    def change(self, tensor: int, pointers: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        """Check that an atomic operation stays inside."""
        self._inside(tensor, pointers, mask, num_bytes, "changes")

    def _inside(self, tensor: int, pointers: np.ndarray, mask: np.ndarray, num_bytes: int, what: str) -> np.ndarray:
        active = pointers[np.broadcast_to(mask, pointers.shape)]
        begin, end = self._tensors[tensor]
        outside = (active < np.uint64(begin)) | (active + np.uint64(num_bytes) > np.uint64(end))
        if outside.any():
            count = f"{int(outside.sum())} of {active.size} numbers outside its tensor"
            raise MemoryError(f"program {self._program} {what} {count}")
        return active

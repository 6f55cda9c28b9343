"""Checks of memory that an interpreter does not make: nothing outside the tensors, no two programs on one number.

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
        self._coming: list[tuple[int, int]] = []
        self._begins = self._ends = np.empty(0, dtype=np.uint64)
        # by tensor, of every unit: the program that stored it, counted from 1
        self._owners: dict[int, np.ndarray] = {}
        self._program = 0
        self._has_acquired = False

    def add(self, tensor: torch.Tensor) -> None:
        """Permit the tensor's memory to the coming launch."""
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self._coming.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))

    def begin(self) -> None:
        """Begin the launch of the tensors added; views of one memory become one."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(self._coming):
            if merged and begin < merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        self._begins, self._ends = np.array(merged or [(0, 0)], dtype=np.uint64).T
        self._coming, self._owners = [], {}

    def begin_program(self, number: int) -> None:
        """Say which program, counted from 1, comes next."""
        self._program, self._has_acquired = number, False

    def acquire(self) -> None:
        """From here on the program may read what others have stored."""
        self._has_acquired = True

    def load(self, pointers: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        """Check that a program may read these numbers."""
        for tensor, units in self._places(pointers, mask, num_bytes, "loads"):
            if tensor in self._owners and not self._has_acquired:
                owner = self._owners[tensor][units]
                if ((owner != 0) & (owner != self._program)).any():
                    raise MemoryError(f"program {self._program} reads what program {owner.max()} stored")

    def store(self, pointers: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        """Check that a program may write these numbers, and remember that it did."""
        for tensor, units in self._places(pointers, mask, num_bytes, "stores"):
            size = int(self._ends[tensor] - self._begins[tensor]) // _UNIT + 1
            owners = self._owners.setdefault(tensor, np.zeros(size, dtype=np.int32))
            if ((owners[units] != 0) & (owners[units] != self._program)).any():
                raise MemoryError(f"program {self._program} stores where program {owners[units].max()} did")
            owners[units] = self._program

    def change(self, pointers: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        """Check that an atomic operation stays inside."""
        list(self._places(pointers, mask, num_bytes, "changes"))

    def _places(self, pointers: np.ndarray, mask: np.ndarray, num_bytes: int, what: str):
        active = pointers[np.broadcast_to(mask, pointers.shape)]
        if not active.size:
            return
        low, high = np.searchsorted(self._begins, [active.min(), active.max()], side="right") - 1
        tensors = np.searchsorted(self._begins, active, side="right") - 1 if low != high else np.array(low)
        outside = (tensors < 0) | (active + np.uint64(num_bytes) > self._ends[tensors])
        if outside.any():
            count = int(outside.sum())
            raise MemoryError(f"program {self._program} {what} {count} of {active.size} numbers outside every tensor")
        if low == high:
            yield int(low), ((active - self._begins[low]) // np.uint64(_UNIT)).astype(np.int64)
            return
        for tensor in np.unique(tensors):
            yield int(tensor), ((active[tensors == tensor] - self._begins[tensor]) // np.uint64(_UNIT)).astype(np.int64)

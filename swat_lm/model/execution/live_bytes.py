"""Counts the bytes of tensors that live, as they are made and as they go; a hook on every operation, for measurements.

Operations of this package are looked into. What a kernel of PyTorch allocates for itself and frees at once is not seen.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]

OWN = "swat_lm"


class LiveBytes(TorchDispatchMode):
    """While it is entered: bytes of all tensors made meanwhile that live, and the most there were at once."""

    def __init__(self, on_tensor: Callable[[Tensor], None] | None = None) -> None:
        """`on_tensor` is shown every tensor that has memory of its own, once, as an operation returns it."""
        super().__init__()
        self.now, self.peak = 0, 0
        self.on_tensor = on_tensor
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it returns."""
        if func.namespace == OWN and not any(isinstance(each, FakeTensor) for each in tree_leaves(args)):
            # straight to its kernel, whose operations come here again
            key = torch._C.DispatchKey.CUDA if any_on_cuda(args) else torch._C.DispatchKey.CPU
            with self:
                results = func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            results = func(*args, **(kwargs or {}))
        # views of what was there before are not new
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                self._count(result)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.on_tensor is not None:
            self.on_tensor(tensor)


def any_on_cuda(arguments: tuple[Any, ...]) -> bool:
    """Whether an argument lies on a GPU."""
    return any(isinstance(argument, Tensor) and argument.is_cuda for argument in tree_leaves(arguments))

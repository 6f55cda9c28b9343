"""Counts the bytes of tensors that live, as they are made and as they go; a hook on every operation, for measurements.

Operations of this package are looked into. What a kernel of PyTorch allocates for itself and frees at once is not seen.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
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
        self._known: dict[Any, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it returns."""
        results = self._look_into(func, args, kwargs or {}) if func.namespace == OWN else None
        if results is None:
            results = func(*args, **(kwargs or {}))
        # views of what was there before are not new
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                self._count(result)
        return results

    def _look_into(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the kernel of an operation of this package, whose operations come here again; None where it cannot be.

        Shapes without numbers cannot say what numbers are asked for: then what the kernel has made so far is counted.
        They are looked into once for each shape; the next time as much is made at once.
        """
        is_shape = any(isinstance(each, FakeTensor) for each in tree_leaves(args))
        known = (str(func), tuple(map(described, tree_leaves((args, kwargs))))) if is_shape else None
        if known in self._known:
            self.peak = max(self.peak, self.now + self._known[known])
            return None
        key = torch._C.DispatchKey.CUDA if any_on_cuda(args) else torch._C.DispatchKey.CPU
        before, self.peak, start = self.peak, self.now, self.now
        try:
            with self:
                results = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        except DataDependentOutputException:
            results = None
        if known is not None:
            self._known[known] = self.peak - start
        self.peak = max(before, self.peak)
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


def described(argument: Any) -> Any:
    """What tells two calls apart that need other memory."""
    return (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument


def any_on_cuda(arguments: tuple[Any, ...]) -> bool:
    """Whether an argument lies on a GPU."""
    return any(isinstance(argument, Tensor) and argument.is_cuda for argument in tree_leaves(arguments))

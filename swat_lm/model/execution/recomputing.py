"""What must be as it was where a part of a pass is computed again: automatic casts, and random numbers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Randomness", "autocast_as_now"]


class Randomness:
    """The states of random generators before each part of a pass; where nothing is drawn all parts share one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: list[list[Tensor]] = []

    def note(self) -> None:
        """Before the next part."""
        # whoever counts or predicts a pass by its operations must not see these, and could not answer them
        with _disable_current_modes():
            states = [torch.get_rng_state()]
            if self.device.type == "cuda":
                states.append(torch.cuda.get_rng_state(self.device))
            before = self.states[-1] if self.states else None
            self.states.append(before if before is not None and all(map(torch.equal, before, states)) else states)

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        """Draw what part number `index` drew; afterwards nothing has been drawn."""
        states = self.states[index]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(states[0])
            if len(states) > 1:
                torch.cuda.set_rng_state(states[1], self.device)
            yield


def autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context of automatic casts that holds now; weights are cast anew in it, whoever held the last ones."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)

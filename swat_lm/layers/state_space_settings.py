"""What layers with a state space say of it in their settings, and what of it cannot be."""

import math
from typing import Protocol

SYSTEMS = ("s4", "s4d")
TAPS = ("powers", "cauchy")
# what is trained at a rate of its own, by the setting that says it
RATES = {"transition_rate": ("log_decay", "angle", "low_rank"), "entry_rate": ("entry",), "step_rate": ("log_step",)}


class StateSpaceSettings(Protocol):
    """What settings of a layer say of its state space."""

    @property
    def state_size(self) -> int:
        """N, numbers kept per channel: half as many conjugate pairs."""
        ...

    @property
    def ssm(self) -> str:
        """One of `SYSTEMS`."""
        ...

    @property
    def taps(self) -> str:
        """One of `TAPS`: how a kernel is made."""
        ...

    @property
    def bidirectional(self) -> bool:
        """Whether a token also sees what comes after it."""
        ...

    @property
    def time_step_min(self) -> float:
        """Steps are drawn between this and the next at the start."""
        ...

    @property
    def time_step_max(self) -> float:
        """The longest."""
        ...


def check_state_space(settings: StateSpaceSettings) -> None:
    """Size, steps and rates. Raises ValueError, which begins with the setting's name."""
    if settings.state_size < 2 or settings.state_size % 2:
        raise ValueError(
            f"state_size: expected an even number of at least 2 (conjugate pairs), got {settings.state_size}"
        )
    if settings.taps not in TAPS:
        raise ValueError(f"taps: expected {' or '.join(map(repr, TAPS))}, got {settings.taps!r}")
    if not 0 < settings.time_step_min <= settings.time_step_max < math.inf:
        raise ValueError(
            "time_step_min: expected 0 < time_step_min <= time_step_max, got "
            f"{settings.time_step_min}, {settings.time_step_max}"
        )
    for name in RATES:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {getattr(settings, name)}")

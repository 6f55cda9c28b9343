"""How a host stands and what it has done, for those who watch it."""

from dataclasses import dataclass

__all__ = ["Counters", "Gauges", "StepReport"]


@dataclass
class Counters:
    """What was done since the start."""

    steps: int = 0
    failed_steps: int = 0
    tokens_read: int = 0
    """Of prompts."""
    tokens_generated: int = 0


@dataclass(frozen=True)
class StepReport:
    """One step, for those who watch."""

    seconds: float
    rows: int
    """Replies that decoded as one batch."""
    tokens_read: int
    tokens_generated: int


@dataclass(frozen=True)
class Gauges:
    """How things stand."""

    waiting: int = 0
    running: int = 0
    used_slots: int = 0
    kept_slots: int = 0
    free_slots: int = 0

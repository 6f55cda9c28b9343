"""What an experiment tells whoever runs it; this one keeps silent, the command line's draws."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swat_lm.train.events import Event

__all__ = ["InterruptedRunError", "Watcher"]


class InterruptedRunError(RuntimeError):
    """A run inside an experiment was stopped and saved; the same call continues it."""


class Watcher:
    """Receives what happens and does nothing with it."""

    def stage(self, text: str) -> None:
        """Something new begins."""

    def count(self, name: str, done: int, total: int) -> None:
        """So much of the work called `name` is done; several may go on side by side."""

    def event(self, name: str, event: "Event") -> None:
        """Something happened in the training run `name`; several may go on side by side."""

    def text(self, text: str) -> None:
        """Generated text, as it appears."""

    def state(self, first: int, last: int, tokens: int) -> None:
        """Bytes of the stream's state after the first and the last of so many tokens."""

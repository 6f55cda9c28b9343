"""What an engine knows of a request that has not ended."""

from dataclasses import dataclass, field

from torch import Tensor

from swat_lm.serve.generation import Fed, Generation
from swat_lm.serve.sampler import StreamSampler
from swat_lm.serve.text import ReplyText

__all__ = ["Reply", "Running"]


@dataclass
class Reply:
    """One of the replies to a request."""

    sampler: StreamSampler
    text: ReplyText
    token: int = 0
    """Drawn last: its slot has not read it yet."""


@dataclass
class Running:
    """A request that has not ended."""

    generation: Generation
    tokens: tuple[int, ...]
    """The prompt as it was at submission."""
    replies: list[Reply]
    slot: int = -1
    """Of its prompt; -1 until it starts."""
    logits: Tensor | None = None
    """`[1, V]` after what was read last, where the next piece's first token is to be weighed by them."""
    sum: Tensor | float = 0.0
    """Of its hidden states, float32 `[M]`, where their mean is asked for."""
    fed: list[Fed] = field(default_factory=list)
    """How its slot has read, where the slot is kept."""
    is_prepared: bool = False
    """Whether its slot holds what it goes on from, and the place to go back to does too, where there is one."""

    @property
    def keeps(self) -> bool:
        """Whether its slot is kept when it ends."""
        return self.generation.keep or self.generation.slot is not None

    def note_step(self, size: int, place: int) -> None:
        """Its slot has read a token in a row of a batch."""
        last = self.fed[-1] if self.fed else None
        if last is not None and (last.kind, last.size, last.place) == ("step", size, place):
            self.fed[-1] = last._replace(count=last.count + 1)
        else:
            self.fed.append(Fed("step", size, place, 1))

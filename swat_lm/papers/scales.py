"""How large an experiment is: budgets, sizes, lengths. Data only; what a paper offers is in the paper's folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swat_lm.words import did_you_mean

__all__ = ["TEXT_BYTES", "Budget", "Scale", "find_scale", "miniature", "shape", "small_budget", "tiny_budget"]

TEXT_BYTES = 24_000_000
"""Of training text, for tiny budgets."""


@dataclass(frozen=True)
class Budget:
    """Shape and training of the models of one kind of experiment."""

    shape: Mapping[str, Any]
    """Fields that SwatConfig and Llama share."""
    steps: int
    tokens_per_step: int
    learning_rate: float
    warmup_steps: int
    vocab_size: int | None
    """Most ids of the tokenizer; None: any."""
    tokens_per_pass: int | None = None
    """Of one forward pass of one process; None: the whole step."""
    source: str | None = None
    """What the paper trained on, where no data is named; None: data must be named."""
    tokenizer: str | None = None
    """Of the hub; None: byte-level BPE trained on the text."""
    final_learning_rate_ratio: float = 0.1
    """Of the last step's learning rate to the highest."""


@dataclass(frozen=True)
class Scale:
    """Everything about a scale that is not a variant."""

    name: str
    about: str
    budgets: Mapping[str, Budget]
    """By kind of experiment."""
    sizes: Mapping[str, int]
    """Tokens behind the names of windows and lengths."""
    lengths: tuple[int, ...]
    """Evaluation lengths; each divides the last."""
    pieces: int
    """Pieces of the greatest length read from the held-out text, and from the books."""
    text_bytes: int | None = None
    """Of the training text, spread evenly; None: all of it."""
    task_limit: int | None = None
    """Documents of each benchmark; None: all."""
    held_out: float = 0.03
    for_people: bool = True
    """Whether the command line offers it."""


def shape(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    """Names as in Llama's configuration."""
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def tiny_budget(model: Mapping[str, Any]) -> Budget:
    """What two cores train in minutes: 1.0M tokens."""
    return Budget(model, 500, 2048, 2e-3, 50, 2048)


def small_budget(model: Mapping[str, Any]) -> Budget:
    """What one GPU trains in an hour or so: 302M tokens."""
    return Budget(model, 4600, 65_536, 1e-3, 300, 8192, 32_768)


def miniature(
    model: Mapping[str, Any],
    sizes: Mapping[str, int],
    lengths: tuple[int, ...],
    *,
    steps: int = 3,
    pieces: int = 2,
    text_bytes: int = 60_000,
) -> Scale:
    """A scale that no command offers."""
    return Scale(
        name="miniature",
        about="for tests: everything runs, nothing is learnt",
        budgets={"analysis": Budget(model, steps, 128, 3e-3, 1, 300)},
        sizes=sizes,
        lengths=lengths,
        pieces=pieces,
        text_bytes=text_bytes,
        held_out=0.2,
        for_people=False,
    )


def find_scale(name: str, scales: Mapping[str, Scale]) -> Scale:
    """A scale by its name; raises ValueError naming the nearest."""
    if name in scales:
        return scales[name]
    offered = [scale.name for scale in scales.values() if scale.for_people]
    raise ValueError(f"--scale: expected {', '.join(offered)}, got {name!r}{did_you_mean(name, offered)}")

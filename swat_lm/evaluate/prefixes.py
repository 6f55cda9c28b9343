"""What a model must read to score rows: inputs that are the same once, and beginnings that several share once.

Only lists of tokens; no model, no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["ModelInput", "PrefixGroup", "Request", "distinct_inputs", "prefix_groups"]

SMALLEST_SHARE = 8
"""Tokens that are worth a pass of their own."""


class Request(NamedTuple):
    """Tokens to predict and the tokens before them, neither empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass
class ModelInput:
    """One input to read, and the continuations that are looked up in it; each ends one token after the input."""

    tokens: list[int]
    wanted: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    """Index of the row, and its continuation."""

    @property
    def first_place(self) -> int:
        """The first place whose prediction is looked up."""
        return len(self.tokens) - max(len(continuation) for _, continuation in self.wanted)


@dataclass
class PrefixGroup:
    """Inputs that begin with the same tokens."""

    num_shared: int
    """Tokens that all begin with, of which no prediction is looked up; 0 for a single input."""
    members: list[ModelInput]

    @property
    def num_tokens(self) -> int:
        """Tokens to read, the shared ones once."""
        return self.num_shared + sum(len(member.tokens) - self.num_shared for member in self.members)

    @property
    def longest(self) -> int:
        """Tokens of the longest member after the shared ones."""
        return max(len(member.tokens) for member in self.members) - self.num_shared


def distinct_inputs(rows: Sequence[Request], vocab_size: int) -> list[ModelInput]:
    """Rows as inputs, those with the same input together (as in multiple choice between single tokens).

    Raises:
        ValueError: a row without context or continuation, or a token beyond the vocabulary.
    """
    known: dict[tuple[int, ...], ModelInput] = {}
    for index, (context, continuation) in enumerate(rows):
        if not len(context) or not len(continuation):
            raise ValueError(f"row {index}: expected at least one token of context and one to predict")
        tokens = [*context, *continuation]
        largest = max(tokens)
        if largest >= vocab_size or min(tokens) < 0:
            raise ValueError(
                f"row {index}: token {largest} is not among the {vocab_size} of the model: tokenizer and model do not "
                "belong together"
            )
        inputs = tuple(tokens[:-1])
        known.setdefault(inputs, ModelInput(tokens[:-1])).wanted.append((index, continuation))
    return list(known.values())


def prefix_groups(found: Sequence[ModelInput]) -> list[PrefixGroup]:
    """Neighbours that share a good part of their beginning together: the choices of one question."""
    made: list[PrefixGroup] = []
    for model_input in found:
        if made:
            last = made[-1]
            first = last.members[0]
            most = min(last.num_shared or first.first_place, model_input.first_place)
            shared = common_length(first.tokens, model_input.tokens, most)
            # one more must save more than the others lose by sharing less
            saves = shared * len(last.members) > last.num_shared * (len(last.members) - 1)
            if saves and shared >= max(SMALLEST_SHARE, len(model_input.tokens) // 4):
                last.num_shared = shared
                last.members.append(model_input)
                continue
        made.append(PrefixGroup(0, [model_input]))
    return made


def common_length(first: Sequence[int], second: Sequence[int], most: int) -> int:
    """Equal tokens at the beginning, at most so many."""
    return next((place for place in range(most) if first[place] != second[place]), most)

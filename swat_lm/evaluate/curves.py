"""Loss against evaluation length as numbers: what is measured, its errors, JSON. No model, no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from swat_lm.evaluate.figures import JsonRecord, read_figures, write_figures
from swat_lm.evaluate.standard_errors import mean_and_error

__all__ = ["LengthCurve", "LengthPoint", "WindowMatrix", "difference", "summarise", "with_bytes"]


@dataclass(frozen=True)
class LengthPoint:
    """The loss at one evaluation length N, in nats per token; tokens of a sequence count from 1.

    Every token is predicted from all tokens of its sequence before it, of which the model's own attention and state
    decide how much it sees. Token 1 has nothing before it and is not predicted.

    - `mean_loss`: tokens 2 .. N. The loss of sequences of length N as a whole, as in the paper's Table 2.
    - `tail_loss`: tokens N/2+1 .. N. The loss where the context is about N long, so that a model that breaks at N shows
      it here first.

    The sequences are the first N tokens of each document (`loss_by_length`), or all pieces of N tokens into which the
    documents are cut (`loss_on_same_text`, the paper's way). All documents of at least N tokens weigh the same. Errors
    are standard errors over documents, None for one document.
    """

    length: int
    num_documents: int
    mean_loss: float
    mean_loss_error: float | None
    tail_loss: float
    tail_loss_error: float | None
    state_bytes: int
    """What one stream keeps of its past after N tokens."""
    bits_per_byte: float | None = None
    """The loss of tokens 2 .. N over all streams, in bits per UTF-8 byte of their text; None where not counted."""


@dataclass(frozen=True)
class LengthCurve(JsonRecord):
    """Loss against evaluation length of one model, with each document's figures, to compare models in pairs."""

    points: tuple[LengthPoint, ...]
    num_tokens: int
    """Tokens predicted; each once."""
    window: int | None
    """Window the model was evaluated with; None: full attention in at least one layer."""
    same_text: bool
    """Whether every length was measured on the same text, cut anew for each; see `loss_on_same_text`."""
    document_mean_loss: tuple[tuple[float | None, ...], ...]
    """Per document, in the order given, per length: tokens 2 .. N; None where the document is shorter than N."""
    document_tail_loss: tuple[tuple[float | None, ...], ...]
    """The same for tokens N/2+1 .. N."""
    num_sinks: int = 0
    """First tokens of each stream that were kept beside the window."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Evaluation lengths, rising."""
        return tuple(point.length for point in self.points)

    def at(self, length: int) -> LengthPoint:
        """The point of one length; raises ValueError if it was not measured."""
        for point in self.points:
            if point.length == length:
                return point
        raise ValueError(f"length {length} was not measured; measured: {', '.join(map(str, self.lengths))}")

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return write_figures({name: value for name, value in asdict(self).items() if value or name != "num_sinks"})


def with_bytes(curve: LengthCurve, streams: Sequence[np.ndarray], token_bytes: np.ndarray | None) -> LengthCurve:
    """The curve of these streams with its `bits_per_byte`, which do not depend on the tokenizer.

    `token_bytes` holds the bytes behind each token id; with None the curve stays as it is.
    """
    if token_bytes is None:
        return curve
    points = []
    for at, point in enumerate(curve.points):
        nats, count = 0.0, 0
        for stream, losses in zip(streams, curve.document_mean_loss, strict=True):
            loss = losses[at]
            if loss is not None:
                nats += loss * (point.length - 1)
                count += int(token_bytes[stream[1 : point.length]].sum())
        points.append(replace(point, bits_per_byte=nats / count / math.log(2) if count else None))
    return replace(curve, points=tuple(points))


@dataclass(frozen=True)
class WindowMatrix(JsonRecord):
    """Loss against evaluation length for several evaluation windows of one model (Figure 2 of SWAT)."""

    names: tuple[str, ...]
    """Of the windows: a number of tokens, `none` (full attention) or `own` (the model as it is)."""
    curves: tuple[LengthCurve, ...]
    """One for each window, all on the same streams and at the same lengths."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Evaluation lengths, rising."""
        return self.curves[0].lengths

    def losses(self) -> list[list[float]]:
        """Mean loss in nats per token, by window and length."""
        return [[point.mean_loss for point in curve.points] for curve in self.curves]

    def to_json(self) -> str:
        """`{window: curve}`."""
        curves = (read_figures(curve.to_json()) for curve in self.curves)
        return write_figures(dict(zip(self.names, curves, strict=True)))

    @classmethod
    def from_json(cls, text: str) -> "WindowMatrix":
        """Read what `to_json` wrote."""
        values = read_figures(text)
        return cls(tuple(values), tuple(LengthCurve.from_json(write_figures(curve)) for curve in values.values()))


def difference(first: Sequence[float | None], second: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean over documents of `first - second` and its standard error (None for one document).

    Pairing by document removes what makes some texts harder than others. Raises ValueError if no document has both.
    """
    both = [a - b for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not both:
        raise ValueError("no document has both losses: expected the same documents, at lengths that some of them reach")
    return mean_and_error(both)


def summarise(
    sizes: Sequence[int],
    means: Sequence[Sequence[float | None]],
    tails: Sequence[Sequence[float | None]],
    state_bytes: Sequence[int],
    num_tokens: int,
    window: int | None,
    *,
    same_text: bool,
    num_sinks: int = 0,
) -> LengthCurve:
    """Means per document and length to means over documents."""
    points = []
    for size, kept, *columns in zip(
        sizes, state_bytes, zip(*means, strict=True), zip(*tails, strict=True), strict=True
    ):
        head, tail = ([loss for loss in column if loss is not None] for column in columns)
        points.append(LengthPoint(size, len(head), *mean_and_error(head), *mean_and_error(tail), kept))
    return LengthCurve(
        tuple(points), num_tokens, window, same_text, tuple(map(tuple, means)), tuple(map(tuple, tails)), num_sinks
    )

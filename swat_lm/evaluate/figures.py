"""Figures that may be beyond any float, or none: perplexities, and JSON that any program reads.

JSON knows neither infinity nor "not a number": they are written as the texts "Infinity", "-Infinity" and "NaN".
"""

import json
import math
import reprlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast

from swat_lm.files import write_text

__all__ = ["JsonRecord", "figure_text", "perplexity", "read_figures", "write_figures"]

NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class JsonRecord:
    """What a dataclass has measured, kept as one JSON file."""

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return write_figures(asdict(cast(Any, self)))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; raises ValueError for anything else."""
        # slow to import, and the command line needs only what is below
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(read_figures(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}." for part in first["loc"])[:-1]
            came = "" if first["type"] == "missing" else f", got {reprlib.repr(first['input'])}"
            raise ValueError(f"{where}{': ' * bool(where)}{first['msg']}{came}") from None

    def save(self, path: Path) -> None:
        """Write the JSON beside the place and rename it."""
        write_text(path, self.to_json() + "\n")


def perplexity(loss: float) -> float:
    """exp(loss), and infinity beyond the greatest float (losses from 709.8 nats on)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def figure_text(value: float, decimals: int) -> str:
    """`1,234.50`; from a million on `1.2e+06`, so that it stays short; `inf` and `nan` as they are."""
    return f"{value:,.{decimals}f}" if abs(value) < 1e6 else f"{value:.1e}"


def write_figures(values: Any, indent: int | None = 1) -> str:
    """Plain values as JSON in the strict sense; what is no plain value as its text."""
    # read back, the bare names of numbers that JSON cannot hold become texts
    plain = json.loads(json.dumps(values, default=str), parse_constant=str)
    return json.dumps(plain, indent=indent, allow_nan=False)


def read_figures(text: str) -> Any:
    """What `write_figures` wrote, and JSON with bare `NaN` and `Infinity` as earlier versions wrote it."""
    return numbered(json.loads(text))


def numbered(values: Any) -> Any:
    """The values with numbers for their names."""
    if isinstance(values, str):
        return NOT_FINITE.get(values, values)
    if isinstance(values, dict):
        return {key: numbered(value) for key, value in values.items()}
    return [numbered(value) for value in values] if isinstance(values, list) else values

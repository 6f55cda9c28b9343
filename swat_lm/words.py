"""Words of messages that many places share: counted nouns, the nearest name, values and types as a reader knows them.

No imports of ours.
"""

import difflib
from collections.abc import Iterable
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["counted", "did_you_mean", "install_extra", "lasting", "nearest", "shown", "type_words"]

# of difflib's measure, from 0 to 1: one of two letters of a short name may be another (runs/l1 for runs/ll)
ALIKE = 0.5


def counted(count: int, noun: str) -> str:
    """`1 document`, `1,200 documents`, `2 queries`."""
    several = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else several}"


def lasting(seconds: float) -> str:
    """Seconds as people say them: 20 s, 12 min, 1.5 h."""
    hours = seconds / 3600
    if hours < 1 / 60:
        return f"{max(1, round(seconds))} s"
    return f"{60 * hours:.0f} min" if hours < 1.5 else f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def install_extra(extra: str) -> str:
    """The command that installs an extra of this package, which is installed from a clone."""
    return f"pip install -e '.[{extra}]' in the folder of swat-lm's clone"


def nearest(given: object, known: Iterable[str], count: int = 1) -> list[str]:
    """The names that a mistyped one may have meant, the likeliest first: at most `count` of them."""
    return difflib.get_close_matches(str(given), list(known), n=count, cutoff=ALIKE)


def did_you_mean(given: object, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: the nearest one, or what to say where none is near."""
    near = nearest(given, known)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def shown(value: Any) -> str:
    """A value as an error message shows it: what it is and its type in YAML's words."""
    if value is None:
        return "null"
    names = {str: "text", int: "whole number", float: "number", bool: "true/false", list: "list", dict: "mapping"}
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({names.get(type(value), type(value).__name__)})"


def type_words(hint: Any) -> str:
    """An annotation in words that a reader of YAML knows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        # lists last, since they refer to the others
        parts = sorted(arguments, key=lambda part: get_origin(part) is list)
        return " or ".join(dict.fromkeys(type_words(part) for part in parts))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} entries, each {type_words(arguments[0])}"
    if origin is list:
        return "a list" if arguments[0] is Any else "a list of these, one per layer"
    if origin is tuple:
        entry = type_words(arguments[0]).removeprefix("a ").removeprefix("one ")
        return f"a list of {entry}s" if entry.endswith("number") else f"a list of {entry}"
    if origin is dict or hint is dict or is_dataclass(hint):
        return "a mapping"
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", NoneType: "null"}
    return names.get(hint) or getattr(origin or hint, "__name__", str(hint))

"""Frozen dataclasses from plain YAML values: pydantic validates, and what it finds is said in words of the user's file.

Knows nothing of recipes; `swat_lm/recipe.py` declares what is allowed. No torch here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic.dataclasses
from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from swat_lm.words import nearest, shown, type_words

__all__ = [
    "NOWHERE", "OVERRIDE", "FieldHelp", "Flag", "Origin", "RecipeError", "Several", "build", "defaults_of", "describe",
    "hint_at", "number", "settings",
]  # fmt: skip

Built = TypeVar("Built")
Entry = TypeVar("Entry")

OVERRIDE = "override"
"""How the place of a value begins that was not written in a file."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, what was expected and what came."""


def number(
    default: Any = ..., *, at_least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A finite number with its range: the default of a field, or the annotation of an entry of a tuple."""
    return Field(default, strict=True, ge=at_least, gt=above, lt=below)


# by itself pydantic would take "yes" and 1
Flag = Annotated[bool, Field(strict=True)]
# a lone text stands for a list of one
Several = Annotated[tuple[Entry, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(kind: type[Built]) -> type[Built]:
    """A frozen dataclass by keywords, whose every instance is valid: a value that is not raises RecipeError."""
    made: Any = pydantic.dataclasses.dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    )(kind)
    validated = made.__init__

    def initialise(self: Any, **values: Any) -> None:
        try:
            validated(self, **values)
        except ValidationError as error:
            raise RecipeError(explain(made, error, "", NOWHERE)) from None

    made.__init__ = initialise
    return made


@dataclass(frozen=True)
class Origin:
    """Where the user wrote what: called with a dotted key, gives the beginning of an error message."""

    whole: str = ""
    """What the values as a whole came from, such as a file's name."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> `file:line` or the override."""
    known: Sequence[str] = ()
    """Every valid key anywhere, to name the nearest."""

    def __call__(self, key: str) -> str:
        """The place of the key, of the nearest mapping around it that has one, or of the whole, with a colon."""
        while key:
            if key in self.places:
                return f"{self.places[key]}: "
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return f"{self.whole}: " if self.whole else ""

    def at_fault(self, at: str, message: str) -> str:
        """The place for a rule between several keys of a mapping: the overrides of keys that the message names.

        Without such an override, where the mapping is written.
        """
        named = [key for key in self.places if at and key.startswith(f"{at}.") and re.search(rf"{key}\b", message)]
        overrides = dict.fromkeys(self.places[key] for key in named if self.places[key].startswith(OVERRIDE))
        return f"{', '.join(overrides)}: " if overrides else self(at)


NOWHERE = Origin()


def build(kind: type[Built], values: Any, at: str = "", place: Origin = NOWHERE) -> Built:
    """Make a `kind` from a mapping of plain YAML values whose own dotted key is `at` ("" for the root).

    Raises RecipeError.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise RecipeError(explain(kind, error, at, place)) from None


def explain(kind: type, error: ValidationError, at: str, place: Origin) -> str:
    """The first of pydantic's findings in one sentence: unknown keys, then missing ones, then values in order."""
    order = ("unexpected_keyword_argument", "missing")
    found = min(
        error.errors(), key=lambda finding: order.index(finding["type"]) if finding["type"] in order else len(order)
    )
    location, value = found["loc"], found["input"]
    if location and location[-1] == "[key]":
        key = dotted(at, location[:-2])
        return f"{place(key)}{key}: keys must be words; got {shown(location[-2])}"
    key, around = dotted(at, location), dotted(at, location[:-1])
    if found["type"] == "invalid_key":
        return f"{place(around)}{around or 'the recipe'}: keys must be words; got {shown(value)}"
    if found["type"] == "unexpected_keyword_argument":
        siblings = [join(around, sibling.name) for sibling in fields(hint_at(kind, location[:-1]))]
        return f"{place(key)}{unknown_key(key, siblings, place.known)}"
    if found["type"] == "missing" and isinstance(location[-1], str):
        about = field_at(kind, location).description or ""
        return f"{place(around)}missing key {key}: {' '.join(about.split())}"
    if found["type"] == "value_error":
        # raised by a dataclass itself, which knows its rules but not where the user wrote the values
        message = str(found.get("ctx", {})["error"])
        return f"{place.at_fault(key, message)}{message}"
    if found["type"] in ("greater_than", "greater_than_equal", "less_than"):
        return f"{place(key)}{key} must be {range_words(kind, location)}; got {value!r}"
    return f"{place(key)}{misfit(kind, found, at)}"


def misfit(kind: type, found: ErrorDetails, at: str) -> str:
    """What a value of the wrong type should have been."""
    location, value = found["loc"], found["input"]
    if not location:
        return f"{at or 'the recipe'} must be a mapping of keys to values; got {shown(value)}"
    if found["type"] == "missing":
        # a list of another length is wrong as a whole
        location = location[:-1]
    hint = hint_at(kind, location)
    mapping = "a mapping of keys to values" if is_dataclass(hint) else type_words(hint)
    could_be_text = hint is str and value is not None and not isinstance(value, list | tuple | dict)
    advice = "; put it in quotes" if could_be_text else ""
    return f"{dotted(at, location)} must be {mapping}; got {shown(value)}{advice}"


def range_words(kind: type, location: tuple[int | str, ...]) -> str:
    """The whole range that a number, or an entry of a tuple or mapping, is held to."""
    if not is_dataclass(hint_at(kind, location[:-1])):
        entries = get_args(get_type_hints(hint_at(kind, location[:-2]), include_extras=True)[str(location[-2])])
        # of a mapping's key and value, or of a tuple's entries, which are alike
        metadata = get_args(entries[0 if isinstance(location[-1], int) else 1])[1].metadata
    else:
        metadata = field_at(kind, location).metadata
    # whole limits in all their digits
    words = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Lt: ("below", "lt")}
    limits = [
        (words[type(limit)][0], getattr(limit, words[type(limit)][1])) for limit in metadata if type(limit) in words
    ]
    return " and ".join(f"{word} {limit if isinstance(limit, int) else f'{limit:g}'}" for word, limit in limits)


def field_at(kind: type, location: Sequence[int | str]) -> FieldInfo:
    """What is declared of a key."""
    return hint_at(kind, location[:-1]).__pydantic_fields__[str(location[-1])]


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of a class under `settings` by key, but for mappings."""
    return {
        name: info.default
        for name, info in kind.__pydantic_fields__.items()
        if not info.is_required() and info.default_factory is None
    }


def hint_at(kind: type, location: Sequence[int | str]) -> Any:
    """The annotation at a location below a dataclass; None where it declares none, as inside a plain mapping."""
    hint: Any = kind
    for name in location:
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(str(name))
        elif get_origin(hint) in (tuple, dict):
            hint = get_args(hint)[0 if get_origin(hint) is tuple else 1]
        else:
            return None
    return hint


def unknown_key(key: str, siblings: Sequence[str], everywhere: Sequence[str] = ()) -> str:
    """The sentence for an unknown key: the same last word elsewhere, else the nearest sibling, else all siblings."""
    leaf = key.rpartition(".")[2]
    misplaced = {other.rpartition(".")[2]: other for other in everywhere}
    leaves = {other.rpartition(".")[2]: other for other in siblings}
    near = [misplaced[leaf]] if leaf in misplaced else [leaves[name] for name in nearest(leaf, leaves)]
    if near:
        return f"unknown key {key}; the nearest valid key is {near[0]}"
    return f"unknown key {key}; valid keys here are {', '.join(siblings)}"


def dotted(at: str, location: Sequence[int | str]) -> str:
    """A location below `at` as the user would write it: `data.sources[1]`."""
    for part in location:
        at = f"{at}[{part}]" if isinstance(part, int) else join(at, part)
    return at


def join(at: str, key: Any) -> str:
    """A dotted key."""
    return f"{at}.{key}" if at else str(key)


@dataclass(frozen=True)
class FieldHelp:
    """One key of a recipe as the documentation shows it."""

    key: str
    type: str
    default: str
    help: str


def describe(kind: Any, at: str = "") -> list[FieldHelp]:
    """Every key below a class under `settings` with its type, default and docstring, in order, nested keys dotted."""
    hints, found = get_type_hints(kind), []
    for name, info in kind.__pydantic_fields__.items():
        key, hint = join(at, name), hints[name]
        if is_dataclass(hint):
            found += describe(hint, key)  # type: ignore[arg-type]
            continue
        default = "required" if info.is_required() else "{}" if info.default_factory else yaml_text(info.default)
        found.append(FieldHelp(key, type_words(hint), default, " ".join((info.description or "").split())))
    return found


def yaml_text(value: Any) -> str:
    """A default as the user would write it in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if type(value) is not int else str(value)

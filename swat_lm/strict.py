"""Builds frozen dataclasses from plain YAML values; unknown keys, wrong types and values out of range are errors.

Knows nothing of recipes; `swat_lm/recipe.py` declares what is allowed. No torch here.
"""

import ast
import difflib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Built = TypeVar("Built")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, what was expected and what came."""


def number(
    default: Any = MISSING, *, at_least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A numeric dataclass field with its range; every entry of a tuple is held to the range."""
    limits = {"at_least": at_least, "above": above, "below": below}
    return field(default=default, metadata={name: limit for name, limit in limits.items() if limit is not None})


@dataclass(frozen=True)
class FieldHelp:
    """One key of a recipe as the documentation shows it."""

    key: str
    type: str
    default: str
    help: str


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


OVERRIDE = "override"
"""How the place of a value begins that was not written in a file."""
NOWHERE = Origin()


def build(kind: type[Built], values: Any, at: str = "", place: Origin = NOWHERE) -> Built:
    """Make a `kind` from a mapping of plain YAML values whose own dotted key is `at` ("" for the root).

    Raises RecipeError.
    """
    declared = {one.name: one for one in fields(cast(Any, kind))}
    if not isinstance(values, Mapping):
        raise RecipeError(f"{place(at)}{at or 'the recipe'} must be a mapping of keys to values; got {shown(values)}")
    for key in values:
        if key not in declared:
            raise RecipeError(
                f"{place(join(at, key))}{unknown_key(join(at, key), [join(at, n) for n in declared], place.known)}"
            )
    missing = [n for n, one in declared.items() if n not in values and is_required(one)]
    if missing:
        raise RecipeError(f"{place(at)}missing key {join(at, missing[0])}: {docstrings(kind).get(missing[0], '')}")
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        dotted = join(at, key)
        arguments[key] = convert(value, hints[key], dotted, place)
        check_range(arguments[key], declared[key], dotted, place)
    try:
        return kind(**arguments)
    except RecipeError as error:
        # raised by the dataclass itself, which knows its rules but not where the user wrote the values
        raise RecipeError(f"{place.at_fault(at, str(error))}{error}") from None


def hint_at(kind: type, key: str) -> Any:
    """The annotation of a dotted key below a dataclass; None where it declares none, as inside a plain mapping."""
    hint: Any = kind
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    return hint


def convert(value: Any, hint: Any, key: str, place: Origin) -> Any:
    """Return `value` as the annotated type `hint`, or raise RecipeError naming the key, the type and what came."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        rest = [one for one in arguments if one is not NoneType]
        assert len(rest) == 1, f"{key}: only `X | None` is understood"
        return convert(value, rest[0], key, place) if value is not None else reject(value, hint, key, place)
    if origin is Literal:
        return value if value in arguments and type(value) is str else reject(value, hint, key, place)
    if origin is tuple:
        return convert_tuple(value, hint, key, place)
    if origin is dict or hint is dict:
        return convert_mapping(value, hint, key, place)
    if is_dataclass(hint):
        return build(cast(type, hint), value, key, place)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    # bool is an int to Python but not to a reader
    return value if type(value) is hint and hint is not float else reject(value, hint, key, place)


def convert_tuple(value: Any, hint: Any, key: str, place: Origin) -> tuple[Any, ...]:
    """A list of the annotated length and entries; a lone string stands for a list of one."""
    entries = get_args(hint)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return reject(value, hint, key, place)
    if len(entries) == 2 and entries[1] is Ellipsis:
        return tuple(convert(one, entries[0], f"{key}[{i}]", place) for i, one in enumerate(value))
    if len(value) != len(entries):
        return reject(value, hint, key, place)
    return tuple(convert(one, entries[i], f"{key}[{i}]", place) for i, one in enumerate(value))


def convert_mapping(value: Any, hint: Any, key: str, place: Origin) -> dict[str, Any]:
    """A mapping whose keys are strings; its values are checked by whoever reads it."""
    if not isinstance(value, Mapping):
        return reject(value, hint, key, place)
    for name in value:
        if not isinstance(name, str):
            raise RecipeError(f"{place(key)}{key}: keys must be words; got {shown(name)}")
    return dict(value)


def check_range(value: Any, declared: Field, key: str, place: Origin) -> None:
    """Hold a number, or each number of a tuple, to the range its field declares."""
    for one in value if isinstance(value, tuple) else (value,):
        if not isinstance(one, int | float) or isinstance(one, bool):
            continue
        limits = declared.metadata
        wrong = (
            ("at_least" in limits and one < limits["at_least"])
            or ("above" in limits and one <= limits["above"])
            or ("below" in limits and one >= limits["below"])
        )
        if wrong:
            # whole limits in all their digits
            shown = {name: limit if isinstance(limit, int) else f"{limit:g}" for name, limit in limits.items()}
            words = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in shown.items())
            raise RecipeError(f"{place(key)}{key} must be {words}; got {one!r}")


def check_fields(instance: Any) -> None:
    """The range checks for an instance made in Python rather than from YAML; call it in `__post_init__`."""
    for declared in fields(instance):
        check_range(getattr(instance, declared.name), declared, declared.name, NOWHERE)


def reject(value: Any, hint: Any, key: str, place: Origin) -> Any:
    """Raise the RecipeError of a value of the wrong type."""
    advice = ""
    if hint is str and value is not None and not isinstance(value, list | dict):
        advice = "; put it in quotes"
    raise RecipeError(f"{place(key)}{key} must be {type_name(hint)}; got {shown(value)}{advice}")


def unknown_key(key: str, siblings: list[str], everywhere: Sequence[str] = ()) -> str:
    """The sentence for an unknown key: the nearest sibling, else the same last word elsewhere, else all siblings."""
    leaf = key.rpartition(".")[2]
    for keys, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
        leaves = {other.rpartition(".")[2]: other for other in keys}
        near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
        if near:
            return f"unknown key {key}; the nearest valid key is {leaves[near[0]]}"
    return f"unknown key {key}; valid keys here are {', '.join(siblings)}"


def shown(value: Any) -> str:
    """A value as an error message shows it: what it is and its type in YAML's words."""
    if value is None:
        return "null"
    names = {str: "text", int: "whole number", float: "number", bool: "true/false", list: "list", dict: "mapping"}
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({names.get(type(value), type(value).__name__)})"


def type_name(hint: Any) -> str:
    """An annotation in words a reader of YAML knows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(type_name(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {type_name(arguments[0]).removeprefix('a ').removeprefix('one ')}"
    if origin is tuple:
        return f"a list of {len(arguments)} entries, each {type_name(arguments[0])}"
    if origin is dict or hint is dict or is_dataclass(hint):
        return "a mapping"
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", NoneType: "null"}
    return names[hint]


def is_required(declared: Field) -> bool:
    """Whether a dataclass field has no default."""
    return declared.default is MISSING and declared.default_factory is MISSING


def join(at: str, key: Any) -> str:
    """A dotted key."""
    return f"{at}.{key}" if at else str(key)


@cache
def docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, as one line."""
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    found = {}
    for statement, follower in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(follower, ast.Expr):
            text = ast.literal_eval(follower.value)
            found[cast(ast.Name, statement.target).id] = " ".join(text.split())
    return found


def describe(kind: type, at: str = "") -> list[FieldHelp]:
    """Every key below a dataclass with its type, default and docstring, in order, nested keys dotted."""
    hints, found = get_type_hints(kind), []
    for declared in fields(cast(Any, kind)):
        key, hint = join(at, declared.name), hints[declared.name]
        if is_dataclass(hint):
            found += describe(cast(type, hint), key)
            continue
        empty = "{}" if declared.default is MISSING else yaml_text(declared.default)
        default = "required" if is_required(declared) else empty
        found.append(FieldHelp(key, type_name(hint), default, docstrings(kind).get(declared.name, "")))
    return found


def yaml_text(value: Any) -> str:
    """A default as the user would write it in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if type(value) is not int else str(value)

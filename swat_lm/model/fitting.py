"""Whether plain values are of the types that a configuration or a layer's settings declare, and which one is not.

For our configuration and for those of libraries, which Hugging Face's validator checks: it refuses in several lines,
here is said which field it must have meant, what is expected there and what came.
"""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from swat_lm.words import type_words

__all__ = ["explain_misfit", "fits"]


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the annotated type; a whole number is a number, true and false are none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    kind = NoneType if hint is None else origin or hint
    # since Python 3.11 Any is a class, of which nothing is an instance
    if kind is Any or not isinstance(kind, type):
        # Any, or a name that is not imported
        return True
    if is_typeddict(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def explain_misfit(error: Exception, kind: type, values: Mapping[str, Any]) -> str:
    """What the first field that does not fit must be and what came; what the validator says where all of them fit."""
    for name, value in values.items():
        # one by one: other fields of a library's class may name types that are not imported
        annotations = (vars(base).get("__annotations__", {}) for base in kind.__mro__)
        hint = next((annotation[name] for annotation in annotations if name in annotation), Any)
        if not fits(value, hint):
            text = repr(value)
            return f"{name} must be {type_words(hint)}; got {text if len(text) <= 60 else text[:57] + '...'}"
    return " ".join(str(error).split())

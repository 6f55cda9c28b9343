"""What a field of a configuration must be and what came, in one line, from the validator's error of several.

For our configuration and for those of libraries, which the same validator checks.
"""

import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from huggingface_hub.errors import StrictDataclassError

__all__ = ["explain_misfit"]


def explain_misfit(error: StrictDataclassError, kind: type, values: Mapping[str, Any]) -> str:
    """What a field of a configuration class must be and what came, from a validator's error of several lines."""
    found = re.search(r"field '(\w+)'", str(error))
    if found is None or found[1] not in values:
        return " ".join(str(error).split())
    name = found[1]
    text = repr(values[name])
    # resolved one by one: other fields of a library's class may name types that are not imported
    hint = next(
        (one.__annotations__[name] for one in kind.__mro__ if name in vars(one).get("__annotations__", {})), Any
    )
    wanted = type_words(hint)
    return f"{name} must be {wanted}; got {text if len(text) <= 60 else text[:57] + '...'}"


def type_words(hint: Any) -> str:
    """An annotation in a reader's words."""
    if get_origin(hint) in (Union, UnionType):
        # lists last, since they refer to the others
        parts = sorted(get_args(hint), key=lambda one: get_origin(one) is list)
        return " or ".join(dict.fromkeys(type_words(one) for one in parts))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(type_words, get_args(hint)))}]"
    if hint == list[Any]:
        return "a list"
    if get_origin(hint) is list:
        return "a list of these, one per layer"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    return names.get(hint) or getattr(get_origin(hint) or hint, "__name__", str(hint))

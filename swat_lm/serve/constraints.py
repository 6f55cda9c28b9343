"""Structured output: which tokens may come next so that a reply follows a JSON schema, an expression or a grammar.

Built on llguidance, which the extra `serve` installs and which is imported on first use. What a reply says is sure only
once its constraint is finished: one cut by a length is a beginning of something that follows it.
"""

import importlib.util
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from swat_lm.serve.sampler import SamplingError
from swat_lm.words import install_extra

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerFast

__all__ = ["Constraint", "ConstraintCompiler", "ConstraintError"]

# one line of JSON as Python writes it: bounded, where free white space lets a weak model write blanks for ever.
# A schema says otherwise under "x-guidance"
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LONGEST_MESSAGE = 200


class ConstraintError(ValueError):
    """A schema, expression or grammar that cannot be compiled, or a tokenizer that cannot be constrained."""


class Constraint:
    """Where one reply stands in what it must follow. One per stream; `copy` gives one that goes its own way."""

    def __init__(self, matcher: "LLMatcher") -> None:
        """Of a matcher without error; `ConstraintCompiler` makes them."""
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may come: what was said is whole."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def satisfied(self) -> bool:
        """Whether the reply may end here, though it may also go on."""
        return self._matcher.is_accepting()

    def allowed(self, size: int) -> Tensor:
        """Which of `size` tokens may come next: bool `[V]` on the CPU; ids beyond the tokenizer's may not.

        Raises SamplingError where the library gives up: a grammar too complex at this place.
        """
        # one byte per token of the tokenizer, 0 or 200
        marks = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.bool)
        if self._matcher.is_error():
            raise SamplingError(f"the constraint cannot go on here: {shortened(self._matcher.get_error())}")
        return torch.nn.functional.pad(marks, (0, max(0, size - len(marks))))[:size]

    def accept(self, token: int) -> None:
        """Take a chosen token in; raises SamplingError for one that is not allowed."""
        if not self._matcher.consume_token(token):
            raise SamplingError(
                f"token {token} is not allowed by the constraint here: {shortened(self._matcher.get_error())}"
            )

    def copy(self) -> Self:
        """The same place in the same constraint, for another reply."""
        return type(self)(self._matcher.deep_copy())


class ConstraintCompiler:
    """Compiles constraints for one tokenizer; making it takes about a second for a large vocabulary, so keep it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", end_tokens: Collection[int]) -> None:
        """`end_tokens` are those that end a text, allowed where a constraint is satisfied.

        Raises ConstraintError for a tokenizer that llguidance cannot read, for no end token and without llguidance.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise ConstraintError(f"structured output needs llguidance: {install_extra('serve')}")
        from llguidance.hf import from_tokenizer

        if not end_tokens:
            raise ConstraintError(
                "structured output needs a token that ends a text; this tokenizer and model name none"
            )
        try:
            self._tokenizer = from_tokenizer(tokenizer, eos_token=sorted(end_tokens))
        except ValueError as error:
            raise ConstraintError(f"structured output cannot use this tokenizer: {shortened(str(error))}") from None

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Constraint:
        """JSON that is valid under a schema, on one line as `json.dumps` writes it; `{"type": "object"}`: any object.

        True allows any JSON; false allows none, and is refused as every schema that no text follows.
        A keyword of JSON Schema that llguidance does not implement is refused, never left out.
        """
        from llguidance import LLMatcher

        if not isinstance(schema, Mapping | bool):
            raise ConstraintError(f"JSON schema: expected an object, got {type(schema).__name__}")
        if schema is False:
            raise ConstraintError("JSON schema: cannot be compiled: no text follows the schema false")
        # the library takes options only beside an object
        schema = {} if schema is True else schema
        try:
            text = json.dumps(schema, allow_nan=False)
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=JSON_STYLE)  # type: ignore[arg-type]
        except RecursionError:
            raise ConstraintError("JSON schema: cannot be compiled: nested too deep") from None
        except (ValueError, TypeError) as error:
            raise ConstraintError(f"JSON schema: cannot be compiled: {shortened(str(error))}") from None
        return self._compiled("JSON schema", grammar)

    def regex(self, expression: str) -> Constraint:
        """Text that a regular expression matches from beginning to end; the syntax of Rust, so no look-around."""
        from llguidance import LLMatcher

        return self._compiled(
            "regular expression", LLMatcher.grammar_from_regex(text_of("regular expression", expression))
        )

    def lark(self, grammar: str) -> Constraint:
        """Text that a context-free grammar in llguidance's form of Lark derives from `start`."""
        from llguidance import LLMatcher

        return self._compiled("grammar", LLMatcher.grammar_from_lark(text_of("grammar", grammar)))

    def _compiled(self, kind: str, grammar: str) -> Constraint:
        """A constraint of llguidance's own form; raises ConstraintError in one sentence."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{kind}: cannot be compiled: {shortened(matcher.get_error())}")
        constraint = Constraint(matcher)
        try:
            possible = bool(constraint.allowed(self._tokenizer.vocab_size).any())
        except SamplingError as error:
            if not matcher.get_error().startswith("NoExtension"):
                raise ConstraintError(f"{kind}: cannot be compiled: {error}") from None
            possible = False
        if not possible:
            raise ConstraintError(f"{kind}: cannot be compiled: no text of this tokenizer's tokens follows it")
        return constraint


def text_of(name: str, value: Any) -> str:
    """A text, or ConstraintError that names what came instead."""
    if not isinstance(value, str):
        raise ConstraintError(f"{name}: expected a text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{name}: expected UTF-8 text, got half a character at {error.start}") from None
    return value


def shortened(message: str) -> str:
    """The line of a library's message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    # errors of expressions are drawn over several lines, the last of which names it
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return said if len(said) <= LONGEST_MESSAGE else said[: LONGEST_MESSAGE - 3] + "..."

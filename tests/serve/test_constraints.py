"""Constrained replies follow their schema, expression or grammar whatever the model says; what cannot is refused."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swat_lm.data import load_tokenizer, train_tokenizer
from swat_lm.serve.constraints import Constraint, ConstraintCompiler, ConstraintError
from swat_lm.serve.sampler import Choice, SamplingError, StreamSampler, choose
from swat_lm.serve.sampling import Sampling
from tests.serve.pieces import sentence_pieces


class Said(BaseModel):
    """A schema as users write it; strings and lists are bounded, since a random model hardly ever ends one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(max_length=6)]
    age: Annotated[int, Field(ge=0, le=120)]
    tags: Annotated[list[Literal["a", "b\u00e9"]], Field(min_length=1, max_length=3)]
    more: bool | None = None


EXPRESSIONS = [r"[a-c]{2,5}\.(com|org)", r"(yes|no|maybe)", r"[0-9]{4}-[0-9]{2}-[0-9]{2}( \u20ac[0-9]+)?", r"x?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Byte-level pairs, with tokens that cross the bounds of what JSON is made of."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text('{"name": "b\u00e9", "age": 12, "tags": ["a", "b\u00e9"]}\n' * 20, "utf-8")
    train_tokenizer([str(folder / "text.txt")], 320, folder / "made")
    return load_tokenizer(str(folder / "made"))


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, [tokenizer.eos_token_id])


def said(tokenizer: Any, constraint: Constraint, seed: int, sampling: Sampling | None = None) -> str:
    """What a model of random logits says under a constraint, which must end it within 200 tokens."""
    sampler = StreamSampler(sampling or Sampling(seed=seed), constraint=constraint)
    # padded beyond the tokenizer, with the likeliest tokens there
    logits = torch.randn(200, len(tokenizer) + 13, generator=torch.Generator().manual_seed(seed)) * 2
    logits[:, len(tokenizer) :] = 30
    tokens = []
    for row in logits:
        tokens.append(sampler.next_token(row))
        if tokens[-1] == tokenizer.eos_token_id or constraint.finished:
            break
    assert constraint.satisfied
    return tokenizer.decode([token for token in tokens if token != tokenizer.eos_token_id])


def test_a_schema_is_followed(tokenizer: PreTrainedTokenizerFast, compiler: ConstraintCompiler):
    begun, texts = compiler.json_schema(Said.model_json_schema()), []
    for seed in range(25):
        # also by who takes the likeliest, and through penalties
        sampling = [None, Sampling(0.0), Sampling(0.9, 5, frequency_penalty=2, logit_bias={3: 100}, seed=seed)][
            seed % 3
        ]
        texts.append(said(tokenizer, begun.copy(), seed, sampling))
        Said.model_validate_json(texts[-1])
    assert len(set(texts)) > 15
    assert isinstance(
        json.loads(said(load_tokenizer("bytes"), bytes_compiler().json_schema({"type": "boolean"}), 1)), bool
    )
    # any JSON at all
    anything, whole = compiler.json_schema(True), tokenizer.encode('{"a": 1}', add_special_tokens=False)
    for token in whole:
        anything.accept(token)
    assert anything.satisfied


def bytes_compiler() -> ConstraintCompiler:
    return ConstraintCompiler(load_tokenizer("bytes"), [257])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_followed(expression: str, tokenizer: PreTrainedTokenizerFast, compiler: ConstraintCompiler):
    begun = compiler.regex(expression)
    for seed in range(8):
        assert re.fullmatch(expression, said(tokenizer, begun.copy(), seed))


def test_pieces_with_byte_fallback_follow_too():
    pieces = sentence_pieces()
    compiler = ConstraintCompiler(pieces, [pieces.eos_token_id])
    for seed in range(8):
        text = said(pieces, compiler.regex("[ab]{2} (a|\u00e9|\u20ac)+"), seed)
        assert re.fullmatch("[ab]{2} (a|\u00e9|\u20ac)+", text)


def test_a_grammar_is_followed(tokenizer: PreTrainedTokenizerFast, compiler: ConstraintCompiler):
    begun = compiler.lark('start: "(" start? ")" | "[" start? "]"')
    for seed in range(4):
        sampling = Sampling(seed=seed, logit_bias={tokenizer.convert_tokens_to_ids(one): 4.0 for one in ")]"})
        text = said(tokenizer, begun.copy(), seed, sampling)
        half = text[: len(text) // 2]
        assert text == half + half[::-1].translate(str.maketrans("([", ")]"))


def test_the_end_is_the_end_tokens(compiler: ConstraintCompiler, tokenizer: PreTrainedTokenizerFast):
    end, size = tokenizer.eos_token_id, len(tokenizer) + 5
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    constraint = compiler.regex("ab?")
    assert constraint.allowed(size).nonzero().flatten().tolist() == [a]
    assert len(constraint.allowed(size)) == size
    constraint.accept(a)
    assert (constraint.satisfied, constraint.finished) == (True, False)
    assert constraint.allowed(size).nonzero().flatten().tolist() == sorted([b, end])
    other = constraint.copy()
    constraint.accept(b)
    assert (constraint.satisfied, constraint.finished) == (True, True)
    assert constraint.allowed(size).nonzero().flatten().tolist() == [end]
    # the copy went its own way
    assert not other.finished
    other.accept(end)
    assert other.finished
    with pytest.raises(SamplingError, match=f"^token {c} is not allowed by the constraint here: [^\n]*$"):
        constraint.accept(c)
    assert not constraint.finished


def test_a_stream_that_cannot_go_on_fails_alone(compiler: ConstraintCompiler, tokenizer: PreTrainedTokenizerFast):
    constraints = [compiler.regex("a+"), compiler.regex("b+"), None]
    samplers = [StreamSampler(Sampling(seed=1), constraint=constraint) for constraint in constraints]
    logits = torch.zeros(3, len(tokenizer))
    logits[1, tokenizer.convert_tokens_to_ids("b")] = -torch.inf
    first, second, third = choose(samplers, logits)
    assert first == Choice(tokenizer.convert_tokens_to_ids("a"))
    assert str(second) == "no token may come next: the constraint and the logits leave none"
    assert isinstance(third, Choice)
    greedy = StreamSampler(Sampling(0.0), constraint=compiler.regex("b+"))
    with pytest.raises(SamplingError, match="no token may come next"):
        greedy.next_token(logits[1])
    with pytest.raises(ValueError, match="ignore_end"):
        StreamSampler(Sampling(ignore_end=True), constraint=constraints[0])


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("json_schema", {"type": "nonsense"}, "JSON schema: cannot be compiled: Invalid type"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "JSON schema: cannot be compiled: .*uniqueItems"),
        ("json_schema", {"type": "string", "pattern": "(?<x"}, "JSON schema: cannot be compiled: unclosed"),
        ("json_schema", {"$ref": "http://example.org/"}, "JSON schema: cannot be compiled: "),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "JSON schema: .*no text"),
        ("json_schema", nested(300), "JSON schema: cannot be compiled: .*recursion"),
        ("json_schema", nested(100_000), "JSON schema: cannot be compiled: nested too deep"),
        ("json_schema", {"const": float("nan")}, "JSON schema: cannot be compiled: "),
        ("json_schema", False, "JSON schema: cannot be compiled: no text follows the schema false"),
        ("json_schema", [1], "JSON schema: expected an object, got list"),
        ("regex", "a(", "regular expression: cannot be compiled: unclosed group"),
        ("regex", "(?=x)y", "regular expression: cannot be compiled: look-around"),
        ("regex", "(" * 5000 + ")" * 5000, "regular expression: cannot be compiled: .*250"),
        ("regex", "\ud800", "regular expression: expected UTF-8 text"),
        ("regex", 3, "regular expression: expected a text, got int"),
        ("lark", 'start: "a" other', "grammar: cannot be compiled: .*other"),
    ],
    ids=range(16),
)
def test_what_cannot_be_compiled_is_refused(kind: str, given: Any, message: str, compiler: ConstraintCompiler):
    with pytest.raises(ConstraintError, match=f"^{message}") as raised:
        getattr(compiler, kind)(given)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_tokenizers_and_packages_that_cannot_serve(monkeypatch: pytest.MonkeyPatch):
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConstraintError, match="cannot use this tokenizer: "):
        ConstraintCompiler(PreTrainedTokenizerFast(tokenizer_object=backend), [1])
    with pytest.raises(ConstraintError, match="needs a token that ends a text"):
        ConstraintCompiler(load_tokenizer("bytes"), [])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConstraintError, match=r"pip install -e '.\[serve\]'"):
        bytes_compiler()

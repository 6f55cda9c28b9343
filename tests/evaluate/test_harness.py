"""Our answers to the harness are its own Hugging Face model's, whatever is batched, streamed or read together."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from swat_lm.data import load_tokenizer
from swat_lm.evaluate import scoring
from swat_lm.evaluate.prefixes import Request, distinct_inputs, prefix_groups
from swat_lm.evaluate.scoring import Scorer
from tests.evaluate import models

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from swat_lm.evaluate.harness import HarnessModel

TEXTS = [
    ("Question: What is wet?\nAnswer:", " water"),
    ("Question: What is wet?\nAnswer:", " sand and dust"),
    # one context, single tokens: read once
    ("Is rain dry?", "n"),
    ("Is rain dry?", "y"),
    ("a context that ends with a space ", "and goes on"),
    ("", "nothing before this"),
    ("long " * 60, "cut on the left"),
    ("x", "a continuation that is longer than the context " * 2),
]


BYTES = 259


def tiny_llama() -> PreTrainedModel:
    return models.tiny_llama(vocab_size=BYTES)


def tiny_swat() -> PreTrainedModel:
    return models.tiny_swat(vocab_size=BYTES)


def tiny_gemma2() -> PreTrainedModel:
    # its logits are capped after the head
    values = {**models.SHARED, "vocab_size": BYTES, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 7}
    return models.built("Gemma2", **values, final_logit_softcapping=3.0)


def tiny_mamba() -> PreTrainedModel:
    # cannot be read in chunks
    return models.built("Mamba", **{**models.STATE_SPACE, "vocab_size": BYTES})


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index)  # type: ignore[arg-type]
        for index, one in enumerate(arguments)
    ]


def theirs(model: PreTrainedModel, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, batch_size=3, device="cpu", **{"tokenizer": load_tokenizer("bytes"), **options})


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_swat, tiny_mamba])
def test_log_likelihoods_are_the_harness_own(build):
    model = build()
    ours, harness = HarnessModel(model, load_tokenizer("bytes"), max_length=128), theirs(model, max_length=128)
    for (value, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(asked("loglikelihood", *TEXTS)),
        harness.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True),
        strict=True,
    ):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert greedy == expected_greedy
    texts = [("one page of text. " * 30,), ("short",), ("a" * 128,), ("b" * 129,)]
    for value, expected in zip(
        ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)),
        harness.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True),
        strict=True,
    ):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)


def with_bos() -> PreTrainedTokenizerFast:
    """Bytes, with a token that the tokenizer puts before every text by itself, as Llama's does."""
    ids = {letter: number + 2 for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(BPE(vocab={"<s>": 0, "</s>": 1, **ids}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")


def test_a_token_before_every_text_is_the_harness_own():
    model, tokens = tiny_llama(), with_bos()
    ours = HarnessModel(model, tokens, max_length=64)
    harness = theirs(model, tokenizer=tokens, max_length=64)
    # the text's own token, nothing before, spaces at the end, and too long
    pairs = [("<s>hello", " x"), ("", " abc"), ("trailing ", " y"), ("z" * 100, " end")]
    found = ours.loglikelihood(asked("loglikelihood", *pairs))
    expected = harness.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-5, abs=1e-4)
    texts = [("one page of text. " * 10,), ("x",), ("",)]
    rolling = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    wanted = harness.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert rolling == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def test_greedy_is_found():
    model, tokens = tiny_llama(), load_tokenizer("bytes")
    context = "abc"
    ids = torch.tensor([tokens.encode(context)])
    with torch.no_grad():
        likeliest = int(model(input_ids=ids).logits[0, -1].argmax())
    scorer = Scorer(model)
    rows = [Request(ids[0].tolist(), [likeliest]), Request(ids[0].tolist(), [(likeliest + 1) % 256])]
    assert [one.is_greedy for one in scorer.score(rows)] == [True, False]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_swat, tiny_mamba])
def test_batches_and_streams_change_nothing(build, monkeypatch: pytest.MonkeyPatch):
    model = build()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (2, 3, 9, 30, 31, 50):
        tokens = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        rows += [Request(tokens[:1], tokens[1:]), Request(tokens[:-1], tokens[-1:])]
    expected = Scorer(model, batch_size=1).score(rows)
    monkeypatch.setattr(scoring, "CHUNK", 8)
    monkeypatch.setitem(scoring.TOKENS_PER_BATCH, "cpu", 64)
    for scores in (
        Scorer(model).score(rows),
        Scorer(model, batch_size=5).score(rows),
        Scorer(model).score(rows, stream_above=0),
        Scorer(model, batch_size=2).score(rows, stream_above=20),
    ):
        for one, other in zip(scores, expected, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4, abs=1e-4)
            assert one.is_greedy == other.is_greedy


def test_beginnings_are_read_once():
    model = tiny_swat()
    generator = torch.Generator().manual_seed(2)

    def some(count: int) -> list[int]:
        return torch.randint(256, (count,), generator=generator).tolist()

    rows = []
    for length in (9, 30, 12, 55, 1):
        context = some(length)
        rows += [Request(context, some(number)) for number in (3, 1, 1, 8)]
    # the contexts differ, as in WinoGrande
    start, end = some(20), some(6)
    rows += [Request([*start, *some(3)], end), Request([*start, *some(5)], end), Request(some(40), some(2))]
    found = distinct_inputs(rows, 259)
    groups = prefix_groups(found)
    # the shortest context is not worth it
    assert [(one.num_shared, len(one.members)) for one in groups[:4]] == [(8, 3), (29, 3), (11, 3), (54, 3)]
    assert (groups[-2].num_shared, len(groups[-2].members), groups[-1].num_shared) == (20, 2, 0)
    assert [member for group in groups for member in group.members] == found
    extended: list[int] = []
    plain = Scorer(model, batch_size=1)
    expected = [plain.score([row])[0] for row in rows]
    chunk = model.forward_chunk
    model.forward_chunk = lambda tokens, *rest: extended.append(len(tokens)) or chunk(tokens, *rest)  # type: ignore
    for scorer in (Scorer(model), Scorer(model, batch_size=7)):
        for one, other in zip(scorer.score(rows), expected, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4, abs=1e-4)
            assert one.is_greedy == other.is_greedy
    assert extended[:2] == [5, 14]


def test_progress_counts_every_token_read_once():
    calls: list[tuple[int, int]] = []
    rows = [Request([1, 2], [3]), Request([1, 2], [4]), Request([1, 2, 3], [4, 5])]
    Scorer(tiny_llama(), batch_size=1).score(rows, lambda done, total: calls.append((done, total)))
    assert calls == [(4, 6), (6, 6)]


def test_batches_shrink_until_they_fit(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    rows = [Request([1, 2, 3], [4 + number]) for number in range(9)] + [
        Request([number, 2, 3], [4]) for number in range(9)
    ]
    expected = Scorer(model, batch_size=1).score(rows)
    body, sizes = model.model.forward, []

    def limited(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return body(input_ids=input_ids, **options)

    scorer = Scorer(model)
    monkeypatch.setattr(model.model, "forward", limited)
    scores = scorer.score(rows)
    # nine inputs, one of which nine rows more share
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    for one, other in zip(scores, expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
    fixed = Scorer(tiny_llama(), batch_size=4)
    monkeypatch.setattr(fixed.model.model, "forward", limited)
    with pytest.raises(ValueError, match="out of memory with 4 rows of 3 tokens: use a smaller --batch-size"):
        fixed.score(rows)


def test_a_long_context_costs_what_the_window_costs():
    model, tokenizer = tiny_swat(), load_tokenizer("bytes")
    ours = HarnessModel(model, tokenizer)
    assert ours._scorer.is_endless
    assert ours.max_length is None
    reached = []
    extend = model.extend

    def counted(tokens: torch.Tensor, state: Any, *rest: Any) -> torch.Tensor:
        reached.append((tokens.shape[1], state.num_bytes))
        return extend(tokens, state, *rest)

    model.extend = counted  # type: ignore[method-assign]
    context = "a word and another " * 300 + "one"
    ((value, _),) = ours.loglikelihood(asked("loglikelihood", (context, " end")))
    assert len(context) > scoring.STREAM_ABOVE
    assert {size for size, _ in reached[:-1]} == {scoring.CHUNK}
    assert len({held for _, held in reached}) == 1
    ids = torch.tensor([tokenizer.encode(context + " end")])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -5:-1].log_softmax(-1)
    expected = logits.gather(-1, ids[0, -4:, None]).sum().item()
    assert value == pytest.approx(expected, rel=1e-4)
    # a model without windows in all layers loses the beginning, as with the harness
    assert not HarnessModel(tiny_llama(), tokenizer)._scorer.is_endless
    assert HarnessModel(tiny_llama(), tokenizer).max_length == tiny_llama().config.max_position_embeddings


def test_a_whole_text_in_one_stream():
    model, tokenizer = tiny_swat(), load_tokenizer("bytes")
    ours = HarnessModel(model, tokenizer, max_length=16)
    text = "whatever the windows cut, this sees more. " * 4
    ours.rolling = "whole"
    (whole,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    assert whole == pytest.approx(logits.gather(-1, ids[0, 1:, None]).sum().item(), rel=1e-5)
    ours.rolling = "windows"
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))[0] != pytest.approx(whole, rel=1e-5)


def test_generation_is_the_harness_own():
    for build in (tiny_llama, tiny_swat):
        model = build()
        requests = [("Once", {"until": ["e", "\n"], "max_gen_toks": 20}), ("A longer beginning", {"until": []})]
        requests = [(text, options | {"max_gen_toks": 12}) for text, options in requests]
        ours = HarnessModel(model, load_tokenizer("bytes"), max_length=64)
        expected = theirs(model, max_length=64).generate_until(asked("generate_until", *requests), disable_tqdm=True)
        assert ours.generate_until(asked("generate_until", *requests)) == expected


def test_requests_with_other_stop_strings_are_not_mixed():
    ours = HarnessModel(tiny_llama(), load_tokenizer("bytes"), max_length=64, batch_size=2)
    batches: list[tuple[list[str], Any]] = []

    def generate(contexts: list[str], asked: dict[str, Any]) -> list[str]:
        batches.append((contexts, asked["until"]))
        return [context.upper() for context in contexts]

    ours._generate = generate  # type: ignore[method-assign, assignment]
    requests = [("a", "ab"), ("bbb", ["a", "b"]), ("cc", "ab"), ("dddd", "ab"), ("ee", ["a", "b"])]
    found = ours.generate_until(asked("generate_until", *((text, {"until": until}) for text, until in requests)))
    assert found == ["A", "BBB", "CC", "DDDD", "EE"]
    assert batches == [(["dddd", "cc"], "ab"), (["a"], "ab"), (["bbb", "ee"], ["a", "b"])]


def test_the_tokenizer_has_a_name_for_the_harness():
    tokenizer = load_tokenizer("bytes")
    tokenizer.name_or_path = "some/where"
    assert HarnessModel(tiny_llama(), tokenizer).tokenizer_name == "some__where"


def test_what_cannot_be_asked_is_said():
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(ValueError, match="token 259 is not among the 259 of the model"):
        Scorer(tiny_llama()).score([Request([1], [259])])
    with pytest.raises(ValueError, match="at least one token of context"):
        Scorer(tiny_llama()).score([Request([], [1])])
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        Scorer(tiny_llama(), batch_size=0)
    ours = HarnessModel(tiny_llama(), tokenizer, max_length=8)
    with pytest.raises(ValueError, match="has no tokens of its own"):
        ours.loglikelihood(asked("loglikelihood", ("context", "")))
    with pytest.raises(ValueError, match="a continuation of 9 tokens is longer than the 8"):
        ours.loglikelihood(asked("loglikelihood", ("context", "123456789")))
    with pytest.raises(ValueError, match="raise --max-length"):
        ours.generate_until(asked("generate_until", ("context", {"max_gen_toks": 8})))
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a beginning-of-text nor an end-of-text"):
        HarnessModel(tiny_llama(), tokenizer)

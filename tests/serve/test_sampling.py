"""The options of a request check themselves, and say which of them is wrong."""

import re

import pytest

from swat_lm.serve.sampling import Sampling


def test_what_json_gives_is_taken():
    given = Sampling(temperature=0, stop=["a", "b"], stop_token_ids=[3], logit_bias={"7": -100, 8: 1})  # type: ignore
    assert given == Sampling(0.0, stop=("a", "b"), stop_token_ids=(3,), logit_bias={7: -100.0, 8: 1.0})
    assert hash(given) == hash(Sampling(0.0, stop=("a", "b"), stop_token_ids=(3,), logit_bias={7: -100.0, 8: 1.0}))
    assert Sampling(stop="end").stop == ("end",)  # type: ignore
    # ranges of OpenAI's API end where they are
    Sampling(presence_penalty=-2, frequency_penalty=2, logprobs=20, n=128, seed=-(2**63), logit_bias={0: 100})


@pytest.mark.parametrize(
    "arguments",
    [
        *({"temperature": value} for value in (-1.0, float("nan"), float("inf"), "1", None, True, 10**400)),
        *({"top_k": value} for value in (0, 1.0, True)),
        *({"top_p": value} for value in (0.0, 1.5, None)),
        *({"min_p": value} for value in (-0.1, 1.1)),
        *({"repetition_penalty": value} for value in (0, -1, float("inf"))),
        *({"presence_penalty": value} for value in (-2.1, 2.1, None)),
        *({"frequency_penalty": value} for value in (-2.1, 2.1, [])),
        *({"logit_bias": value} for value in ({"x": 1}, {1: 101}, {-1: 0}, {1: "a"}, [1], {"9" * 20: 1}, {True: 1})),
        *({"seed": value} for value in (2**63, 1.5, "1")),
        *({"stop": value} for value in ([""], ["a"] * 17, [1], 3, "a" * 1025)),
        *({"stop_token_ids": value} for value in (3, [-1], ["a"], [1.0])),
        *({"max_tokens": value} for value in (-1, 1.5)),
        *({"ignore_end": value} for value in (1, None)),
        *({"logprobs": value} for value in (-1, 21, True)),
        *({"n": value} for value in (0, 129, None, "2")),
        {"vocab_size": 0},
        {"logit_bias": {10: 1}, "vocab_size": 10},
        {"stop_token_ids": (10,), "vocab_size": 10},
    ],
    ids=str,
)
def test_bad_values(arguments: dict):
    with pytest.raises(ValueError, match=f"^{re.escape(next(iter(arguments)))}: expected .*, got ") as raised:
        Sampling(**arguments)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_an_integer_too_long_to_be_written_is_named():
    with pytest.raises(ValueError, match=r"^seed: expected an integer from .*, got int of very many digits; "):
        Sampling(seed=1 << 20_000)

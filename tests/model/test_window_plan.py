"""Which layers keep full attention, in words: for recipes, for sources of other families, for any plan of layers."""

import pytest
from transformers import LlamaConfig, Mamba2Config, MistralConfig, Olmo3Config

from swat_lm.model.configuration import config_from_recipe
from swat_lm.model.conversion import convert_config
from swat_lm.model.window_plan import window_plan, windows_of, with_windows

from .models import VOCABULARY

RECIPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "sliding_window": 8,
}  # fmt: skip


def full_layers(config) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.window(layer) is None]


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("none", []), ("odd", [1, 3, 5]), ("even", [0, 2, 4]), ("every:3", [2, 5]), ("every:1", [0, 1, 2, 3, 4, 5]),
        ("last", [5]), ("last:2", [4, 5]), ("0,3", [0, 3]), ("4", [4]), ([3, 0], [0, 3]), (4, [4]),
    ],
)  # fmt: skip
def test_words(words, chosen: list[int]):
    assert window_plan(6, 8, words) == [None if layer in chosen else 8 for layer in range(6)]
    assert full_layers(config_from_recipe({**RECIPE, "full_layers": words})) == chosen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("every:0", "expected a whole number from 1 to 6, .*got '0'"),
        ("last:7", "expected a whole number from 1 to 6, .*got '7'"),
        ("every", "expected none, odd, even, every:3"),
        ("lst:2", "did you mean 'last'"),
        ("odd:2", "expected none, odd"),
        ("0,,1", "numbers with commas between"),
        ("0,6", "no layer 6 with attention; there are 6, numbered 0 to 5"),
        ([1, 1], "layer 1 is named twice"),
        ([True], "expected numbers of layers .*got True"),
        ([], r"got \[\]"),
        (b"last", "expected none, odd.*got b'last'"),
        (2.5, "got 2.5"),
    ],
)
def test_what_is_refused(words, message: str):
    with pytest.raises(ValueError, match=f"full_layers: .*{message}"):
        window_plan(6, 8, words)


def test_only_layers_of_attention_are_counted():
    plan = ["mamba2", {"kind": "attention", "sliding_window": 4}]
    config = config_from_recipe({**RECIPE, "layers": plan, "full_layers": "every:2"})
    assert [config.window(layer) for layer in (1, 3, 5)] == [4, None, 4]
    with pytest.raises(ValueError, match="no layer 2 with attention"):
        config_from_recipe({**RECIPE, "layers": plan, "full_layers": "2"})
    with pytest.raises(ValueError, match="window: expected a whole number of at least 1, got 0"):
        window_plan(6, 0, "last")
    for count in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"num_layers: expected a whole number of at least 1, got {count}"):
            window_plan(count, 8, "none")
    with pytest.raises(ValueError, match="this model has none; give it a window"):
        config_from_recipe({**RECIPE, "sliding_window": None, "full_layers": "last"})


def test_first_tokens_are_kept_beside_windows_alone():
    softmax = {**RECIPE, "score_function": "softmax", "slopes": "none", "sinks": 2}
    config = config_from_recipe(softmax)
    assert with_windows(config, dict.fromkeys(range(6))).sinks == 0
    assert with_windows(config, {**dict.fromkeys(range(6)), 5: 4}).sinks == 2
    # what an entry says of its own is not asked of the model
    plan = ["mamba2", {"kind": "attention", "sinks": 0}, "attention"]
    config = config_from_recipe({**softmax, "layers": plan})
    for windows, sinks in (({1: 8, 2: None, 4: 8, 5: None}, 0), ({1: None, 2: None, 4: None, 5: 8}, 2)):
        changed = with_windows(config, windows)
        assert (changed.sinks, windows_of(changed)) == (sinks, windows)
    with pytest.raises(ValueError, match=r"sinks: 2 first tokens .* full_layers 'every:1' leaves no layer one"):
        config_from_recipe({**softmax, "full_layers": "every:1"})


def test_sources_of_other_families():
    shape = {key: value for key, value in RECIPE.items() if key != "sliding_window"}
    llama = convert_config(LlamaConfig(**shape), 8, "every:3")
    assert full_layers(llama) == [2, 5]
    with pytest.raises(ValueError, match="this model has none"):
        convert_config(LlamaConfig(**shape), full_layers="last")
    # how a layer rotates stays its own, with a window or without
    theirs = Olmo3Config(**shape, sliding_window=8)
    before, after = convert_config(theirs), convert_config(theirs, 16, "0")
    assert full_layers(before) == [3]
    for words in ("none", "last"):
        with pytest.raises(ValueError, match=r"layer 3 of this model has none; give all .*--window 1024"):
            convert_config(theirs, full_layers=words)
    assert full_layers(convert_config(theirs, 16, "none")) == []
    mistral = MistralConfig(**shape, num_key_value_heads=4, sliding_window=8)
    assert full_layers(convert_config(mistral, full_layers="none")) == []
    assert [after.window(layer) for layer in range(6)] == [None, 16, 16, 16, 16, 16]
    assert [after.rotary(layer) for layer in range(6)] == [before.rotary(layer) for layer in range(6)]
    mamba = Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, n_groups=1, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"full_layers is a setting of attention.*, of which a Mamba-2 model has"):
        convert_config(mamba, full_layers="last")

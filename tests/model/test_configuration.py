"""SwatConfig: per-layer settings, what Hugging Face reads of it, and the messages for what cannot be."""

import math
from typing import Literal

import pytest
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from swat_lm import SwatConfig
from swat_lm.model.architectures import configure_model
from swat_lm.model.fitting import fits
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.words import type_words

from .models import tiny_config


def test_one_window_is_what_hugging_face_understands():
    config = tiny_config(sliding_window=5)
    assert config.sliding_window == 5
    assert config.layer_types == ["sliding_attention"] * 2
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)
    assert tiny_config(sliding_window=None).layer_types == ["full_attention"] * 2


def test_windows_per_layer_reach_the_stock_cache():
    config = tiny_config(num_hidden_layers=4, sliding_window=[5, None, 9, 5])
    assert [config.window(index) for index in range(4)] == [5, None, 9, 5]
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    layers = DynamicCache(config=config).layers
    assert type(layers[1]) is DynamicLayer
    assert [layers[index].sliding_window for index in (0, 2, 3)] == [5, 9, 5]


def test_layer_types_place_a_single_window():
    types = ["sliding_attention", "full_attention"]
    assert [tiny_config(sliding_window=5, layer_types=types).window(index) for index in range(2)] == [5, None]
    interleaved = tiny_config(sliding_window=[5, None])
    assert interleaved.sliding_window == 5
    assert interleaved.layer_types == types


def test_save_and_load_keeps_every_setting(tmp_path):
    config = tiny_config(
        sliding_window=[5, 9],
        score_function=["sigmoid", "softmax"],
        slopes=["3:1", "none"],
        score_bias=["-log(window)", 0.5],
        use_rotary=[True, False],
        rope_theta=[1e4, 5e5],
        slope_schedule="alibi",
    )
    config.save_pretrained(tmp_path)
    loaded = SwatConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    for index in range(2):
        assert loaded.attention_settings(index) == config.attention_settings(index)
        assert loaded.rotary(index) == config.rotary(index)
    assert loaded.attention_settings(0).bias() == -math.log(5)
    assert loaded.rotary(1) is None


def test_rotary_base_has_one_home():
    assert tiny_config(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    assert tiny_config().rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}
    by_type = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
    config = tiny_config(sliding_window=[5, None], rope_parameters=by_type)
    assert [config.rotary(index)["rope_theta"] for index in range(2)] == [1e4, 1e6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window: expected at least 1"),
        ({"sliding_window": -3}, "sliding_window: expected at least 1"),
        ({"sliding_window": [5]}, r"sliding_window: .* one per layer \(2\), got a list of 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "5 heads do not divide hidden_size 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1"),
        ({"slopes": "3:2"}, "names 5 heads, the layer has 4"),
        ({"slopes": "forward"}, "slopes: expected one of"),
        ({"score_function": "relu"}, "score_function: expected 'sigmoid' or 'softmax'"),
        ({"score_bias": "-log(n)"}, "score_bias: expected a number or"),
        ({"score_bias": "-log(window)", "sliding_window": None}, "score_bias: the layer has no window"),
        ({"score_bias": math.inf}, "score_bias: expected a finite number"),
        ({"learned_sink": True}, "learned_sink: only softmax"),
        ({"learned_slopes": True, "slopes": "none"}, "learned_slopes: slopes is 'none', so there are none to learn"),
        ({"slope_schedule": "window", "sliding_window": None}, "slope_schedule: 'window' divides by the layer's"),
        ({"slope_span": 0, "slope_schedule": "window"}, "slope_span: expected a positive number, or two"),
        (
            {"slopes": "3:1", "slope_schedule": "window", "positive_slope_span": [1, 2, 3]},
            "positive_slope_span: expected a positive number, or two",
        ),
        (
            {"slopes": "negative", "slope_schedule": "window", "positive_slope_span": 1},
            "positive_slope_span: 1 is of the positive heads of .* and slopes='negative'; leave it out",
        ),
        ({"layers": ["mamba2"], "positive_slope_span": 1}, "positive_slope_span: it is set, and no layer"),
        ({"layer_scale": -0.1}, "layer_scale: expected a positive number"),
        ({"layers": ["mamba2"], "output_gate": True}, r"output_gate: .* no layer of this plan \(mamba2\) has it"),
        ({"slope_span": 8}, "slope_span: 8 belongs to slope_schedule='window'"),
        (
            {"learned_score_bias": True, "score_function": "softmax", "slopes": "none"},
            "learned_score_bias: softmax is the",
        ),
        ({"layers": [{"kind": ["attention"]}]}, r"layers\[0\]: kind must be text, one of .*; got \['attention'\]"),
        ({"mixers": ["attention", "mamba"]}, r"layers\[1\]: unknown kind 'mamba'"),
        ({"mixers": ["attention"], "layers": ["mamba2"]}, r"mixers: layers says what each layer is, mixers"),
        ({"layers": []}, r"layers: expected a list of kinds, such as \[attention, mamba2\]; got \[\]"),
        ({"layers": [3]}, r"layers\[0\]: expected a kind or a mapping with the key 'kind'; got 3"),
        ({"layers": [{"knd": "mamba2"}]}, r"layers\[0\]: expected a kind or a mapping with the key 'kind'"),
        (
            {"layers": [{"kind": ["mamba2"]}]},
            r"layers\[0\]: kind must be text, one of attention, mamba2, .*; got \['mamba2'\]",
        ),
        ({"layers": ["attention", "mamba3"]}, r"layers\[1\]: unknown kind 'mamba3'; did you mean 'mamba2'\?"),
        ({"layers": [{"kind": "mamba2", "state_sise": 3}]}, "unknown setting 'state_sise'; did you mean 'state_size'"),
        (
            {"layers": [{"kind": "mamba2", "sliding_window": 3}]},
            r"layers\[0\] \(mamba2\): 'sliding_window' is a setting of attention, .*not of mamba2",
        ),
        ({"layers": [{"kind": "mamba2", "state_size": "x"}]}, "state_size must be a whole number; got 'x'"),
        (
            {"layers": [{"kind": "mamba2", "time_step_limit": 1}]},
            r"time_step_limit must be a list of 2 entries, each a finite number or null; got 1",
        ),
        (
            {"layers": [{"kind": "mamba2", "time_step_limit": [1]}]},
            r"layers\[0\] \(mamba2\): time_step_limit: expected two numbers, .* got \[1\]",
        ),
        ({"layers": [{"kind": "mamba2", "repeat": 0}]}, r"layers\[0\]: repeat: expected a whole number of at least 1"),
        ({"layers": [{"kind": "mamba2", "repeat": 3}]}, "the pattern has 3 layers, num_hidden_layers is 2"),
        (
            {"layers": ["attention", {"kind": "mamba2", "ssm_head_dim": 7}]},
            r"layers\[1\] \(mamba2\): ssm_head_dim: expected a divisor of expand \* hidden_size \(64\), got 7",
        ),
        (
            {"layers": ["attention", {"kind": "attention", "num_attention_heads": 5}]},
            r"layers\[1\] \(attention\): num_attention_heads: 5 heads do not divide hidden_size 32",
        ),
        ({"state_size": 16}, r"it is a setting of mamba2 .*: write it in layers, \{kind: mamba2, state_size: ...\}"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: expected 2 entries"),
        ({"layer_types": ["sliding_attention", "chunked_attention"]}, "layer_types: layer 1"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": [3, 4]}, "layer 1 is 'full_att"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "its sliding_window is None"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' depends"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 2e4}, "contradicts"),
        ({"rope_theta": -1.0}, "positive rotary bases"),
        ({"head_dim": 5}, "even head size"),
        ({"attention_backend": "cuda"}, "attention_backend"),
        ({"sliding_widow": 5}, "no argument 'sliding_widow'; did you mean 'sliding_window'"),
        ({"rms_norm_epsilon": 1e-5}, "did you mean 'rms_norm_eps'"),
        ({"window": 5}, "no argument 'window'; did you mean 'sliding_window'"),
        ({"num_heads": 5}, "did you mean 'num_attention_heads'"),
        ({"rotary": False}, "did you mean 'use_rotary'"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_recipe_mapping():
    config = config_from_recipe({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, vocab_size=260)
    assert (config.hidden_size, config.vocab_size) == (64, 260)
    assert config_from_recipe({"preset": "swat-340m"}, vocab_size=260).vocab_size == 260
    assert config_from_recipe({"preset": "swat-340m", "slopes": "16:0"}).slopes == "16:0"
    assert config_from_recipe({"preset": "swat-248m"}).vocab_size == 50257


@pytest.mark.parametrize(
    ("mapping", "vocab_size", "message"),
    [
        ({"hiden_size": 64}, None, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"window": 64}, None, "unknown key 'window'; did you mean 'sliding_window'"),
        ({"preset": "swat-340"}, None, "did you mean 'swat-340m'"),
        ({"vocab_size": 100}, 260, "smaller than the tokenizer's 260"),
        ({"hidden_size": "wide"}, None, "model: hidden_size must be a whole number; got 'wide'"),
        ({"slopes": 484}, None, "must be quoted"),
        ({"slopes": [122, "2:2"]}, None, "must be quoted"),
        ({"sliding_window": 0}, None, "sliding_window: expected at least 1"),
    ],
)
def test_recipe_mapping_refuses(mapping, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        config_from_recipe(mapping, vocab_size)


def test_words_of_a_choice_are_checked():
    for hint in (Literal["fast", "exact"], Literal["fast", "exact"] | None):
        assert fits("fast", hint)
        assert not fits("slow", hint)
        assert not fits(["fast"], hint)
    assert type_words(Literal["fast", "exact"]) == "one of fast, exact"


def test_a_library_s_fields_are_told_apart():
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    for changes, said in (
        ({"rope_parameters": rope, "hidden_size": "x"}, "hidden_size must be a whole number; got 'x'"),
        ({"rope_parameters": 3}, "rope_parameters must be"),
    ):
        with pytest.raises(ValueError, match=said):
            configure_model({"architecture": "llama", **changes}, 260)

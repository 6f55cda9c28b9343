"""Every family that is taken over: the same logits, gradients, cached tokens and folders; and what is refused."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.evaluate.windows import with_window
from swat_lm.layers import AttentionSettings
from swat_lm.model.conversion import convert, convert_config, convert_folder
from swat_lm.model.families import family_of
from swat_lm.model.fingerprint import fingerprint

from .models import VOCABULARY, close, tiny_model, tokens

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
BY_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
    },
}
GEMMA = {"head_dim": 12, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12}
# low enough that they cap
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
NO_ROTARY = [1, 0, 1, 0]
HALF_WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, **HALF_WINDOWED}),
    ("qwen3", {"head_dim": 12}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True, **HALF_WINDOWED}),
    ("phi3", {}),
    ("phi3", {"tie_word_embeddings": True, "sliding_window": 7}),
    ("granite", SCALES),
    ("granite", {**SCALES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("olmo2", {}),
    ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    ("olmo3", {"sliding_window": 7}),
    ("olmo3", {"sliding_window": 7, "max_position_embeddings": 64, "rope_parameters": BY_TYPE}),
    ("gemma2", {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 3, **CAPS}),
    ("gemma2", {"head_dim": 12, "sliding_window": 7, "tie_word_embeddings": False, "attention_bias": True,
                "attn_logit_softcapping": 0.5, "final_logit_softcapping": None}),
    ("gemma3_text", GEMMA),
    ("gemma3_text", {**GEMMA, "tie_word_embeddings": False, "attention_bias": True, "query_pre_attn_scalar": 3,
                     "final_logit_softcapping": 2.0}),
    ("starcoder2", {}),
    ("starcoder2", {"sliding_window": 7, "tie_word_embeddings": False, "use_bias": False, "hidden_act": "silu"}),
    ("smollm3", {"no_rope_layers": NO_ROTARY, "tie_word_embeddings": False}),
    ("smollm3", {"no_rope_layers": NO_ROTARY, "attention_bias": True, "mlp_bias": True,
                 "use_sliding_window": True, "sliding_window": 7}),
]  # fmt: skip
each = pytest.mark.parametrize(
    ("kind", "changes"), VARIANTS, ids=[f"{kind}: {', '.join(changes)}" for kind, changes in VARIANTS]
)


def source_model(kind: str, changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # what starts at zero or one would prove nothing
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    return model


@each
def test_same_logits_and_gradients(kind, changes):
    source, ids = source_model(kind, changes), tokens(2, 40)
    model = convert(source)
    close(model(ids).logits, source(ids).logits)
    loss, ours = source(ids, labels=ids).loss, model(ids, labels=ids).loss
    close(ours, loss)
    loss.backward()
    ours.backward()
    # the loss of training forms no logits
    close(model.train()(ids, labels=ids).loss, loss)
    gradients = {name: parameter.grad for name, parameter in source.named_parameters()}
    expected = family_of(source.config).renamed(gradients, source.config)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name])


@each
def test_same_cached_generation(kind, changes):
    source, ids = source_model(kind, changes), tokens(2, 11)
    model = convert(source)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = source.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    # padding on the left is seen by nobody
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(2, -1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], expected)


@each
@pytest.mark.parametrize("is_arranged", [False, True])
@torch.no_grad()
def test_streams_compute_the_same(kind, changes, is_arranged):
    source, ids = source_model(kind, changes), tokens(2, 40)
    model, expected = convert(source), source(ids).logits
    if is_arranged:
        model.arrange_for_decoding()
    state = model.init_state(2)
    close(model.lm_head(model.extend(ids[:, :9], state)), expected[:, :9])
    close(model.prefill(ids[:, 9:20], state, chunk=4)[0], expected[:, 19])
    for place in range(20, 40):
        close(model.decode_step(ids[:, place, None], state), expected[:, place])


@each
def test_a_folder_becomes_ours_and_is_loaded_again(kind, changes, tmp_path):
    source, ids = source_model(kind, changes), tokens(1, 30)
    source.save_pretrained(tmp_path / "theirs")
    convert_folder(tmp_path / "theirs", tmp_path / "ours")
    model = SwatForCausalLM.from_pretrained(tmp_path / "ours")
    close(model(ids).logits, source(ids).logits)
    assert model.config.plan() == convert(source).config.plan()


@each
def test_another_window(kind, changes):
    source, ids = source_model(kind, changes), tokens(1, 30)
    windowed = with_window(source, 5)
    assert [windowed.config.window(layer) for layer in range(4)] == [5] * 4
    # what a window cuts off is not there for the first five
    full = with_window(source, None)
    close(windowed(ids).logits[:, :5], full(ids).logits[:, :5])
    assert (windowed(ids).logits - full(ids).logits).abs().max() > 1e-3
    close(with_window(windowed, None)(ids).logits, full(ids).logits)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_larger_vocabulary_is_scaled_as_before(is_tied):
    model, ids = convert(source_model("granite", {**SCALES, "tie_word_embeddings": is_tied})), tokens(1, 20)
    expected = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    close(model(ids).logits[..., :VOCABULARY], expected)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_caps_are_what_makes_the_logits_those_of_the_source(name):
    source, ids = source_model("gemma2", {"head_dim": 12, "sliding_window": 7, **CAPS}), tokens(1, 20)
    assert (convert(source, **{name: None})(ids).logits - source(ids).logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match=f"{name}: expected a positive number.* got 0"):
        SwatConfig(**{name: 0})


def test_numbers_that_scale_are_positive():
    with pytest.raises(ValueError, match="logits_scaling: expected a positive number, got 0"):
        SwatConfig(logits_scaling=0)
    with pytest.raises(ValueError, match="residual_multiplier: expected a positive number, got -1"):
        SwatConfig(residual_multiplier=-1.0)


def test_weights_are_taken_over_as_they_are():
    source = source_model("qwen3", {})
    with pytest.raises(
        ValueError, match=r"qk_norm_over would change the shapes .* leave qk_norm_over at the source's head"
    ):
        convert(source, qk_norm_over="layer")
    with pytest.raises(ValueError, match=r"feed_forward would change the shapes .* at the source's plain"):
        convert(source_model("starcoder2", {}), feed_forward="gated")
    with pytest.raises(ValueError, match=r"not understood: model\.layers\.0\.self_attn\.k_norm"):
        convert(source, qk_norm=False)
    # where the source has none, it is one more to train
    assert convert(source_model("qwen2", {}), qk_norm=True, qk_norm_over="layer").config.qk_norm_over == "layer"


def test_norms_have_a_place_and_a_range():
    with pytest.raises(ValueError, match="norm_placement: expected 'pre' or 'post' or 'both', got 'sandwich'"):
        AttentionSettings(norm_placement="sandwich")
    with pytest.raises(ValueError, match="qk_norm_over: expected 'head' or 'layer', got 'model'"):
        AttentionSettings(qk_norm_over="model")


def test_states_are_bound_to_the_scales():
    known = {fingerprint(tiny_model(**changes)) for changes in ({}, *({name: 2.0} for name in SCALES))}
    known |= {fingerprint(tiny_model(**{name: cap})) for name, cap in CAPS.items()}
    assert len(known) == 7


def test_a_norm_of_the_source_that_is_lacking_is_named(tmp_path):
    source = source_model("qwen3", {})
    state = {name: weight for name, weight in source.state_dict().items() if "layers.1.self_attn.k_norm" not in name}
    source.save_pretrained(tmp_path / "theirs", state_dict=state)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.self_attn\.k_norm\.weight; not understood: none"):
        convert_folder(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GptOssConfig(), r"expected a llama, .* or mamba2 model, got 'gpt_oss', which is a mixture of experts"),
        (MixtralConfig(), "got 'mixtral', which is a mixture of experts"),
        (Qwen3MoeConfig(), "got 'qwen3_moe', which is a mixture of experts"),
        (Phi3Config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}),
         "partial_rotary_factor 0.5 rotates a part of each head"),
        (Phi3Config(**SHAPE, rope_parameters=LONGROPE), "rotary of type 'longrope' changes with the sequence's length"),
        (Gemma2Config(use_bidirectional_attention=True), "use_bidirectional_attention has no counterpart"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0 is not applied by transformers'"),
        (Gemma3TextConfig(hidden_activation="relu"), "hidden_activation 'relu' is not supported"),
        (Starcoder2Config(hidden_act="relu"), "hidden_act 'relu' is not supported, only 'silu', 'gelu_pytorch_tanh'"),
    ],
)  # fmt: skip
def test_other_families_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        convert_config(config)

"""`generate_batch` of transformers, over its paged cache: the tokens of `generate()`, or why not."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from .models import tiny_model, tokens

LENGTHS = (1, 5, 8, 20, 33)


def in_one_batch(model, prompts: list[list[int]], **changes) -> list[list[int]]:
    # so few tokens at once that long prompts come in parts, beside rows that decode already
    options = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=24)
    greedy = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=options, **changes)
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in found.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": None},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"score_function": "softmax", "learned_sink": True, "qk_norm": True, "use_rotary": False},
        {"norm_placement": "both", "qk_norm": True, "qk_norm_over": "layer"},
        {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, "norm": "layer", "feed_forward": "plain"},
    ],
    ids=str,
)
def test_the_tokens_of_generate(settings):
    model = tiny_model(**settings)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    alone = [
        model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
        for prompt in prompts
    ]
    expected = [row[0, len(prompt) :].tolist() for row, prompt in zip(alone, prompts, strict=True)]
    assert in_one_batch(model, prompts) == expected
    # and the model is as it was
    assert model.config._attn_implementation == "eager"
    assert torch.equal(
        model.generate(torch.tensor([prompts[3]]), max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0),
        alone[3],
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"layers": ["mamba2", "attention"]},
            r"layer 0 is mamba2, and transformers. paged cache holds keys",
        ),
        (
            {"layers": ["attention", {"kind": "attention", "head_dim": 4}]},
            r"layers differ in their head size \(4, 8\)",
        ),
        ({"sliding_window": [3, 7]}, r"layers differ in their window \(3, 7\)"),
    ],
    ids=str,
)
def test_what_the_paged_cache_cannot_hold_is_refused(settings, reason):
    model = tiny_model(**settings)
    with pytest.raises(ValueError, match=reason):
        in_one_batch(model, [[1, 2, 3]])
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3).shape == (1, 6)

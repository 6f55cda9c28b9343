"""Tiny causal models of many kinds for the tests of this folder, with weights large enough that differences show."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

from swat_lm import SwatConfig, SwatForCausalLM

VOCABULARY = 61
SHARED = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
STATE_SPACE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2,
}  # fmt: skip


def tiny_swat(window: int | None = 7, **changes) -> SwatForCausalLM:
    torch.manual_seed(0)
    values = {**SHARED, "sliding_window": window}
    if window is None:
        values |= {"score_function": "softmax", "slopes": "none"}
    return SwatForCausalLM(SwatConfig(**{**values, **changes})).eval()


def built(kind: str, **values) -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel")
    return model(getattr(transformers, f"{kind}Config")(**values)).eval()


def tiny_llama(**changes) -> PreTrainedModel:
    return built("Llama", **{**SHARED, "num_key_value_heads": 1, "max_position_embeddings": 4096, **changes})


def tiny_mistral(**changes) -> PreTrainedModel:
    return built("Mistral", **{**SHARED, "num_key_value_heads": 1, "sliding_window": 7, **changes})


def tiny_gpt2(**changes) -> PreTrainedModel:
    values = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return built("GPT2", **{**values, "initializer_range": 0.2, **changes})


def tiny_gemma2() -> PreTrainedModel:
    return built("Gemma2", **SHARED, num_key_value_heads=1, head_dim=16, sliding_window=7, final_logit_softcapping=3.0)


def tiny_mamba2() -> PreTrainedModel:
    return built("Mamba2", **STATE_SPACE, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)


def tiny_mamba() -> PreTrainedModel:
    return built("Mamba", **STATE_SPACE)


def tiny_qwen3_next() -> PreTrainedModel:
    return built(
        "Qwen3Next", **SHARED, num_key_value_heads=1, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


STREAMABLE: dict[str, Callable[[], PreTrainedModel]] = {
    "swat": tiny_swat,
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "gpt2": tiny_gpt2,
    "gemma2": tiny_gemma2,
    "mamba2": tiny_mamba2,
    "qwen3-next": tiny_qwen3_next,
}

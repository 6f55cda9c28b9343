"""Tiny GGUF files for tests, as llama.cpp's converter would write them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from swat_lm.data.tokenizer import byte_characters

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
MERGES = ["t h", "th e", "Ġ the", "Ġ Ġ"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
# a vocabulary that begins with the special tokens, as SmolLM's does
VOCABULARY = [*SPECIAL, *byte_characters().values(), "th", "the", "Ġthe", "ĠĠ"]
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
GEMMA_NAMES = {
    **NAMES, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    architecture: str = "llama",
    kind: str = "F32",
    split: str = "smollm",
    extra=None,
) -> Path:
    """The model as a GGUF file; matrices in blocks of `kind`, or F32, F16; `extra` are more settings."""
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rotary = config.rope_parameters
    writer.add_rope_freq_base(rotary.get("full_attention", rotary)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    # last, over what is there already
    for key, value in (extra or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if architecture == "gemma3" and "norm" in name:
            values = 1 + values
        add_tensor(writer, gguf_name(name, GEMMA_NAMES if architecture == "gemma3" else NAMES), values, kind)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    # vectors stay float32, as in llama.cpp
    form = GGMLQuantizationType.F32 if values.ndim == 1 else GGMLQuantizationType[kind]
    writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values), form), raw_dtype=form)


def llama3_factors(model: PreTrainedModel) -> np.ndarray:
    """By how much each frequency was divided."""
    plain = tiny_llama(**{**model.config.to_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    return (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()


def gguf_name(name: str, names: Mapping[str, str]) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, module = name.split(".", 3)
    module, _, kind = module.rpartition(".")
    return f"blk.{layer}.{names[module]}.{kind}"


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The two halves of a head's rows, which rotary turns together, side by side."""
    parts = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)

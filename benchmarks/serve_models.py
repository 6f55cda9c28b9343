"""One model in the forms that three servers load: transformers' folder, ours with windows, llama.cpp's file in float32.

    python -m benchmarks.serve_models SOURCE OUT [--small]

SOURCE is a folder with a Llama and a BPE tokenizer of bytes, as SmolLM2 has, in transformers' form. OUT gets `hf`,
`swat` and `f32.gguf`, all with the very same weights in float32. With --small the weights are random ones of 4 layers
of width 256, and the tokenizer is the source's with its first 4,096 tokens.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks import models
from swat_lm.model.conversion import convert

WINDOW, SINKS = 1024, 4
"""No request of the loads is longer, so all servers compute the same function."""
SMALL_WIDTH, SMALL_VOCABULARY = 256, 4096
HF, OURS, GGUF = "hf", "swat", "f32.gguf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# of one layer, as transformers and as llama.cpp name them
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# ASCII and its blanks, as BPE of bytes writes them
TEXT = re.compile("[!-~\u0120]+")
# llama.cpp's numbers for kinds of tokens
NORMAL, CONTROL = 1, 3


def main() -> None:
    """Write the three forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="random weights of 4 layers, width 256")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already: expected a new folder")
    try:
        tokenizer = json.loads((arguments.source / TOKENIZER_FILES[0]).read_text(encoding="utf-8"))
        if arguments.small:
            tokenizer = shortened(tokenizer, SMALL_VOCABULARY)
            model = small(tokenizer)
        else:
            model = LlamaForCausalLM.from_pretrained(arguments.source, dtype=torch.float32)
        write_forms(model, tokenizer, arguments.source, arguments.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{arguments.out}\n")


def small(tokenizer: dict[str, Any]) -> LlamaForCausalLM:
    """Random weights that never draw what is no whole text: then every token that is drawn is sent at once."""
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    unlikely = [
        number for token, number in tokenizer["model"]["vocab"].items() if token in special or not TEXT.fullmatch(token)
    ]
    model = models.llama(SMALL_WIDTH, SMALL_VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight[unlikely] = 0
    return model


def write_forms(model: LlamaForCausalLM, tokenizer: dict[str, Any], source: Path, out: Path) -> None:
    """Write `hf`, `swat` and `f32.gguf` into the new folder; the rest of the tokenizer comes from the source."""
    hf, ours = out / HF, out / OURS
    # nothing ends a reply: all servers draw as many tokens as were asked for
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(hf)
    convert(model, WINDOW, sinks=SINKS).save_pretrained(ours)
    for folder in (hf, ours):
        shutil.copyfile(source / TOKENIZER_FILES[1], folder / TOKENIZER_FILES[1])
        (folder / TOKENIZER_FILES[0]).write_text(json.dumps(tokenizer), encoding="utf-8")
    write_gguf(model, tokenizer, out / GGUF)


def shortened(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """A BPE tokenizer with its first `size` tokens: what was merged later is left in its parts."""
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < size}
    merges = [pair for pair in model["merges"] if "".join(parts(pair)) in vocabulary]
    return {**tokenizer, "model": {**model, "vocab": vocabulary, "merges": merges}}


def parts(pair: str | list[str]) -> list[str]:
    """A merge as tokenizer.json has it, in either of its forms."""
    return pair.split(" ") if isinstance(pair, str) else pair


def write_gguf(model: LlamaForCausalLM, tokenizer: dict[str, Any], path: Path) -> None:
    """The model as llama.cpp loads it, float32 throughout."""
    import gguf

    # its fields may be None only before it is made
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.parent.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(max(config.max_position_embeddings, models.LONGEST * 4))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, tokenizer)
    for name, tensor in tensors(model).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    """The vocabulary with its merges; the first token stands for all that must have a number."""
    by_number = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {entry["content"] for entry in tokenizer["added_tokens"] if entry["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in by_number])
    writer.add_token_types([CONTROL if token in special else NORMAL for token, _ in by_number])
    writer.add_token_merges([" ".join(parts(pair)) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Weights by llama.cpp's names; it turns queries and keys by pairs of neighbours, not by halves."""
    weights = model.state_dict()
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        found["output.weight"] = weights["lm_head.weight"]
    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for theirs, name in LAYER.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if name in heads:
                weight = weight.view(heads[name], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            found[f"blk.{layer}.{name}.weight"] = weight
    return found


if __name__ == "__main__":
    main()

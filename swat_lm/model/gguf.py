"""Models in GGUF files, read through transformers: configuration, weights without blocks, tokenizer, end tokens.

Everything that can be refused is, before weights are read. The header's own form is in gguf_header.py.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils.import_utils import is_accelerate_available

from swat_lm.model.gguf_header import GgufHeader, read_gguf_header
from swat_lm.words import install_extra

__all__ = ["GgufSource", "open_gguf", "read_gguf_model"]

# by ggml's numbers; every other form is of blocks, whose values float32 holds exactly
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
TOKENS = "tokenizer.ggml.tokens"
SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding")
# tensors that are factors of rotary angles, no weights
ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# how SmolLM's text is split before merging, which transformers' table does not have: each digit by itself
DIGITS_APART = ("smollm",)


class GgufSource(NamedTuple):
    """A file that can be taken over as far as its header tells."""

    header: GgufHeader
    config: PreTrainedConfig
    """Of transformers' model; its dtype is the one that the weights will have."""
    tokenizer: Any
    """A fast tokenizer of transformers, with the file's chat template; None where the file has no vocabulary."""


def open_gguf(path: Path, dtype: torch.dtype | None) -> GgufSource:
    """Read everything but the weights.

    Args:
        dtype: of the weights to be; None: the file's own where it holds floats, float32 where it holds blocks.

    Raises:
        ValueError: what `read_gguf_header` refuses, an architecture that transformers does not read from GGUF files,
            settings or tensors that it would leave out, or a vocabulary that does not fit the model.
        OSError: the file cannot be read.
    """
    header = read_gguf_header(path)
    check_library(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=str(path.absolute()))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"source: {path}: transformers {transformers_version} reads no GGUF file of the architecture "
            f"{header.architecture!r}: {error}"
        ) from error
    check_vocabulary(header)
    settle(config, header)
    refuse_unread(config, header)
    kinds = {tensor.kind for tensor in header.tensors.values()}
    if dtype is None:
        # norms stay float32 beside halves
        narrow = [FLOATS[kind] for kind in (30, 1) if kind in kinds]
        dtype = narrow[0] if narrow and kinds <= set(FLOATS) else torch.float32
    config.dtype = dtype
    ends = end_tokens(header)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return GgufSource(header, config, tokenizer_of(header))


def end_tokens(header: GgufHeader) -> list[int]:
    """Ids that end a text or a turn, each once."""
    ids = [header.settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in ids if number is not None))


def check_library(path: Path) -> None:
    """Raise ValueError where transformers cannot read GGUF files here."""
    import transformers

    if not hasattr(transformers, "GgufConfig") or not is_accelerate_available():
        what = "accelerate" if hasattr(transformers, "GgufConfig") else "a newer transformers"
        raise ValueError(f"source: {path}: reading GGUF files needs {what}: {install_extra('gguf')}")


def check_vocabulary(header: GgufHeader) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model, or special tokens that it does not have."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"source: {header.path} holds no model: it has no tensor token_embd.weight")
    tokens = header.settings.get(TOKENS)
    if tokens is None:
        return
    if len(tokens) > embedding.shape[0]:
        raise ValueError(
            f"source: {header.path}: its tokenizer has {len(tokens):,} tokens, the model embeds {embedding.shape[0]:,}: "
            "they do not belong together"
        )
    for name in SPECIAL:
        number = header.settings.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(
                f"source: {header.path}: its {name} token is number {number}, the tokenizer has {len(tokens):,} tokens"
            )


def settle(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Set what the file says of the model's shape and transformers leaves at its own default."""
    # a table that was padded, beside a tokenizer that was not
    config.vocab_size = header.tensors["token_embd.weight"].shape[0]
    key_length = header.setting("attention.key_length")
    if key_length is not None:
        config.head_dim = key_length


def refuse_unread(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Raise ValueError for what changes the function and transformers does not take from such a file."""
    rotary = getattr(config, "rope_parameters", None) or {}
    plain = all(entry.get("rope_type", "default") == "default" for entry in rotary.values() if isinstance(entry, dict))
    scaled = header.setting("rope.scaling.type") not in (None, "none")
    factors = [name for name in ROTARY_FACTORS if name in header.tensors]
    if plain and rotary.get("rope_type", "default") == "default" and (scaled or factors):
        what = f"rope.scaling.type {header.setting('rope.scaling.type')!r}" if scaled else f"factors in {factors[0]}"
        raise ValueError(
            f"source: {header.path} scales its rotary ({what}), which transformers {transformers_version} does not read "
            "from GGUF files: the result would be another function. Convert the model's safetensors folder"
        )
    window = header.setting("attention.sliding_window")
    if window and getattr(config, "sliding_window", None) is None:
        raise ValueError(
            f"source: {header.path} has windows of {window:,} tokens, which transformers {transformers_version} does "
            f"not read from GGUF files of {header.architecture!r}. Convert the model's safetensors folder"
        )


def check_all_is_read(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Raise ValueError for a file whose weights are more or fewer than those of transformers' model.

    transformers leaves out, without a word, tensors for which its model has no place, such as biases.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # of tied weights, one
    expected = sum(parameter.numel() for parameter in model.parameters())
    held = sum(tensor.num_elements for name, tensor in header.tensors.items() if name not in ROTARY_FACTORS)
    if held != expected:
        raise ValueError(
            f"source: {header.path} holds {held:,} weights in {len(header.tensors)} tensors, the {config.model_type} "
            f"model that its header describes has {expected:,}: something of it would be left out or made up"
        )


def tokenizer_of(header: GgufHeader) -> Any:
    """The file's tokenizer as transformers builds it; None where it has none. Raises ValueError where it cannot."""
    if TOKENS not in header.settings:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=str(header.path.absolute()))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"source: {header.path}: transformers {transformers_version} cannot build its tokenizer "
            f"({header.settings.get('tokenizer.ggml.model')}): {error}"
        ) from error
    if header.settings.get("tokenizer.ggml.pre") in DIGITS_APART:
        from tokenizers import pre_tokenizers

        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def read_gguf_model(source: GgufSource) -> PreTrainedModel:
    """Transformers' model with the file's weights, taken out of their blocks.

    Raises:
        ValueError: weights that the model has no place for, or that it lacks.
        OSError: the file cannot be read.
    """
    from transformers import GgufConfig

    check_all_is_read(source.config, source.header)
    path = source.header.path
    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent,
        config=source.config,
        gguf_file=str(path.absolute()),
        # where kernels are installed, weights would stay in blocks
        quantization_config=GgufConfig(dequantize=True),
        dtype=source.config.dtype,
        output_loading_info=True,
    )
    lacking = sorted({*report["missing_keys"]} - ({"lm_head.weight"} if source.config.tie_word_embeddings else set()))
    if lacking:
        raise ValueError(f"source: {path} lacks weights that the model needs: {', '.join(lacking)}")
    return model

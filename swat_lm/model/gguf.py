"""Models in GGUF files, read through transformers: configuration, weights without blocks, tokenizer, end tokens.

Everything that can be refused is, before weights are read. The header's own form is in gguf_header.py.
"""

import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_accelerate_available

from swat_lm.model.gguf_header import GgufHeader, check_settings, read_gguf_header
from swat_lm.words import install_extra

__all__ = ["GgufSource", "open_gguf", "read_gguf_model"]

# llama.cpp's names of the families whose files are held against the models that they were made of
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")
# of Gemma's families, the layers of the one size that scales scores by the width and not by the size of a head
SCALED_BY_WIDTH = {"gemma3": 62}
# by ggml's numbers; every other form is of blocks, whose values float32 holds exactly
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
TOKENS = "tokenizer.ggml.tokens"
SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding")
# tensors that are factors of rotary angles, no weights
LLAMA3_FACTORS = "rope_freqs.weight"
ROTARY_FACTORS = (LLAMA3_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight")
# how text is split before merging: as GPT-2 does, or with each digit by itself, which transformers' table lacks
SPLIT_AS_GPT2 = (None, "default", "gpt-2", "gpt2", "olmo", "phi-2")
DIGITS_APART = ("smollm", "starcoder")


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
        ValueError: what `read_gguf_header` refuses, an architecture that is not one of `ARCHITECTURES`, settings that
            would be left out or are of another type than theirs, or a vocabulary that does not fit the model.
        OSError: the file cannot be read.
    """
    header = read_gguf_header(path)
    check_architecture(header)
    check_settings(path, header.settings, header.architecture)
    check_library(path)
    check_vocabulary(header)
    # a model of so many layers would take for ever to build
    if (header.setting("block_count") or 0) > len(header.tensors):
        raise ValueError(
            f"source: {path} is damaged: it names {header.setting('block_count'):,} layers and holds "
            f"{len(header.tensors):,} tensors; fetch it again"
        )
    try:
        config = read_alone(AutoConfig, path)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError, OSError) as error:
        # of the last kind is also, without a number, that it could not decode a text
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"source: {path}: transformers {transformers.__version__} cannot read its header: {error}"
        ) from error
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


def read_alone(kind: Any, path: Path, **options: Any) -> Any:
    """What an Auto class makes of a file, without what lies beside it, which may be another model's."""
    with TemporaryDirectory() as empty:
        return kind.from_pretrained(empty, gguf_file=str(path.absolute()), **options)


def end_tokens(header: GgufHeader) -> list[int]:
    """Ids that end a text or a turn, each once."""
    ids = [header.settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in ids if number is not None))


def check_architecture(header: GgufHeader) -> None:
    """Raise ValueError for families that are not read from GGUF files, and for mixtures of experts of the others."""
    if header.architecture not in ARCHITECTURES or header.setting("expert_count"):
        *others, last = ARCHITECTURES
        what = "a mixture of experts, " if header.setting("expert_count") else ""
        raise ValueError(
            f"source: {header.path}: expected a GGUF file of the architecture {', '.join(others)} or {last}; got "
            f"{what}{header.architecture!r}. Families that are not among these may be as folders of safetensors"
        )


def check_library(path: Path) -> None:
    """Raise ValueError where transformers cannot read GGUF files here."""
    if not hasattr(transformers, "GgufConfig") or not is_accelerate_available():
        what = "accelerate" if hasattr(transformers, "GgufConfig") else "a newer transformers"
        raise ValueError(f"source: {path}: reading GGUF files needs {what}: {install_extra('gguf')}")


def check_vocabulary(header: GgufHeader) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model, or special tokens that it does not have."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"source: {header.path} holds no model: it has no tensor token_embd.weight")
    if len(embedding.shape) != 2 or not embedding.num_elements:
        raise ValueError(
            f"source: {header.path} is damaged: expected token_embd.weight to be a matrix, got the shape "
            f"{list(embedding.shape)}; fetch it again"
        )
    tokens = header.settings.get(TOKENS)
    if tokens is None:
        return
    if len(tokens) > embedding.shape[0]:
        raise ValueError(
            f"source: {header.path}: its tokenizer has {len(tokens):,} tokens, the model embeds "
            f"{embedding.shape[0]:,}: they do not belong together"
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
    window = header.setting("attention.sliding_window")
    if window and hasattr(config, "sliding_window") and getattr(config, "layer_types", None) is None:
        config.sliding_window = window
    if header.setting("block_count") == SCALED_BY_WIDTH.get(header.architecture):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    settle_rotary(config, header)


def settle_rotary(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Scaled rotary, where it is linear or Llama 3's; of families that rotate by type, of the layers with no window."""
    whole = config.rope_parameters
    rotary = whole.get("full_attention", whole)
    if header.setting("rope.scaling.type") == "linear":
        scaled = {**rotary, "rope_type": "linear", "factor": header.setting("rope.scaling.factor")}
    else:
        scaled = llama3_rotary(header, rotary["rope_theta"], head_size(config)) or rotary
    config.rope_parameters = {**whole, "full_attention": scaled} if rotary is not whole else scaled


def head_size(config: PreTrainedConfig) -> int:
    """Channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def llama3_rotary(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's way to scale rotary, where the factors in the file are those; transformers drops them.

    They are a number for each pair of channels, and all published models that have them differ in the first alone.
    """
    tensor = header.tensors.get(LLAMA3_FACTORS)
    if tensor is None or FLOATS.get(tensor.kind) is not torch.float32 or tensor.num_elements != head_dim // 2:
        return None
    held = np.fromfile(header.path, dtype="<f4", count=head_dim // 2, offset=tensor.start).astype(np.float64)
    low, high, length, factor = 1.0, 4.0, 8192, round(float(held.max()), 3)
    turns = length * theta ** (-2 * np.arange(head_dim // 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(held, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def refuse_unread(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Raise ValueError for what changes the function and transformers does not take from such a file."""

    def refuse(what: str) -> None:
        raise ValueError(
            f"source: {header.path} {what}, which transformers {transformers.__version__} does not read from a GGUF "
            f"file of {header.architecture!r}: the result would be another function. Convert the model's folder of "
            "safetensors"
        )

    rotary = config.rope_parameters.get("full_attention", config.rope_parameters)
    scaling = header.setting("rope.scaling.type")
    factors = [name for name in ROTARY_FACTORS if name in header.tensors]
    if rotary["rope_type"] == "default" and scaling not in (None, "none"):
        refuse(f"scales its rotary (rope.scaling.type {scaling!r})")
    if factors and rotary["rope_type"] != "llama3":
        refuse(f"scales its rotary (by {factors[0]})")
    rotated = header.setting("rope.dimension_count")
    if rotated not in (None, head_size(config)):
        refuse(f"rotates {rotated} of the {head_size(config)} channels of each head")
    base = header.setting("rope.freq_base")
    if base is not None and base != rotary["rope_theta"]:
        refuse(f"has the rotary base {base}")
    window = header.setting("attention.sliding_window")
    if window and getattr(config, "sliding_window", None) is None:
        refuse(f"has windows of {window:,} tokens")


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
        tokenizer = read_alone(AutoTokenizer, header.path)
    except OSError:
        raise
    except Exception as error:
        # the package tokenizers raises nothing narrower
        raise ValueError(
            f"source: {header.path}: transformers {transformers.__version__} cannot build its tokenizer "
            f"({header.settings.get('tokenizer.ggml.model')}): {error}"
        ) from error
    split = header.settings.get("tokenizer.ggml.pre")
    if split in DIGITS_APART:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif split not in SPLIT_AS_GPT2 and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        warnings.warn(
            f"{header.path}: transformers {transformers.__version__} does not know how {split!r} splits text and "
            "splits it as GPT-2 does: some tokens will differ; give the model's own tokenizer where that matters",
            stacklevel=2,
        )
    return tokenizer


def read_gguf_model(source: GgufSource) -> PreTrainedModel:
    """Transformers' model with the file's weights, taken out of their blocks.

    Raises:
        ValueError: weights that the model has no place for, or that it lacks.
        OSError: the file cannot be read.
    """
    check_all_is_read(source.config, source.header)
    path = source.header.path
    try:
        model, report = read_alone(
            AutoModelForCausalLM,
            path,
            config=source.config,
            # where kernels are installed, weights would stay in blocks
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=source.config.dtype,
            output_loading_info=True,
        )
    except (RuntimeError, KeyError) as error:
        # of the first kind is also that gguf does not know the family
        raise ValueError(f"source: {path}: transformers cannot read its weights: {error}") from error
    lacking = sorted({*report["missing_keys"]} - ({"lm_head.weight"} if source.config.tie_word_embeddings else set()))
    if lacking:
        raise ValueError(f"source: {path} lacks weights that the model needs: {', '.join(lacking)}")
    return model

"""The models under comparison: Hugging Face's Mistral and Llama, and ours with the very same weights.

Equal logits are checked before anything is timed: what is compared computes the same function.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from swat_lm import SwatForCausalLM
from swat_lm.model.conversion import convert

HEAD_DIM = 64
LAYERS = 4
WINDOW = 128
# longest sequence of any benchmark; Hugging Face warns beyond it
LONGEST = 32_768
# the product: converted weights, but weighed by sigmoid with balanced slopes
SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "slopes": "balanced"}


def feed_forward_width(width: int) -> int:
    """SwiGLU's 8/3 of the width, rounded up to a multiple of 64."""
    return -(-8 * width // 3 // 64) * 64


def mistral(
    width: int, vocabulary: int, attention: str = "sdpa", layers: int = LAYERS, window: int = WINDOW
) -> MistralForCausalLM:
    """Hugging Face's Mistral with seeded weights, heads of 64, as many key/value heads as heads, fp32."""
    torch.manual_seed(0)
    config = MistralConfig(**_sizes(width, vocabulary, layers, attention), sliding_window=window)
    return MistralForCausalLM(config)


def llama(width: int, vocabulary: int, layers: int = LAYERS) -> LlamaForCausalLM:
    """Hugging Face's Llama with full attention and Mistral's weights."""
    config = LlamaConfig(**_sizes(width, vocabulary, layers, "sdpa"))
    model = LlamaForCausalLM(config)
    model.load_state_dict(mistral(width, vocabulary, layers=layers).state_dict())
    return model


def swat(width: int, vocabulary: int, layers: int = LAYERS) -> SwatForCausalLM:
    """Ours as it is meant to be used, with Mistral's weights."""
    return convert(mistral(width, vocabulary, layers=layers), **SIGMOID)


def softmax_window(width: int, vocabulary: int, layers: int = LAYERS) -> SwatForCausalLM:
    """Ours computing Mistral's own function."""
    return convert(mistral(width, vocabulary, layers=layers))


def check_equal(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Stop the benchmark where two models that should compute the same do not.

    Raises:
        SystemExit: they differ by more than the tolerance times the largest value (at least 1).
    """
    difference = float((actual - expected).abs().max())
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise SystemExit(f"no figures: {name} differs from its peer by {difference:.2g} in its logits")


def random_tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """int64 `[B, T]`, the same in every process."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_same_function(width: int, vocabulary: int, length: int = 4 * WINDOW) -> None:
    """Our softmax window against Mistral, and our full attention against Llama, on the same weights."""
    tokens = random_tokens(1, length, vocabulary)
    windowed, full = mistral(width, vocabulary).eval(), llama(width, vocabulary).eval()
    check_equal("softmax window", convert(windowed)(tokens).logits, windowed(tokens).logits)
    check_equal("full attention", convert(full)(tokens).logits, full(tokens).logits)
    eager: PreTrainedModel = mistral(width, vocabulary, "eager").eval()
    check_equal("Mistral's eager attention", eager(tokens).logits, windowed(tokens).logits)


def _sizes(width: int, vocabulary: int, layers: int, attention: str) -> dict[str, Any]:
    if width % HEAD_DIM:
        raise ValueError(f"width: expected a multiple of {HEAD_DIM}, got {width}")
    heads = width // HEAD_DIM
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": feed_forward_width(width),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": LONGEST,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": attention,
    }

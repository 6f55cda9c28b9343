"""Wrote the files of this folder at commit 5b2a3aa, before layers had one contract; kept to say what they hold.

`python -m tests.model.golden.make` writes them again, with the numbers of the code at hand: to look at, not to commit.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.state import save_state

FOLDER = Path(__file__).parent
SHARED = {
    "vocab_size": 47, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
PLANS = {
    "swat": {"num_hidden_layers": 2, "sliding_window": 5},
    "mixed": {
        "num_hidden_layers": 3, "sliding_window": [4, None, 7], "score_function": ["softmax", "softmax", "sigmoid"],
        "slopes": ["none", "negative", "3:1"], "score_bias": [0.0, 0.5, "-log(window)"],
        "use_rotary": [True, False, True], "rope_theta": [10000.0, 10000.0, 500.0], "qk_norm": True,
        "output_norm": True, "attention_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Two plans: the default layer, and one of every option that layers may differ in."""
PROMPT, DECODED = 13, 6


def tokens(batch: int, length: int) -> torch.Tensor:
    """Token ids that need no random generator, int64 `[B, T]`."""
    return (torch.arange(batch * length).view(batch, length) * 37 + 11) % 47


def documents() -> torch.Tensor:
    """Three documents and two places of padding in a row, int64 `[2, PROMPT]`."""
    return torch.tensor([[0] * 4 + [1] * 6 + [2] + [-1] * 2, [0] * 9 + [1] * 4])


def expected(model: SwatForCausalLM) -> dict[str, torch.Tensor]:
    """Logits of one pass, of packed rows and of a padded batch, decoded ones after a prefill, and gradients."""
    ids = tokens(2, PROMPT + DECODED)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        numbers = {
            "logits": model(ids).logits,
            "packed": model(ids[:, :PROMPT], document_ids=documents()).logits[documents() >= 0],
            "padded": model(ids[:, :PROMPT], attention_mask=mask).logits[mask != 0],
        }
    state = model.init_state(batch_size=2)
    _, state = model.prefill(ids[:, :PROMPT], state, chunk=4, attention_mask=mask)
    numbers["decoded"] = torch.stack([model.decode_step(one, state) for one in ids[:, PROMPT:].split(1, dim=1)])
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        numbers[f"gradient.{name}"] = parameter.grad.norm()[None]
    numbers["gradient"] = model.model.layers[0].self_attn.k_proj.weight.grad
    return numbers


def main() -> None:
    """Write both checkpoints, what they compute, and a state in the middle of a stream."""
    for number, (name, plan) in enumerate(PLANS.items()):
        torch.manual_seed(number)
        model = SwatForCausalLM(SwatConfig(**SHARED, **plan)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink()
        save_file(expected(model), FOLDER / name / "expected.safetensors")
        state = model.init_state(batch_size=2)
        model.prefill(tokens(2, PROMPT + DECODED)[:, :PROMPT], state, chunk=7)
        save_state(state, FOLDER / name / "state.safetensors")


if __name__ == "__main__":
    main()

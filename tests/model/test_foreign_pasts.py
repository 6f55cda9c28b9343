"""What was kept by a model of another plan of layers is refused in one sentence, wherever it is handed in."""

import pytest
import torch

from .models import tiny_model, tokens

MAMBA = {"kind": "mamba2", "ssm_head_dim": 16, "state_size": 8}
OTHERS = [
    ({}, "layer 0 keeps conv as "),
    ({"layers": [{**MAMBA, "state_size": 4}, "attention"]}, "layer 0 keeps conv as "),
    ({"layers": [MAMBA, {"kind": "attention", "sliding_window": 3}]}, "layer 1 keeps key as "),
    ({"layers": [MAMBA, "attention"], "num_hidden_layers": 4}, "expected 2 layers, it holds 4"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_pasts_of_another_plan(changes, message):
    model, other, ids = tiny_model(layers=[MAMBA, "attention"]), tiny_model(**changes), tokens(2, 5)
    with torch.no_grad():
        _, state = other.prefill(ids, other.init_state(batch_size=2))
        cache = other(ids, use_cache=True).past_key_values
    for what, call in {
        "state": lambda: model.decode_step(ids[:, :1], state),
        "past_key_values": lambda: model(ids, past_key_values=cache),
        "carry": lambda: model(ids, carry=other.init_carry()),
    }.items():
        with pytest.raises(ValueError, match=f"^{what}: {message}.*; it belongs to another model$"):
            call()

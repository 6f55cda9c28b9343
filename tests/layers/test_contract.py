"""The contract of layers, for every kind of LAYERS at its defaults and for plans that mix them."""

import pytest

from swat_lm.layers import LAYERS
from tests.layers.contract import CHECKS, Check, Subject, name_of
from tests.layers.sharded import launch

# settings with which what a kind does happens within the suite's few tokens, and in little time
SMALL = {
    "spade": {"kind": "spade", "state_size": 8},
    "sparsek": {"kind": "sparsek", "k": 3, "sliding_window": 4},
    "ecp": {"kind": "ecp", "segment": 4},
    "longvq": {"kind": "longvq", "codes": 6, "block": 3, "key_size": 8, "state_size": 4},
}

SUBJECTS = [Subject(kind, [SMALL.get(kind, kind)]) for kind in LAYERS if not LAYERS[kind].shortens] + [
    Subject(
        "selected otherwise",
        [
            {"kind": "sparsek", "k": 2, "sliding_window": 0, "masking": "both", "score_function": "sigmoid",
             "score_bias": "-log(window)", "num_key_value_heads": 4, "candidates": 40, "score_std": 0.1},
            {"kind": "sparsek", "k": 2, "candidates": 3, "sliding_window": 5, "masking": "straight",
             "use_rotary": False, "position_slope": 0.1},
        ],
    ),
    Subject(
        "state spaces",
        [
            {"kind": "spade", "state_size": 4, "fusion": "add", "ssm": "s4d", "score_function": "softmax",
             "slopes": "none", "use_rotary": False, "taps": "cauchy", "relative_bias": "own"},
            {"kind": "spade", "state_size": 6, "fusion": "stack", "taps": "cauchy", "sliding_window": 5,
             "score_function": "sigmoid", "slopes": "balanced"},
            {"kind": "attention", "relative_bias": "shared", "sliding_window": 3, "score_function": "softmax"},
        ],
        {"norm": "layer"},
    ),
    Subject("interleaved", ["mamba2", "attention"]),
    Subject("window and full", ["attention", {"kind": "attention", "sliding_window": None}]),
    Subject(
        "softmax with sink",
        [
            {"kind": "attention", "sliding_window": 5, "score_function": "softmax", "slopes": "none",
             "learned_sink": True},
            {"kind": "attention", "sliding_window": 1, "score_function": "softmax", "slopes": "negative",
             "learned_sink": True,
             "qk_norm": True, "output_norm": True, "attention_bias": True, "use_rotary": False},
        ],
    ),
    Subject(
        "first tokens",
        [
            {"kind": "attention", "sliding_window": 5, "sinks": 3, "score_function": "softmax", "slopes": "none"},
            {"kind": "attention", "sliding_window": 4, "sinks": 2},
        ],
    ),
    Subject(
        "learned per head",
        [
            {"kind": "attention", "learned_slopes": True, "learned_score_bias": True, "score_bias": "-log(window)",
             "slope_schedule": "window", "sliding_window": 5, "sinks": 2},
            {"kind": "attention", "slopes": "none", "learned_score_bias": True, "sinks": 3, "sliding_window": 4},
            {"kind": "attention", "output_gate": True, "layer_scale": 0.5, "slopes": "negative",
             "slope_schedule": "window", "slope_span": [8, 0.5], "score_function": "softmax", "learned_slopes": True},
        ],
    ),
    Subject(
        "biases per projection",
        [
            {"kind": "attention", "attention_bias": True, "output_bias": False, "score_function": "softmax",
             "slopes": "none"},
            {"kind": "attention", "output_bias": True, "mlp_bias": True, "feed_forward": "plain"},
        ],
        {"norm": "layer"},
    ),
    Subject(
        "scaled",
        [
            {"kind": "attention", "attention_multiplier": 0.4, "residual_multiplier": 0.3, "learned_sink": True,
             "score_function": "softmax", "slopes": "none", "attn_logit_softcapping": 0.8},
            {"kind": "attention", "attention_multiplier": 0.1},
        ],
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "final_logit_softcapping": 1.5},
    ),
    Subject(
        "norms behind",
        [
            {"kind": "attention", "norm_placement": "post", "qk_norm": True, "qk_norm_over": "layer",
             "score_function": "softmax", "slopes": "none"},
            {"kind": "attention", "norm_placement": "both", "residual_multiplier": 0.7, "qk_norm_over": "layer",
             "hidden_act": "gelu_pytorch_tanh", "norm": "layer", "attn_logit_softcapping": 0.8},
        ],
    ),
    Subject(
        "chosen queries",
        [
            {"kind": "taipan", "execution": "sparse", "score_function": "sigmoid", "gate_layers": 2,
             "temperature": 0.7, "sliding_window": 5},
            "mamba2",
            {"kind": "taipan", "execution": "sparse", "selection": "random", "capacity": 0.4},
        ],
    ),
    Subject(
        "odd recurrences",
        [
            {"kind": "mamba2", "state_size": 8, "ssm_head_dim": 16, "num_groups": 2, "conv_kernel": 2,
             "chunk_size": 4, "time_step_limit": [0.01, 0.5], "projection_bias": True},
            {"kind": "attention", "sliding_window": None, "score_function": "softmax", "slopes": "none"},
            {"kind": "mamba2", "state_size": 4, "ssm_head_dim": 32, "conv_kernel": 1, "conv_bias": False,
             "chunk_size": 3},
        ],
        {"norm": "layer", "feed_forward": "plain"},
    ),
]  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_it_keeps_the_contract(check: Check, subject: Subject, tmp_path):
    check(subject, tmp_path)


def test_it_holds_over_two_processes(tmp_path):
    said = launch(SUBJECTS, tmp_path)
    wrong = {name: message for name, message in said.items() if message}
    assert not wrong, "\n".join(f"{name}: {message}" for name, message in wrong.items())

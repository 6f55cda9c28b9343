"""Selective copy with early marks: does SPARSEK (arXiv 2406.16747) learn which keys to keep when they leave the window.

    python -m benchmarks.selective_copy [--seeds 0,1] [--models sparsek,random-k] [--record]

The task `synthetic:selective`: a few values behind marks stand in the first quarter of a row of other values, and the
marks are shown again at its end. Every answer lies far outside the window. Whoever knows that a marked value is wanted,
and not which mark it stood behind, gets one in so many right as there are marks. One key/value head: with several, each
choosing by chance, a layer would see much of what the window of the layer below has gathered. All models have equal
parameters, but for the scores that SPARSEK learns, one row of its width.
"""

from typing import Any

from benchmarks.task_runs import Case, Tasks

PAIRS, VALUES, LENGTH, WINDOW = 4, 16, 96, 4
SPARSEK = {"kind": "sparsek", "k": PAIRS, "sliding_window": WINDOW}
SOFTMAX = {"kind": "attention", "score_function": "softmax", "slopes": "none"}


def case(label: str, entry: dict[str, Any]) -> Case:
    """A model of two such layers."""
    model = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "max_position_embeddings": LENGTH, "initializer_range": 0.05, "layers": [entry],
    }  # fmt: skip
    source, draws = f"synthetic:selective?pairs={PAIRS}&values={VALUES}", entry.get("selection") == "random"
    return Case(label, source, LENGTH, 1 / VALUES, model, draws=draws)


CASES = {
    "sparsek": case("SPARSEK", SPARSEK),
    "sparsek-straight": case("SPARSEK, hard mask with the soft one's gradient", {**SPARSEK, "masking": "straight"}),
    "sparsek-sigmoid": case(
        "SPARSEK with sigmoid", {**SPARSEK, "score_function": "sigmoid", "score_bias": "-log(window)"}
    ),
    "random-k": case("4 keys by chance", {**SPARSEK, "selection": "random"}),
    "recent-k": case("the 4 most recent keys before the window", {**SPARSEK, "selection": "recent"}),
    "window": case("the window alone", {**SOFTMAX, "sliding_window": WINDOW}),
    "full-attention": case("full attention", {**SOFTMAX, "sliding_window": None}),
}

TASKS = Tasks("selective_copy", __doc__, CASES, 800)
main = TASKS.main

if __name__ == "__main__":
    main()

"""Copy at one distance: does context move on by segments per layer, as ECP (arXiv 2412.06106) says, and no farther.

    python -m benchmarks.ecp_copy [--seeds 0,1] [--models 'ecp-2-*'] [--record]

The task `synthetic:copy` with a fixed distance: each value of a row's second half stands so far before the token that
predicts it. L layers of segments of m = 4 reach L m back from everywhere and (L + 1) m - 1 at most. Disjoint segments
of 8 reach 7, over any number of layers; L windows of 2 m, where every token sees as many keys, L (2 m - 1). Rotary is
in all layers; the paper's has it in the first alone.
"""

from typing import Any

from benchmarks.task_runs import Case, Tasks

SEGMENT, VALUES = 4, 8
ECP = {"kind": "ecp", "segment": SEGMENT, "rotary_layers": "all"}
FIRST = {"kind": "ecp", "segment": SEGMENT}
WINDOW = {"kind": "attention", "score_function": "softmax", "slopes": "none", "sliding_window": 2 * SEGMENT}
DISJOINT = {**ECP, "segment": 2 * SEGMENT, "look_back": 0}


def case(label: str, entry: dict[str, Any], layers: int, distance: int) -> Case:
    """A model of so many layers."""
    length = 2 * distance + 2
    model = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4,
        "max_position_embeddings": length, "initializer_range": 0.05, "layers": [entry],
    }  # fmt: skip
    source = f"synthetic:copy?values={VALUES}&distance={distance}"
    return Case(f"{label}, {layers} layers, distance {distance}", source, length, 1 / VALUES, model)


CASES = {
    "ecp-2-8": case("ECP", ECP, 2, 8),
    "ecp-2-12": case("ECP", ECP, 2, 12),
    "disjoint-2-8": case("disjoint segments of 8", DISJOINT, 2, 8),
    "window-2-12": case("windows of 8", WINDOW, 2, 12),
    "ecp-4-12": case("ECP", ECP, 4, 12),
    "ecp-4-16": case("ECP", ECP, 4, 16),
    "ecp-4-20": case("ECP", ECP, 4, 20),
    "disjoint-4-12": case("disjoint segments of 8", DISJOINT, 4, 12),
    "ecp-first-4-12": case("ECP with rotary in its first layer alone", FIRST, 4, 12),
}

TASKS = Tasks("ecp_copy", __doc__, CASES, 400)
main = TASKS.main

if __name__ == "__main__":
    main()

"""Multi-query associative recall (arXiv 2312.04927) inside the window: does Taipan's gate find the queries.

    python -m benchmarks.taipan_recall [--seeds 0,1] [--models 'taipan*'] [--record]

Measured is accuracy on rows that are never trained on, and how often the gate opens at the tokens that ask and at all
others. More pairs are asked for than the recurrences' small states hold; every answer lies inside the window.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.task_runs import Case, Tasks, accuracy
from swat_lm.layers.selective_attention import SelectiveAttention

PAIRS, KEYS, VALUES = 8, 32, 32
LENGTH = WINDOW = 64
CAPACITY = 0.15
"""Of 64 tokens 8 ask: 12.5 %."""
WIDTH, STATE = 64, 4
TWO = {"kind": "mamba2", "state_size": STATE, "repeat": 2}
STRICT = 3.0
"""The budget's weight; with the layer's default of 1 more tokens stay chosen than the budget asks for."""


def case(label: str, layers: list[Any], depth: int = 3) -> Case:
    """A model of these layers."""
    model = {
        "hidden_size": WIDTH, "intermediate_size": 184, "num_hidden_layers": depth, "num_attention_heads": 2,
        "sliding_window": WINDOW, "max_position_embeddings": LENGTH, "initializer_range": 0.1, "layers": layers,
    }  # fmt: skip
    source = f"synthetic:mqar?pairs={PAIRS}&keys={KEYS}&values={VALUES}"
    return Case(label, source, LENGTH, 1 / VALUES, model)


def selective(label: str, **settings: Any) -> Case:
    """Two recurrences and a layer of selective attention: one such group, where the paper has six recurrences."""
    return case(label, [TWO, {"kind": "taipan", "capacity": CAPACITY, **settings}])


CASES = {
    "taipan": selective("Taipan, C = 0.15, `budget_weight` 3", budget_weight=STRICT),
    "taipan-light": selective("Taipan, C = 0.15, `budget_weight` 1"),
    "all-tokens": selective("attention on all tokens", selection="all"),
    "random": selective("attention on a random 15 %", selection="random"),
    # as many parameters as two recurrences with attention and feed-forward: see the records
    "ssm-only": case("Mamba-2 alone", [{"kind": "mamba2", "state_size": STATE}], depth=4),
    "taipan-sparse": selective("Taipan, `execution: sparse`", budget_weight=STRICT, execution="sparse"),
    "taipan-sigmoid": selective(
        "Taipan with sigmoid windows", budget_weight=STRICT, score_function="sigmoid", score_bias="-log(window)"
    ),
}


def gates(model: PreTrainedModel, case: Case, seed: int) -> dict[str, float]:
    """Accuracy, and of all gates together how often they open where one is asked for and elsewhere."""
    opened: dict[bool, list[Tensor]] = {True: [], False: []}
    shares: list[Tensor] = []
    mixers = [module for module in model.modules() if isinstance(module, SelectiveAttention)]
    handles = [mixer.register_forward_hook(lambda _, __, output: shares.append(output[1][..., 0])) for mixer in mixers]

    def look(asking: Tensor) -> None:
        for share in shares:
            for which in (True, False):
                opened[which].append((share > 0)[asking == which].double())
        shares.clear()

    found = {"accuracy": accuracy(model, case, seed, look)}
    for handle in handles:
        handle.remove()
    if mixers:
        found |= {
            "gate opens where asked": torch.cat(opened[True]).mean().item(),
            "elsewhere": torch.cat(opened[False]).mean().item(),
            "anywhere": torch.cat([*opened[True], *opened[False]]).mean().item(),
        }
    return found


TASKS = Tasks("taipan_recall", __doc__, CASES, 2500, gates)
main = TASKS.main

if __name__ == "__main__":
    main()

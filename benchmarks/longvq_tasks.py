"""LongVQ (reconstruction) on tasks: recall (MQAR, arXiv 2312.04927) with more and fewer codes than keys, and ListOps.

    python -m benchmarks.longvq_tasks [--seeds 0,1] [--models 'mqar-*'] [--record]

Measured is accuracy on rows that are never trained on, and how many codes of a layer are in use. Two keys of one code
share the sum of their values, so with fewer codes than keys attention must add next to nothing to what a state space
recalls in short rows by itself.
"""

from typing import Any

from transformers import PreTrainedModel

from benchmarks.task_runs import Case, Tasks, accuracy
from swat_lm.layers.codebook import KeyCodebook
from swat_lm.ops.codebook import perplexity

WIDTH, INNER, KEY_SIZE, STATE, BLOCK, DEPTH = 48, 64, 24, 8, 8, 2
VALUE = 2 * WIDTH
# a feed-forward of three matrices pays for what a control lacks
WITHOUT_ATTENTION = INNER + (KEY_SIZE + 3 * VALUE) // 3
WITHOUT_SYSTEM = INNER + (3 * STATE + 2) // 3


def layer(**settings: Any) -> dict[str, Any]:
    """A layer of LongVQ at the size of these tasks; in short runs keys move on fast, and codes must follow."""
    size = {"key_size": KEY_SIZE, "block": BLOCK, "state_size": STATE, "intermediate_size": INNER}
    book = {} if "attention" in settings else {"average_decay": 0.9}
    return {"kind": "longvq", **size, **book, **settings}


def without(part: str, codes: int = 32) -> dict[str, Any]:
    """The block without attention or without a state space, as large as with it."""
    if part == "attention":
        return {
            "kind": "longvq", "attention": "none", "state_size": STATE, "intermediate_size": WITHOUT_ATTENTION
        }  # fmt: skip
    plain = {name: value for name, value in layer().items() if name != "state_size"}
    return {**plain, "codes": codes, "ssm": "none", "intermediate_size": WITHOUT_SYSTEM}


def case(label: str, source: str, length: int, guessing: float, entry: dict[str, Any]) -> Case:
    """A model of two such layers."""
    model = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": DEPTH, "num_attention_heads": 2,
        "max_position_embeddings": length, "initializer_range": 0.1, "layers": [entry],
    }  # fmt: skip
    return Case(label, source, length, guessing, model, rows=64, learning_rate=4e-3, warmup_steps=50)


MQAR = ("synthetic:mqar?pairs=4&keys=8&values=8", 24, 1 / 8)
LIST_OPS = ("synthetic:listops?depth=3&arguments=4", 96, 1 / 10)
CASES = {
    "mqar-more-codes": case("MQAR, 8 keys: 32 codes", *MQAR, layer(codes=32)),
    "mqar-fewer-codes": case("2 codes", *MQAR, layer(codes=2)),
    "mqar-exact": case("keys as they are", *MQAR, layer(attention="exact")),
    "mqar-no-attention": case("without attention", *MQAR, without("attention")),
    "mqar-no-ssm": case("32 codes without a state space", *MQAR, without("ssm")),
    "mqar-fewer-no-ssm": case("2 codes without a state space", *MQAR, without("ssm", codes=2)),
    "listops-quantised": case("ListOps: 32 codes", *LIST_OPS, layer(codes=32)),
    "listops-exact": case("keys as they are", *LIST_OPS, layer(attention="exact")),
    "listops-no-attention": case("without attention", *LIST_OPS, without("attention")),
    "listops-no-ssm": case("32 codes without a state space", *LIST_OPS, without("ssm")),
}


def codes(model: PreTrainedModel, case: Case, seed: int) -> dict[str, float]:
    """Accuracy, and how many codes of each layer are in use (perplexity of running counts)."""
    books = [module for module in model.modules() if isinstance(module, KeyCodebook)]
    used = {f"codes used, layer {index}": perplexity(book.counts).item() for index, book in enumerate(books)}
    return {"accuracy": accuracy(model, case, seed), **used}


TASKS = Tasks("longvq_tasks", __doc__, CASES, 800, codes)
main = TASKS.main

if __name__ == "__main__":
    main()

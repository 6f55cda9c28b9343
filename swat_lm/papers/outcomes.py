"""What a study keeps of a run beside its losses: what its attention does, and what the model recalls."""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from swat_lm.papers.experiment import Progress, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OUTCOMES", "measure_outcomes", "shown_outcomes"]

SAMPLES = 32
"""Items per distance of each recall task."""
STREAMS = 4
"""Streams of the training length whose attention is looked at."""
TASKS = ("passkey", "mqar")
# times the window: within it, at its edge, and across it
DISTANCES = (0.75, 1, 2, 4)
UNBOUNDED = 64
"""Tokens that stand for the window in DISTANCES where a model has none."""


def attention_outcome(model: "PreTrainedModel", run: Run, told: Progress) -> dict[str, Any]:
    """First-token mass and the norm of the mixers' outputs by position, both averaged over heads and layers."""
    from swat_lm.evaluate.diagnose import diagnose

    length = run.recipe.data.sequence_length
    streams = [stream[:length] for stream in run.streams("text")[:STREAMS]]
    found = diagnose(model, streams, on_progress=lambda done, total: told("attention", done, total))
    layers = [layer for layer in found.weights if layer is not None]
    # twice as far each time; the last position is of its own
    places = [*(1 << power for power in range((length - 1).bit_length())), length]
    return {
        "length": length,
        "first_token_mass": mean([mean(layer.first_token_mass) for layer in layers]),
        "first_token_uniform": mean([layer.first_token_uniform for layer in layers]),
        "row_sum": mean([mean(layer.row_sum) for layer in layers]),
        "mean_distance": mean([mean(layer.mean_distance) for layer in layers]),
        "output_norm": {str(place): mean([norms[place - 1] for norms in found.output_norm]) for place in places},
        "hidden_variance": [mean(layer) for layer in found.hidden_variance],
    }


def recall_outcome(model: "PreTrainedModel", run: Run, told: Progress) -> list[dict[str, Any]]:
    """Recall of a pass key and of several keys at distances within the window and across it, guessing beside it.

    Distances too short for a task's text are left out.
    """
    from swat_lm.data import load_tokenizer
    from swat_lm.evaluate.probes import guessed_share, text_items
    from swat_lm.evaluate.recall import measure_recall
    from swat_lm.evaluate.windows import model_window

    encode = partial(load_tokenizer(str(run.folder / "export")).encode, add_special_tokens=False)
    window = model_window(model) or UNBOUNDED
    curves = []
    for task in TASKS:
        items = []
        for distance in (round(times * window) for times in DISTANCES):
            try:
                items += text_items(task, encode, [distance], SAMPLES)
            except ValueError:
                # the task's own text is longer
                continue
        if items:
            curve = measure_recall(
                model, items, task, chance=guessed_share(None, items),
                on_progress=lambda done, total, task=task: told(f"recall, {task}", done, total),
            )  # fmt: skip
            curves.append(asdict(curve))
    return curves


OUTCOMES: dict[str, Callable[["PreTrainedModel", Run, Progress], Any]] = {
    "attention": attention_outcome,
    "recall": recall_outcome,
}


def measure_outcomes(names: tuple[str, ...], model: "PreTrainedModel", run: Run, told: Progress) -> dict[str, Any]:
    """What a study asks for beside losses, by name."""
    return {name: OUTCOMES[name](model, run, told) for name in names}


def shown_outcomes(record: dict[str, Any]) -> tuple[str, ...]:
    """First-token mass over its uniform share, norms at both ends, recall at the nearest and farthest distance."""
    kept = record.get("outcomes", {})
    attention, curves = kept.get("attention"), kept.get("recall", [])
    shown = ["-", "-"]
    if attention is not None:
        mass, norms = attention["first_token_mass"], list(attention["output_norm"].values())
        shown = [
            "-" if mass is None else f"{mass:.4f} ({attention['first_token_uniform']:.4f})",
            f"{norms[0]:.3g} to {norms[-1]:.3g}",
        ]
    points = {curve["task"]: curve["points"] for curve in curves}
    for task in TASKS:
        ends = points.get(task)
        shown.append("-" if not ends else f"{100 * ends[0]['accuracy']:.0f} to {100 * ends[-1]['accuracy']:.0f} %")
    return tuple(shown)


def mean(values: Any) -> float | None:
    """Their mean; None of none."""
    found = list(values)
    return statistics.fmean(found) if found else None

"""The demo's results.json, plots and report.html; every sentence about the outcome is decided by the numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from swat_lm.evaluate.curves import LengthCurve, difference
from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.plots import Series, plot_loss_by_length, plot_state_bytes, plot_training
from swat_lm.files import write_text
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.cost import count_parameters, reach
from swat_lm.papers.page import machine, with_error, write_page
from swat_lm.papers.pictures import training_series
from swat_lm.recipe import Recipe, dump_recipe
from swat_lm.train.metrics import read_metrics
from swat_lm.words import counted

__all__ = ["TOLERANCE", "judge", "write_report"]

TOLERANCE = 0.05
"""Nats per token: a smaller change between lengths counts as none."""


class Named(NamedTuple):
    """How a model is called."""

    name: str
    short: str
    """In heads of tables, and in legends of many."""
    other: str
    """In a claim, as what SWAT is compared with."""


NAMES = {
    "swat": Named("SWAT with negative slopes (recommended)", "SWAT", ""),
    "twin": Named("full attention (RoPE, QK-norm)", "full attention", "full attention"),
    "paper": Named("SWAT with balanced slopes (arXiv 2502.18845)", "balanced slopes", "SWAT with balanced slopes"),
    "alibi": Named("full attention (RoPE, QK-norm, ALiBi)", "full, ALiBi", "full attention with ALiBi"),
    "window": Named("softmax, the same window and slopes", "softmax window", "softmax over the same window and slopes"),
}
"""In the order of the claims."""
PICTURES = ("loss_by_length.png", "training.png", "state_bytes.png")


def write_report(
    out: Path,
    recipes: Mapping[str, Recipe],
    curves: Mapping[str, LengthCurve],
    samples: Mapping[str, dict[str, Any]],
    text: dict[str, int],
    seconds: dict[str, float],
    threads: int,
) -> dict[str, Any]:
    """Write the plots, `results.json` and, last, `report.html` into the folder; returns the results."""
    metrics = {name: read_metrics(Path(recipe.out, "metrics.jsonl")) for name, recipe in recipes.items()}
    trained = recipes["swat"].data.sequence_length
    results = {
        "training_length": trained,
        "steps": recipes["swat"].train.steps,
        "claims": judge(curves, samples, trained),
        "models": {
            name: describe(name, recipe, curves[name], samples[name], metrics[name]) for name, recipe in recipes.items()
        },
        "text": text,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "machine": machine(threads),
    }
    write_text(out / "results.json", write_figures(results) + "\n")
    # what was measured is kept before anything is drawn
    draw(out, recipes["swat"], curves, metrics)
    write_page(
        out / "report.html",
        "demo.html",
        title="swat-lm demo",
        **results,
        pictures={name.partition(".")[0]: out / name for name in PICTURES},
        sources=recipes["swat"].data.sources,
        recipes={name: dump_recipe(recipe) for name, recipe in recipes.items()},
        tolerance=TOLERANCE,
    )
    return results


def judge(
    curves: Mapping[str, LengthCurve], samples: Mapping[str, dict[str, Any]], trained: int
) -> list[dict[str, Any]]:
    """What SWAT promises, each with `held` and the numbers that decide it.

    Of two models: the difference of their losses on the same text at the training length, paired by stream, which has
    to be more than two standard errors; one stream has none, and shows nothing. Of one: the change of its loss between
    the training length and the longest; up to TOLERANCE it counts as none, and full attention's has to be more than two
    standard errors too. What another seed would change is in no error.
    """
    swat, longest = curves["swat"], curves["swat"].lengths[-1]
    claims = []
    for name, called in NAMES.items():
        if name in curves and name != "swat":
            ahead, error = difference(at_length(curves[name], trained), at_length(swat, trained))
            claims.append({
                "claim": f"SWAT is ahead of {called.other} at the training length ({trained:,} tokens)",
                "held": shown(ahead, error),
                "numbers": f"the other's loss is {with_error(ahead, error, sign='+')} nats per token against SWAT's"
                + ("" if shown(abs(ahead), error) else ", which decides nothing"),
            })  # fmt: skip
    flat, flat_error = change(swat, trained, longest)
    twin, twin_error = change(curves["twin"], trained, longest)
    first, last = samples["swat"]["state_bytes_first"], samples["swat"]["state_bytes_last"]
    return [
        *claims,
        {
            "claim": f"SWAT stays flat or falls from its training length to {longest:,} tokens",
            "held": flat <= TOLERANCE,
            "numbers": f"loss changes by {with_error(flat, flat_error, sign='+')} nats per token",
        },
        {
            "claim": f"Full attention with RoPE alone breaks beyond its training length, at {longest:,} tokens",
            "held": twin > TOLERANCE and shown(twin, twin_error),
            "numbers": f"loss changes by {with_error(twin, twin_error, sign='+')} nats per token",
        },
        {
            "claim": "SWAT's stream keeps a state of constant size",
            "held": samples["swat"]["state_constant"],
            "numbers": f"{counted(first, 'byte')} after the first generated token, {last:,} after the last",
        },
    ]


def shown(gap: float, error: float | None) -> bool:
    """Whether a gap is more than two standard errors above nothing."""
    return error is not None and gap > 2 * error


def at_length(curve: LengthCurve, length: int) -> list[float | None]:
    """Loss of each stream, read in pieces of a length."""
    at = curve.lengths.index(length)
    return [row[at] for row in curve.document_mean_loss]


def change(curve: LengthCurve, trained: int, to: int) -> tuple[float, float | None]:
    """Loss at one length minus loss at the training length, paired by stream, with its standard error."""
    return difference(at_length(curve, to), at_length(curve, trained))


def describe(
    name: str, recipe: Recipe, curve: LengthCurve, sample: dict[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one model."""
    config = SwatConfig.from_pretrained(Path(recipe.out, "export"))
    held_out = [record["held_out_loss"] for record in metrics if "held_out_loss" in record]
    return {
        "name": NAMES[name].name,
        "short": NAMES[name].short,
        "parameters": count_parameters(config).total,
        "window": curve.window,
        "reach": reach(config),
        "tokens_trained": metrics[-1]["tokens"],
        "training_seconds": round(metrics[-1]["seconds"], 1),
        "held_out_loss": held_out[-1] if held_out else None,
        "curve": [
            {
                "length": point.length,
                "mean_loss": point.mean_loss,
                "mean_loss_error": point.mean_loss_error,
                "tail_loss": point.tail_loss,
                "tail_loss_error": point.tail_loss_error,
                "state_bytes": point.state_bytes,
            }
            for point in curve.points
        ],
        "stream": sample,
    }


def draw(
    out: Path,
    recipe: Recipe,
    curves: Mapping[str, LengthCurve],
    metrics: Mapping[str, list[dict[str, Any]]],
) -> None:
    """The three pictures."""
    trained = recipe.data.sequence_length
    names = {name: called.name if len(curves) <= 3 else called.short for name, called in NAMES.items()}
    # errors of the change since the training length: those of the loss itself only say that texts differ
    losses = [
        Series(
            names[name],
            curve.lengths,
            [point.mean_loss for point in curve.points],
            [change(curve, trained, length)[1] for length in curve.lengths],
        )
        for name, curve in curves.items()
    ]
    plot_loss_by_length(losses, out / PICTURES[0], training_length=trained, window=curves["swat"].window)
    training = [training_series(names[name], records) for name, records in metrics.items()]
    held_out = [training_series(names[name], records, "held_out_loss") for name, records in metrics.items()]
    plot_training(training, held_out, out / PICTURES[1])
    kept = [Series(names[name], c.lengths, [p.state_bytes for p in c.points]) for name, c in curves.items()]
    plot_state_bytes(kept, out / PICTURES[2])

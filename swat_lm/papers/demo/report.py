"""The demo's results.json, plots and report.html; every sentence about the outcome is decided by the numbers."""

import html
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from swat_lm.evaluate.curves import LengthCurve, difference
from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.plots import Series, plot_loss_by_length, plot_state_bytes, plot_training
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.cost import count_parameters, reach
from swat_lm.papers.page import machine, picture, write_page
from swat_lm.recipe import Recipe, dump_recipe
from swat_lm.train.metrics import read_metrics
from swat_lm.wording import counted

__all__ = ["TOLERANCE", "judge", "write_report"]

TOLERANCE = 0.05
"""Nats per token: a smaller change between lengths counts as none."""

NAMES = {"swat": "SWAT (sigmoid, window)", "twin": "full attention (softmax, RoPE)"}
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
            name: describe(recipe, curves[name], samples[name], metrics[name]) for name, recipe in recipes.items()
        },
        "text": text,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "machine": machine(threads),
    }
    beside = out / ".tmp-results.json"
    beside.write_text(write_figures(results) + "\n", encoding="utf-8")
    beside.replace(out / "results.json")
    # what was measured is kept before anything is drawn
    draw(out, recipes["swat"], curves, metrics)
    write_page(out / "report.html", "swat-lm demo", render(out, recipes, results))
    return results


def judge(
    curves: Mapping[str, LengthCurve], samples: Mapping[str, dict[str, Any]], trained: int
) -> list[dict[str, Any]]:
    """What SWAT promises, each with `held` and the numbers that decide it.

    Changes are differences of the loss of the same text, cut into pieces of the longest and of the training length,
    paired by stream; a change under TOLERANCE, or one within two standard errors, counts as none.
    """
    longest = curves["swat"].lengths[-1]
    changes = {name: change(curve, trained, longest) for name, curve in curves.items()}
    swat, swat_error = changes["swat"]
    twin, twin_error = changes["twin"]
    gap = [curves[name].document_mean_loss for name in ("twin", "swat")]
    ahead, ahead_error = difference([row[-1] for row in gap[0]], [row[-1] for row in gap[1]])
    first, last = samples["swat"]["state_bytes_first"], samples["swat"]["state_bytes_last"]
    return [
        {
            "claim": f"SWAT stays flat or falls from its training length ({trained:,}) to {longest:,} tokens",
            "held": swat <= TOLERANCE,
            "numbers": f"loss changes by {signed(swat, swat_error)} nats per token",
        },
        {
            "claim": f"The full-attention twin breaks beyond its training length, at {longest:,} tokens",
            "held": twin > TOLERANCE and twin > 2 * (twin_error or 0.0),
            "numbers": f"loss changes by {signed(twin, twin_error)} nats per token",
        },
        {
            "claim": f"At {longest:,} tokens SWAT is the better of the two",
            "held": ahead > 2 * (ahead_error or 0.0),
            "numbers": f"the twin's loss is {signed(ahead, ahead_error)} nats per token against SWAT's",
        },
        {
            "claim": "SWAT's stream keeps a state of constant size",
            "held": samples["swat"]["state_constant"],
            "numbers": f"{counted(first, 'byte')} after the first generated token, {last:,} after the last",
        },
    ]


def change(curve: LengthCurve, trained: int, to: int) -> tuple[float, float | None]:
    """Loss at one length minus loss at the training length, paired by stream, with its standard error."""
    before, after = curve.lengths.index(trained), curve.lengths.index(to)
    losses = curve.document_mean_loss
    return difference([row[after] for row in losses], [row[before] for row in losses])


def signed(value: float, error: float | None) -> str:
    """+0.123 +- 0.004."""
    return f"{value:+.3f}" + ("" if error is None else f" \u00b1 {error:.3f}")


def describe(
    recipe: Recipe, curve: LengthCurve, sample: dict[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one model."""
    config = SwatConfig.from_pretrained(Path(recipe.out, "export"))
    held_out = [record["held_out_loss"] for record in metrics if "held_out_loss" in record]
    return {
        "name": NAMES[recipe.name],
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
    # errors of the change since the training length: those of the loss itself only say that texts differ
    losses = [
        Series(
            NAMES[name],
            curve.lengths,
            [point.mean_loss for point in curve.points],
            [change(curve, trained, length)[1] for length in curve.lengths],
        )
        for name, curve in curves.items()
    ]
    plot_loss_by_length(losses, out / PICTURES[0], training_length=trained, window=curves["swat"].window)
    training, held_out = [], []
    for name, records in metrics.items():
        training.append(Series(NAMES[name], [r["tokens"] for r in records], [r["loss"] for r in records]))
        some = [r for r in records if "held_out_loss" in r]
        held_out.append(Series(NAMES[name], [r["tokens"] for r in some], [r["held_out_loss"] for r in some]))
    plot_training(training, held_out, out / PICTURES[1])
    kept = [Series(NAMES[name], c.lengths, [p.state_bytes for p in c.points]) for name, c in curves.items()]
    plot_state_bytes(kept, out / PICTURES[2])


def render(out: Path, recipes: Mapping[str, Recipe], results: dict[str, Any]) -> str:
    """The body of the page."""
    swat, twin = results["models"]["swat"], results["models"]["twin"]
    template = Template((files("swat_lm.papers.demo") / "report.html").read_text(encoding="utf-8"))
    values = {name.partition(".")[0]: picture(out / name) for name in PICTURES}
    values |= {
        "claims": "\n".join(claim_row(claim) for claim in results["claims"]),
        "curve_rows": "\n".join(map(curve_row, swat["curve"], twin["curve"], [results["training_length"]] * 99)),
        "sample_prompt": html.escape(swat["stream"]["prompt"]),
        "sample_text": html.escape(swat["stream"]["text"]),
        "sample_tokens": f"{swat['stream']['tokens']:,}",
        "tolerance": f"{TOLERANCE:g}",
        "state_rows": "\n".join(state_row(model) for model in (swat, twin)),
        "model_rows": "\n".join(model_row(model) for model in (swat, twin)),
        "text_facts": "{documents:,} files, {bytes:,} bytes; {held_out_documents:,} of them ({held_out_tokens:,} "
        "tokens) held out".format(**results["text"]),
        "sources": html.escape(", ".join(recipes["swat"].data.sources)),
        "steps": f"{results['steps']:,}",
        "recipes": "\n".join(
            f"<details><summary>{name}/recipe.yaml</summary><pre>{html.escape(dump_recipe(recipe))}</pre></details>"
            for name, recipe in recipes.items()
        ),
        "machine_rows": "\n".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in results["machine"].items()
        ),
        "seconds": ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items()),
    }
    return template.substitute(values)


def claim_row(claim: dict[str, Any]) -> str:
    """One claim, its verdict and its numbers."""
    verdict = "held" if claim["held"] else "did not hold"
    kind = "held" if claim["held"] else "failed"
    return f'<li class="{kind}"><b>{verdict}</b>: {html.escape(claim["claim"])}. {html.escape(claim["numbers"])}.</li>'


def curve_row(swat: dict[str, Any], twin: dict[str, Any], trained: int) -> str:
    """One evaluation length of both models."""
    mark = " (training length)" if swat["length"] == trained else ""
    cells = [f"{swat['length']:,}{mark}"]
    cells += [f"{model[loss]:.3f}" for loss in ("mean_loss", "tail_loss") for model in (swat, twin)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def state_row(model: dict[str, Any]) -> str:
    """The state of one model while it streamed."""
    stream = model["stream"]
    kind = "constant" if stream["state_constant"] else "growing"
    return (
        f"<tr><td>{model['name']}</td><td>{stream['state_bytes_first']:,}</td><td>{stream['state_bytes_last']:,}</td>"
        f"<td>{kind}</td><td>{stream['tokens_per_second']:.0f}</td></tr>"
    )


def model_row(model: dict[str, Any]) -> str:
    """Size and training of one model."""
    reached = "everything before" if model["reach"] is None else f"{model['reach']:,}"
    window = "none" if model["window"] is None else f"{model['window']:,}"
    held_out = "" if model["held_out_loss"] is None else f"{model['held_out_loss']:.3f}"
    cells = (
        model["name"], f"{model['parameters']:,}", window, reached, f"{model['tokens_trained']:,}",
        f"{model['training_seconds']:.0f}", held_out,
    )  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

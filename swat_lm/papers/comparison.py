"""Compares finished or running runs on one page: training, loss against length, recall, state, speed.

Reads what the runs' folders hold; what was not measured of a run is named with the command that measures it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import swat_lm.model.configuration  # noqa: F401 registers ours
from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.plots import COLOURS, Series, plot_loss_by_length, plot_state_bytes, plot_training
from swat_lm.evaluate.recall import RecallCurve
from swat_lm.evaluate.recall_plots import plot_recall
from swat_lm.evaluate.windows import widest_window
from swat_lm.files import write_text
from swat_lm.model.architectures import OURS, count_model_parameters, model_state_bytes, name_of
from swat_lm.papers.findings import recent_loss
from swat_lm.papers.page import machine, with_error, write_page
from swat_lm.papers.pictures import plot_rows
from swat_lm.recipe import Recipe, dump_recipe, load_recipe
from swat_lm.train.metrics import read_metrics
from swat_lm.words import counted

__all__ = ["RunFindings", "read_run", "report"]

MOST_RUNS = len(COLOURS)
STATE_CONTEXTS = tuple(2**power for power in range(6, 18))
STATE_BYTES_PER_ELEMENT = 2


@dataclass(frozen=True)
class RunFindings:
    """What one run's folder holds."""

    name: str
    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    config: PreTrainedConfig | None
    """None before the run has exported a model."""
    lengths: Mapping[str, LengthCurve]
    """Loss by length, by the file's place in the run's folder."""
    recalls: Mapping[str, RecallCurve]
    """By task."""


def read_run(folder: Path, name: str | None = None) -> RunFindings:
    """Everything of a run that is there; raises ValueError for a folder that is no run, or a damaged file."""
    if not (folder / "recipe.yaml").exists() or not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} is no run: expected recipe.yaml and metrics.jsonl, as `swat-lm train` writes them")
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{folder} has no line in metrics.jsonl yet: nothing to report")
    config = folder / "export" / "config.json"
    recalls = {}
    for path in sorted(folder.rglob("recall.json")):
        for values in parse(path, lambda text: json.loads(text)):
            curve = parse(path, lambda _, values=values: RecallCurve.from_json(write_figures(values)))
            recalls[curve.task] = curve
    paths = [*folder.rglob("length.json"), *(folder / "evaluation").glob("*window*.json")]
    return RunFindings(
        name=name or folder.absolute().name,
        folder=folder,
        recipe=load_recipe(folder / "recipe.yaml"),
        metrics=metrics,
        config=AutoConfig.from_pretrained(folder / "export") if config.exists() else None,
        lengths={
            str(path.relative_to(folder).with_suffix("")): parse(path, LengthCurve.from_json) for path in sorted(paths)
        },
        recalls=recalls,
    )


def parse(path: Path, read: Callable[[str], Any]) -> Any:
    """What `read` makes of the file's text; raises ValueError naming the file."""
    try:
        return read(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what swat-lm wrote: {error}") from None


def report(runs: Sequence[RunFindings], out: Path) -> dict[str, Any]:
    """Write `report.json`, the pictures and, last, `report.html` into the folder; returns what the JSON holds.

    Raises ValueError for more runs than a picture can tell apart, or two of one name.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"expected 1 to {MOST_RUNS} runs, which a picture can tell apart; got {len(runs)}")
    names = [one.name for one in runs]
    if len(set(names)) != len(names):
        raise ValueError(f"two runs have the same name ({', '.join(names)}): write NAME=FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "runs": [describe(one) for one in runs],
        "not_measured": [line for one in runs for line in missing(one)],
        "machine": machine(0) | {"threads": "not measured here"},
    }
    # what was found is kept before anything is drawn
    write_text(out / "report.json", write_figures(found) + "\n")
    write_page(
        out / "report.html",
        "comparison.html",
        title="swat-lm runs",
        headings=HEADINGS,
        rows=[row(one) for one in found["runs"]],
        pictures=draw(runs, out),
        not_measured=found["not_measured"],
        recipes={one.name: dump_recipe(one.recipe) for one in runs},
    )
    return found


def describe(one: RunFindings) -> dict[str, Any]:
    """The figures of one run."""
    last = one.metrics[-1]
    held_out = [line["held_out_loss"] for line in one.metrics if "held_out_loss" in line]
    rates = sorted(line["tokens_per_second"] for line in one.metrics)
    return {
        "name": one.name,
        "folder": str(one.folder),
        "architecture": one.recipe.model.get("architecture", OURS) if one.config is None else name_of(one.config),
        "parameters": None if one.config is None else count_model_parameters(one.config).total,
        "steps": last["step"],
        "of_steps": one.recipe.train.steps,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "training_loss": recent_loss(one.metrics),
        "held_out_loss": held_out[-1] if held_out else None,
        "tokens_per_second": rates[len(rates) // 2],
        "state_bytes": None if one.config is None else {
            context: model_state_bytes(one.config, context, STATE_BYTES_PER_ELEMENT) for context in STATE_CONTEXTS
        },
        "loss_by_length": {
            place: {point.length: [point.mean_loss, point.mean_loss_error] for point in curve.points}
            for place, curve in one.lengths.items()
        },
        "recall": {
            task: {point.distance: point.accuracy for point in curve.points} for task, curve in one.recalls.items()
        },
    }  # fmt: skip


def missing(one: RunFindings) -> list[str]:
    """What was not measured, and how it is."""
    lines = []
    if one.config is None:
        return [f"{one.name}: no export yet, so neither parameters nor state: finish the run with train.export=true"]
    if not one.lengths:
        lines.append(
            f"{one.name}: loss against length: swat-lm evaluate length {one.folder} --data TEXT "
            f"--out {one.folder / 'length'}"
        )
    if not one.recalls:
        lines.append(f"{one.name}: recall: swat-lm evaluate recall {one.folder} --out {one.folder / 'recall'}")
    if model_state_bytes(one.config, 1) is None:
        lines.append(f"{one.name}: state: known only while such a model runs")
    return lines


def draw(runs: Sequence[RunFindings], out: Path) -> dict[str, Path]:
    """Write the pictures for which any run has data; returns them by their headings."""
    drawn: dict[str, Path] = {}

    def at(heading: str, name: str) -> Path:
        drawn[heading] = out / f"{name}.png"
        return drawn[heading]

    # a run looks the same in every picture, also where another lacks a measurement
    style = {one.name: index for index, one in enumerate(runs)}
    training = [Series(one.name, *columns(one.metrics, "loss")) for one in runs]
    held_out = [Series(one.name, *columns(one.metrics, "held_out_loss")) for one in runs]
    plot_training(training, held_out, at("Training", "training"))
    for number, place in enumerate(dict.fromkeys(place for one in runs for place in one.lengths)):
        found = [(one, curve) for one in runs if (curve := one.lengths.get(place)) is not None]
        series = [
            Series(
                one.name + how_read(one, curve),
                curve.lengths,
                [point.mean_loss for point in curve.points],
                [point.mean_loss_error for point in curve.points],
                style[one.name],
            )
            for one, curve in found
        ]
        plot_loss_by_length(series, at(f"Loss against length ({place})", f"length-{number}"))
    for number, task in enumerate(dict.fromkeys(task for one in runs for task in one.recalls)):
        asked = [one for one in runs if task in one.recalls]
        curves = [replace(one.recalls[task], task=one.name) for one in asked]
        styles = [style[one.name] for one in asked]
        # the heading above the picture names the task
        plot_recall(curves, at(f"Recall: {task}", f"recall-{number}"), styles=styles)
    states = [
        Series(one.name, STATE_CONTEXTS, kept, style=style[one.name]) for one in runs if (kept := state_of(one.config))
    ]
    if states:
        plot_state_bytes(states, at("State of one stream, in bf16", "state"))
    rates = [(one.name, describe(one)["tokens_per_second"], None) for one in runs]
    plot_rows(
        rates, at("Speed of training", "speed"), xlabel="tokens per second while training (median)", from_zero=True,
        apart=True,
    )  # fmt: skip
    return drawn


def how_read(one: RunFindings, curve: LengthCurve) -> str:
    """What sets a curve apart from the run's model as it is: another window, first tokens kept."""
    own = None if one.config is None else widest_window(one.config)
    window = "" if curve.window == own else f", window {'none' if curve.window is None else f'{curve.window:,}'}"
    return window + (f", first {counted(curve.num_sinks, 'token')} kept" if curve.num_sinks else "")


def columns(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Tokens trained on, and a number, where a line has it."""
    lines = [line for line in metrics if name in line]
    return [line["tokens"] for line in lines], [line[name] for line in lines]


def state_of(config: PreTrainedConfig | None) -> list[int]:
    """Bytes of the state after each of the contexts; empty where that is not known."""
    values = [
        None if config is None else model_state_bytes(config, at, STATE_BYTES_PER_ELEMENT) for at in STATE_CONTEXTS
    ]
    return [value for value in values if value is not None]


HEADINGS = (
    "run", "architecture", "parameters", "steps", "tokens trained on", "training loss", "held-out loss", "tokens/s",
    f"state bytes at {STATE_CONTEXTS[-1]:,} tokens",
)  # fmt: skip


def row(one: Mapping[str, Any]) -> list[str]:
    """A run's figures under HEADINGS."""
    state = (one["state_bytes"] or {}).get(STATE_CONTEXTS[-1])
    return [
        one["name"],
        one["architecture"],
        "\u2013" if one["parameters"] is None else f"{one['parameters']:,}",
        f"{one['steps']:,}\u00a0of\u00a0{one['of_steps']:,}",
        f"{one['tokens']:,}",
        with_error(one["training_loss"], None),
        with_error(one["held_out_loss"], None),
        f"{one['tokens_per_second']:,.0f}",
        "\u2013" if state is None else f"{state:,}",
    ]

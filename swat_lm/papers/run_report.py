"""Compares finished or running runs on one page: training, loss against length, recall, state, speed.

Reads what the runs' folders hold; what was not measured of a run is named with the command that measures it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median_high
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
from swat_lm.papers.measuring import parsed
from swat_lm.papers.page import machine, with_error, write_page
from swat_lm.papers.pictures import plot_rows, training_series
from swat_lm.recipe import Recipe, dump_recipe, load_recipe
from swat_lm.train.metrics import read_metrics
from swat_lm.words import counted

__all__ = ["RunFindings", "read_run", "write_run_report"]

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


# a run's folder may hold files of others, which nobody is told to remove
read_found = partial(parsed, said="{path}: not what swat-lm wrote: {error}")


def read_run(folder: Path, name: str | None = None) -> RunFindings:
    """Everything of a run that is there; raises ValueError for a folder that is no run, or a damaged file."""
    if not (folder / "recipe.yaml").exists() or not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} is no run: expected recipe.yaml and metrics.jsonl, as `swat-lm train` writes them")
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{folder} has no line in metrics.jsonl yet: nothing to report")
    recalls = [
        curve
        for path in sorted(folder.rglob("recall.json"))
        for curve in read_found(
            path, lambda text: [RecallCurve.from_json(json.dumps(held)) for held in json.loads(text)]
        )
    ]
    paths = [*folder.rglob("length.json"), *(folder / "evaluation").glob("*window*.json")]
    return RunFindings(
        name=name or folder.absolute().name,
        folder=folder,
        recipe=load_recipe(folder / "recipe.yaml"),
        metrics=metrics,
        config=(
            AutoConfig.from_pretrained(folder / "export") if (folder / "export" / "config.json").exists() else None
        ),
        lengths={
            str(path.relative_to(folder).with_suffix("")): read_found(path, LengthCurve.from_json)
            for path in sorted(paths)
        },
        recalls={curve.task: curve for curve in recalls},
    )


def write_run_report(runs: Sequence[RunFindings], out: Path) -> dict[str, Any]:
    """Write `report.json`, the pictures and, last, `report.html` into the folder; returns what the JSON holds.

    Raises ValueError for more runs than a picture can tell apart, or two of one name.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"expected 1 to {MOST_RUNS} runs, which a picture can tell apart; got {len(runs)}")
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        raise ValueError(f"two runs have the same name ({', '.join(names)}): write NAME=FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "runs": [describe(run) for run in runs],
        "not_measured": [line for run in runs for line in missing(run)],
        "machine": machine(0) | {"threads": "not measured here"},
    }
    # what was found is kept before anything is drawn
    write_text(out / "report.json", write_figures(found) + "\n")
    rows = [cells(figures) for figures in found["runs"]]
    write_page(
        out / "report.html",
        "run_report.html",
        title="swat-lm runs",
        headings=list(rows[0]),
        rows=[row.values() for row in rows],
        pictures=draw(runs, found["runs"], out),
        not_measured=found["not_measured"],
        recipes={run.name: dump_recipe(run.recipe) for run in runs},
    )
    return found


def describe(run: RunFindings) -> dict[str, Any]:
    """The figures of one run."""
    last = run.metrics[-1]
    held_out = [line["held_out_loss"] for line in run.metrics if "held_out_loss" in line]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "architecture": run.recipe.model.get("architecture", OURS) if run.config is None else name_of(run.config),
        "parameters": None if run.config is None else count_model_parameters(run.config).total,
        "steps": last["step"],
        "of_steps": run.recipe.train.steps,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "training_loss": recent_loss(run.metrics),
        "held_out_loss": held_out[-1] if held_out else None,
        "tokens_per_second": median_high(line["tokens_per_second"] for line in run.metrics),
        "state_bytes": None if run.config is None else {
            context: model_state_bytes(run.config, context, STATE_BYTES_PER_ELEMENT) for context in STATE_CONTEXTS
        },
        "loss_by_length": {
            place: {point.length: [point.mean_loss, point.mean_loss_error] for point in curve.points}
            for place, curve in run.lengths.items()
        },
        "recall": {
            task: {point.distance: point.accuracy for point in curve.points} for task, curve in run.recalls.items()
        },
    }  # fmt: skip


def missing(run: RunFindings) -> list[str]:
    """What was not measured, and how it is."""
    lines = []
    if run.config is None:
        return [f"{run.name}: no export yet, so neither parameters nor state: finish the run with train.export=true"]
    if not run.lengths:
        lines.append(
            f"{run.name}: loss against length: swat-lm evaluate length {run.folder} --data TEXT "
            f"--out {run.folder / 'length'}"
        )
    if not run.recalls:
        lines.append(f"{run.name}: recall: swat-lm evaluate recall {run.folder} --out {run.folder / 'recall'}")
    if model_state_bytes(run.config, 1) is None:
        lines.append(f"{run.name}: state: known only while such a model runs")
    return lines


def draw(runs: Sequence[RunFindings], figures: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Path]:
    """Write the pictures for which any run has data; returns them by their headings.

    `figures` are those that `describe` gives of each run.
    """
    drawn: dict[str, Path] = {}

    def at(heading: str, name: str) -> Path:
        drawn[heading] = out / f"{name}.png"
        return drawn[heading]

    # a run looks the same in every picture, also where another lacks a measurement
    style = {run.name: index for index, run in enumerate(runs)}
    training = [training_series(run.name, run.metrics) for run in runs]
    held_out = [training_series(run.name, run.metrics, "held_out_loss") for run in runs]
    plot_training(training, held_out, at("Training", "training"))
    for number, place in enumerate(dict.fromkeys(place for run in runs for place in run.lengths)):
        curves = [(run, run.lengths[place]) for run in runs if place in run.lengths]
        series = [
            Series(
                run.name + how_read(run, curve),
                curve.lengths,
                [point.mean_loss for point in curve.points],
                [point.mean_loss_error for point in curve.points],
                style[run.name],
            )
            for run, curve in curves
        ]
        plot_loss_by_length(series, at(f"Loss against length ({place})", f"length-{number}"))
    for number, task in enumerate(dict.fromkeys(task for run in runs for task in run.recalls)):
        asked = [run for run in runs if task in run.recalls]
        # the heading above the picture names the task
        recalls = [replace(run.recalls[task], task=run.name) for run in asked]
        plot_recall(
            recalls, at(f"Recall: {task}", f"recall-{number}"), styles=[style[run.name] for run in asked]
        )  # fmt: skip
    states = [
        Series(run["name"], STATE_CONTEXTS, list(run["state_bytes"].values()), style=style[run["name"]])
        for run in figures
        if run["state_bytes"] and None not in run["state_bytes"].values()
    ]
    if states:
        plot_state_bytes(states, at("State of one stream, in bf16", "state"))
    plot_rows(
        [(run["name"], run["tokens_per_second"], None) for run in figures],
        at("Speed of training", "speed"), xlabel="tokens per second while training (median)", from_zero=True,
        apart=True,
    )  # fmt: skip
    return drawn


def how_read(run: RunFindings, curve: LengthCurve) -> str:
    """What sets a curve apart from the run's model as it is: another window, first tokens kept."""
    own = None if run.config is None else widest_window(run.config)
    window = "" if curve.window == own else f", window {'none' if curve.window is None else f'{curve.window:,}'}"
    return window + (f", first {counted(curve.num_sinks, 'token')} kept" if curve.num_sinks else "")


def cells(run: Mapping[str, Any]) -> dict[str, str]:
    """A run's figures as the page shows them, by heading."""
    state = (run["state_bytes"] or {}).get(STATE_CONTEXTS[-1])
    return {
        "run": run["name"],
        "architecture": run["architecture"],
        "parameters": "\u2013" if run["parameters"] is None else f"{run['parameters']:,}",
        "steps": f"{run['steps']:,}\u00a0of\u00a0{run['of_steps']:,}",
        "tokens trained on": f"{run['tokens']:,}",
        "training loss": with_error(run["training_loss"], None),
        "held-out loss": with_error(run["held_out_loss"], None),
        "tokens/s": f"{run['tokens_per_second']:,.0f}",
        f"state bytes at {STATE_CONTEXTS[-1]:,} tokens": "\u2013" if state is None else f"{state:,}",
    }

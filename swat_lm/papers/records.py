"""What is kept of one run of a study: recipe, identity of the text, losses and outcomes, as a file to be committed."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swat_lm.data import prepare
from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.figures import read_figures, write_figures
from swat_lm.evaluate.length import loss_on_same_text
from swat_lm.files import write_text
from swat_lm.model.architectures import count_model_parameters
from swat_lm.model.loading import load_causal_lm
from swat_lm.model.recipe_fields import DEFAULTS as MODEL_DEFAULTS
from swat_lm.papers.experiment import Progress, Run
from swat_lm.papers.findings import Findings
from swat_lm.papers.measuring import parsed, read_json
from swat_lm.papers.outcomes import measure_outcomes
from swat_lm.papers.page import machine
from swat_lm.recipe import DataRecipe, TrainRecipe
from swat_lm.train.metrics import read_metrics
from swat_lm.train.setup import resolved

__all__ = ["RecordedFindings", "has_record", "make_record"]

# names, places and what changes no number: two machines may have them otherwise for the same run
NOT_COMPARED = {
    "": ("name", "out"),
    "data": ("sources", "tokenizer", "cache", "workers"),
    "train": ("resume", "keep", "save_every", "export", "loggers"),
}
# what a record made before a field existed has in its place
DEFAULTS = json.loads(
    json.dumps({"data": asdict(DataRecipe(sources=("text",))), "train": asdict(TrainRecipe()), "model": MODEL_DEFAULTS})
)


def record_path(out: Path, name: str) -> Path:
    """Where the record of a run lies."""
    return out / "records" / f"{name}.json"


def identity(run: Run) -> dict[str, Any]:
    """What makes two runs the same wherever they were trained; the text counts by its tokens, not its place.

    Of a model of ours every setting is named, so that another default makes another run.
    """
    recipe = asdict(resolved(run.recipe))
    for part, keys in NOT_COMPARED.items():
        held = recipe[part] if part else recipe
        for key in keys:
            del held[key]
    text = prepare(run.recipe.data).key
    return json.loads(json.dumps({**recipe, "text": text, "lengths": run.scale.lengths, "pieces": run.scale.pieces}))


def has_record(run: Run, outcomes: tuple[str, ...] = ()) -> bool:
    """Whether the run's record is there, with all these outcomes; raises ValueError for that of another run."""
    path = record_path(run.out, run.recipe.name)
    if not path.exists():
        return False
    held, kept = parsed(path, lambda text: read(read_figures(text)))
    other = difference(held, identity(run))
    if other is not None:
        raise ValueError(f"{path} is of another run ({other}): remove it, or name another folder for --out")
    return kept >= set(outcomes)


def read(record: Any) -> tuple[Any, set[str]]:
    """The identity in a record, and which outcomes it has."""
    return record["identity"], set(record.get("outcomes", {}))


def difference(held: Any, wanted: Any, at: str = "") -> str | None:
    """The first place in which a record differs, as a sentence; None if in none."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in held if key not in wanted)]
        old, new = ({**DEFAULTS.get(at, {}), **one} for one in (held, wanted))
        found = (difference(old.get(key), new.get(key), f"{at}.{key}".strip(".")) for key in keys)
        return next((place for place in found if place is not None), None)
    return None if held == wanted else f"{at or 'all'} is {held!r} there, {wanted!r} here"


def make_record(run: Run, outcomes: tuple[str, ...], told: Progress) -> None:
    """Measure a trained run, its outcomes of these names too, and write its record."""
    model = load_causal_lm(str(run.folder))
    curve = loss_on_same_text(
        model,
        run.streams("text"),
        run.scale.lengths,
        on_progress=lambda done, total: told("all lengths", done, total),
    )
    lines = read_metrics(run.folder / "metrics.jsonl")
    record = {
        "identity": identity(run),
        "parameters": count_model_parameters(model.config).total,
        "curve": read_figures(curve.to_json()),
        "training": [{"tokens": x["tokens"], "loss": x["loss"]} for x in lines],
        # of this machine as busy as it was: to be compared with care
        "tokens_per_second": statistics.median(x["tokens_per_second"] for x in lines),
        "outcomes": measure_outcomes(outcomes, model, run, told),
        "machine": machine(torch.get_num_threads()),
    }
    write_text(record_path(run.out, run.recipe.name), write_figures(record) + "\n")


class RecordedFindings(Findings):
    """The results of a study, from its records alone."""

    def record(self, variant: Any, seed: int) -> dict[str, Any] | None:
        """What was kept of a run; None of one that diverged."""
        path = record_path(self.out, f"{variant.name}-seed{seed}")
        return read_json(path) if path.exists() else None

    def curve(self, variant: Any, seed: int, text: str, window: int | None, num_sinks: int = 0) -> LengthCurve | None:
        """Loss of the held-out text."""
        record = self.record(variant, seed)
        return None if record is None else LengthCurve.from_json(write_figures(record["curve"]))

    def training(self, variant: Any, seed: int) -> list[dict[str, Any]]:
        """Tokens and loss of each line of metrics.jsonl."""
        record = self.record(variant, seed)
        return [] if record is None else record["training"]

    def parameters(self, variant: Any) -> int:
        """Of the first seed that was recorded; 0 if none was."""
        records = (self.record(variant, seed) for seed in self.seeds)
        return next((record["parameters"] for record in records if record is not None), 0)

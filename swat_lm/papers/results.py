"""The page and the JSON of an experiment: ours beside the paper's numbers, and a verdict per claim."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.standard_errors import mean_and_error
from swat_lm.files import write_text
from swat_lm.papers.experiment import Experiment, Section, Variant
from swat_lm.papers.findings import Findings, recent_loss
from swat_lm.papers.page import machine, with_error, write_page
from swat_lm.papers.scales import Scale
from swat_lm.papers.verdicts import Verdict
from swat_lm.words import counted

__all__ = ["write_results"]

# of a gap without any effect but that of seeds to exceed twice its error, from so many seeds (Student's t), in per cent
BY_CHANCE = {2: 30, 3: 18, 4: 14, 5: 12}


def write_results(
    experiment: Experiment,
    scale: Scale,
    chosen: Mapping[str, Variant],
    seeds: Sequence[int],
    out: Path,
    sources: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `NAME.json`, its pictures and, last, `NAME.html` into the folder; returns what the JSON holds."""
    found = experiment.findings(scale, chosen, seeds, out)
    verdicts = experiment.verdicts(found)
    results = {
        "experiment": experiment.name,
        "title": experiment.title,
        "scale": scale.name,
        "about": scale.about,
        "seeds": list(seeds),
        "sizes": dict(scale.sizes),
        "lengths": list(scale.lengths),
        "variants": [describe(found, variant) for variant in chosen.values()],
        "not_run_on_this_machine": [
            variant.label for name, variant in experiment.variants(scale).items() if name not in chosen
        ],
        "diverged": found.diverged(),
        "claims": [asdict(verdict) for verdict in verdicts],
        "printed_in_the_paper": experiment.printed,
        "doubtful_in_the_paper": list(experiment.doubtful),
        "sources": sources,
        "machine": machine(torch.get_num_threads()),
    }
    # what was measured is kept before anything is drawn
    write_text(out / f"{experiment.name}.json", write_figures(results) + "\n")
    write_page(
        out / f"{experiment.name}.html",
        "experiment.html",
        **results,
        text=json.dumps(sources),
        lead=experiment.lead(scale),
        claims_heading=experiment.claims_heading,
        caution=caution(verdicts),
        pictures=experiment.pictures(found, out),
        sections=[*experiment.sections(found), training(results)],
    )
    return results


def describe(found: Findings, variant: Any) -> dict[str, Any]:
    """The figures of one variant, over seeds."""
    finals = [recent_loss(found.training(variant, seed)) for seed in found.finished(variant)]
    recipe = found.recipe(variant)
    mean, error = mean_and_error(finals) if finals else (None, None)
    return {
        "name": variant.name,
        "label": variant.label,
        "parameters": found.parameters(variant),
        "training_length": recipe.data.sequence_length,
        "tokens": recipe.train.steps * recipe.train.batch_size * recipe.data.sequence_length,
        "training_loss": mean,
        "training_loss_error": error,
        "losses": {
            text: {
                str(length): dict(zip(("mean", "error"), found.mean_loss(variant, text, length), strict=True))
                for length in found.scale.lengths
            }
            for text in found.experiment.texts
            if found.experiment.lists_losses
        },
    }


def caution(verdicts: Sequence[Verdict]) -> str:
    """How far the error can be trusted with so few seeds."""
    seeds = max((verdict.num_seeds for verdict in verdicts), default=0)
    if seeds == 1:
        return "With one seed the error is over documents alone: it says nothing of what another seed would give."
    if seeds in BY_CHANCE:
        return (
            f"An error from {counted(seeds, 'seed')} is itself uncertain: where seeds differ more than documents do, "
            f"about {BY_CHANCE[seeds]} in 100 claims without anything to them would be decided."
        )
    return ""


def training(results: Mapping[str, Any]) -> Section:
    """Size and training of every variant."""
    rows = [
        [variant["label"], f"{variant['parameters']:,}", f"{variant['training_length']:,}", f"{variant['tokens']:,}",
         with_error(variant["training_loss"], variant["training_loss_error"])]
        for variant in results["variants"]
    ]  # fmt: skip
    headings = ("variant", "parameters", "training length", "tokens trained on", "training loss at the end")
    return Section("Training", headings, rows)

"""Small models on synthetic tasks: trained by the trainer on one thread, measured on rows that are never trained on.

A benchmark of this kind writes one JSON record per model and seed into OUT/records. A record that is there is kept, so
several commands with other --models or --seeds may run side by side on one folder, and an interrupted one goes on after
what it has. `--record` makes the records those of the project, in docs/results/tasks, from which the tables of
docs/experiments.md are written.
"""

import argparse
import fnmatch
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks import measure
from swat_lm.data.synthetic import SyntheticSource, synthetic_task
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.files import write_text
from swat_lm.model.architectures import configure_model, count_model_parameters
from swat_lm.model.loading import load_causal_lm
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe, dump_recipe
from swat_lm.train import run

RECORDS = measure.REPOSITORY / "docs" / "results" / "tasks"


@dataclass(frozen=True)
class Case:
    """One model on one task."""

    label: str
    """As the documents call it."""
    source: str
    """`synthetic:...`."""
    length: int
    """Of a row."""
    guessing: float
    """The share of answers that guessing gets right."""
    model: Mapping[str, Any]
    """Of the recipe."""
    rows: int = 32
    """Of a step."""
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    held_out_batches: int = 32
    draws: bool = False
    """Whether what it sees is drawn by chance: then anew for each held-out row too, as in training."""

    def recipe(self, name: str, seed: int, out: Path, steps: int) -> Recipe:
        """Its run with one seed."""
        train = TrainRecipe(
            steps=steps, batch_size=self.rows, learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, steps // 4), weight_decay=0.01, log_every=max(1, steps // 50),
            evaluate_every=0, save_every=0, keep=1, precision="fp32",
        )  # fmt: skip
        data = DataRecipe(
            sources=(self.source,), tokenizer="bytes", sequence_length=self.length, documents="concatenate",
            held_out=0.0,
        )  # fmt: skip
        own = f"{name}-seed{seed}"
        return Recipe(name=own, seed=seed, out=str(out / "runs" / own), model=dict(self.model), data=data, train=train)


Look = Callable[[Tensor], None]
"""Is shown after each batch which tokens ask, bool `[B, T]`."""


def accuracy(model: PreTrainedModel, case: Case, seed: int, look: Look | None = None) -> float:
    """The share of answers on held-out rows that the model gives."""
    rows = SyntheticSource(
        synthetic_task(case.source), "held_out", case.length, seed, batch_size=case.rows,
        vocab_size=model.config.vocab_size,
    )  # fmt: skip
    right = []
    with evaluating(model), torch.inference_mode():
        model.train(case.draws)
        for batch in rows.pass_over(num_batches=case.held_out_batches):
            drawn = {"noise_seed": batch.noise_seed} if case.draws else {}
            logits = model(input_ids=batch.input_ids, use_cache=False, **drawn).logits[:, :-1]
            asked = batch.labels[:, 1:] >= 0
            right.append((logits.argmax(dim=-1) == batch.labels[:, 1:])[asked].double().mean().item())
            if look is not None:
                look(torch.nn.functional.pad(asked, (0, 1)))
    return fmean(right)


def only_accuracy(model: PreTrainedModel, case: Case, seed: int) -> dict[str, float]:
    """What is measured where nothing else is of interest."""
    return {"accuracy": accuracy(model, case, seed)}


@dataclass(frozen=True)
class Tasks:
    """A benchmark: models by name, and what is measured of each."""

    name: str
    doc: str | None
    cases: Mapping[str, Case]
    steps: int
    """Of each model, unless --steps says otherwise."""
    measure: Callable[[PreTrainedModel, Case, int], dict[str, float]] = only_accuracy
    """`accuracy`, and by its heading in tables what else there is."""

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Train what has no record yet, and print all that there is."""
        given = self.parsed(arguments)
        torch.set_num_threads(1)
        # a bar for 20 tensors
        logging.disable_progress_bar()
        chosen = [name for name in self.cases if any(fnmatch.fnmatch(name, one) for one in given.models.split(","))]
        for seed in () if given.summary else map(int, given.seeds.split(",")):
            for name in chosen:
                path = given.out / "records" / f"{name}-seed{seed}.json"
                if path.exists():
                    self.check(path, name, seed, given.steps)
                    continue
                record = self.train_and_measure(name, seed, given.out, given.steps)
                write_text(path, json.dumps(record, indent=1) + "\n")
                said = f"accuracy {100 * record['accuracy']:.1f} %, {record['seconds']:.0f} s"
                sys.stdout.write(f"{name}, seed {seed}: {said}\n")
                sys.stdout.flush()
        sys.stdout.writelines(f"{line}\n" for line in self.summary(given.out))
        if given.record:
            sys.stdout.write(self.publish(given.out))

    def parsed(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The command line."""
        names = ", ".join(self.cases)
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, default=measure.REPOSITORY / "runs" / self.name, help="runs, records")
        parser.add_argument("--seeds", default="0,1", help="by commas")
        parser.add_argument("--models", default="*", help=f"by commas, also with *: {names}")
        parser.add_argument("--steps", type=int, default=self.steps)
        parser.add_argument("--summary", action="store_true", help="only show what is there")
        parser.add_argument("--record", action="store_true", help="also make the records those of docs/results/tasks")
        given = parser.parse_args(arguments)
        unknown = [one for one in given.models.split(",") if not fnmatch.filter(self.cases, one)]
        if unknown:
            parser.error(f"--models: expected some of {names}; got {', '.join(unknown)}")
        if not all(seed.isdigit() for seed in given.seeds.split(",")):
            parser.error(f"--seeds: expected whole numbers by commas; got {given.seeds!r}")
        if given.steps < 1:
            parser.error(f"--steps: expected at least 1; got {given.steps}")
        return given

    def train_and_measure(self, name: str, seed: int, out: Path, steps: int) -> dict[str, Any]:
        """One record."""
        case, begun = self.cases[name], time.monotonic()
        recipe = case.recipe(name, seed, out, steps)
        if run(recipe).interrupted:
            raise KeyboardInterrupt
        model = load_causal_lm(recipe.out)
        return {
            "model": name,
            "place": list(self.cases).index(name),
            "label": case.label,
            "seed": seed,
            "recipe": told(recipe),
            "parameters": count_model_parameters(configure_model(recipe.model, model.config.vocab_size)).total,
            "guessing": case.guessing,
            **self.measure(model, case, seed),
            "seconds": time.monotonic() - begun,
            "machine": measure.machine(),
        }

    def check(self, path: Path, name: str, seed: int, steps: int) -> None:
        """Leave, with what to do, where a record is of another run."""
        wanted = told(self.cases[name].recipe(name, seed, path.parent.parent, steps))
        if json.loads(path.read_text(encoding="utf-8"))["recipe"] != wanted:
            raise SystemExit(f"{path} is of another run: remove it, or name another folder with --out")

    def summary(self, out: Path) -> list[str]:
        """A line for each model over its seeds."""
        width = max(map(len, self.cases))
        lines = [f"{'':{width}}  parameters  guessing  accuracy, seed by seed"]
        for name, case in self.cases.items():
            paths = sorted((out / "records").glob(f"{name}-seed*.json"))
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            if found:
                shares = "  ".join(f"{100 * one['accuracy']:5.1f}" for one in found)
                lines.append(f"{name:{width}}  {found[0]['parameters']:10,}  {100 * case.guessing:8.1f}  {shares}")
        return lines

    def publish(self, out: Path) -> str:
        """Copy the records to their place in the project; returns the lines that say so."""
        place, paths = RECORDS / self.name, sorted((out / "records").glob("*.json"))
        place.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copyfile(path, place / path.name)
        return f"{len(paths)} records in {place}\nmake docs    writes the documents' tables from them\n"


def told(recipe: Recipe) -> str:
    """A recipe without the place of its run."""
    return dump_recipe(replace(recipe, out="OUT"))

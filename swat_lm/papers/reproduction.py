"""Runs an experiment: text, training of every variant that has no result yet, measurements, page.

Everything lies in one folder, shared by the experiments of one scale, so that a variant that two of them need is
trained once and the same call continues after an interruption. The experiment says what is compared and measured.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swat_lm.data import load_tokenizer, vocabulary_size
from swat_lm.files import write_text
from swat_lm.model.architectures import check_trainable, configure_model, count_model_parameters, training_flops
from swat_lm.papers import find_experiment
from swat_lm.papers.experiment import Experiment, Run, Variant
from swat_lm.papers.measuring import note_divergence, read_divergence
from swat_lm.papers.results import write_results
from swat_lm.papers.scales import Scale, find_scale
from swat_lm.papers.texts import (
    Sources,
    check_sources,
    evaluation_streams,
    prepare_texts,
    read_by_runs,
    sources_from_folder,
)
from swat_lm.papers.watching import InterruptedRunError, Watcher
from swat_lm.papers.worker import MOST_THREADS, run_workers, usable_cores
from swat_lm.recipe import TrainRecipe
from swat_lm.train import DivergedError, run
from swat_lm.train.engine import Engine
from swat_lm.words import lasting

__all__ = ["Sources", "do_model", "plan_without_running", "reproduce", "sources_from_folder"]

A800_FLOPS_PER_SECOND = 312e12
UTILISATION = 0.4
WORKER = "swat_lm.papers.reproduction"


def reproduce(
    name: str, scale_name: str, sources: Sources, out: Path, seeds: Sequence[int], watcher: Watcher
) -> dict[str, Any]:
    """Run or continue an experiment and write its page and JSON; returns what the JSON holds.

    Under torchrun every process calls it: all train, the first one prepares, measures and writes while the others wait.

    Raises ValueError for anything that could not work, before any training; InterruptedRunError after a Ctrl-C that
    saved.
    """
    experiment = find_experiment(name)
    scale = find_scale(scale_name, experiment.scales)
    chosen = check_variants(experiment, scale)
    jobs = [f"{experiment.key}:{name}:{seed}" for seed in seeds for name in chosen]
    engine = Engine(TrainRecipe())

    def begin() -> list[str]:
        for variant in chosen.values():
            # rows that do not divide among the processes
            Engine(experiment.recipe(variant, scale, 0, out, ("text",), "bytes").train).rows()
        check_sources(experiment, sources)
        was_there, is_new = out.exists(), not (out / "plan.json").exists()
        plan = open_plan(out, scale, sources, experiment.brought)
        write_text(out / "plan.json", json.dumps(plan, indent=1) + "\n")
        watcher.stage("preparing the text")
        try:
            # all runs read the same tokens
            variant, texts = next(iter(chosen.values())), read_by_runs(out, sources, experiment, scale)
            any_run = experiment.recipe(variant, scale, 0, out, *texts)
            prepare_texts(out, sources, any_run, experiment, scale, watcher)
        except ValueError:
            if is_new:
                # a text that will not do is no reason to keep the folder from a better one
                take_back(out, was_there, experiment.brought)
            raise
        return [job for job in jobs if not is_done(out, job)]

    missing = engine.on_main(begin)
    watcher.stage(f"runs: {len(jobs)}, of them done before: {len(jobs) - len(missing)}")
    do_jobs(out, missing, len(jobs), watcher)
    watcher.stage("writing the page")
    return engine.on_main(lambda: write_results(experiment, scale, chosen, seeds, out, sources.plain()))


def plan_without_running(name: str, scale_name: str) -> list[dict[str, Any]]:
    """Every variant of an experiment with its parameters, FLOPs and GPU hours; models exist on the meta device only.

    Hours are of one A800, the hardware of SWAT's authors (312 TFLOP/s in bf16), at a share of 40 %. A model whose
    package is not installed has a `remark` instead of numbers.
    """
    experiment = find_experiment(name)
    scale = find_scale(scale_name, experiment.scales)
    rows = []
    for variant in experiment.variants(scale).values():
        recipe = experiment.recipe(variant, scale, 0, Path("out"), ("text",), "bytes")
        length, train = recipe.data.sequence_length, recipe.train
        tokens = train.steps * train.batch_size * length
        row: dict[str, Any] = {
            "variant": variant.name, "label": variant.label, "length": length, "tokens": tokens, "steps": train.steps,
            "rows_per_step": train.batch_size, "remark": "",
        }  # fmt: skip
        rows.append(row)
        try:
            config = configure_model(recipe.model, vocabulary_of(experiment, scale))
        except ValueError as error:
            row["remark"] = str(error)
            continue
        flops = training_flops(config, length)
        total = flops.per_token * tokens
        row |= {
            "parameters": count_model_parameters(config).total, "flops": total, "flops_by": flops.method,
            "gpu_hours": total / (A800_FLOPS_PER_SECOND * UTILISATION) / 3600,
        }  # fmt: skip
    return rows


def vocabulary_of(experiment: Experiment, scale: Scale) -> int:
    """Ids that its models are counted with: the most of the budget, or those of its tokenizer."""
    budget = experiment.budget(scale)
    return budget.vocab_size or vocabulary_size(load_tokenizer(budget.tokenizer or "bytes"))


def check_variants(experiment: Experiment, scale: Scale) -> dict[str, Variant]:
    """The variants that this machine can train; those that it cannot are left out where the experiment allows it.

    Raises ValueError for a recipe that does not hold.
    """
    able = {}
    for name, variant in experiment.variants(scale).items():
        recipe = experiment.recipe(variant, scale, 0, Path("out"), ("text",), "bytes")
        try:
            check_trainable(recipe.model, recipe.data.documents)
        except ValueError:
            if not experiment.leaves_out:
                raise
            continue
        configure_model(recipe.model, vocabulary_of(experiment, scale))
        able[name] = variant
    return able


def open_plan(out: Path, scale: Scale, sources: Sources, brought: Sequence[str] = ()) -> dict[str, Any]:
    """What this folder holds: one scale on one text. Raises ValueError for another one, or a folder of other things.

    Folders named in `brought` may be there before.
    """
    path = out / "plan.json"
    wanted = {"scale": scale.name, "sources": sources.plain()}
    if path.exists():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            before = {name: plan[name] for name in wanted}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: remove {out}, or name another folder for --out") from None
        # an experiment that needs no books may have come first
        compared = [{**held, "sources": {**held["sources"], "books": None}} for held in (before, wanted)]
        if compared[0] != compared[1]:
            raise ValueError(f"{out} holds another scale or text ({before}): name another folder for --out")
        return {**plan, **wanted}
    if out.exists() and (not out.is_dir() or any(entry.name not in brought for entry in out.iterdir())):
        raise ValueError(f"{out} exists and is no reproduction: name another folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    return wanted


def take_back(out: Path, was_there: bool, brought: Sequence[str]) -> None:
    """Remove what was written into a folder that `open_plan` found empty, and the folder if it was made for that."""
    for entry in out.iterdir():
        if entry.name not in brought:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not was_there:
        out.rmdir()


def run_of(out: Path, job: str, watcher: Watcher) -> tuple[Run, Experiment, Variant]:
    """The run behind `experiment:variant:seed`, as the plan in the folder says."""
    key, name, seed = job.rsplit(":", 2)
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    experiment, sources = find_experiment(key), Sources.planned(plan)
    scale = find_scale(plan["scale"], experiment.scales)
    variant, texts = experiment.variants(scale)[name], read_by_runs(out, sources, experiment, scale)
    recipe = experiment.recipe(variant, scale, int(seed), out, *texts)
    streams = partial(evaluation_streams, recipe, sources, scale, watcher)
    return Run(recipe, scale, out, streams, sources.tasks), experiment, variant


def is_done(out: Path, job: str) -> bool:
    """Whether a run and all that the experiment measures of it are there, or it diverged."""
    trained, experiment, variant = run_of(out, job, Watcher())
    return read_divergence(trained.folder) is not None or experiment.is_done(variant, trained)


def do_jobs(out: Path, jobs: Sequence[str], of: int, watcher: Watcher) -> None:
    """Train and measure; on a CPU several at a time, each with few threads, which small models use best."""
    begun = time.monotonic()
    in_here = torch.cuda.is_available() or "RANK" in os.environ
    together = 1 if in_here else max(1, min(len(jobs), usable_cores()))
    for first in range(0, len(jobs), together):
        batch = list(jobs[first : first + together])
        # as long a batch as those before it
        left = f"; about {lasting((time.monotonic() - begun) / first * (len(jobs) - first))} left" if first else ""
        names = ", ".join("{1} seed {2}".format(*job.rsplit(":", 2)) for job in batch)
        done = of - len(jobs) + first
        watcher.stage(f"runs {done + 1} to {done + len(batch)} of {of}: {names}{left}")
        if in_here:
            do_model(out, batch[0], watcher)
        else:
            threads = max(1, min(MOST_THREADS, usable_cores() // len(batch)))
            run_workers(out, batch, threads, watcher, WORKER)


def do_model(out: Path, name: str, watcher: Watcher) -> None:
    """Train the run `experiment:variant:seed` and measure what the experiment needs; what is there is kept.

    Raises InterruptedRunError if training was stopped, and saved.
    """
    trained, experiment, variant = run_of(out, name, watcher)
    recipe = trained.recipe
    if not trained.is_trained:
        try:
            result = run(recipe, lambda event: watcher.event(recipe.name, event))
        except DivergedError as error:
            # what the paper says of some variants, and no reason to leave the others undone
            said = str(error)
            Engine(recipe.train).on_main(lambda: note_divergence(trained.folder, said))
            return
        if result.interrupted:
            raise InterruptedRunError(f"stopped at step {result.last_step} of {recipe.train.steps}")

    def measure() -> None:
        for step in experiment.measure(variant, trained):
            step(lambda what, done, total: watcher.count(f"{recipe.name}: {what}", done, total))

    Engine(recipe.train).on_main(measure)

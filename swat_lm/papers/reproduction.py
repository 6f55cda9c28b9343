"""Runs a table or figure of the paper: text, training of every variant that has no result yet, measurements, page.

Everything lies in one folder, shared by the experiments, so that a variant that two of them need is trained once and
the same call continues after an interruption. What is compared is in variants.py, what is claimed in claims.py.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swat_lm.data import TokenStore, prepare, resolve_sources
from swat_lm.data.readers import read_pieces
from swat_lm.data.tokenizer_training import train_tokenizer
from swat_lm.evaluate.curves import write_whole
from swat_lm.evaluate.length import segments
from swat_lm.model.architectures import build_model, check_trainable, configure_model, training_flops
from swat_lm.papers.demo.pace import MOST_THREADS, usable_cores
from swat_lm.papers.measuring import measure_variant, note_divergence, read_divergence, read_json
from swat_lm.papers.reproduction_page import write_results
from swat_lm.papers.scales import Scale, find_scale
from swat_lm.papers.variants import (
    Experiment,
    Variant,
    budget_of,
    find_experiment,
    variant_model,
    variant_recipe,
    variants_of,
)
from swat_lm.papers.watching import InterruptedRunError, Watcher
from swat_lm.papers.worker import run_workers
from swat_lm.recipe import Recipe, TrainRecipe
from swat_lm.train import DivergedError, run
from swat_lm.train.engine import Engine

__all__ = ["Sources", "do_model", "plan_without_running", "reproduce", "sources_from_folder"]

FOLDERS = {"text": "corpus", "books": "books"}
A800_FLOPS_PER_SECOND = 312e12
UTILISATION = 0.4
WORKER = "swat_lm.papers.reproduction"


@dataclass(frozen=True)
class Sources:
    """Where the texts are; kept in `plan.json`, since a folder holds one scale on one text."""

    text: tuple[str, ...]
    """To train on, with a share held out for evaluation."""
    books: tuple[str, ...]
    """Long documents, only for evaluation."""
    tasks: str
    """Folder of the benchmarks' files, or `hub`."""
    tokenizer: str | None = None
    """None: trained on the text (tiny, small), or the paper's (paper)."""


def sources_from_folder(folder: Path, experiment: Experiment) -> Sources:
    """The parts of a data folder that an experiment needs: corpus/, books/ and the benchmarks' files.

    Raises ValueError naming what is missing.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--data: no folder {folder}; expected one with corpus/ and books/ (and the benchmarks' files)"
        )
    needed = FOLDERS if experiment.reads_texts else {"text": "corpus"}
    missing = [f"{name}/" for name in needed.values() if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"--data {folder} lacks {' and '.join(missing)}: expected text files or .jsonl there; or name the texts "
            "themselves with --text and --books"
        )
    books = (str(folder / "books"),) if (folder / "books").is_dir() else ()
    return Sources((str(folder / "corpus"),), books, str(folder))


def reproduce(
    name: str, scale_name: str, sources: Sources, out: Path, seeds: Sequence[int], watcher: Watcher
) -> dict[str, Any]:
    """Run or continue an experiment and write its page and JSON; returns what the JSON holds.

    Under torchrun every process calls it: all train, the first one prepares, measures and writes while the others wait.

    Raises ValueError for anything that could not work, before any training; InterruptedRunError after a Ctrl-C that
    saved.
    """
    experiment, scale = find_experiment(name), find_scale(scale_name)
    chosen = check_variants(experiment, scale)
    jobs = [f"{name}:{one}:{seed}" for seed in seeds for one in chosen]
    engine = Engine(TrainRecipe())

    def begin() -> list[str]:
        for one in chosen.values():
            # rows that do not divide among the processes
            Engine(variant_recipe(one, scale, 0, out, ("text",), "bytes").train).rows()
        check_sources(experiment, sources)
        was_there, is_new = out.exists(), not (out / "plan.json").exists()
        plan = open_plan(out, scale, sources)
        write_whole(out / "plan.json", json.dumps(plan, indent=1) + "\n")
        watcher.stage("preparing the text")
        try:
            prepare_texts(out, plan, experiment, scale, watcher)
        except ValueError:
            if is_new:
                # a text that will not do is no reason to keep the folder from a better one
                take_back(out, was_there)
            raise
        return [job for job in jobs if not is_done(out, plan, job)]

    missing = engine.on_main(begin)
    watcher.stage(f"runs: {len(jobs)}, of them done before: {len(jobs) - len(missing)}")
    do_jobs(out, missing, len(jobs), watcher)
    watcher.stage("writing the page")
    return engine.on_main(lambda: write_results(experiment, scale, chosen, seeds, out, asdict(sources)))


def plan_without_running(name: str, scale_name: str) -> list[dict[str, Any]]:
    """Every variant of an experiment with its parameters, FLOPs and GPU hours; models exist on the meta device only.

    Hours are of one A800, the paper's hardware (312 TFLOP/s in bf16), at a share of 40 %. A model whose package is not
    installed has a `remark` instead of numbers.
    """
    experiment, scale = find_experiment(name), find_scale(scale_name)
    rows = []
    for one in variants_of(experiment, scale).values():
        budget, length = budget_of(one, scale), scale.sizes[one.length]
        row: dict[str, Any] = {"variant": one.name, "label": one.label, "length": length, "tokens": budget.tokens}
        recipe = variant_recipe(one, scale, 0, Path("out"), ("text",), "bytes")
        row["steps"], row["rows_per_step"] = recipe.train.steps, recipe.train.batch_size
        row["tokens"] = recipe.train.steps * recipe.train.batch_size * length
        try:
            config = configure_model(recipe.model, budget.vocab_size)
        except ValueError as error:
            rows.append(row | {"remark": str(error)})
            continue
        with torch.device("meta"):
            counted = sum(parameter.numel() for parameter in build_model(config).parameters())
        flops = training_flops(config, length)
        total = flops.per_token * row["tokens"]
        hours = total / (A800_FLOPS_PER_SECOND * UTILISATION) / 3600
        rows.append(
            row | {"parameters": counted, "flops": total, "flops_by": flops.method, "gpu_hours": hours, "remark": ""}
        )
    return rows


def check_variants(experiment: Experiment, scale: Scale) -> dict[str, Variant]:
    """The variants that this machine can train; those that it cannot are left out only if others remain.

    Raises ValueError for a recipe that does not hold.
    """
    chosen = variants_of(experiment, scale)
    able = {}
    for name, one in chosen.items():
        model = variant_model(one, scale)
        try:
            check_trainable(model, "concatenate")
        except ValueError:
            if not one.is_benchmark:
                raise
            continue
        configure_model(model, budget_of(one, scale).vocab_size)
        able[name] = one
    return able


def check_sources(experiment: Experiment, sources: Sources) -> None:
    """Raise ValueError for a text or benchmark that is not there."""
    resolve_sources(sources.text)
    if experiment.reads_texts:
        if not sources.books:
            raise ValueError(
                f"{experiment.name} is also measured on books: name them with --books, or use --data FOLDER"
            )
        resolve_sources(sources.books)
    if experiment.name == "table1":
        from swat_lm.evaluate.tasks import load_tasks, task_names

        load_tasks(task_names(None), sources.tasks)


def open_plan(out: Path, scale: Scale, sources: Sources) -> dict[str, Any]:
    """What this folder holds: one scale on one text. Raises ValueError for another one, or a folder of other things."""
    path = out / "plan.json"
    wanted = {"scale": scale.name, "sources": json.loads(json.dumps(asdict(sources)))}
    if path.exists():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            before = {name: plan[name] for name in wanted}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: remove {out}, or name another folder for --out") from None
        # an experiment that needs no books may have come first
        compared = [{**one, "sources": {**one["sources"], "books": None}} for one in (before, wanted)]
        if compared[0] != compared[1]:
            raise ValueError(f"{out} holds another scale or text ({before}): name another folder for --out")
        return {**plan, **wanted}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no reproduction: name another folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    return wanted


def take_back(out: Path, was_there: bool) -> None:
    """Remove what was written into a folder that `open_plan` found empty, and the folder if it was made for that."""
    for one in out.iterdir():
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink()
    if not was_there:
        out.rmdir()


def planned_sources(plan: dict[str, Any]) -> Sources:
    """What the plan says of the texts."""
    held = plan["sources"]
    return Sources(tuple(held["text"]), tuple(held["books"]), held["tasks"], held["tokenizer"])


def prepare_texts(out: Path, plan: dict[str, Any], experiment: Experiment, scale: Scale, watcher: Watcher) -> None:
    """Everything that runs share: the share of the text, the tokenizer, the tokens; each only if it is not there."""
    sources = planned_sources(plan)
    if scale.text_bytes is not None and not (out / "text.jsonl").exists():
        sample_text(sources.text, scale.text_bytes, out / "text.jsonl", watcher)
    trained = out / "tokenizer"
    if find_tokenizer(out, sources, experiment, scale) == str(trained) and not trained.exists():
        texts = text_sources(out, sources, scale)
        train_tokenizer(
            texts, scale.analysis.vocab_size, trained,
            progress=lambda done, total: watcher.count("training the tokenizer", done, total),
        )  # fmt: skip
    recipe = first_recipe(out, experiment, scale)
    store = prepare(recipe.data, lambda at: watcher.count("the text", at.bytes_read, at.bytes_total))
    check_vocabulary(store, experiment, scale)
    keys = {"text": store.key}
    if experiment.reads_texts:
        # too little text is found here and not after training
        for text in FOLDERS:
            keys[text] = text_store(out, recipe, text, watcher).key
            evaluation_streams(out, recipe, scale, text, watcher)
    check_same_texts(out, "benchmarks" if experiment.name == "table1" else "analysis", keys)


def check_same_texts(out: Path, kind: str, keys: dict[str, str]) -> None:
    """Remember which texts the runs of a kind have; raises ValueError for others than before, since runs are compared.

    `keys` are those of the token stores: the names in `plan.json` stay the same when the files behind them change.
    """
    path = out / "texts.json"
    known = read_json(path) if path.exists() else {}
    before = known.get(kind, {})
    changed = [name for name, key in keys.items() if before.get(name, key) != key]
    if changed:
        raise ValueError(
            f"the files of the {' and the '.join(changed)} are not those that the runs in {out} were trained or "
            "measured on: bring the old ones back, or name another folder for --out"
        )
    if {**before, **keys} != before:
        write_whole(path, json.dumps({**known, kind: {**before, **keys}}, indent=1) + "\n")


def sample_text(sources: Sequence[str], wanted: int, path: Path, watcher: Watcher) -> None:
    """About so many bytes of the documents, every k-th one of each source, as one .jsonl."""
    found = resolve_sources(sources)
    total = sum(one.size for one in found)
    documents: list[str] = []
    read = 0
    for source in found:
        documents += [piece.text for piece in read_pieces(source, "text", None)]
        read += source.size
        watcher.count("reading the text", read, total)
    held = sum(len(one.encode()) for one in documents)
    step = max(1, held // wanted)
    write_whole(path, "".join(json.dumps({"text": one}) + "\n" for one in documents[::step]))


def find_tokenizer(out: Path, sources: Sources, experiment: Experiment, scale: Scale) -> str:
    """The one named, the paper's, or the one trained here."""
    budget = scale.benchmarks if experiment.name == "table1" else scale.analysis
    return sources.tokenizer or budget.tokenizer or str(out / "tokenizer")


def text_sources(out: Path, sources: Sources, scale: Scale) -> tuple[str, ...]:
    """What is trained on."""
    return sources.text if scale.text_bytes is None else (str(out / "text.jsonl"),)


def check_vocabulary(store: TokenStore, experiment: Experiment, scale: Scale) -> None:
    """Raise ValueError where a tokenizer of another size would make models of another size than the scale's."""
    budget = scale.benchmarks if experiment.name == "table1" else scale.analysis
    if store.vocab_size > budget.vocab_size:
        raise ValueError(
            f"the tokenizer has {store.vocab_size:,} ids, the scale {scale.name} counts on at most "
            f"{budget.vocab_size:,}: name a smaller one"
        )


def recipe_of(out: Path, job: str) -> tuple[Recipe, Experiment, Scale, Variant]:
    """The run behind `experiment:variant:seed`, as the plan in the folder says."""
    name, variant, seed = job.split(":")
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    experiment, scale = find_experiment(name), find_scale(plan["scale"])
    one = variants_of(experiment, scale)[variant]
    sources = planned_sources(plan)
    tokenizer = find_tokenizer(out, sources, experiment, scale)
    recipe = variant_recipe(one, scale, int(seed), out, text_sources(out, sources, scale), tokenizer)
    return recipe, experiment, scale, one


def first_recipe(out: Path, experiment: Experiment, scale: Scale) -> Recipe:
    """Any of the experiment's runs: all read the same tokens."""
    return recipe_of(out, f"{experiment.name}:{next(iter(variants_of(experiment, scale)))}:0")[0]


def text_store(out: Path, recipe: Recipe, text: str, watcher: Watcher) -> TokenStore:
    """The tokens of the text trained on and held out from, or of the books."""
    data = recipe.data
    if text == "books":
        plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        data = replace(data, sources=tuple(plan["sources"]["books"]), held_out=0.0)
    return prepare(data, lambda at: watcher.count(text, at.bytes_read, at.bytes_total))


def evaluation_streams(out: Path, recipe: Recipe, scale: Scale, text: str, watcher: Watcher) -> list[Any]:
    """Pieces of the greatest length of the held-out text or of the books; raises ValueError if there is none."""
    split = text_store(out, recipe, text, watcher).split("train" if text == "books" else "held_out")
    return segments([split[index] for index in range(len(split))], scale.lengths[-1], scale.pieces)


def is_done(out: Path, plan: dict[str, Any], job: str) -> bool:
    """Whether a run and all that the experiment measures of it are there."""
    recipe, experiment, scale, one = recipe_of(out, job)
    if read_divergence(Path(recipe.out)) is not None:
        return True
    return Path(recipe.out, "export", "config.json").exists() and not measure_variant(
        experiment, scale, one, recipe, None, plan["sources"]["tasks"]
    )


def do_jobs(out: Path, jobs: Sequence[str], of: int, watcher: Watcher) -> None:
    """Train and measure; on a CPU several at a time, each with few threads, which small models use best."""
    begun, finished = time.monotonic(), 0
    in_here = torch.cuda.is_available() or "RANK" in os.environ
    together = 1 if in_here else max(1, min(len(jobs), usable_cores()))
    for first in range(0, len(jobs), together):
        batch = list(jobs[first : first + together])
        left = (
            "" if not finished else f"; about {clock((time.monotonic() - begun) / finished * (len(jobs) - first))} left"
        )
        names = ", ".join(job.partition(":")[2].replace(":", " seed ") for job in batch)
        done = of - len(jobs) + first
        watcher.stage(f"runs {done + 1} to {done + len(batch)} of {of}: {names}{left}")
        if in_here:
            do_model(out, batch[0], watcher)
        else:
            threads = max(1, min(MOST_THREADS, usable_cores() // len(batch)))
            run_workers(out, batch, threads, watcher, WORKER)
        finished += len(batch)


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = max(1, round(seconds / 60))
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{minutes} minute{'' if minutes == 1 else 's'}"


def do_model(out: Path, name: str, watcher: Watcher) -> None:
    """Train the run `experiment:variant:seed` and measure what the experiment needs; what is there is kept.

    Raises InterruptedRunError if training was stopped, and saved.
    """
    recipe, experiment, scale, one = recipe_of(out, name)
    if not Path(recipe.out, "export", "config.json").exists():
        try:
            result = run(recipe, lambda event: watcher.event(recipe.name, event))
        except DivergedError as error:
            # what the paper says of some variants, and no reason to leave the others undone
            said = str(error)
            Engine(recipe.train).on_main(lambda: note_divergence(Path(recipe.out), said))
            return
        if result.interrupted:
            raise InterruptedRunError(f"stopped at step {result.last_step} of {recipe.train.steps}")
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))

    def streams(text: str) -> list[Any]:
        return evaluation_streams(out, recipe, scale, text, watcher)

    def measure() -> None:
        for step in measure_variant(experiment, scale, one, recipe, streams, plan["sources"]["tasks"]):
            step(lambda what, done, total: watcher.count(f"{recipe.name}: {what}", done, total))

    Engine(recipe.train).on_main(measure)

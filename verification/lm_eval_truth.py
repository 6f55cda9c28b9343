"""`swat-lm evaluate tasks` answers every item as the stock `lm_eval --model hf` does on the same weights.

Needs benchmarks' files and a checkpoint in both forms, so it runs only where it is named:

    python -m verification lm_eval_truth --data FOLDER --model OURS --hf THEIRS --limit 1000 --out FOLDER
"""

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swat_lm.files import discard, write_text
from verification.lm_eval_tasks import TASKS, local_name, write_task
from verification.workplace import REPOSITORY, CheckFailedError, Workplace, require

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")
SIDES = ("stock", "ours")
# a log-likelihood is a sum over tokens, in float32 on both sides
ABSOLUTE, RELATIVE = 1e-3, 1e-5


class Difference(NamedTuple):
    """What two runs of a task have apart, item by item."""

    documents: int
    requests: int
    largest: float
    """Of log-likelihoods, in nats."""
    median: float
    largest_share: float
    """Relative to the log-likelihood."""
    flipped: int
    """Items whose accuracy, or whose "is it greedy", differs; each is a tie within the tolerance."""


class Comparison(NamedTuple):
    """A task on both sides, the stock harness first."""

    difference: Difference
    metrics: dict[str, tuple[float, float]]
    seconds: tuple[int, int]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this check must be told."""
    group = parser.add_argument_group("lm_eval_truth")
    group.add_argument("--data", type=Path, help="folder of the benchmarks' files, as `evaluate tasks --data` reads it")
    group.add_argument("--model", type=Path, help="the checkpoint as a model folder of swat-lm (`swat-lm convert`)")
    group.add_argument("--hf", type=Path, help="the same weights as transformers has them, with their tokenizer")
    group.add_argument(
        "--limit", action="append", default=[], metavar="N or TASK=N", help="first documents of each task, or of one"
    )
    group.add_argument("--tasks", default=",".join(TASKS), help=f"with commas between, of {', '.join(TASKS)}")
    group.add_argument("--max-length", type=int, default=2048, help="tokens that a prediction may see, on both sides")
    group.add_argument("--out", type=Path, help="keep both sides' results there; a rerun takes up what is finished")


def check(place: Workplace, options: argparse.Namespace) -> dict[str, str]:
    """Run both sides, task by task, and compare; returns the versions."""
    for name in ("data", "model", "hf"):
        folder = getattr(options, name)
        require(folder is not None and folder.is_dir(), f"lm_eval_truth: --{name} must name a folder; got {folder}")
    names = options.tasks.split(",")
    require(set(names) <= set(TASKS), f"--tasks: expected of {', '.join(TASKS)}; got {options.tasks}")
    limits = limits_of(options.limit, names)
    out = place.folder if options.out is None else options.out.absolute()
    found = {name: compare_task(name, limits[name], options, out) for name in names}
    for name, comparison in found.items():
        place.done(sentence(name, comparison))
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def limits_of(given: Sequence[str], names: Sequence[str]) -> dict[str, int | None]:
    """Documents of each task; None: all. Raises CheckFailedError for what is no number, or a task that is not run."""
    limits: dict[str, int | None] = dict.fromkeys(names)
    # those that name a task count last
    for text in sorted(given, key=lambda text: "=" in text):
        name, _, number = text.rpartition("=")
        require(number.isdecimal() and int(number) > 0, f"--limit: expected N or TASK=N, got {text}")
        require(not name or name in limits, f"--limit: {name} is none of the tasks {', '.join(names)}")
        limits |= {name: int(number)} if name else dict.fromkeys(names, int(number))
    return limits


def compare_task(name: str, limit: int | None, options: argparse.Namespace, out: Path) -> Comparison:
    """Both sides' answers to a task, compared; raises CheckFailedError where they differ."""
    folders = {side: out / name / side for side in SIDES}
    write_task(name, options.data.absolute(), folders["stock"] / "task")
    commands = {
        "stock": stock_command(name, limit, options, folders["stock"]),
        "ours": our_command(name, limit, options, folders["ours"]),
    }
    seconds = [run_once(command, folders[side]) for side, command in commands.items()]
    samples = {side: read_samples(folder) for side, folder in folders.items()}
    difference = compare(name, samples["stock"], samples["ours"])
    values = [read_metrics(folders["stock"], local_name(name)), read_metrics(folders["ours"], name)]
    require(values[0].keys() == values[1].keys(), f"{name}: other metrics: {list(values[0])}, {list(values[1])}")
    metrics = {metric: (values[0][metric], values[1][metric]) for metric in values[0]}
    return Comparison(difference, metrics, (seconds[0], seconds[1]))


def stock_command(name: str, limit: int | None, options: argparse.Namespace, folder: Path) -> list[str]:
    """The harness as its users run it."""
    model = f"pretrained={options.hf.absolute()},dtype=float32,max_length={options.max_length}"
    # of a whole text each window's logits are held at once
    batch = "1" if name == "wikitext" else "16"
    return [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--device", "cpu",
        "--tasks", local_name(name), "--include_path", str(folder / "task"), "--batch_size", batch, "--log_samples",
        "--output_path", str(folder / "results"), *limited(limit),
    ]  # fmt: skip


def our_command(name: str, limit: int | None, options: argparse.Namespace, folder: Path) -> list[str]:
    """Ours."""
    return [
        sys.executable, "-m", "swat_lm.cli", "evaluate", "tasks", f"swat={options.model.absolute()}", "--tasks", name,
        "--data", str(options.data.absolute()), "--max-length", str(options.max_length), "--device", "cpu",
        "--log-samples", "--out", str(folder / "results"), *limited(limit),
    ]  # fmt: skip


def limited(limit: int | None) -> list[str]:
    """Both sides call it the same."""
    return [] if limit is None else ["--limit", str(limit)]


def run_once(command: list[str], folder: Path) -> int:
    """Run a command whose output goes to the folder, unless it has been done there; returns the seconds that it took.

    Results of another command, such as one with another limit, are removed first; those of this one are taken up.

    Raises:
        CheckFailedError: with the end of what it said.
    """
    done, begun, log = folder / "done.json", folder / "begun.json", folder / "log.txt"
    if done.exists() and (kept := json.loads(done.read_text(encoding="utf-8")))["command"] == command:
        return kept["seconds"]
    if not begun.exists() or json.loads(begun.read_text(encoding="utf-8")) != command:
        for old in (folder / "results", done):
            discard(old)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(begun, json.dumps(command))
    began = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    with log.open("w", encoding="utf-8") as stream:
        ran = subprocess.run(command, cwd=folder, env=environment, stdout=stream, stderr=stream, check=False)
    if ran.returncode:
        said = log.read_text(encoding="utf-8")[-2000:]
        raise CheckFailedError(f"{' '.join(command[1:5])}: exit code {ran.returncode}\n{said}")
    seconds = round(time.monotonic() - began)
    write_text(done, json.dumps({"command": command, "seconds": seconds}))
    return seconds


def newest(folder: Path, pattern: str) -> Path:
    """The last written file of a kind."""
    found = sorted((folder / "results").rglob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckFailedError(f"{folder / 'results'} holds no {pattern}")
    return found[-1]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """A side's samples by number of the document."""
    lines = newest(folder, "samples_*.jsonl").read_text(encoding="utf-8").split("\n")
    return sorted((json.loads(line) for line in lines if line), key=lambda sample: sample["doc_id"])


def read_metrics(folder: Path, task: str) -> dict[str, float]:
    """A side's metrics over all documents."""
    results = json.loads(newest(folder, "results*.json").read_text(encoding="utf-8"))["results"][task]
    return {key.removesuffix(",none"): value for key, value in results.items()
            if key.endswith(",none") and "stderr" not in key}  # fmt: skip


def compare(name: str, stock: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> Difference:
    """Item by item: the same requests, log-likelihoods but for rounding, and the same metrics but for ties.

    Raises:
        CheckFailedError: with the first item that differs.
    """
    require(len(stock) == len(ours) > 0, f"{name}: {len(stock)} documents in the harness, {len(ours)} in ours")
    gaps: list[tuple[float, float]] = []
    flipped = 0
    for theirs, own in zip(stock, ours, strict=True):
        where = f"{name}, document {theirs['doc_id']}"
        for key in ("doc_id", "arguments", "target"):
            require(theirs[key] == own[key], f"{where}: {key} is {theirs[key]!r} in the harness, {own[key]!r} in ours")
        pairs = list(zip(answers(theirs), answers(own), strict=True))
        for (expected, _), (value, _) in pairs:
            require(close(value, expected), f"{where}: log-likelihood {expected} in the harness, {value} in ours")
            gaps.append((abs(value - expected), abs(value - expected) / max(1.0, abs(expected))))
        flags = [(first[1], second[1]) for first, second in pairs]
        if scores(theirs) != scores(own) or any(first != second for first, second in flags):
            require(is_tie(theirs), f"{where}: {scores(theirs)} in the harness, {scores(own)} in ours, and no tie")
            flipped += 1
    sizes = [gap for gap, _ in gaps]
    return Difference(
        len(stock), len(gaps), max(sizes), statistics.median(sizes), max(share for _, share in gaps), flipped
    )


def answers(sample: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Each request's log-likelihood, and whether the model would write just that ("" for whole texts)."""
    for response in sample["filtered_resps"]:
        value, greedy = response if isinstance(response, list) else (response, "")
        yield float(value), greedy


def scores(sample: dict[str, Any]) -> dict[str, Any]:
    """The accuracies of an item."""
    return {metric: sample[metric] for metric in sample["metrics"] if metric.startswith("acc")}


def close(value: float, expected: float) -> bool:
    """Whether two log-likelihoods are one but for rounding."""
    return math.isclose(value, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def is_tie(sample: dict[str, Any]) -> bool:
    """Whether two choices are so close that rounding decides, as they are or by length."""
    values = [value for value, _ in answers(sample)]
    texts = [request["arg_1"] for request in sample["arguments"].values()]
    by_length = [value / len(text.lstrip()) for value, text in zip(values, texts, strict=True)]
    return any(
        close(second, first)
        for ranked in (sorted(values), sorted(by_length))
        for first, second in zip(ranked[-2:-1], ranked[-1:], strict=True)
    )


def sentence(name: str, comparison: Comparison) -> str:
    """A task's line in the record."""
    difference, metrics, seconds = comparison
    values = "; ".join(f"{metric} {first:.6g} and {second:.6g}" for metric, (first, second) in metrics.items())
    ties = f", {difference.flipped} of them decided by a tie" if difference.flipped else ""
    accuracies = f"; accuracies equal item by item{ties}" if "acc" in metrics else ""
    return (
        f"{name}: {difference.documents:,} documents, {difference.requests:,} requests, the same prompts; "
        f"log-likelihoods differ by at most {difference.largest:.1e} (median {difference.median:.1e}, "
        f"relative {difference.largest_share:.1e}){accuracies}; "
        f"stock and ours: {values}; {seconds[0]:,} and {seconds[1]:,} s"
    )

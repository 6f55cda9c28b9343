"""Runs lm-evaluation-harness's tasks for one checkpoint: each result is kept when it is there, and not measured twice.

A kept result belongs to one checkpoint, tokenizer, set of documents and choice of options; another one is an error.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

from swat_lm.evaluate.figures import perplexity, read_figures, write_figures
from swat_lm.evaluate.tasks import LoadedTask
from swat_lm.files import write_text

if TYPE_CHECKING:
    from swat_lm.evaluate.harness import HarnessModel

__all__ = ["Subject", "Suite", "TaskResult", "weights_fingerprint"]

RESAMPLES = 1000
"""Draws of the harness's bootstrap for errors of perplexities; accuracies have theirs in closed form."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
NO_FILTER = "none"
"""The harness's name for answers taken as they are."""
HARNESS_SECTIONS = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class Subject:
    """What is measured, as far as it decides the results."""

    label: str
    """Its name in tables and its folder's."""
    checkpoint: str
    """See `weights_fingerprint`."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    max_length: int | None
    """As given to `HarnessModel`."""
    limit: int | None
    """Documents per task; None: all."""


@dataclass(frozen=True)
class TaskResult:
    """One task's result for one checkpoint, as it is kept."""

    task: str
    identity: dict[str, Any]
    source: str
    """Where the documents are from."""
    remark: str | None
    rolling: str
    window_length: int
    """Tokens of a window where whole texts are scored in windows."""
    seconds: float
    chance: float | None
    """Expected accuracy of guessing; None where there are no choices."""
    harness: dict[str, Any]
    """The harness's own results, a JSON object."""
    documents: dict[str, list[Any]]
    """Each metric of each document, in order, to compare models in pairs."""

    def value(self, metric: str) -> tuple[float, float | None] | None:
        """A metric and its standard error; None for a metric that the task does not have.

        Where the harness filters a model's words in several ways, a metric is called `metric,filter`.
        """
        found = self.harness["results"][self.task]
        name, _, kind = metric.partition(",")
        key = f"{name},{kind or NO_FILTER}"
        if key not in found:
            return None
        error = found.get(f"{name}_stderr,{kind or NO_FILTER}")
        if metric == "word_perplexity" and not isinstance(error, float):
            error = perplexity_error(self.documents[metric])
        value = float(found[key])
        # of an infinite value, or one of which some resamples are, no error can be told
        return value, error if isinstance(error, float) and math.isfinite(error) and math.isfinite(value) else None

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        names = (name for name in self.harness["results"][self.task] if "," in name and "_stderr," not in name)
        return [name.removesuffix(f",{NO_FILTER}") for name in names]


class Suite:
    """The results of one checkpoint, in a folder of its own below `folder` (None: kept nowhere).

    With `log_samples` each task also leaves `samples_TASK.jsonl` there: every document with its requests, the model's
    answers and its metrics, a row each, in the form that the harness's `--log_samples` has.
    """

    def __init__(
        self, subject: Subject, tasks: Sequence[LoadedTask], folder: Path | None, *, log_samples: bool = False
    ) -> None:
        """Reads what is there already; a result without the samples that are asked for is missing.

        Raises:
            ValueError: a kept result that belongs to another measurement, a damaged file, or samples without a folder.
        """
        if log_samples and folder is None:
            raise ValueError("log_samples: expected a folder to write the samples to, got none")
        self.subject, self.tasks, self.log_samples = subject, list(tasks), log_samples
        self.folder = None if folder is None else folder / subject.label
        self.results: dict[str, TaskResult] = {}
        for task in self.tasks:
            if self.folder is not None and (self.folder / f"{task.name}.json").exists():
                kept = self._read(task, self.folder / f"{task.name}.json")
                if not log_samples or samples_file(self.folder, task.name).exists():
                    self.results[task.name] = kept

    @property
    def missing(self) -> list[LoadedTask]:
        """Tasks without a result."""
        return [task for task in self.tasks if task.name not in self.results]

    def run(
        self, model: "HarnessModel", on_progress: Callable[[str, int, int], None] | None = None
    ) -> Iterator[TaskResult]:
        """Measure what is missing, keeping and yielding each result; then write the harness's JSON.

        `on_progress` is called with the task's name, tokens read and tokens in all.
        """
        if self.folder is not None:
            # before any work, so that a place that cannot be written costs none
            self.folder.mkdir(parents=True, exist_ok=True)
        for task in self.missing:
            model.on_progress = None if on_progress is None else partial(on_progress, task.name)
            result, samples = measure(model, task, self.subject, self._identity(task))
            self.results[task.name] = result
            if self.folder is not None:
                # before the result, which says that the task is done
                place = samples_file(self.folder, task.name)
                if self.log_samples:
                    write_text(place, "".join(map(sample_line, samples)))
                else:
                    # those of an earlier result would be taken for this one's
                    place.unlink(missing_ok=True)
                write_text(self.folder / f"{task.name}.json", write_figures(asdict(result)) + "\n")
            yield result
        if self.folder is not None:
            write_text(self.folder / "results.json", write_figures(self.harness_json()) + "\n")

    def harness_json(self) -> dict[str, Any]:
        """All results in the form of the harness's own results file."""
        found = [self.results[task.name].harness for task in self.tasks if task.name in self.results]
        merged: dict[str, Any] = {
            section: {name: value for harness in found for name, value in harness.get(section, {}).items()}
            for section in HARNESS_SECTIONS
        }
        config = {"model": self.subject.label, "limit": self.subject.limit, "bootstrap_iters": RESAMPLES}
        return merged | {"config": config, "lm_eval_version": harness_version()}

    def _identity(self, task: LoadedTask) -> dict[str, Any]:
        subject = {name: value for name, value in asdict(self.subject).items() if name != "label"}
        return subject | {"documents": task.fingerprint, "lm_eval": harness_version()}

    def _read(self, task: LoadedTask, path: Path) -> TaskResult:
        try:
            result = TaskResult(**read_figures(path.read_text(encoding="utf-8")))
            result.harness["results"][task.name]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a result of this command ({error}): remove it") from None
        for name, value in self._identity(task).items():
            if result.identity.get(name) != value:
                raise ValueError(
                    f"{path} holds another measurement: {name} is {short(result.identity.get(name))} there, "
                    f"{short(value)} now; remove the file, or name another folder with --out"
                )
        return result


def measure(
    model: "HarnessModel", task: LoadedTask, subject: Subject, identity: Mapping[str, Any]
) -> tuple[TaskResult, list[dict[str, Any]]]:
    """Ask the model everything that the task asks, by the harness's evaluation; returns its samples too."""
    import lm_eval

    model.rolling = "whole" if task.rolling == "whole" else "windows"
    began = time.monotonic()
    inner = task.task.task_name
    with patched_harness():
        # its decorator hides its parameters from type checkers
        found = cast(Any, lm_eval.evaluate)(
            lm=model,
            task_dict={"tasks": {inner: task.task}},
            limit=subject.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=True,
        )
    samples = found["samples"][inner]
    choices = [len(sample["arguments"]) for sample in samples]
    is_choice = task.task.OUTPUT_TYPE == "multiple_choice"
    result = TaskResult(
        task=task.name,
        identity=dict(identity),
        source=task.source,
        remark=task.remark,
        rolling=task.rolling,
        window_length=model.window_length,
        seconds=round(time.monotonic() - began, 2),
        chance=math.fsum(1 / count for count in choices) / len(choices) if is_choice else None,
        # a streamed task goes by its own name
        harness={
            section: {task.name: found[section][inner]} for section in HARNESS_SECTIONS if inner in found[section]
        },
        documents=by_document(samples),
    )
    return result, samples


def samples_file(folder: Path, task: str) -> Path:
    """Where a task's samples are; the harness's name without its date."""
    return folder / f"samples_{task}.jsonl"


def sample_line(sample: Mapping[str, Any]) -> str:
    """A document with its requests, answers and metrics as the harness writes it: answers are texts."""
    from lm_eval.utils import handle_non_serializable, sanitize_list

    changed = {
        "arguments": {
            f"gen_args_{number}": {f"arg_{place}": value for place, value in enumerate(request)}
            for number, request in enumerate(sample["arguments"])
        },
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "target": str(sample["target"]),
    }
    # numpy's numbers stay numbers
    plain = json.loads(json.dumps({**sample, **changed}, default=handle_non_serializable))
    return write_figures(plain, indent=None) + "\n"


def by_document(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Each metric of each document, in order; under `metric,filter` where there is more than the plain one."""
    found: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == NO_FILTER else f"{metric},{sample['filter']}"
            found.setdefault(name, []).append(sample[metric])
    return found


@contextlib.contextmanager
def patched_harness() -> Iterator[None]:
    """The harness quiet, and its perplexities infinite where they are beyond any float; its own end with an error.

    Without its words on stdout, where results go, its bars, and its processes for a second of resampling. Some of its
    bars are switched on whatever TQDM_DISABLE says; ours is drawn by another library.
    """
    from lm_eval.api import metrics
    from tqdm import tqdm

    draw, spread = tqdm.__init__, metrics.sample_stddev

    def disabled(bar: Any, *arguments: Any, **options: Any) -> None:
        draw(bar, *arguments, **{**options, "disable": True})

    def sample_stddev(values: Sequence[float]) -> float:
        try:
            return spread(values)
        except OverflowError:
            return math.inf

    mathematics = SimpleNamespace(**{**vars(math), "exp": perplexity})
    with (
        patch.dict(os.environ, DISABLE_MULTIPROC="1"),
        patch.object(tqdm, "__init__", disabled),
        patch.multiple(metrics, math=mathematics, sample_stddev=sample_stddev),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def perplexity_error(documents: Sequence[Sequence[float]]) -> float | None:
    """Standard error of exp(-sum of log-likelihoods / sum of words) over documents, which the harness does not give.

    That of a ratio of sums, times the perplexity (delta method). None for fewer than two documents.
    """
    count, words = len(documents), math.fsum(weight for _, weight in documents)
    if count < 2:
        return None
    rate = -math.fsum(value for value, _ in documents) / words
    spread = math.fsum((-value - rate * weight) ** 2 for value, weight in documents)
    return perplexity(rate) * math.sqrt(count / (count - 1) * spread) / words


def weights_fingerprint(folder: str) -> str:
    """Changes with a checkpoint's configuration or weights: from the files of a folder, or a hub name's commit.

    Raises:
        ValueError: a folder without weights, or a hub name that is not known.
    """
    path = Path(folder)
    if not path.exists():
        return hub_fingerprint(folder)
    files = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise ValueError(f"{folder} holds no weights: expected model.safetensors or its parts")
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def hub_fingerprint(name: str) -> str:
    """A hub name with its commit."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"no folder {name}, and the hub gave no model of that name: {reason}") from error
    return f"hub:{name}@{getattr(config, '_commit_hash', None)}"


def harness_version() -> str:
    """Of the installed lm-evaluation-harness."""
    return importlib.metadata.version("lm_eval")


def short(value: object) -> str:
    """A value for a message: hashes cut, None as all or none."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."

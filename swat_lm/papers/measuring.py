"""What can be measured of a trained run: every measurement is a file, and one that is there is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.figures import read_figures
from swat_lm.evaluate.suite import Subject, Suite, TaskResult, weights_fingerprint
from swat_lm.files import write_text
from swat_lm.model.loading import load_causal_lm
from swat_lm.papers.experiment import Measurement, Progress, Run

__all__ = [
    "missing_losses",
    "missing_tasks",
    "note_divergence",
    "parsed",
    "read_curve",
    "read_divergence",
    "read_json",
    "read_tasks",
]

FEWEST_SEEN = 1024


def parsed(
    path: Path, read: Callable[[str], Any], *, said: str = "{path} is damaged ({error}): remove it and measure again"
) -> Any:
    """What `read` makes of a file's text; raises ValueError that names the file and says what to do."""
    try:
        return read(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(said.format(path=path, error=error)) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises ValueError that names it."""
    return parsed(path, read_figures)


def note_divergence(run: Path, said: str) -> None:
    """Keep that a run's loss stopped being a number, so that it is not tried again."""
    write_text(run / "diverged.json", json.dumps({"said": said}) + "\n")


def read_divergence(run: Path) -> str | None:
    """What was said of a run that diverged; None for any other."""
    path = run / "diverged.json"
    return parsed(path, lambda text: str(json.loads(text)["said"])) if path.exists() else None


def curve_path(run: Path, text: str, window: int | None, num_sinks: int = 0) -> Path:
    """Where the losses of a run on a text behind a window, with sinks kept or none, lie."""
    sinks = f"-sinks-{num_sinks}" if num_sinks else ""
    return run / "evaluation" / f"{text}-{'own-window' if window is None else f'window-{window}'}{sinks}.json"


def read_curve(run: Path, text: str, window: int | None, num_sinks: int = 0) -> LengthCurve | None:
    """What was measured, if it was."""
    path = curve_path(run, text, window, num_sinks)
    return parsed(path, LengthCurve.from_json) if path.exists() else None


def missing_losses(run: Run, text: str, window: int | None, num_sinks: int = 0) -> list[Measurement]:
    """Loss of the same text at every length, behind a window (None: the model's own); nothing if it is there."""
    path = curve_path(run.folder, text, window, num_sinks)

    def measure(told: Progress) -> None:
        from swat_lm.evaluate.length import loss_on_same_text

        what = f"{text} at all lengths" + ("" if window is None else f", window {window:,}")
        curve = loss_on_same_text(
            load_causal_lm(str(run.folder)),
            run.streams(text),
            run.scale.lengths,
            window=window,
            num_sinks=num_sinks,
            on_progress=lambda done, total: told(what, done, total),
        )
        curve.save(path)

    return [] if path.exists() else [measure]


def task_folder(run: Path, label: str) -> Path:
    """Where the harness's results of a run lie."""
    return run / "evaluation" / "tasks" / label


def missing_tasks(run: Run, length: int) -> list[Measurement]:
    """The benchmarks through lm-evaluation-harness, if not all are there; an interruption loses one task at most.

    `length` is how many tokens a prediction may see, equal for all models; never fewer than the longest answers need.
    """

    def measure(told: Progress) -> None:
        from swat_lm.data import load_tokenizer
        from swat_lm.data.tokenizer import tokenizer_facts
        from swat_lm.evaluate.harness import HarnessModel
        from swat_lm.evaluate.tasks import load_tasks, task_names

        export, seen = str(run.folder / "export"), max(FEWEST_SEEN, length)
        tokenizer = load_tokenizer(export)
        subject = Subject(
            run.recipe.name, weights_fingerprint(export), tokenizer_facts(tokenizer).fingerprint, seen,
            run.scale.task_limit,
        )  # fmt: skip
        suite = Suite(subject, load_tasks(task_names(None), run.tasks), run.folder / "evaluation" / "tasks")
        for _ in suite.run(HarnessModel(load_causal_lm(str(run.folder)), tokenizer, max_length=seen), told):
            pass

    return [] if (task_folder(run.folder, run.recipe.name) / "results.json").exists() else [measure]


def read_tasks(run: Path, label: str) -> dict[str, Any]:
    """The finished tasks of a run, by name."""
    found = {}
    for path in sorted(task_folder(run, label).glob("*.json")):
        if path.name != "results.json":
            result = parsed(path, lambda text: TaskResult(**read_figures(text)))
            found[result.task] = result
    return found

"""What each experiment measures of a trained variant; every measurement is a file, and one that is there is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from swat_lm.data import load_tokenizer
from swat_lm.data.tokenizer import tokenizer_facts
from swat_lm.evaluate.curves import LengthCurve, write_whole
from swat_lm.evaluate.figures import read_figures, write_figures
from swat_lm.evaluate.length import loss_on_same_text
from swat_lm.evaluate.reader import evaluating
from swat_lm.model.architectures import build_model
from swat_lm.model.loading import load_causal_lm
from swat_lm.papers.scales import Scale
from swat_lm.papers.variants import Experiment, Variant
from swat_lm.recipe import Recipe

__all__ = [
    "SINKS",
    "curve_path",
    "measure_variant",
    "note_divergence",
    "read_curve",
    "read_divergence",
    "read_json",
    "read_tasks",
    "read_variances",
    "task_folder",
    "windows_of",
]

FEWEST_SEEN = 1024
SINKS = 4
"""First tokens kept in Figure 2's control, as in StreamingLLM."""
Progress = Callable[[str, int, int], None]
Measurement = Callable[[Progress], None]
Streams = Callable[[str], list[Any]]


def measure_variant(
    experiment: Experiment, scale: Scale, one: Variant, recipe: Recipe, streams: Streams | None, tasks: str
) -> list[Measurement]:
    """The measurements still missing for an experiment, each to be called with a listener to its progress."""
    left: list[Measurement] = []
    run = Path(recipe.out)
    if experiment.reads_texts:
        texts = ("text",) if experiment.name == "figure2" else ("text", "books")
        for text in texts:
            for window in windows_of(experiment, scale, one):
                path = curve_path(run, text, window)
                if not path.exists():
                    left.append(length_measurement(path, run, text, window, scale, streams))
    if experiment.name == "figure2":
        path = curve_path(run, "text", scale.sizes["W"], SINKS)
        if not path.exists():
            left.append(length_measurement(path, run, "text", scale.sizes["W"], scale, streams, SINKS))
    if experiment.name == "figure3" and read_variances(run) is None:
        left.append(variance_measurement(run, one, scale, recipe))
    if experiment.name == "table1" and not (task_folder(run, recipe.name) / "results.json").exists():
        left.append(task_measurement(run, recipe, scale, tasks))
    return left


def windows_of(experiment: Experiment, scale: Scale, one: Variant) -> list[int | None]:
    """Windows of evaluation: None is the model's own."""
    if experiment.name == "figure2":
        return [*sorted({scale.sizes[name] for name in ("W", "4W", "L", "XL")})]
    return [None if one.evaluated is None else scale.sizes[one.evaluated]]


def curve_path(run: Path, text: str, window: int | None, num_sinks: int = 0) -> Path:
    """Where the losses of a run on a text behind a window, with sinks kept or none, lie."""
    sinks = f"-sinks-{num_sinks}" if num_sinks else ""
    return run / "evaluation" / f"{text}-{'own-window' if window is None else f'window-{window}'}{sinks}.json"


def read_curve(run: Path, text: str, window: int | None, num_sinks: int = 0) -> LengthCurve | None:
    """What was measured, if it was."""
    path = curve_path(run, text, window, num_sinks)
    return parsed(path, LengthCurve.from_json) if path.exists() else None


def parsed(path: Path, read: Callable[[str], Any]) -> Any:
    """What `read` makes of a file's text; raises ValueError that names the file and says what to do."""
    try:
        return read(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the same command measures it again") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises ValueError that names it."""
    return parsed(path, read_figures)


def note_divergence(run: Path, said: str) -> None:
    """Keep that a run's loss stopped being a number, so that it is not tried again."""
    write_whole(run / "diverged.json", json.dumps({"said": said}) + "\n")


def read_divergence(run: Path) -> str | None:
    """What was said of a run that diverged; None for any other."""
    path = run / "diverged.json"
    return parsed(path, lambda text: str(json.loads(text)["said"])) if path.exists() else None


def length_measurement(
    path: Path, run: Path, text: str, window: int | None, scale: Scale, streams: Streams | None, num_sinks: int = 0
) -> Measurement:
    """Loss of the same text at every length."""

    def measure(told: Progress) -> None:
        assert streams is not None
        what = f"{text} at all lengths" + ("" if window is None else f", window {window:,}")
        curve = loss_on_same_text(
            load_causal_lm(str(run)),
            streams(text),
            scale.lengths,
            window=window,
            num_sinks=num_sinks,
            on_progress=lambda done, total: told(what, done, total),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        curve.save(path)

    return measure


def variance_path(run: Path) -> Path:
    """Where the variances of hidden states lie."""
    return run / "evaluation" / "variances.json"


def read_variances(run: Path) -> dict[str, Any] | None:
    """What was measured, if it was; not what an earlier version measured without an untrained twin."""
    path = variance_path(run)
    found = read_json(path) if path.exists() else None
    return found if found is not None and "untrained_first_over_rest" in found else None


def variance_measurement(run: Path, one: Variant, scale: Scale, recipe: Recipe) -> Measurement:
    """Variance over channels of each layer's hidden state, at the first positions of rows of the training length.

    Figure 3: a token that gathers attention it does not need (a sink) has by far the largest. The first token differs
    also without any training, since it alone sees nothing but itself; so the same is measured of the run's first
    weights.
    """

    def measure(told: Progress) -> None:
        from swat_lm.data import BatchSource, prepare

        model = load_causal_lm(str(run))
        torch.manual_seed(recipe.seed)
        untrained: Any = build_model(model.config)
        length = scale.sizes["L"]
        source = BatchSource(prepare(recipe.data), "held_out", length, "concatenate", 0, batch_size=scale.pieces)
        tokens = next(source.pass_over(num_batches=1)).input_ids.to(model.device)
        variances = state_variances(model, tokens)
        told("variances of hidden states", 1, 1)
        path = variance_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            path,
            write_figures(
                {
                    "mean": np.round(variances.mean(axis=1), 6).tolist(),
                    "first_over_rest": first_over_rest(variances),
                    "untrained_first_over_rest": first_over_rest(state_variances(untrained.to(model.device), tokens)),
                }
            ),
        )

    return measure


def state_variances(model: PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    """[layers, rows, positions]: the embedding and all layers but the last, which comes behind the final norm."""
    with torch.inference_mode(), evaluating(model):
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([layer.float().var(dim=-1) for layer in states[:-1]]).cpu().numpy()


def first_over_rest(variances: np.ndarray) -> list[float]:
    """Of each row the largest over layers of the first token's variance over the median of the later ones."""
    return (variances[1:, :, 0] / np.median(variances[1:, :, 1:], axis=2)).max(axis=0).tolist()


def task_folder(run: Path, label: str) -> Path:
    """Where the harness's results of a run lie."""
    return run / "evaluation" / "tasks" / label


def task_measurement(run: Path, recipe: Recipe, scale: Scale, tasks: str) -> Measurement:
    """The benchmarks of Table 1 through lm-evaluation-harness; an interruption loses one task at most."""

    def measure(told: Progress) -> None:
        from swat_lm.evaluate.harness import HarnessModel

        suite = open_suite(run, recipe, scale, tasks)
        model = HarnessModel(
            load_causal_lm(str(run)), load_tokenizer(str(run / "export")), max_length=seen_by_tasks(scale)
        )
        for _ in suite.run(model, told):
            pass

    return measure


def seen_by_tasks(scale: Scale) -> int:
    """Tokens a prediction of a benchmark may see, equal for all models; the longest answers need several hundred."""
    return max(FEWEST_SEEN, scale.sizes["BL"])


def open_suite(run: Path, recipe: Recipe, scale: Scale, tasks: str) -> Any:
    """The benchmarks of one run with what is known of them."""
    from swat_lm.evaluate.suite import Subject, Suite, weights_fingerprint
    from swat_lm.evaluate.tasks import load_tasks, task_names

    export = str(run / "export")
    facts = tokenizer_facts(load_tokenizer(export))
    subject = Subject(
        recipe.name, weights_fingerprint(export), facts.fingerprint, seen_by_tasks(scale), scale.task_limit
    )
    return Suite(subject, load_tasks(task_names(None), tasks), run / "evaluation" / "tasks")


def read_tasks(run: Path, label: str) -> dict[str, Any]:
    """The finished tasks of a run, by name."""
    from swat_lm.evaluate.suite import TaskResult

    found = {}
    for path in sorted(task_folder(run, label).glob("*.json")):
        if path.name != "results.json":
            result = parsed(path, lambda text: TaskResult(**read_figures(text)))
            found[result.task] = result
    return found

"""Numbers of a run: always `metrics.jsonl`, on request TensorBoard, Weights & Biases or trackio as well."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from swat_lm.files import write_text
from swat_lm.recipe import Recipe, dump_recipe

__all__ = ["MetricsFile", "MetricsWriter", "check_loggers", "open_writers", "read_metrics"]


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, each step at most once, also over interruptions.

    Opening it for a run that continues from `resumed_step` removes the lines of later steps, which that run writes
    again. The file is replaced as a whole, so a crash in between loses nothing.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        if path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= resumed_step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        # unbuffered, so that a killed process loses nothing and a full disk is noticed here, not on closing
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; raises OSError."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, f"cannot write to {self._file.name}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises ValueError for any other line that is not a JSON object with a step.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines) or line.endswith("\n"):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a whole-number step, got {line[:60]!r}"
            )
    return records


class TensorBoardWriter:
    """Event files in `OUT/tensorboard`; show them with `tensorboard --logdir OUT/tensorboard`."""

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # events of later steps, written before a crash, are hidden by the purge
        self._writer = SummaryWriter(
            str(Path(recipe.out, "tensorboard")), purge_step=resumed_step + 1 if resumed_step else None
        )
        if not resumed_step:
            self._writer.add_text("recipe", f"```yaml\n{dump_recipe(recipe)}```")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class TrackedRun:
    """A run at Weights & Biases or trackio, which share `init`, `log` and `finish`; the run is the recipe's name."""

    def __init__(self, module: ModuleType, recipe: Recipe, **options: Any) -> None:
        self._module = module
        module.init(
            project="swat-lm", name=recipe.name, config={"recipe": dump_recipe(recipe)}, resume="allow", **options
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers at this step."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._module.finish()


MetricsWriter = MetricsFile | TensorBoardWriter | TrackedRun
"""A place that takes one record of numbers per logged step."""


def check_loggers(names: Iterable[str]) -> None:
    """Raise ValueError naming the package to install for a logger that is not there."""
    for name in names:
        import_logger(name)


def open_writers(recipe: Recipe, resumed_step: int) -> list[MetricsWriter]:
    """The file and the loggers the recipe names; call it on the main process only. Raises as `check_loggers`."""
    writers: list[MetricsWriter] = []
    for name in dict.fromkeys(recipe.train.loggers):
        module = import_logger(name)
        if name == "tensorboard":
            writers.append(TensorBoardWriter(recipe, resumed_step))
        elif name == "wandb":
            identity = "".join(c if c.isalnum() or c in "-_" else "-" for c in recipe.name)
            writers.append(TrackedRun(module, recipe, id=identity, dir=recipe.out))
        else:
            writers.append(TrackedRun(module, recipe))
    # made last, so that a missing package leaves the old file as it was
    return [MetricsFile(Path(recipe.out, "metrics.jsonl"), resumed_step), *writers]


def import_logger(name: str) -> ModuleType:
    """Import a logger's package; all of them are named as their module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"train.loggers names {name}, which cannot be imported ({error}): `pip install {name}`, or take it out"
        ) from None

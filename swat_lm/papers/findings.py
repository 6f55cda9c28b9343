"""What the finished runs of an experiment found, read from their files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.standard_errors import pooled
from swat_lm.papers.measuring import read_curve, read_divergence, read_tasks
from swat_lm.papers.scales import Scale
from swat_lm.recipe import Recipe

if TYPE_CHECKING:
    from swat_lm.papers.experiment import Experiment

__all__ = ["Findings", "recent_loss"]

# in place of a window, where None is one
EVALUATED = "evaluated"


class Findings:
    """The results of one experiment at one scale, over seeds."""

    def __init__(
        self, experiment: "Experiment", scale: Scale, chosen: Mapping[str, Any], seeds: Sequence[int], out: Path
    ) -> None:
        self.experiment, self.scale, self.chosen, self.seeds, self.out = experiment, scale, chosen, list(seeds), out
        self._documents: dict[str, str] = {}
        self._curves: dict[tuple[Any, ...], LengthCurve | None] = {}

    def run_folder(self, variant: Any, seed: int) -> Path:
        """Where a run lies."""
        return self.out / "runs" / f"{variant.name}-seed{seed}"

    def recipe(self, variant: Any) -> Recipe:
        """How a variant was trained; of any seed, on any text."""
        return self.experiment.recipe(variant, self.scale, 0, self.out, ("text",), "bytes")

    def window(self, variant: Any) -> int | None:
        """Window in tokens that a variant is evaluated with; None: as trained."""
        return self.experiment.window(variant, self.scale)

    def finished(self, variant: Any) -> list[int]:
        """The seeds whose runs did not diverge."""
        return [seed for seed in self.seeds if read_divergence(self.run_folder(variant, seed)) is None]

    def diverged(self) -> list[str]:
        """A sentence for each run whose loss stopped being a number."""
        said = {
            f"{variant.label}, seed {seed}": read_divergence(self.run_folder(variant, seed))
            for variant in self.chosen.values()
            for seed in self.seeds
        }
        return [f"{name}: {sentence}" for name, sentence in said.items() if sentence is not None]

    def curve(self, variant: Any, seed: int, text: str, window: int | None, num_sinks: int = 0) -> LengthCurve | None:
        """What was measured of a run on a text, read once."""
        key = (variant.name, seed, text, window, num_sinks)
        if key not in self._curves:
            self._curves[key] = read_curve(self.run_folder(variant, seed), text, window, num_sinks)
        return self._curves[key]

    def losses(
        self, variant: Any, text: str, length: int, window: int | None, num_sinks: int = 0
    ) -> dict[int, list[float]]:
        """Per seed, the loss of each document at a length."""
        found = {}
        for seed in self.seeds:
            curve = self.curve(variant, seed, text, window, num_sinks)
            if curve is not None:
                at = curve.lengths.index(length)
                found[seed] = [row[at] for row in curve.document_mean_loss if row[at] is not None]
        return found

    def mean_loss(
        self, variant: Any, text: str, length: int, window: int | str | None = EVALUATED
    ) -> tuple[float | None, float | None]:
        """Mean over documents and seeds and its standard error."""
        chosen = self.window(variant) if window == EVALUATED else window
        found = self.losses(variant, text, length, chosen)  # type: ignore[arg-type]
        return pooled(found) if found else (None, None)

    def training(self, variant: Any, seed: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        from swat_lm.train.metrics import read_metrics

        return read_metrics(self.run_folder(variant, seed) / "metrics.jsonl")

    def parameters(self, variant: Any) -> int:
        """Parameters of a variant, from its configuration."""
        from swat_lm.model.architectures import configure_model, count_model_parameters

        vocab_size = self.experiment.budget(self.scale).vocab_size
        assert vocab_size is not None
        return count_model_parameters(configure_model(self.recipe(variant).model, vocab_size)).total

    def tasks(self, variant: Any, seed: int) -> dict[str, Any]:
        """The harness's results of a run, by task."""
        found = read_tasks(self.run_folder(variant, seed), f"{variant.name}-seed{seed}")
        for name, result in found.items():
            # gaps are paired by place, so all must have answered the same documents
            first = self._documents.setdefault(name, result.identity["documents"])
            if result.identity["documents"] != first:
                folder = self.run_folder(variant, seed) / "evaluation" / "tasks"
                raise ValueError(
                    f"{name}: {variant.name}, seed {seed}, answered other documents than the runs before it, since the "
                    f"benchmark's file changed: remove {folder}, or those of the others, and run the same command again"
                )
        return found


def recent_loss(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Mean training loss of the last twentieth of the logged steps."""
    losses = [line["loss"] for line in metrics]
    last = losses[-max(1, len(losses) // 20) :]
    return math.fsum(last) / len(last)

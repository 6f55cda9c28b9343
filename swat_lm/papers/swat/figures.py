"""SWAT's Figure 3, variance of hidden states by layer and position, and Figure 5, training loss of the ablations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from typing_extensions import override

from swat_lm.papers.experiment import Measurement, Progress, Run
from swat_lm.papers.findings import Findings, recent_loss
from swat_lm.papers.measuring import read_json
from swat_lm.papers.swat.variants import ANALYSIS, SwatExperiment
from swat_lm.papers.variants import SizedVariant
from swat_lm.papers.verdicts import Verdict, judge

__all__ = ["StateVariance", "TrainingLoss"]

VARIANCES = Path("evaluation", "variances.json")
FIRST_POSITIONS = 12
PARTS = 8
"""Parts of the last third of training, each a document of Figure 5's gaps."""


class StateVariance(SwatExperiment):
    """Whether training raises the first token's variance over that of later ones, and for which models."""

    @override
    def measure(self, one: SizedVariant, run: Run) -> list[Measurement]:

        def measured(told: Progress) -> None:
            from swat_lm.papers.swat.variances import measure_variances

            measure_variances(run, run.folder / VARIANCES)
            told("variances of hidden states", 1, 1)

        return [measured] if read_variances(run.folder) is None else []

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:

        def samples(name: str) -> dict[int, list[float]]:
            read = {seed: read_variances(found.run_folder(ANALYSIS[name], seed)) for seed in found.seeds}
            return {
                seed: [
                    math.log(trained / untrained)
                    for trained, untrained in zip(one["first_over_rest"], one["untrained_first_over_rest"], strict=True)
                ]
                for seed, one in read.items()
                if one is not None
            }

        full, window, swat = (samples(name) for name in ("vanilla-softmax-long", "sliding-softmax", "sliding-alirope"))
        zero = {seed: [0.0] * len(row) for seed, row in full.items()}
        what = "a picture without numbers"
        remark = (
            "Gaps are logarithms of the first token's variance over the median of the others', less the same of the "
            "untrained model: the first token differs from the start, since it sees itself only."
        )
        says = "training with full softmax attention makes the first token's hidden states vary more than other tokens'"
        return [
            judge(says, what, full, zero, remark),
            judge("it does so more than under SWAT", what, full, swat, remark),
            judge("it does so more than under a softmax window", what, full, window, remark),
        ]

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        # of the first seed, one range of colours
        from swat_lm.evaluate.heatmaps import plot_heat_map

        levels, drawn = {}, {}
        for one in found.chosen.values():
            read = read_variances(found.run_folder(one, found.seeds[0]))
            if read is not None:
                levels[one.name] = [[math.log10(max(x, 1e-12)) for x in row[:FIRST_POSITIONS]] for row in read["mean"]]
        every = [x for layers in levels.values() for layer in layers for x in layer]
        for name, layers in levels.items():
            label = found.chosen[name].label
            path = drawn[f"Variance of hidden states: {label}"] = out / f"{self.name}-{name}.png"
            plot_heat_map(
                layers, path, rows=["embedding", *map(str, range(1, len(layers)))],
                columns=[str(place) for place in range(1, len(layers[0]) + 1)],
                ylabel="after layer", xlabel="position in the row (tokens)", scale="variance of hidden states (log10)",
                title=label, limits=(min(every), max(every)),
            )  # fmt: skip
        return drawn


def read_variances(run: Path) -> dict[str, Any] | None:
    """What was measured, if it was; not what an earlier version measured without an untrained twin."""
    path = run / VARIANCES
    found = read_json(path) if path.exists() else None
    return found if found is not None and "untrained_first_over_rest" in found else None


class TrainingLoss(SwatExperiment):
    """How far the training loss jumps about late in training."""

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        pair = [ANALYSIS[name] for name in ("sliding-alibi-6-6", "sliding-alirope")]
        plain, rotated = ({seed: unrest(found.training(one, seed)) for seed in found.finished(one)} for one in pair)
        plain_end, rotated_end = (
            {seed: [recent_loss(found.training(one, seed))] for seed in found.finished(one)} for one in pair
        )
        what = "a picture: unstable late in training"
        return [
            judge(
                "sigmoid with balanced ALiBi and no RoPE trains less steadily late in training than with RoPE",
                what, plain, rotated,
                "Measured as the standard deviation of the logged loss within each of "
                f"{PARTS} parts of the last third of training; the batches are the same.",
            ),
            judge("its training loss ends higher than with RoPE", what, plain_end, rotated_end,
                  "Needs two seeds: a run has one training loss."),
        ]  # fmt: skip

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        # of the first seed; of a run that diverged as far as it came
        from swat_lm.evaluate.plots import Series, plot_training

        training = []
        for one in found.chosen.values():
            lines = found.training(one, found.seeds[0])
            if lines:
                training.append(Series(one.label, [line["tokens"] for line in lines], [line["loss"] for line in lines]))
        path = out / f"{self.name}.png"
        plot_training(training, [], path)
        return {"Training loss": path}


def unrest(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """Standard deviations of the logged loss in parts of the last third."""
    losses = [line["loss"] for line in metrics]
    late = losses[-max(PARTS * 2, len(losses) // 3) :]
    size = max(1, len(late) // PARTS)
    parts = [late[start : start + size] for start in range(0, size * PARTS, size)]
    return [pstdev(part) if part else 0.0 for part in parts]

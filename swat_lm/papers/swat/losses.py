"""SWAT's Tables 2 and 3 and its Figures 2 and 5: loss against length, behind windows, on books, and in training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any, ClassVar

from typing_extensions import override

from swat_lm.papers.experiment import Measurement, Run, Section
from swat_lm.papers.findings import Findings, recent_loss
from swat_lm.papers.loss_claims import claimed
from swat_lm.papers.measuring import missing_losses
from swat_lm.papers.page import with_error
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant
from swat_lm.papers.swat.claims import CLAIMS
from swat_lm.papers.swat.variants import ANALYSIS, SwatExperiment
from swat_lm.papers.verdicts import Verdict, judge

__all__ = ["BehindWindows", "LossByLength", "LossOfModules", "TrainingLoss"]

SINKS = 4
"""First tokens kept in Figure 2's control, as in StreamingLLM."""
PARTS = 8
"""Parts of the last third of training, each a document of Figure 5's gaps."""
TEXTS = {"text": "held-out text (the paper: OpenWebText)", "books": "books (the paper: PG-19)"}
SHORT = {"text": "held-out text", "books": "books"}


class LossTable(SwatExperiment):
    """Losses of every variant at every length, the paper's beside them."""

    texts: ClassVar[tuple[str, ...]] = ("text", "books")
    lists_losses: ClassVar[bool] = True

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        window = self.window(variant, run.scale)
        return [left for text in self.texts for left in missing_losses(run, text, window)]

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        return claimed(found, CLAIMS[self.name])

    @override
    def sections(self, found: Findings) -> list[Section]:
        return [self.section(found, text) for text in self.texts]

    def section(self, found: Findings, text: str) -> Section:
        """Ours in rows, and below each row the paper's."""
        scale, rows, kinds = found.scale, [], []
        for variant in found.chosen.values():
            values = [with_error(*found.mean_loss(variant, text, length)) for length in scale.lengths]
            rows.append([variant.label, f"{found.parameters(variant):,}", *values])
            kinds.append("")
            theirs = self.printed.get(variant.name, {}).get(text)
            if theirs:
                cells = {scale.sizes["W"]: theirs.get("W"), scale.lengths[-1]: theirs.get("last")}
                shown = ["" if cells.get(x) is None else f"{cells[x]:.2f}" for x in scale.lengths]
                rows.append(["as printed in the paper", "247M", *shown])
                kinds.append("paper")
        return Section(
            f"Loss on {TEXTS[text]}",
            ("variant", "parameters", *(f"{length:,} tokens" for length in scale.lengths)),
            rows,
            kinds,
            "Nats per token over whole pieces, \u00b1 its standard error over pieces and seeds. "
            "The paper's rows are on other text and another vocabulary: compare orders and gaps, not values.",
        )


def in_tokens(scale: Scale) -> str:
    """What the names of windows and lengths stand for."""
    return ", ".join(f"{size} = {scale.sizes[size]:,}" for size in ("W", "L", "XL")) + " tokens"


class LossByLength(LossTable):
    """Table 2: training and evaluation length."""

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.papers.pictures import plot_losses

        drawn, title = {}, f"{in_tokens(found.scale)}; bars: error of the change"
        for text in self.texts:
            path = out / f"{self.name}-{text}.png"
            if plot_losses(found, text, path, title=title):
                drawn[f"Loss on {SHORT[text]}"] = path
        return drawn


class LossOfModules(LossTable):
    """Table 3: ablation of score function, slopes and rotary."""

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.papers.pictures import plot_rows

        last, drawn = found.scale.lengths[-1], {}
        for text in self.texts:
            path = drawn[f"Loss at {last:,} tokens on {SHORT[text]}"] = out / f"{self.name}-{text}.png"
            rows = [(variant.label, *found.mean_loss(variant, text, last)) for variant in found.chosen.values()]
            what = f"loss at {last:,} tokens on {SHORT[text]} (nats per token)"
            plot_rows(rows, path, xlabel=what, title=in_tokens(found.scale))
        return drawn


class BehindWindows(SwatExperiment):
    """Figure 2: a softmax model behind windows that it was not trained with."""

    texts: ClassVar[tuple[str, ...]] = ("text",)

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        # as a control the smallest window with the first tokens kept, untrained (StreamingLLM)
        bare = [left for window in windows(run.scale) for left in missing_losses(run, "text", window)]
        return [*bare, *missing_losses(run, "text", run.scale.sizes["W"], SINKS)]

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        (variant,), scale = found.chosen.values(), found.scale
        last, window = scale.lengths[-1], scale.sizes["W"]
        control = judge(
            f"keeping the first {SINKS} tokens beside the window of W lowers the loss at the greatest length",
            "not SWAT's claim but StreamingLLM's (arXiv 2309.17453), as a control",
            found.losses(variant, "text", last, window),
            found.losses(variant, "text", last, window, SINKS),
        )
        return [*claimed(found, CLAIMS[self.name]), control]

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.evaluate.heatmaps import plot_heat_map

        (variant,), scale = found.chosen.values(), found.scale
        if not found.finished(variant):
            return {}
        path, behind = out / f"{self.name}.png", windows(scale)
        plot_heat_map(
            [[found.mean_loss(variant, "text", length, window)[0] for length in scale.lengths] for window in behind],
            path,
            rows=[f"{window:,}" for window in behind],
            columns=[f"{length:,}" for length in scale.lengths],
            ylabel="evaluation window (tokens)", xlabel="evaluation length (tokens)", scale="loss (nats per token)",
            title=f"trained with full attention on {scale.sizes[variant.length]:,} tokens",
        )  # fmt: skip
        return {"Loss of a softmax model behind windows it was not trained with": path}


def windows(scale: Scale) -> list[int]:
    """The evaluation windows of Figure 2."""
    return sorted({scale.sizes[name] for name in ("W", "4W", "L", "XL")})


class TrainingLoss(SwatExperiment):
    """Figure 5: how far the training loss jumps about late in training."""

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        pair = [ANALYSIS[name] for name in ("sliding-alibi-6-6", "sliding-alirope")]
        plain, rotated = (
            {seed: unrest(found.training(variant, seed)) for seed in found.finished(variant)} for variant in pair
        )
        plain_end, rotated_end = (
            {seed: [recent_loss(found.training(variant, seed))] for seed in found.finished(variant)} for variant in pair
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
        from swat_lm.evaluate.plots import plot_training
        from swat_lm.papers.pictures import training_series

        read = [(variant, found.training(variant, found.seeds[0])) for variant in found.chosen.values()]
        training = [training_series(variant.label, lines) for variant, lines in read if lines]
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

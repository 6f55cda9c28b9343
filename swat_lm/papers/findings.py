"""What the finished runs of an experiment found, read from their files, and the verdicts that follow."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swat_lm.evaluate.curves import LengthCurve
from swat_lm.model.architectures import configure_model, count_model_parameters
from swat_lm.papers.claims import Loss, Verdict, error_of_mean, judge, judge_losses
from swat_lm.papers.measuring import SINKS, read_curve, read_divergence, read_tasks, read_variances, windows_of
from swat_lm.papers.scales import Scale
from swat_lm.papers.variants import ANALYSIS, Experiment, Variant, budget_of, variant_model
from swat_lm.train.metrics import read_metrics

__all__ = ["Findings"]

PARTS = 8
"""Parts of the last third of training, each a document of Figure 5's gaps."""


class Findings:
    """The results of one experiment at one scale, over seeds."""

    def __init__(
        self, experiment: Experiment, scale: Scale, chosen: Mapping[str, Variant], seeds: Sequence[int], out: Path
    ) -> None:
        self.experiment, self.scale, self.chosen, self.seeds, self.out = experiment, scale, chosen, list(seeds), out
        self.texts = ("text",) if experiment.name == "figure2" else ("text", "books")
        self._documents: dict[str, str] = {}
        self._curves: dict[tuple[str, int, str, int | None], LengthCurve | None] = {}

    def label(self, one: Variant) -> str:
        """A variant's name for people."""
        return one.label

    def run_folder(self, one: Variant, seed: int) -> Path:
        """Where a run lies."""
        return self.out / "runs" / f"{one.name}-seed{seed}"

    def finished(self, one: Variant) -> list[int]:
        """The seeds whose runs did not diverge."""
        return [seed for seed in self.seeds if read_divergence(self.run_folder(one, seed)) is None]

    def diverged(self) -> list[str]:
        """A sentence for each run whose loss stopped being a number."""
        found = []
        for one in self.chosen.values():
            for seed in self.seeds:
                said = read_divergence(self.run_folder(one, seed))
                found += [] if said is None else [f"{one.label}, seed {seed}: {said}"]
        return found

    def curve(self, one: Variant, seed: int, text: str, window: int | None) -> LengthCurve | None:
        """What was measured of a run on a text, read once."""
        key = (one.name, seed, text, window)
        if key not in self._curves:
            self._curves[key] = read_curve(self.run_folder(one, seed), text, window)
        return self._curves[key]

    def losses(self, one: Variant, text: str, length: int, window: int | None) -> dict[int, list[float]]:
        """Per seed, the loss of each document at a length."""
        found = {}
        for seed in self.seeds:
            curve = self.curve(one, seed, text, window)
            if curve is not None:
                at = curve.lengths.index(length)
                found[seed] = [row[at] for row in curve.document_mean_loss if row[at] is not None]
        return found

    def mean_loss(
        self, one: Variant, text: str, length: int, window: int | str | None = "evaluated"
    ) -> tuple[float | None, float | None]:
        """Mean over documents and seeds and its standard error."""
        chosen = windows_of(self.experiment, self.scale, one)[0] if window == "evaluated" else window
        found = self.losses(one, text, length, chosen)  # type: ignore[arg-type]
        if not found:
            return None, None
        per_seed = [math.fsum(row) / len(row) for row in found.values()]
        per_document = [math.fsum(row) / len(row) for row in zip(*found.values(), strict=True)]
        spreads = [one for one in (error_of_mean(per_document), error_of_mean(per_seed)) if one is not None]
        error = math.sqrt(math.fsum(one**2 for one in spreads)) if spreads else None
        return math.fsum(per_seed) / len(per_seed), error

    def training(self, one: Variant, seed: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.run_folder(one, seed) / "metrics.jsonl")

    def final_loss(self, one: Variant, seed: int) -> float:
        """Mean training loss of the last twentieth of the logged steps."""
        losses = [line["loss"] for line in self.training(one, seed)]
        last = losses[-max(1, len(losses) // 20) :]
        return math.fsum(last) / len(last)

    def parameters(self, one: Variant) -> int:
        """Parameters of a variant, from its configuration."""
        config = configure_model(variant_model(one, self.scale), budget_of(one, self.scale).vocab_size)
        return count_model_parameters(config).total

    def tasks(self, one: Variant, seed: int) -> dict[str, Any]:
        """The harness's results of a run, by task."""
        found = read_tasks(self.run_folder(one, seed), f"{one.name}-seed{seed}")
        for name, result in found.items():
            # gaps are paired by place, so all must have answered the same documents
            first = self._documents.setdefault(name, result.identity["documents"])
            if result.identity["documents"] != first:
                raise ValueError(
                    f"{name}: {one.name}, seed {seed}, answered other documents than the runs before it, since the "
                    f"benchmark's file changed: remove {self.run_folder(one, seed) / 'evaluation' / 'tasks'}, or those "
                    "of the others, and run the same command again"
                )
        return found

    def verdicts(self) -> list[Verdict]:
        """The outcome of every claim of the experiment."""
        special = {"table1": self.benchmark_verdicts, "figure3": self.sink_verdicts, "figure5": self.unrest_verdicts}
        if self.experiment.name in special:
            return special[self.experiment.name]()
        if self.experiment.name == "figure2":
            return [*judge_losses("figure2", self.find), self.sinks_help()]
        return judge_losses(self.experiment.name, self.find)

    def sinks_help(self) -> Verdict:
        """Figure 2's control: the same window with the first tokens kept, untrained (StreamingLLM)."""
        (one,), last = self.chosen.values(), self.scale.lengths.index(self.scale.lengths[-1])
        kept = {}
        for seed in self.seeds:
            curve = read_curve(self.run_folder(one, seed), "text", self.scale.sizes["W"], SINKS)
            if curve is not None:
                kept[seed] = [row[last] for row in curve.document_mean_loss if row[last] is not None]
        bare = self.losses(one, "text", self.scale.lengths[-1], self.scale.sizes["W"])
        says = f"keeping the first {SINKS} tokens beside the window of W lowers the loss at the greatest length"
        return judge(says, "not SWAT's claim but StreamingLLM's (arXiv 2309.17453), as a control", bare, kept)

    def find(self, wanted: Loss) -> dict[int, list[float]] | None:
        """The samples behind one side of a claim; None where it was not measured."""
        one = self.chosen.get(wanted.variant)
        if one is None:
            return None
        lengths = {"last": self.scale.lengths[-1]}
        length = lengths.get(wanted.length) or self.scale.sizes[wanted.length]
        window = self.scale.sizes[wanted.window] if wanted.window else windows_of(self.experiment, self.scale, one)[0]
        return self.losses(one, wanted.text, length, window) or None

    def sink_verdicts(self) -> list[Verdict]:
        """Figure 3: how much training raised the first token's variance over that of later ones, as logarithms."""

        def samples(name: str) -> dict[int, list[float]]:
            found = {}
            for seed in self.seeds:
                read = read_variances(self.run_folder(ANALYSIS[name], seed))
                if read is not None:
                    pairs = zip(read["first_over_rest"], read["untrained_first_over_rest"], strict=True)
                    found[seed] = [math.log(trained / untrained) for trained, untrained in pairs]
            return found

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

    def unrest_verdicts(self) -> list[Verdict]:
        """Figure 5: how far the training loss jumps about late in training."""

        def samples(name: str) -> dict[int, list[float]]:
            return {seed: self.unrest(ANALYSIS[name], seed) for seed in self.finished(ANALYSIS[name])}

        remark = (
            "Measured as the standard deviation of the logged loss within each of "
            f"{PARTS} parts of the last third of training; the batches are the same."
        )
        rotated, plain = samples("sliding-alirope"), samples("sliding-alibi-6-6")
        what = "a picture: unstable late in training"
        says = "sigmoid with balanced ALiBi and no RoPE trains less steadily late in training than with RoPE"
        final = {
            name: {seed: [self.final_loss(ANALYSIS[name], seed)] for seed in self.finished(ANALYSIS[name])}
            for name in ("sliding-alirope", "sliding-alibi-6-6")
        }
        return [
            judge(says, what, plain, rotated, remark),
            judge("its training loss ends higher than with RoPE", what, final["sliding-alibi-6-6"],
                  final["sliding-alirope"], "Needs two seeds: a run has one training loss."),
        ]  # fmt: skip

    def unrest(self, one: Variant, seed: int) -> list[float]:
        """Standard deviations of the loss in parts of the last third."""
        losses = [line["loss"] for line in self.training(one, seed)]
        late = losses[-max(PARTS * 2, len(losses) // 3) :]
        size = max(1, len(late) // PARTS)
        spreads = []
        for start in range(0, size * PARTS, size):
            part = late[start : start + size]
            mean = math.fsum(part) / max(1, len(part))
            spreads.append(math.sqrt(math.fsum((loss - mean) ** 2 for loss in part) / max(1, len(part))))
        return spreads

    def benchmark_verdicts(self) -> list[Verdict]:
        """Table 1: averages of eight accuracies, and the loss of WikiText per word."""
        accuracy, words = self.average_accuracy, self.wikitext
        return [
            judge("SWAT (-) has a higher average than Transformer++", "46.88 against 42.92 (340M)",
                  accuracy("swat-negative"), accuracy("llama")),
            judge("SWAT (-+) has a higher average than Transformer++", "45.85 against 42.92 (340M)",
                  accuracy("swat-balanced"), accuracy("llama")),
            judge("SWAT (-) has a higher average than SWAT (-+)", "46.88 against 45.85 (340M)",
                  accuracy("swat-negative"), accuracy("swat-balanced")),
            judge("SWAT (-+) has a higher average than SWAT (+)", "45.85 against 45.05 (340M)",
                  accuracy("swat-balanced"), accuracy("swat-positive")),
            judge("SWAT (-+) has a higher average than Gated DeltaNet", "45.85 against 45.42 (340M)",
                  accuracy("swat-balanced"), accuracy("gated-deltanet")),
            judge("on WikiText SWAT (-+) is worse than Transformer++", "perplexity 35.53 against 31.52 (340M)",
                  words("swat-balanced"), words("llama"), "Gap in nats per word."),
        ]  # fmt: skip

    def average_accuracy(self, name: str) -> dict[int, list[float]] | None:
        """Percent per document, weighted so that their mean is the average of the eight tasks."""
        from swat_lm.evaluate.table1 import COLUMNS

        columns = [(one.task, one.metric) for one in COLUMNS if one.is_percent]
        found: dict[int, list[float]] = {}
        for seed in self.seeds if name in self.chosen else ():
            results = self.tasks(self.chosen[name], seed)
            if any(task not in results for task, _ in columns):
                continue
            scores = [[float(x) for x in results[task].documents[metric]] for task, metric in columns]
            total = sum(map(len, scores))
            found[seed] = [100 * x * total / (len(columns) * len(row)) for row in scores for x in row]
        return found or None

    def mean_average(self, one: Variant) -> tuple[float | None, float | None]:
        """Average of the eight accuracies over seeds, in per cent; its error joins documents and seeds."""
        from swat_lm.evaluate.table1 import AVERAGE, our_row

        rows = [our_row(one.label, self.tasks(one, seed)) for seed in self.seeds]
        cells = [row.cells[AVERAGE] for row in rows if AVERAGE in row.cells]
        if not cells:
            return None, None
        values = [cell.value for cell in cells]
        # the seeds answer the same documents, so that their errors do not shrink each other
        documents = [cell.error for cell in cells if cell.error is not None]
        spreads = [math.fsum(documents) / len(documents)] if len(documents) == len(cells) else []
        spreads += [spread for spread in [error_of_mean(values)] if spread is not None]
        error = math.sqrt(math.fsum(spread**2 for spread in spreads)) if spreads else None
        return math.fsum(values) / len(values), error

    def guessing(self) -> float | None:
        """The average of the eight accuracies of guessing, in per cent; a last word cannot be guessed."""
        from swat_lm.evaluate.table1 import ACCURACIES, chance_row

        for one in self.chosen.values():
            results = self.tasks(one, self.seeds[0])
            if results:
                return math.fsum(cell.value for cell in chance_row(results).cells.values()) / len(ACCURACIES)
        return None

    def wikitext(self, name: str) -> dict[int, list[float]] | None:
        """Nats per word of each article."""
        found = {}
        for seed in self.seeds if name in self.chosen else ():
            result = self.tasks(self.chosen[name], seed).get("wikitext")
            if result is not None:
                found[seed] = [-value / words for value, words in result.documents["word_perplexity"]]
        return found or None

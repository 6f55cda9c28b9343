"""A study: one base recipe, a few changes of it, the same seeds for all, and what came of it beside a baseline.

What is measured of a run is kept as one JSON record with the run's recipe and the identity of its text. Whoever has the
record needs neither model nor training: a study goes on from records that were made elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from swat_lm.papers.experiment import Experiment, Measurement, Run, Section, Variant
from swat_lm.papers.page import with_error
from swat_lm.papers.scales import Budget, Scale
from swat_lm.papers.verdicts import Verdict, judge, paired_gap
from swat_lm.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from swat_lm.papers.findings import Findings

__all__ = ["Study"]

# what all runs share, or their losses could not be paired
SHARED = re.compile(r"(name|out|seed|data\.(sources|text_field|tokenizer|add_\w+|held_out|split_seed|cache))=")
PIECES = 16


@dataclass(frozen=True)
class ChangedVariant(Variant):
    """The base recipe with overrides."""

    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study(Experiment):
    """What a study's file says. Raises ValueError, which names the file, for anything that could not be run."""

    base: str
    """A recipe of ours by its name, or a file beside the study's."""
    changes: Mapping[str, Sequence[str]]
    """Overrides such as `model.sliding_window=16` by the name of the variant that has them."""
    baseline: str
    """The variant that the others are compared with."""
    overrides: Sequence[str] = ()
    """Of all variants."""
    quick: Sequence[str] = ()
    """More of them for `--quick`: runs of seconds."""
    lengths: Sequence[int] = (1, 4)
    """Evaluation lengths in training lengths, rising; each divides the last."""
    seeds: Sequence[int] = (0, 1, 2)
    path: Path = Path()
    """The study's file."""
    texts: ClassVar[tuple[str, ...]] = ("text",)
    lists_losses: ClassVar[bool] = True
    brought: ClassVar[tuple[str, ...]] = ("records",)
    claims_heading: ClassVar[str] = "Beside the baseline"

    def __post_init__(self) -> None:
        for key in self.changes:
            if not re.fullmatch(r"[\w.-]+", key):
                raise ValueError(f"{self.path}: changes: expected a name of letters, digits, . and -; got {key!r}")
        lengths = list(self.lengths)
        if not lengths or lengths != sorted(set(lengths)) or not lengths[0] or any(lengths[-1] % x for x in lengths):
            raise ValueError(f"{self.path}: lengths: expected rising numbers that divide the last; got {lengths}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"{self.path}: seeds: expected one or more different numbers; got {list(self.seeds)}")
        if self.baseline not in self.changes or len(self.changes) < 2:
            got = f"{self.baseline!r} of {', '.join(map(str, self.changes))}"
            raise ValueError(f"{self.path}: baseline: expected one of two or more changes; got {got}")
        for name, overrides in self.changes.items():
            for change in filter(SHARED.match, overrides):
                raise ValueError(f"{self.path}: {name}: {change}: this is the same for all variants of a study")
            for scale in ("full", "quick"):
                if self.load(overrides, scale).model.get("init") is not None:
                    raise ValueError(f"{self.path}: {name}: a study begins its runs anew; leave model.init out")

    def shared(self, scale: str) -> list[str]:
        """What all variants override at a scale."""
        return [*self.overrides, *(self.quick if scale == "quick" else ())]

    def load(self, overrides: Sequence[str], scale: str) -> Recipe:
        """The base recipe with overrides."""
        beside = self.path.parent / self.base
        return load_recipe(beside if beside.is_file() else self.base, [*self.shared(scale), *overrides])

    @property
    @override
    def key(self) -> str:
        return str(self.path)

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        found = {}
        for name in ("full", "quick"):
            recipe = self.load((), name)
            train, length = recipe.train, recipe.data.sequence_length
            budget = Budget(
                recipe.model, train.steps, train.batch_size * length, train.learning_rate, train.warmup_steps, None,
                tokenizer=recipe.data.tokenizer,
            )  # fmt: skip
            about = f"{len(self.changes)} variants of {self.base}, {train.steps:,} steps each"
            lengths = tuple(length * times for times in self.lengths)
            found[name] = Scale(name, about, {self.budget_name: budget}, {}, lengths, PIECES)
        return found

    @override
    def variants(self, scale: Scale) -> Mapping[str, ChangedVariant]:
        return {name: ChangedVariant(name, name, tuple(changed)) for name, changed in self.changes.items()}

    @override
    def recipe(
        self, variant: ChangedVariant, scale: Scale, seed: int, out: Path, sources: tuple[str, ...], tokenizer: str
    ) -> Recipe:
        recipe, name = self.load(variant.overrides, scale.name), f"{variant.name}-seed{seed}"
        data = replace(recipe.data, sources=sources, tokenizer=tokenizer, cache=str(out / "tokens"))
        # what is measured is the exported model
        train = replace(recipe.train, export=True)
        return replace(recipe, name=name, seed=seed, out=str(out / "runs" / name), data=data, train=train)

    @override
    def measure(self, variant: ChangedVariant, run: Run) -> list[Measurement]:
        from swat_lm.papers.records import has_record, make_record

        return [] if has_record(run) else [lambda told: make_record(run, told)]

    @override
    def is_done(self, variant: ChangedVariant, run: Run) -> bool:
        # a record does without the model
        return not self.measure(variant, run)

    @override
    def findings(self, scale: Scale, chosen: Mapping[str, Any], seeds: Sequence[int], out: Path) -> "Findings":
        from swat_lm.papers.records import RecordedFindings

        return RecordedFindings(self, scale, chosen, seeds, out)

    def gap(self, found: "Findings", variant: ChangedVariant, length: int) -> tuple[float | None, float | None]:
        """Loss of a variant less that of the baseline, paired by piece and seed, and its standard error."""
        ours, theirs = (found.losses(each, "text", length, None) for each in (variant, found.chosen[self.baseline]))
        return paired_gap(ours, theirs)[:2] if ours.keys() & theirs.keys() else (None, None)

    @override
    def verdicts(self, found: "Findings") -> list[Verdict]:
        last, base = found.scale.lengths[-1], found.chosen[self.baseline]
        return [
            judge(
                f"{variant.label} has a lower loss than {base.label} at {last:,} tokens", "",
                found.losses(base, "text", last, None), found.losses(variant, "text", last, None),
            )
            for variant in found.chosen.values()
            if variant is not base
        ]  # fmt: skip

    @override
    def sections(self, found: "Findings") -> list[Section]:
        lengths, ones = found.scale.lengths, found.chosen.values()
        headings = ("variant", *(f"{length:,} tokens" for length in lengths))
        losses = [
            [variant.label, *(with_error(*found.mean_loss(variant, "text", at)) for at in lengths)] for variant in ones
        ]
        gaps = [
            [variant.label, *(with_error(*self.gap(found, variant, at), 4, "+") for at in lengths)]
            for variant in ones
            if variant.name != self.baseline
        ]  # fmt: skip
        overrides = [[variant.label, " ".join(variant.overrides)] for variant in ones]
        return [
            Section(f"Loss less that of {self.baseline}", headings, gaps, note="Nats per token, paired by piece of the "
                    "held-out text and by seed, \u00b1 one standard error; below zero the variant is the better one."),
            Section("Loss", headings, losses, note="Nats per token of the same text, \u00b1 its standard error over "
                    "pieces and seeds."),
            Section(f"Changes of {self.base}", ("variant", "overrides"), overrides,
                    note=f"Overrides of all: {' '.join(self.shared(found.scale.name)) or 'none'}."),
        ]  # fmt: skip

    @override
    def pictures(self, found: "Findings", out: Path) -> dict[str, Path]:
        from swat_lm.evaluate.plots import Series, plot_loss_by_length, plot_training
        from swat_lm.papers.pictures import plot_rows

        lengths, ones = found.scale.lengths, [variant for variant in found.chosen.values() if found.finished(variant)]
        if not ones:
            return {}
        gaps, losses, training = (out / f"{self.name}-{what}.png" for what in ("gaps", "losses", "training"))
        rows = [
            (variant.label, *self.gap(found, variant, lengths[-1])) for variant in ones if variant.name != self.baseline
        ]
        what = f"loss less that of {self.baseline} at {lengths[-1]:,} tokens (nats per token)"
        plot_rows(rows, gaps, xlabel=what, mark=(0.0, self.baseline))
        by_length, by_step = [], []
        for variant in ones:
            by_length.append(
                Series(variant.label, lengths, [found.mean_loss(variant, "text", at)[0] or 0.0 for at in lengths])
            )
            lines = found.training(variant, found.finished(variant)[0])
            by_step.append(Series(variant.label, [line["tokens"] for line in lines], [line["loss"] for line in lines]))
        plot_loss_by_length(by_length, losses)
        plot_training(by_step, [], training)
        return {"Beside the baseline, \u00b1 one standard error": gaps, "Loss by length": losses, "Training": training}

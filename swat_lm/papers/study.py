"""A study: one base recipe, a few changes of it, the same seeds for all, and what came of it beside a baseline.

What is measured of a run is kept as one JSON record with the run's recipe and the identity of its text. Whoever has the
record needs neither model nor training: a study goes on from records that were made elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import override

from swat_lm.papers.experiment import Experiment, Measurement, Run, Section, Variant
from swat_lm.papers.outcomes import OUTCOMES, shown_outcomes
from swat_lm.papers.page import with_error
from swat_lm.papers.scales import Budget, Scale
from swat_lm.papers.verdicts import Verdict, judge, paired_gap
from swat_lm.recipe import Recipe, load_recipe
from swat_lm.validation import Several, number, settings

if TYPE_CHECKING:
    from swat_lm.papers.findings import Findings

__all__ = ["Study", "StudySpec"]

# what all runs share, or their losses could not be paired
SHARED = re.compile(r"(name|out|seed|data\.(sources|text_field|tokenizer|add_\w+|held_out|split_seed|cache))=")
BY_RUN = ("run", "early loss", "final loss", "first token", "output norm", "passkey", "mqar", "tokens/s")
Count = Annotated[int, number(at_least=0)]


@settings
class StudySpec:
    """What the file of a study says."""

    title: str
    """What the study asks, in a line."""
    base: str
    """A recipe of ours by its name, or a file beside the study's."""
    baseline: str
    """The variant that the others are compared with."""
    changes: dict[str, Several[str]]
    """By the name of each variant, its overrides, such as `model.sliding_window=16`."""
    overrides: Several[str] = ()
    """Of all variants."""
    quick: Several[str] = ()
    """More of them for `--quick`: runs of seconds."""
    lengths: tuple[Count, ...] = (1, 4)
    """Evaluation lengths in training lengths, rising; each divides the last."""
    seeds: tuple[Count, ...] = (0, 1, 2)
    """Of the paired runs."""
    outcomes: Several[str] = ()
    """What is measured of each run beside losses: `attention`, `recall`."""
    vocab_size: int | None = number(None, at_least=259)
    """Train byte-level BPE of so many ids on the study's text, in OUT/tokenizer; else the base's tokenizer is used."""
    pieces: Annotated[int, number(at_least=1)] = 16
    """Of the greatest length, read from the held-out text."""
    text_bytes: int | None = number(None, at_least=1)
    """Read about so much of the text, whole documents spread evenly over it; else all of it."""


@dataclass(frozen=True)
class ChangedVariant(Variant):
    """The base recipe with overrides."""

    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study(Experiment):
    """What a study's file says. Raises ValueError, which names the file, for anything that could not be run."""

    spec: StudySpec
    path: Path
    """The study's file."""
    texts: ClassVar[tuple[str, ...]] = ("text",)
    lists_losses: ClassVar[bool] = True
    brought: ClassVar[tuple[str, ...]] = ("records",)
    claims_heading: ClassVar[str] = "Beside the baseline"

    def __post_init__(self) -> None:
        for key in self.spec.changes:
            if not re.fullmatch(r"[\w.-]+", key):
                raise ValueError(f"{self.path}: changes: expected a name of letters, digits, . and -; got {key!r}")
        lengths = list(self.spec.lengths)
        if not lengths or lengths != sorted(set(lengths)) or not lengths[0] or any(lengths[-1] % x for x in lengths):
            raise ValueError(f"{self.path}: lengths: expected rising numbers that divide the last; got {lengths}")
        if not self.spec.seeds or len(set(self.spec.seeds)) < len(self.spec.seeds):
            raise ValueError(f"{self.path}: seeds: expected one or more different numbers; got {list(self.spec.seeds)}")
        self.check_text()
        for name in self.spec.outcomes:
            if name not in OUTCOMES:
                raise ValueError(f"{self.path}: outcomes: expected some of {', '.join(OUTCOMES)}; got {name!r}")
        if self.spec.baseline not in self.spec.changes or len(self.spec.changes) < 2:
            got = f"{self.spec.baseline!r} of {', '.join(map(str, self.spec.changes))}"
            raise ValueError(f"{self.path}: baseline: expected one of two or more changes; got {got}")
        for name, overrides in self.spec.changes.items():
            for change in filter(SHARED.match, overrides):
                raise ValueError(f"{self.path}: {name}: {change}: this is the same for all variants of a study")
            for scale in ("full", "quick"):
                if self.load(overrides, scale).model.get("init") is not None:
                    raise ValueError(f"{self.path}: {name}: a study begins its runs anew; leave model.init out")

    def check_text(self) -> None:
        """Raise ValueError for a text or a tokenizer that is asked for in two ways."""
        spec = self.spec
        if spec.vocab_size is not None and any(one.startswith("data.tokenizer=") for one in spec.overrides):
            raise ValueError(
                f"{self.path}: vocab_size trains a tokenizer, and overrides name one: leave one of them out"
            )
        field = self.load((), "full").data.text_field
        if field != "text" and (spec.vocab_size, spec.text_bytes) != (None, None):
            raise ValueError(
                f"{self.path}: data.text_field is {field!r}, and vocab_size and text_bytes read 'text' alone: "
                "leave them out, and name a tokenizer with data.tokenizer"
            )

    def shared(self, scale: str) -> list[str]:
        """What all variants override at a scale."""
        return [*self.spec.overrides, *(self.spec.quick if scale == "quick" else ())]

    def load(self, overrides: Sequence[str], scale: str) -> Recipe:
        """The base recipe with overrides."""
        beside = self.path.parent / self.spec.base
        return load_recipe(beside if beside.is_file() else self.spec.base, [*self.shared(scale), *overrides])

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
                recipe.model, train.steps, train.batch_size * length, train.learning_rate, train.warmup_steps,
                self.spec.vocab_size, tokenizer=None if self.spec.vocab_size else recipe.data.tokenizer,
            )  # fmt: skip
            about = f"{len(self.spec.changes)} variants of {self.spec.base}, {train.steps:,} steps each"
            lengths = tuple(length * times for times in self.spec.lengths)
            found[name] = Scale(
                name, about, {self.budget_name: budget}, {}, lengths, self.spec.pieces, text_bytes=self.spec.text_bytes
            )
        return found

    @override
    def variants(self, scale: Scale) -> Mapping[str, ChangedVariant]:
        return {name: ChangedVariant(name, name, tuple(changed)) for name, changed in self.spec.changes.items()}

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

        outcomes = tuple(self.spec.outcomes)
        return [] if has_record(run, outcomes) else [lambda told: make_record(run, outcomes, told)]

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
        ours, theirs = (
            found.losses(each, "text", length, None) for each in (variant, found.chosen[self.spec.baseline])
        )
        return paired_gap(ours, theirs)[:2] if ours.keys() & theirs.keys() else (None, None)

    @override
    def verdicts(self, found: "Findings") -> list[Verdict]:
        last, base = found.scale.lengths[-1], found.chosen[self.spec.baseline]
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
        lengths, compared = found.scale.lengths, found.chosen.values()
        headings = ("variant", *(f"{length:,} tokens" for length in lengths))
        losses = [
            [variant.label, *(with_error(*found.mean_loss(variant, "text", at)) for at in lengths)]
            for variant in compared
        ]
        gaps = [
            [variant.label, *(with_error(*self.gap(found, variant, at), 4, "+") for at in lengths)]
            for variant in compared
            if variant.name != self.spec.baseline
        ]  # fmt: skip
        overrides = [[variant.label, " ".join(variant.overrides)] for variant in compared]
        by_run = self.by_run(found)
        return [
            Section(f"Loss less that of {self.spec.baseline}", headings, gaps,
                    note="Nats per token, paired by piece of the held-out text and by seed, \u00b1 one standard error; "
                    "below zero the variant is the better one."),
            Section("Loss", headings, losses, note="Nats per token of the same text, \u00b1 its standard error over "
                    "pieces and seeds."),
            Section("What each run came to", BY_RUN, by_run, note="Training loss after a quarter "
                    "of the steps and after all, the mean of the twentieth before. Mass of the first token: "
                    "in brackets what it would be if all weighed alike. Norm of the mixers' outputs: at the first and "
                    "at the last position. Recall: at the least and at the greatest distance. Speed is that of the "
                    "machine as busy as it was."),
            Section(f"Changes of {self.spec.base}", ("variant", "overrides"), overrides,
                    note=f"Overrides of all: {' '.join(self.shared(found.scale.name)) or 'none'}."),
        ]  # fmt: skip

    def by_run(self, found: "Findings") -> list[list[str]]:
        """A row for every run that was recorded."""
        from swat_lm.papers.findings import recent_loss
        from swat_lm.papers.records import RecordedFindings

        assert isinstance(found, RecordedFindings)
        rows = []
        for variant in found.chosen.values():
            for seed in found.finished(variant):
                record = found.record(variant, seed)
                if record is None:
                    continue
                lines = record["training"]
                early = lines[: max(1, len(lines) // 4)]
                speed = record.get("tokens_per_second")
                rows.append([
                    f"{variant.label}, seed {seed}", f"{recent_loss(early):.3f}", f"{recent_loss(lines):.3f}",
                    *shown_outcomes(record), "-" if speed is None else f"{speed:,.0f}",
                ])  # fmt: skip
        return rows

    @override
    def pictures(self, found: "Findings", out: Path) -> dict[str, Path]:
        from swat_lm.evaluate.plots import Series, plot_loss_by_length, plot_training
        from swat_lm.papers.pictures import plot_rows, training_series

        lengths, compared = found.scale.lengths, list(filter(found.finished, found.chosen.values()))
        if not compared:
            return {}
        gaps, losses, training = (out / f"{self.name}-{what}.png" for what in ("gaps", "losses", "training"))
        rows = [
            (variant.label, *self.gap(found, variant, lengths[-1]))
            for variant in compared
            if variant.name != self.spec.baseline
        ]
        what = f"loss less that of {self.spec.baseline} at {lengths[-1]:,} tokens (nats per token)"
        plot_rows(rows, gaps, xlabel=what, mark=(0.0, self.spec.baseline))
        by_length = [
            Series(variant.label, lengths, [found.mean_loss(variant, "text", at)[0] or 0.0 for at in lengths])
            for variant in compared
        ]
        by_step = [
            training_series(variant.label, found.training(variant, found.finished(variant)[0])) for variant in compared
        ]
        plot_loss_by_length(by_length, losses)
        plot_training(by_step, [], training)
        return {"Beside the baseline, \u00b1 one standard error": gaps, "Loss by length": losses, "Training": training}

"""The experiment: of every way to train the longest row in a given memory, a curve of peaks, and equal gradients."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import override

from swat_lm.papers.blockwise.claims import judged
from swat_lm.papers.blockwise.measuring import gradients_of_all, longest_and_peaks
from swat_lm.papers.blockwise.methods import METHODS
from swat_lm.papers.blockwise.scales import MEASURES, SCALES
from swat_lm.papers.experiment import Section
from swat_lm.papers.measured import MeasuredExperiment, Results
from swat_lm.papers.scales import Scale
from swat_lm.papers.verdicts import Verdict

__all__ = ["BlockwiseMemory"]

MIB = 2**20
PRINTED = ("vanilla", "memory-efficient", "blockwise")


class BlockwiseMemory(MeasuredExperiment):
    """Memory against length."""

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def settings(self, scale: Scale) -> dict[str, Any]:
        return {**asdict(MEASURES[scale.name]), "methods": {name: str(method) for name, method in METHODS.items()}}

    @override
    def jobs(self, scale: Scale) -> Mapping[str, str]:
        measure = MEASURES[scale.name]
        jobs = {"exact": f"gradients of every method over {measure.exact:,} tokens"} if measure.exact else {}
        several = len(measure.sizes) > 1
        for size in measure.sizes:
            of = f"{size.name}, " if several else ""
            jobs |= {f"{size.name}-{name}": f"{of}{method.label}" for name, method in METHODS.items()}
        return jobs

    @override
    def measure(self, job: str, scale: Scale) -> dict[str, Any]:
        measure = MEASURES[scale.name]
        if job == "exact":
            return gradients_of_all(measure.sizes[0], scale, measure.exact)
        size_name, _, method = job.partition("-")
        size = next(size for size in measure.sizes if size.name == size_name)
        return longest_and_peaks(method, size, scale, measure)

    @override
    def verdicts(self, found: Results, scale: Scale) -> list[Verdict]:
        return judged(found, MEASURES[scale.name])

    @override
    def sections(self, found: Results, scale: Scale) -> list[Section]:
        measure, sections = MEASURES[scale.name], []
        for size in measure.sizes:
            printed = dict(zip(PRINTED, size.printed or (), strict=False))
            rows = []
            for name, method in METHODS.items():
                of = found[f"{size.name}-{name}"]
                own = next((point for point in of["points"] if point["tokens"] == of["longest"]), None)
                said = f"{printed[name]}k" if name in printed else ""
                rows.append(
                    [method.label, f"{of['longest']:,}", mebibytes(of["predicted"]),
                     "" if own is None else mebibytes(own["counted"]), *([said] if size.printed else [])]
                )  # fmt: skip
            headings = ["", "longest row, tokens", "predicted peak, MiB", "counted, MiB"]
            headings += ["printed, thousand"] if size.printed else []
            where = f"{size.name}: w" if len(measure.sizes) > 1 else "W"
            note = f"Of {mebibytes(size.available)} MiB weights and optimizer take {mebibytes(of['held'])}."
            sections.append(Section(f"{where}hat fits in {mebibytes(size.available)} MiB", headings, rows, note=note))
            if measure.curve:
                sections.append(curve(found, size.name, measure.curve))
        if "exact" in found:
            rows = [
                [METHODS[name].label, f"{of['loss']:.1e}", f"{of['gradient']:.1e}"]
                for name, of in found["exact"].items()
            ]
            note = f"A row of {measure.exact:,} tokens, divided by no block; each against the first of its model."
            headings = ("float64", "loss differs by", "gradients differ by")
            sections.append(Section("The same results", headings, rows, note=note))
        return sections

    @override
    def pictures(self, found: Results, scale: Scale, out: Path) -> dict[str, Path]:
        from swat_lm.evaluate.plots import Series, plot_memory

        measure = MEASURES[scale.name]
        drawn = {}
        for size in measure.sizes if measure.curve else ():
            for windowed, words in ((False, "all tokens before"), (True, "a window")):
                by = {name: found[f"{size.name}-{name}"]["points"] for name in METHODS}
                series = [
                    Series(method.label, [each["tokens"] for each in by[name]], [each["counted"] for each in by[name]])
                    for name, method in METHODS.items()
                    if method.windowed == windowed and by[name]
                ]
                path = out / f"{self.name}{'-window' if windowed else ''}.png"
                plot_memory(series, path, available=size.available)
                drawn[f"Peak memory against length, attention to {words}"] = path
        return drawn

    @override
    def lead(self, scale: Scale) -> str:
        sizes = scale.sizes
        return (
            f"Blockwise Parallel Transformer, arXiv 2305.19370. GPT's shape, one row; blocks of {sizes['block']:,}, "
            f"windows of {sizes['window']:,} where there are some, chunks of {sizes['chunk']:,}. Losses are formed in "
            "parts: whole logits are nowhere held."
        )


def curve(found: Results, size: str, lengths: tuple[int, ...]) -> Section:
    """Counted peaks by length."""
    rows = []
    for name, method in METHODS.items():
        by = {point["tokens"]: point for point in found[f"{size}-{name}"]["points"]}
        rows.append([method.label, *(mebibytes(by[n]["counted"]) if n in by else "" for n in lengths)])
    headings = ("counted peak, MiB", *(f"{length:,} tokens" for length in lengths))
    note = "Weights, gradients and optimizer included; empty where it does not fit, or is too long to be run."
    return Section("Peak memory against length", headings, rows, note=note)


def mebibytes(size: int) -> str:
    """A size, with one digit where it is small."""
    return f"{size / MIB:,.1f}" if size < 1000 * MIB else f"{size / MIB:,.0f}"

"""Claims of a paper that are measured of models as they are: nothing is trained, and no text is read.

Every job writes one file, and one that is there is kept, so that the same call continues after an interruption. The
page and the JSON are those of every experiment.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swat_lm.evaluate.figures import write_figures
from swat_lm.files import write_text
from swat_lm.papers.experiment import Section
from swat_lm.papers.measuring import read_json
from swat_lm.papers.page import machine, write_page
from swat_lm.papers.scales import Scale, find_scale
from swat_lm.papers.verdicts import Verdict
from swat_lm.papers.watching import Watcher

__all__ = ["MeasuredExperiment", "Results", "reproduce_measured"]

Results = Mapping[str, Any]
"""What was measured, by the names of jobs."""


@dataclass(frozen=True)
class MeasuredExperiment(ABC):
    """What is measured, and what follows."""

    name: str
    title: str
    doubtful: tuple[str, ...] = ()
    """What is doubtful in the paper, or in the comparison with it."""
    judged_by: str = ""
    """How a claim is judged, in one sentence."""

    @property
    @abstractmethod
    def scales(self) -> Mapping[str, Scale]:
        """How large it can be, by name."""

    def settings(self, scale: Scale) -> dict[str, Any]:
        """What else the figures depend on: a folder of other settings is not gone on with."""
        return {}

    @abstractmethod
    def jobs(self, scale: Scale) -> Mapping[str, str]:
        """What is measured one after the other: names, and what people are told."""

    @abstractmethod
    def measure(self, job: str, scale: Scale) -> dict[str, Any]:
        """The figures of one job, as JSON holds them."""

    @abstractmethod
    def verdicts(self, found: Results, scale: Scale) -> list[Verdict]:
        """The outcome of every claim."""

    @abstractmethod
    def sections(self, found: Results, scale: Scale) -> list[Section]:
        """The tables of its page."""

    @abstractmethod
    def pictures(self, found: Results, scale: Scale, out: Path) -> dict[str, Path]:
        """Write its pictures as PNG files; returns them by their headings."""

    @abstractmethod
    def lead(self, scale: Scale) -> str:
        """What the head of the page says beside the scale."""


def reproduce_measured(experiment: MeasuredExperiment, scale_name: str, out: Path, watcher: Watcher) -> dict[str, Any]:
    """Measure what is missing and write page and JSON; returns what the JSON holds.

    Raises ValueError for an unknown scale, or a folder of other things.
    """
    scale = find_scale(scale_name, experiment.scales)
    begin(experiment, scale, out)
    jobs, found = experiment.jobs(scale), {}
    for number, (job, words) in enumerate(jobs.items(), 1):
        path = out / "measured" / f"{job}.json"
        if not path.exists():
            watcher.stage(f"{number} of {len(jobs)}: {words}")
            write_text(path, write_figures(experiment.measure(job, scale)) + "\n")
        found[job] = read_json(path)
    watcher.stage("writing the page")
    return write_measured(experiment, scale, found, out)


def begin(experiment: MeasuredExperiment, scale: Scale, out: Path) -> None:
    """Make the folder, or go on in it. Raises ValueError where it holds something else."""
    plan = out / "plan.json"
    wanted = {"experiment": experiment.name, "scale": scale.name, "sizes": dict(scale.sizes)}
    # as it comes back from the file
    wanted = json.loads(json.dumps({**wanted, "settings": experiment.settings(scale)}))
    if plan.exists():
        held = read_json(plan)
        if held != wanted:
            other = next(key for key in wanted if not isinstance(held, dict) or held.get(key) != wanted[key])
            raise ValueError(f"{out} was measured with another {other}: name another folder for --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no reproduction: name another folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(plan, json.dumps(wanted, indent=1) + "\n")


def write_measured(experiment: MeasuredExperiment, scale: Scale, found: Results, out: Path) -> dict[str, Any]:
    """Write `NAME.json`, pictures and, last, `NAME.html`."""
    results: dict[str, Any] = {
        "experiment": experiment.name,
        "title": experiment.title,
        "scale": scale.name,
        "about": scale.about,
        "sizes": dict(scale.sizes),
        "claims": [asdict(verdict) for verdict in experiment.verdicts(found, scale)],
        "measured": dict(found),
        "doubtful_in_the_paper": list(experiment.doubtful),
        "machine": machine(torch.get_num_threads()),
    }
    write_text(out / f"{experiment.name}.json", write_figures(results) + "\n")
    write_page(
        out / f"{experiment.name}.html",
        "measured.html",
        **results,
        lead=experiment.lead(scale),
        judged_by=experiment.judged_by,
        pictures=experiment.pictures(found, scale, out),
        sections=experiment.sections(found, scale),
    )
    return results

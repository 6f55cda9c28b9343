"""What a paper is made of: tables and figures, each with variants, measurements, verdicts, sections and pictures.

The runner, the worker and the page know these classes and no table of any paper. A new table is one more subclass of
`Experiment`, a new paper one more row of `PAPERS`. No torch here, so that a mistyped name is told at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swat_lm.papers.scales import Budget, Scale
from swat_lm.papers.verdicts import Verdict
from swat_lm.recipe import Recipe

if TYPE_CHECKING:
    from swat_lm.papers.findings import Findings

__all__ = ["Experiment", "Measurement", "Run", "Section", "Variant"]

Progress = Callable[[str, int, int], None]
Measurement = Callable[[Progress], None]


@dataclass(frozen=True)
class Variant:
    """One trained model of an experiment."""

    name: str
    label: str
    """For people."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed: where it is trained, and what its measurements read."""

    recipe: Recipe
    scale: Scale
    out: Path
    """The experiment's folder."""
    streams: Callable[[str], list[Any]]
    """Token ids of the pieces of a text, each as long as the scale's greatest length."""
    tasks: str
    """Folder of the benchmarks' files, or `hub`."""

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.recipe.out)

    @property
    def is_trained(self) -> bool:
        """Whether training came to its end."""
        return (self.folder / "export" / "config.json").exists()


@dataclass(frozen=True)
class Section:
    """A table of an experiment's page, all of it plain text."""

    heading: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: Sequence[str] = ()
    """Class of each row, such as `paper` for printed numbers."""
    note: str = ""
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment(ABC):
    """A table or figure: what is trained, what is measured of it, and what follows."""

    name: str
    title: str
    printed: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The paper's own numbers."""
    doubtful: tuple[str, ...] = field(default=(), kw_only=True)
    """What is doubtful in them."""
    texts: ClassVar[tuple[str, ...]] = ()
    """Texts that loss by length is measured on: `text` (held out from training), `books`."""
    reads_benchmarks: ClassVar[bool] = False
    """Whether it asks the questions of lm-evaluation-harness."""
    lists_losses: ClassVar[bool] = False
    """Whether the JSON holds the losses of each variant by text and length."""
    leaves_out: ClassVar[bool] = False
    """Whether variants that a machine cannot train are left out instead of refused."""
    budget_name: ClassVar[str] = "analysis"
    """Which of a scale's budgets its variants have."""
    brought: ClassVar[tuple[str, ...]] = ()
    """Folders that may be in a new `out` before anything is run."""
    claims_heading: ClassVar[str] = "The paper's claims"

    @property
    def key(self) -> str:
        """What finds the experiment again in another process."""
        return self.name

    @property
    @abstractmethod
    def scales(self) -> Mapping[str, Scale]:
        """How large it can be, by name."""

    @abstractmethod
    def variants(self, scale: Scale) -> Mapping[str, Variant]:
        """The models it compares, by name."""

    @abstractmethod
    def recipe(
        self, variant: Any, scale: Scale, seed: int, out: Path, sources: tuple[str, ...], tokenizer: str
    ) -> Recipe:
        """The run of one variant: the same text and schedule for all that are compared."""

    def budget(self, scale: Scale) -> Budget:
        """Shape and training that its variants share."""
        return scale.budgets[self.budget_name]

    def window(self, variant: Any, scale: Scale) -> int | None:
        """Window in tokens that a variant is evaluated with; None: as trained."""
        return None

    def measure(self, variant: Any, run: Run) -> list[Measurement]:
        """The measurements of a run that are still missing, each to be called with a listener to its progress."""
        return []

    def is_done(self, variant: Any, run: Run) -> bool:
        """Whether a run is trained and everything is measured of it."""
        return run.is_trained and not self.measure(variant, run)

    def findings(self, scale: Scale, chosen: Mapping[str, Any], seeds: Sequence[int], out: Path) -> "Findings":
        """What the finished runs found."""
        from swat_lm.papers.findings import Findings

        return Findings(self, scale, chosen, seeds, out)

    @abstractmethod
    def verdicts(self, found: "Findings") -> list[Verdict]:
        """The outcome of every claim."""

    def sections(self, found: "Findings") -> list[Section]:
        """The tables of its page, beside that of training."""
        return []

    @abstractmethod
    def pictures(self, found: "Findings", out: Path) -> dict[str, Path]:
        """Write its pictures as PNG files; returns them by their headings."""

    def lead(self, scale: Scale) -> str:
        """What the head of the page says beside scale and seeds."""
        return ""

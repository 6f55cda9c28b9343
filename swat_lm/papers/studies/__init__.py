"""Studies that come with the package, and those of a user's own: YAML files, read here."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from swat_lm.papers.study import Study
from swat_lm.recipe import parse
from swat_lm.validation import Origin, Several, build, number, settings
from swat_lm.words import did_you_mean

__all__ = ["load_study", "study_names", "study_summary"]

Count = Annotated[int, number(at_least=0)]
FOLDER = Path(__file__).parent


@settings
class StudyFile:
    """What the file of a study says; `Study` explains it."""

    title: str
    """What the study asks, in a line."""
    base: str
    """A recipe of ours by its name, or a file beside the study's."""
    baseline: str
    """The variant that the others are compared with."""
    changes: dict[str, Several[str]]
    """By name, the overrides of each variant."""
    overrides: Several[str] = ()
    """Of all variants."""
    quick: Several[str] = ()
    """More of them for `--quick`."""
    lengths: tuple[Count, ...] = (1, 4)
    """Evaluation lengths in training lengths."""
    seeds: tuple[Count, ...] = (0, 1, 2)
    """Of the paired runs."""


def study_names() -> list[str]:
    """Names of all studies of ours, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def study_summary(name: str) -> str:
    """The first line of a study's opening comment."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def load_study(name: str) -> Study:
    """One of ours by its name, or a file; raises ValueError, which names the file or the nearest study."""
    path = FOLDER / f"{name}.yaml" if name in study_names() else Path(name)
    if not path.is_file():
        hint = did_you_mean(name, study_names(), ".")
        raise ValueError(f"no study {name!r}{hint} Expected one of {', '.join(study_names())}, or a YAML file")
    places: dict[str, str] = {}
    values = parse(path.read_text(encoding="utf-8"), str(path), places)
    if isinstance(values, dict) and isinstance(values.get("changes"), dict):
        # a name such as 16 is a number to YAML
        values["changes"] = {str(variant): overrides for variant, overrides in values["changes"].items()}
    return Study(path.stem, path=path, **asdict(build(StudyFile, values, place=Origin(str(path), places))))

"""Studies that come with the package, and those of a user's own: YAML files, read here."""

from pathlib import Path

from swat_lm.papers.study import Study, StudySpec
from swat_lm.recipe import parse
from swat_lm.validation import Origin, build
from swat_lm.words import did_you_mean

__all__ = ["load_study", "study_names", "study_summary"]

FOLDER = Path(__file__).parent


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
    spec = build(StudySpec, values, place=Origin(str(path), places))
    return Study(path.stem, spec.title, spec=spec, path=path)

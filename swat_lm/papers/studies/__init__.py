"""Studies that come with the package, and those of a user's own: YAML files, read here."""

import difflib
from pathlib import Path

import yaml

from swat_lm.papers.study import Study

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
        near = difflib.get_close_matches(name, study_names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no study {name!r}{hint} Expected one of {', '.join(study_names())}, or a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    offered = {"title": str, "base": str, "baseline": str, "changes": dict, "overrides": list, "quick": list,
               "lengths": list, "seeds": list}  # fmt: skip
    needed = ("title", "base", "baseline", "changes")
    if not isinstance(values, dict) or not set(needed) <= values.keys() <= offered.keys():
        got = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{path}: expected the keys {', '.join(needed)}, and of {', '.join(offered)}; got {got}")
    for key, value in values.items():
        if not isinstance(value, offered[key]):
            raise ValueError(f"{path}: {key}: expected a {offered[key].__name__}; got {value!r}")
    # a name such as 16 is a number to YAML
    changes = {str(name): overrides for name, overrides in values.pop("changes").items()}
    return Study(path.stem, path=path, changes=changes, **values)

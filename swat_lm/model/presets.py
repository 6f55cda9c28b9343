"""Named configurations, one YAML file each in `presets/`; the files say where their numbers come from."""

from importlib.resources import files
from typing import Any

import yaml

from swat_lm.words import did_you_mean


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def preset_fields(name: str) -> dict[str, Any]:
    """The SwatConfig fields of a preset.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    names = preset_names()
    if name not in names:
        raise ValueError(f"preset: unknown preset {name!r}{did_you_mean(name, names, ';')} presets: {', '.join(names)}")
    fields = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(fields, dict), name
    return fields


def _folder() -> Any:
    # `presets.py` and the folder `presets/` share a name, so the data is found from the package above
    return files("swat_lm.model") / "presets"

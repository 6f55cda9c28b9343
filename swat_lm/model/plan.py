"""The plan of a model's layers as data: a pattern of kinds with settings, over the configuration's flat fields.

`layers: [mamba2, mamba2, {kind: attention, sliding_window: 128}]` is cycled over the number of layers; `repeat: 6` in
an entry stands for six of it. Flat fields are the defaults of every entry that has a setting of that name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, get_type_hints

from swat_lm.layers import LAYERS, Layer
from swat_lm.model.fitting import fits
from swat_lm.words import did_you_mean, type_words

__all__ = ["LayerEntry", "kinds_with", "resolve_plan"]


class LayerEntry(NamedTuple):
    """One layer of a plan."""

    kind: type[Layer]
    settings: Any
    """Of the type `kind.Settings`, whole."""

    @property
    def layer_type(self) -> str:
        """Hugging Face's name for such a layer."""
        return self.kind.layer_type(self.settings)


class Written(NamedTuple):
    """An entry of the pattern as the user wrote it."""

    kind: str
    own: dict[str, Any]
    where: str
    """How a message about it begins."""


def resolve_plan(
    pattern: Sequence[Any] | None, num_layers: int, width: int, flat: Sequence[Mapping[str, Any]]
) -> list[LayerEntry]:
    """Every layer with all its settings.

    Args:
        pattern: what `SwatConfig.layers` holds; None: attention everywhere.
        num_layers: over how many layers it is cycled.
        width: M.
        flat: per layer, the configuration's fields by name.

    Raises:
        ValueError: an unknown kind or key (the nearest valid one is named), a value that does not fit, or a pattern
            that is longer than the model.
    """
    written = [Written("attention", {}, "")] if pattern is None else expand(pattern)
    if len(written) > num_layers:
        raise ValueError(
            f"layers: the pattern has {len(written)} layers, num_hidden_layers is {num_layers}; "
            "raise it, or shorten the pattern"
        )
    # a list with one value per layer: say which one is at fault
    uneven = any(entry != flat[0] for entry in flat)
    entries = []
    for index in range(num_layers):
        kind, own, where = written[index % len(written)]
        if pattern is None and uneven:
            where = f"layer {index}: "
        entries.append(resolve_entry(LAYERS[kind], own, where, flat[index], width))
    return entries


def expand(pattern: Sequence[Any]) -> list[Written]:
    """The entries of a pattern, each as often as it repeats; raises ValueError for one that cannot be read."""
    if not isinstance(pattern, Sequence) or isinstance(pattern, str) or not pattern:
        raise ValueError(f"layers: expected a list of kinds, such as [attention, mamba2]; got {pattern!r}")
    found = []
    for number, entry in enumerate(pattern):
        where = f"layers[{number}]"
        values = {"kind": entry} if isinstance(entry, str) else entry
        if not isinstance(values, Mapping) or "kind" not in values:
            raise ValueError(f"{where}: expected a kind or a mapping with the key 'kind'; got {entry!r}")
        own = dict(values)
        kind, repeat = own.pop("kind"), own.pop("repeat", 1)
        if not isinstance(kind, str):
            raise ValueError(f"{where}: kind must be text, one of {', '.join(LAYERS)}; got {kind!r}")
        if kind not in LAYERS:
            otherwise = f"; expected one of {', '.join(LAYERS)}"
            raise ValueError(f"{where}: unknown kind {kind!r}{did_you_mean(kind, LAYERS, otherwise)}")
        if type(repeat) is not int or repeat < 1:
            raise ValueError(f"{where}: repeat: expected a whole number of at least 1, got {repeat!r}")
        check_own(LAYERS[kind], own, f"{where} ({kind})")
        found += [Written(kind, own, f"{where} ({kind}): ")] * repeat
    return found


def kinds_with(setting: str) -> list[str]:
    """The kinds of layers that have a setting of this name."""
    return [name for name, kind in LAYERS.items() if setting in {known.name for known in fields(kind.Settings)}]


def check_own(kind: type[Layer], own: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a key that the kind does not have, or a value of another type."""
    hints = get_type_hints(kind.Settings)
    for key, value in own.items():
        if key not in hints:
            owners = kinds_with(key)
            if owners:
                raise ValueError(f"{where}: {key!r} is a setting of {', '.join(owners)}, not of {kind.name}")
            otherwise = f"; expected one of {', '.join(hints)}"
            raise ValueError(f"{where}: unknown setting {key!r}{did_you_mean(key, hints, otherwise)}")
        if not fits(value, hints[key]):
            raise ValueError(f"{where}: {key} must be {type_words(hints[key])}; got {value!r}")


def resolve_entry(
    kind: type[Layer], own: Mapping[str, Any], where: str, flat: Mapping[str, Any], width: int
) -> LayerEntry:
    """One entry's settings: its own over the configuration's fields over the kind's defaults."""
    values = {}
    for setting in fields(kind.Settings):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        values[setting.name] = own.get(setting.name, flat.get(setting.name, default))
    try:
        return LayerEntry(kind, kind.Settings(**kind.settle(values, frozenset(own), width)))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None

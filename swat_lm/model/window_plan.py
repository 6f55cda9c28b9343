"""Which layers keep full attention beside those that have a window, in words: `every:3`, `last`, `odd` or a list."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swat_lm.layers import AttentionLayer
from swat_lm.model.plan import expand
from swat_lm.words import did_you_mean

if TYPE_CHECKING:
    from swat_lm.model.configuration import SwatConfig

__all__ = ["FullLayers", "full_windows", "window_plan", "windows_of", "with_full_layers", "with_windows"]

FullLayers = str | int | Sequence[int]
"""`none`, `odd`, `even`, `every:N`, `last`, `last:N`, or the numbers of layers, in a list or with commas between."""

WORDS = ("none", "odd", "even", "every", "last")
FORMS = "none, odd, even, every:3, last, last:2 or numbers of layers such as 0,7,15"


def window_plan(num_layers: int, window: int, full: FullLayers) -> list[int | None]:
    """The window of each layer, as `SwatConfig.sliding_window` takes it: None for those that keep full attention.

    Args:
        window: tokens that a query of the other layers sees, itself included.
        full: `every:N` = the N-th, the 2N-th, ... layer; `last:N` = the last N of them, `last` = `last:1`; `odd` and
            `even` = by their numbers, which begin with 0; `none`; or numbers, in a list or with commas between.

    Raises:
        ValueError: fewer layers or a window than 1, words that mean nothing, more layers than there are, a number
            twice, or none chosen by other words than `none`.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers: expected a whole number of at least 1, got {num_layers!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window: expected a whole number of at least 1, got {window!r}")
    chosen = set(choose_layers(full, range(num_layers)))
    return [None if index in chosen else window for index in range(num_layers)]


def choose_layers(full: FullLayers, layers: Sequence[int]) -> list[int]:
    """Which of these layers (their numbers in the model, in order) `full` chooses; numbers are those of the model.

    Raises:
        ValueError: as `window_plan`.
    """
    if isinstance(full, int):
        return check_numbers([full], layers)
    if not isinstance(full, str):
        return check_numbers(full, layers)
    word, colon, rest = (part.strip() for part in full.partition(":"))
    if word.replace(",", "").replace(" ", "").isdecimal() and not colon:
        parts = word.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"full_layers: expected numbers with commas between, such as 0,7,15; got {full!r}")
        return check_numbers([int(part) for part in parts], layers)
    if word not in WORDS or (colon and word not in ("every", "last")) or (word == "every" and not colon):
        hint = did_you_mean(word, WORDS) if word not in WORDS else ""
        raise ValueError(f"full_layers: expected {FORMS}; got {full!r}{hint}")
    if word == "none":
        return []
    if word in ("odd", "even"):
        chosen = [number for number in layers if number % 2 == (word == "odd")]
        if not chosen:
            raise ValueError(f"full_layers: {word} chooses no layer of {len(layers)}; write none for that")
        return chosen
    count = count_of(full, rest, len(layers)) if colon else 1
    return list(layers[count - 1 :: count]) if word == "every" else list(layers[len(layers) - count :])


def count_of(full: str, text: str, most: int) -> int:
    """The number behind the colon; raises ValueError for anything but 1 to the number of layers."""
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ValueError(
            f"full_layers: {full!r}: expected a whole number from 1 to {most}, the layers of attention that there are, "
            f"behind the colon; got {text!r}"
        )
    return int(text)


def check_numbers(numbers: Sequence[int], layers: Sequence[int]) -> list[int]:
    """The numbers of layers, in order; raises ValueError for one that is none of them, or twice there."""
    # bytes are a sequence of numbers too
    if not isinstance(numbers, Sequence) or isinstance(numbers, bytes | bytearray) or not numbers:
        raise ValueError(f"full_layers: expected {FORMS}; got {numbers!r}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"full_layers: expected numbers of layers or one of {FORMS}; got {number!r}")
        if number not in layers:
            raise ValueError(
                f"full_layers: there is no layer {number} with attention; there are {len(layers)}, numbered "
                f"{layers[0]} to {layers[-1]}"
            )
        if list(numbers).count(number) > 1:
            raise ValueError(f"full_layers: layer {number} is named twice; name each once")
    return sorted(numbers)


def with_full_layers(config: "SwatConfig", full: FullLayers) -> "SwatConfig":
    """The same configuration with full attention in the layers of attention that `full` chooses.

    Raises:
        ValueError: as `full_windows`; first tokens to keep where no window is left beside which they could be.
    """
    windows = full_windows(config, full)
    if config.sinks and not any(windows.values()):
        raise ValueError(
            f"sinks: {config.sinks} first tokens are kept beside a window, and full_layers {full!r} leaves no layer "
            "one; leave sinks out, or choose fewer layers"
        )
    return with_windows(config, windows)


def full_windows(config: "SwatConfig", full: FullLayers) -> dict[int, int | None]:
    """The window of each layer that may have one, where those that `full` chooses have none.

    Raises:
        ValueError: as `window_plan`; a model in which no layer has a window, so that nothing would change; one in which
            some have none already, which `none` or `last` would leave as they are.
    """
    windows = windows_of(config)
    if not any(windows.values()):
        raise ValueError(
            f"full_layers: {full!r} chooses among layers with a window, and this model has none; give it a window too"
        )
    without = [str(index) for index, window in windows.items() if window is None]
    if without:
        which = f"layer{'s' * (len(without) > 1)} {', '.join(without[:3])}{' ...' if len(without) > 3 else ''}"
        raise ValueError(
            f"full_layers: {full!r} chooses among layers that all have a window, and {which} of this model "
            f"{'have' if len(without) > 1 else 'has'} none; give all of them one by a single number (--window 1024, "
            "sliding_window: 1024), or leave full_layers out, which keeps the layers as they are"
        )
    chosen = set(choose_layers(full, [*windows]))
    return {index: None if index in chosen else window for index, window in windows.items()}


def windows_of(config: "SwatConfig") -> dict[int, int | None]:
    """The window of each layer of attention, which may have one or not, by the layer's number."""
    return {
        index: entry.settings.sliding_window
        for index, entry in enumerate(config.plan())
        if issubclass(entry.kind, AttentionLayer)
    }


def with_windows(config: "SwatConfig", windows: Mapping[int, int | None]) -> "SwatConfig":
    """The same configuration with other windows, by the layer's number; other layers keep theirs.

    First tokens are kept beside a window, so without any they are not.
    """
    fields = config.to_dict()
    own = [getattr(entry.settings, "sliding_window", None) for entry in config.plan()]
    each = [windows.get(index, window) for index, window in enumerate(own)]
    # derived from windows where it is left out
    fields.pop("layer_types")
    keeps = [window is not None for window in each]
    if config.layers is not None:
        # what an entry says of its own would come before the list
        written = expand(config.layers)
        cycled = [written[index % len(written)] for index in range(config.num_hidden_layers)]
        dropped = [
            set() if index not in windows else {"sliding_window"} if window is not None else {"sliding_window", "sinks"}
            for index, window in enumerate(each)
        ]
        fields["layers"] = [
            {"kind": kind, **{key: value for key, value in own.items() if key not in names}}
            for (kind, own, _), names in zip(cycled, dropped, strict=True)
        ]
        # what an entry says of its own is not asked of the model
        keeps = [has and "sinks" not in own for has, (_, own, _) in zip(keeps, cycled, strict=True)]
    if not any(keeps):
        fields["sinks"] = 0
    return type(config).from_dict({**fields, "sliding_window": each})

"""`swat-lm info --plans`: what it costs which layers keep full attention, row by row; formulas, nothing is run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swat_lm.cli.console import print_table, text_table
from swat_lm.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from swat_lm.model.configuration import SwatConfig

__all__ = ["PLAN_WINDOW", "print_plans"]

LENGTHS = (4_096, 32_768, 131_072)
# where there are as many layers of attention
USUAL = ("none", "last", "every:6", "every:3", "every:2")
PLAN_WINDOW = 1024
"""Of a model that has no window of its own."""


def print_plans(
    theirs: "PreTrainedConfig", window: int | None, asked: Sequence[str], lengths: Sequence[int] | None
) -> None:
    """Print what each plan keeps for one stream after so many tokens, and what one token then costs.

    Args:
        theirs: of a model of ours, or of one that can be taken over, which then is counted as if it were.
        window: of the layers that have one; None: the model's own narrowest, else 1,024.
        asked: more plans, as `window_plan` reads them.
        lengths: tokens; None: 4,096, 32,768 and 131,072.

    Raises:
        ValueError: a model without attention, one that cannot be taken over, or a plan that means nothing.
    """
    from swat_lm.model import cost
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.conversion import convert_config
    from swat_lm.model.window_plan import windows_of

    config = without_biases(theirs if isinstance(theirs, SwatConfig) else convert_config(theirs))
    own = windows_of(config)
    if not own:
        raise ValueError("--plans: the model has no layer of attention, so none that could keep full attention")
    window = window or min((width for width in own.values() if width is not None), default=PLAN_WINDOW)
    lengths = lengths or LENGTHS
    rows = []
    for name, planned in plans_of(config, window, asked):
        windows = windows_of(planned).values()
        held = [cost.state_bytes(planned, context=length) for length in lengths]
        work = cost.decoding_flops_per_token(planned, lengths[-1])
        full = sum(width is None for width in windows)
        rows.append([name, str(full), str(len(windows) - full), *(f"{size:,}" for size in held), f"{work:.3g}"])
    print_table(
        text_table(
            [
                "plan", "full layers", "windowed", *(f"state bytes at {length:,}" for length in lengths),
                f"FLOPs per token at {lengths[-1]:,}",
            ],
            rows,
            title=f"{counted(len(own), 'layer')} of attention, window {window:,}; one stream in bf16",
            left=("plan",),
        )
    )  # fmt: skip


def without_biases(config: "SwatConfig") -> "SwatConfig":
    """The same costs without biases of scores, which may follow from a window that a layer then has not."""
    fields = {**config.to_dict(), "score_bias": 0.0}
    entries = [dict(entry) if isinstance(entry, Mapping) else entry for entry in fields["layers"] or []]
    for entry in entries:
        if isinstance(entry, dict):
            entry.pop("score_bias", None)
    return type(config).from_dict({**fields, "layers": entries or None})


def plans_of(config: "SwatConfig", window: int, asked: Sequence[str]) -> "list[tuple[str, SwatConfig]]":
    """Plans by what they are called: the model's own, all layers full, the usual ones, and those asked for."""
    from swat_lm.model.window_plan import full_windows, windows_of, with_windows

    layers = windows_of(config)
    windowed = with_windows(config, dict.fromkeys(layers, window))
    usual = [word for word in USUAL if int(word.partition(":")[2] or 1) < len(layers)]
    words = [*usual, *(word for word in dict.fromkeys(asked) if word not in usual)]
    planned = [(word, with_windows(windowed, full_windows(windowed, word))) for word in words]
    return [("as it is", config), ("all full", with_windows(config, dict.fromkeys(layers))), *planned]

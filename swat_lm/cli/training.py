"""`swat-lm train`: run a recipe, continue it after an interruption."""

from typing import Annotated

import typer

from swat_lm.cli.console import results
from swat_lm.cli.failures import INTERRUPTED
from swat_lm.cli.progress import RunProgress

__all__ = ["train"]

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name in `swat-lm recipes`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace the recipe's, for example train.steps=100; names and paths as typed.",
    ),
]


def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train a model as a recipe says.

    Everything lands in the recipe's `out` folder: recipe.yaml (resolved), metrics.jsonl, checkpoints, and `export`, a
    folder that Hugging Face's `from_pretrained` loads. The same command continues after any interruption; Ctrl-C saves
    first.

    \b
    Examples:
      swat-lm train own-text data.sources=notes/ out=runs/mine
      swat-lm train swat-340m train.micro_batch_size=4
      torchrun --nproc-per-node 8 -m swat_lm.cli train swat-760m
    """
    from swat_lm.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    from swat_lm.train import run

    with RunProgress() as progress:
        result = run(settings, lambda event: progress.event(settings.name, event))
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    out = results()
    if result.last_loss is None:
        other = "" if settings.train.schedule == "constant" else (
            f", which stretches the {settings.train.schedule} schedule: the result is not that of a fresh run"
        )  # fmt: skip
        out.print(f"already trained to step {result.last_step}; for more, raise train.steps{other}", markup=False)
    else:
        held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f}"
        out.print(f"step {result.last_step}: loss {result.last_loss:.4f}{held_out}", markup=False)
    for name, folder in (("checkpoint", result.checkpoint), ("model", result.export)):
        if folder is not None:
            out.print(f"{name}: {folder}", markup=False)

"""`swat-lm recipes`: the recipes that come with swat-lm, listed or one of them printed."""

from typing import Annotated

import typer

from swat_lm.cli.console import key_value_table, results
from swat_lm.named_recipes import recipe_names, recipe_path, recipe_summary

__all__ = ["recipes"]


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one; leave out to list all.")] = None,
) -> None:
    """List the recipes that come with swat-lm, or print one.

    Their names stand wherever a recipe is asked for, and in the line `inherits:` of a recipe of your own.

    \b
    Examples:
      swat-lm recipes
      swat-lm recipes own-text > mine.yaml
    """
    if name is None:
        results().print(key_value_table([(known, recipe_summary(known)) for known in recipe_names()]))
        return
    # as it is in the file: no wrapping, no markup
    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)

"""The command line: parses, delegates, shows progress, and turns errors into one line. The entry point is `main`.

Each command is a module beside this one. Heavy imports (torch, transformers) happen inside commands, so that `--help`
answers at once.
"""

import sys

from swat_lm.words import install_extra

__all__ = ["main"]

NEEDED = ("typer", "rich", "yaml")


def main() -> None:
    """Run `swat-lm`; without the packages it needs, say in one line what to install and leave with 2."""
    try:
        from swat_lm.cli.application import run_application
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        if sys.stderr is not None:
            sys.stderr.write(
                f"error: the command line needs {error.name}, which is not installed: {install_extra('train')}\n"
            )
        raise SystemExit(2) from None
    raise SystemExit(run_application())

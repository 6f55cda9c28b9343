"""The `swat-lm` application: global options, the list of commands, and how each of them may end."""

import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from swat_lm.cli import (
    benchmarks,
    comparison,
    conversion,
    demonstration,
    diagnosis,
    evaluation,
    generation,
    information,
    preparation,
    recall,
    recipes,
    reproduction,
    training,
    tuning,
)
from swat_lm.cli.console import messages
from swat_lm.cli.failures import INTERRUPTED, USER_ERROR, quiet_broken_pipe, report_failure

__all__ = ["application", "run_application"]

application = typer.Typer(
    name="swat-lm",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
measurements = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

application.command(name="demo")(demonstration.demo)
application.command(name="train")(training.train)
application.command(name="tokenizer")(preparation.tokenizer)
application.command(name="prepare")(preparation.prepare)
application.command(name="generate")(generation.generate)
application.add_typer(measurements, name="evaluate")
measurements.command(name="length")(evaluation.length)
measurements.command(name="recall")(recall.recall)
measurements.command(name="reach")(recall.reach)
measurements.command(name="diagnose")(diagnosis.diagnose)
measurements.command(name="tasks")(benchmarks.tasks)
application.command(name="reproduce")(reproduction.reproduce)
application.command(name="report")(comparison.report)
application.command(name="recipes")(recipes.recipes)
application.command(name="info")(information.info)
application.command(name="convert")(conversion.convert)
application.command(name="tune")(tuning.tune)

# the base of every usage error; typer carries its own copy of click in newer versions
USAGE_ERROR: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


@measurements.callback()
def measure() -> None:
    """Measure a trained model."""


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"swat-lm {importlib.metadata.version('swat-lm')}")
        raise typer.Exit


@application.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, evaluate and run language models whose attention is a sliding window.

    Begin with `swat-lm demo`: it trains a small model on this machine and shows what the window is good for.
    """


def run_application(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 an error to act on, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # accepted anywhere: whoever adds it does so after a failure, at the end of the line
    debug = "--debug" in given
    given = [one for one in given if one != "--debug"]
    set_up_output(debug)
    try:
        code = application(given, standalone_mode=False, prog_name="swat-lm")
    except BrokenPipeError:
        return quiet_broken_pipe()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except USAGE_ERROR as error:
        text = error.format_message()  # type: ignore[attr-defined]
        # a command without its arguments shows its help, which comes as the message of this exception
        is_help = type(error).__name__ == "NoArgsIsHelpError"
        messages().print(text if is_help else f"error: {' '.join(text.split())}", markup=False)
        return USER_ERROR
    except Exception as error:
        # the one place that catches all: what is not the user's to mend is shown whole and ends with 1
        return report_failure(error, debug)
    if code == INTERRUPTED:
        messages().print("interrupted")
    return code if isinstance(code, int) else 0


def set_up_output(debug: bool) -> None:
    """Our own remarks in one style on stderr; libraries' progress bars and advice stay away unless asked for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        # read by tqdm itself, which all the libraries draw with, when it is first imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    logger = logging.getLogger("swat_lm")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    warnings.showwarning = show_warning


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """One line per warning, without the source line Python would add."""
    # the plain kind says nothing that the level does not
    kind = "" if category is UserWarning else f"{category.__name__}: "
    logging.getLogger("swat_lm").warning("%s%s", kind, " ".join(str(message).split()))

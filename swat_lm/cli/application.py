"""The `swat-lm` application: global options, the list of commands, and how each of them may end."""

import functools
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from swat_lm.cli import (
    benchmarks,
    chatting,
    conversion,
    demonstration,
    diagnosis,
    generation,
    information,
    length,
    preparation,
    recall,
    recipes,
    reproduction,
    run_report,
    serving,
    studies,
    training,
    tuning,
)
from swat_lm.cli.console import messages
from swat_lm.cli.failures import INTERRUPTED, USER_ERROR, describe_os_error, report_failure
from swat_lm.cli.streams import Outlet, lasting_streams, remark
from swat_lm.paths import local_path

__all__ = ["application", "run_application"]


def located(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose paths may begin with `~`, which shells leave as it is in `--out=~/x` or between quotes.

    Raises FileNotFoundError where the current directory was removed, in which libraries end the process when loaded.
    """

    @functools.wraps(command)
    def call(**options: Any) -> None:
        try:
            os.getcwd()
        except FileNotFoundError:
            raise FileNotFoundError("the current directory was removed: change to another one") from None
        command(**{name: local_path(value) if isinstance(value, Path) else value for name, value in options.items()})

    return call


application = typer.Typer(
    name="swat-lm",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
measurements = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure a trained model.")
COMMANDS: dict[typer.Typer, tuple[Callable[..., None], ...]] = {
    application: (
        demonstration.demo, training.train, preparation.tokenizer, preparation.prepare, generation.generate,
        serving.serve, chatting.chat, reproduction.reproduce, studies.study, run_report.report, recipes.recipes,
        information.info, conversion.convert, tuning.tune,
    ),
    measurements: (length.length, recall.recall, recall.reach, diagnosis.diagnose, benchmarks.tasks),
}  # fmt: skip
for group, commands in COMMANDS.items():
    for command in commands:
        group.command(name=command.__name__)(located(command))
application.add_typer(measurements, name="evaluate")

# the base of every usage error; typer carries its own copy of click in newer versions
USAGE_ERROR: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


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
    """Run the command line and return its exit code: 0 done, 2 an error to act on, 130 interrupted.

    A reader of the output that goes away is no error. One that could not take it all is, after the work is done.
    """
    with lasting_streams() as out:
        code = run_command(list(sys.argv[1:] if arguments is None else arguments))
        return code or check_written(out)


def check_written(out: Outlet) -> int:
    """Say what of the results could not be written, or not as it is; returns the exit code."""
    out.flush()
    note = remark(out)
    if note is not None:
        messages().print(f"note: {note}", markup=False)
    if out.failure is None:
        return 0
    messages().print(f"error: cannot write to stdout: {describe_os_error(out.failure)}", markup=False)
    return USER_ERROR


def run_command(given: list[str]) -> int:
    """Run the command line on open streams and return its exit code."""
    # accepted anywhere: whoever adds it does so after a failure, at the end of the line
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    set_up_output(debug)
    try:
        code = application(given, standalone_mode=False, prog_name="swat-lm")
    except SystemExit as left:
        if not isinstance(left.__context__, OSError):
            raise
        # so typer leaves, without a word, where a pipe broke that is none of the standard streams
        return report_failure(left.__context__, debug)
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
        handler = MessageHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    warnings.showwarning = show_warning


class MessageHandler(logging.StreamHandler[Any]):
    """Writes to whatever stderr is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stderr
        super().emit(record)


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """One line per warning, without the source line Python would add."""
    # the plain kind says nothing that the level does not
    kind = "" if category is UserWarning else f"{category.__name__}: "
    logging.getLogger("swat_lm").warning("%s%s", kind, " ".join(str(message).split()))

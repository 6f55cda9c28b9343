"""What goes wrong, in one line on stderr with exit code 2; the traceback only under `--debug`."""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from swat_lm.cli.console import on_main_process
from swat_lm.words import install_extra

USER_ERROR = 2
INTERRUPTED = 130

# raised by libraries for files that are not what they should be, without being ValueError or OSError
FOREIGN = {
    ("safetensors", "SafetensorError"),
    ("yaml", "YAMLError"),
    ("swat_lm", "DivergedError"),
    ("huggingface_hub", "StrictDataclassError"),
    ("transformers", "OutOfMemoryError"),
    ("torch", "OutOfMemoryError"),
}


def describe_failure(error: BaseException) -> str | None:
    """One line for an error that the user can act on; None for one that is ours."""
    if isinstance(error, ModuleNotFoundError):
        # only a missing third-party package is the user's to mend
        name = (error.name or "").partition(".")[0]
        if not name or name == "swat_lm":
            return None
        return f"this command needs {name}, which is not installed: {install_extra('train')}"
    if isinstance(error, OSError):
        return one_line(describe_os_error(error))
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if isinstance(error, ValueError) or names & FOREIGN:
        return one_line(str(error) or type(error).__name__)
    return None


def describe_os_error(error: OSError) -> str:
    """The system's words with the file they are about; a message of our own as it is."""
    if error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return error.strerror or str(error) or type(error).__name__


def one_line(text: str) -> str:
    """A message without line breaks."""
    return " ".join(text.split())


def report_failure(error: BaseException, debug: bool) -> int:
    """Print the error and return the exit code; re-raise nothing.

    Of several processes, those that only repeat what the main process met stay silent.
    """
    message = describe_failure(error)
    if message is None or debug:
        traceback.print_exception(error)
        if message is None:
            sys.stderr.write("This is a defect of swat-lm, not of your input; the lines above say where.\n")
            return 1
    if on_main_process():
        sys.stderr.write(f"error: {message}\n")
    elif not came_from_main(error):
        sys.stderr.write(f"error (process {os.environ['RANK']}): {message}\n")
    sys.stderr.flush()
    tell_torchrun(message)
    return USER_ERROR


def tell_torchrun(message: str) -> None:
    """Put the line into torchrun's own report too, which ends its many lines and comes after all of ours."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def came_from_main(error: BaseException) -> bool:
    """Whether the main process met this error, or the one it stands for, and told the others (`Engine.on_main`)."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(getattr(cause, "from_main_process", False) for cause in chain)

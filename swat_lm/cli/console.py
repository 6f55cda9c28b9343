"""Where the command line writes: results on stdout, everything else on stderr, and only on the main process."""

import os

from rich.console import Console
from rich.table import Table

__all__ = ["key_value_table", "messages", "on_main_process", "results"]


def on_main_process() -> bool:
    """Whether this process is the first of a torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def results() -> Console:
    """The console on stdout; made anew, so that it follows a redirected stdout."""
    return Console(quiet=not on_main_process(), highlight=False, soft_wrap=True)


def messages() -> Console:
    """The console on stderr for progress and remarks."""
    return Console(stderr=True, quiet=not on_main_process(), highlight=False, soft_wrap=True)


def key_value_table(rows: list[tuple[str, str]], title: str | None = None) -> Table:
    """Two columns without lines: what, and how much."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table

"""Where the command line writes: results on stdout, everything else on stderr, and only on the main process.

Tables lose no figure on a narrow terminal: headings wrap, and where that is not enough each row becomes a list.
"""

import os
from collections.abc import Collection, Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

__all__ = ["key_value_table", "messages", "on_main_process", "print_table", "results", "text_table"]


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


def text_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    left: Collection[str] = (),
    gap: int = 3,
) -> Table:
    """A table without lines, its columns so many spaces apart; cells stand on the right but for the columns `left`."""
    table = Table(
        title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, gap, 0, 0)
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table without lines so that no cell is cut off or wrapped.

    Columns draw together and shrink to their cells and the longest word of their heading. A table that is still wider
    than the terminal is printed as lists: a row's first cell, and the others below it, each behind its heading.
    """
    console = console or results()
    columns = [(str(column.header), [str(cell) for cell in column.cells]) for column in table.columns]
    least = [max(map(cell_len, [*heading.split(), *cells, ""])) for heading, cells in columns]
    widths = [max(cell_len(heading), width) for (heading, _), width in zip(columns, least, strict=True)]
    rooms = {gap: console.width - gap * (len(columns) - 1) for gap in range(table.padding[1], 0, -1)}
    # columns stand closer rather than that the rows become lists
    gap = next((gap for gap, room in rooms.items() if sum(least) <= room), 0)
    if not gap:
        print_rows(console, str(table.title or ""), columns)
        return
    table.padding = (0, gap, 0, 0)
    while sum(widths) > rooms[gap]:
        # the widest heading wraps first
        spare = [width - need for width, need in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.no_wrap, column.overflow = width, False, "fold"
    console.print(table, markup=False)


def print_rows(console: Console, title: str, columns: list[tuple[str, list[str]]]) -> None:
    """The rows of a table one below the other."""
    if title.strip():
        console.print(title, markup=False)
    (first, names), *others = columns
    widest = max((cell_len(heading) for heading, _ in others), default=0)
    for row, name in enumerate(names):
        console.print(f"{first} {name}".strip(), markup=False)
        for heading, cells in others:
            console.print(f"  {heading}{' ' * (widest - cell_len(heading))}  {cells[row]}", markup=False)

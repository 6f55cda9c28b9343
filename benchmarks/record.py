"""Where results go: this machine's own into an ignored folder, the committed record only on request.

    python -m benchmarks.record runs/benchmarks/NAME.json [more files]    make finished results the record

A benchmark writes `runs/benchmarks/NAME.json`, which git ignores; with `--record` it then makes that file the record,
`benchmarks/results/NAME.json`, from which the documents' tables are written.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.table import BENCHMARKS, render
from swat_lm.files import write_text

OWN = measure.REPOSITORY / "runs" / "benchmarks"
FIELDS = ("machine", "settings", "rows", "goals")
HELP = "also make the result the committed record in benchmarks/results, which the documents show"


def main(arguments: list[str] | None = None) -> int:
    """Make finished results the record; returns the exit code, 2 for a file that is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what a benchmark wrote, of any machine")
    options = parser.parse_args(arguments)
    try:
        # all are looked at before one is written
        texts = {path: read_result(path)[0] for path in options.results}
        for path in texts:
            sys.stdout.write(f"{make_record(path)}\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("make docs    writes the documents' tables from it\n")
    return 0


def save(
    name: str,
    rows: list[dict[str, Any]],
    goals: list[dict[str, Any]],
    settings: dict[str, Any],
    kind: str = "",
    **more: Any,
) -> Path:
    """Write one benchmark's result into the ignored folder; returns the file.

    A `kind` of run that measures less has a file of its own beside that of the whole one: `NAME-KIND.json`. `more` are
    further fields of the record: `gpu` describes the card, `details` is not shown in the documents.
    """
    record = {
        "benchmark": name, "machine": measure.machine(), "settings": settings, "rows": rows, "goals": goals, **more,
    }  # fmt: skip
    path = OWN / (f"{name}-{kind}.json" if kind else f"{name}.json")
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path


def finish(path: Path, to_record: bool) -> str:
    """Make a saved result the record if that was asked for; returns the lines that end a benchmark's output."""
    if to_record:
        return f"{path}\n{make_record(path)}\nmake docs    writes the documents' tables from it\n"
    return f"{path}\nThe committed record is as it was; python -m benchmarks.record {path}    makes this the record\n"


def make_record(path: Path) -> Path:
    """Copy a result to its place in the record; returns that place. Raises ValueError as `read_result` does."""
    text, name = read_result(path)
    place = measure.RESULTS / f"{name}.json"
    write_text(place, text)
    return place


def read_result(path: Path) -> tuple[str, str]:
    """The text of a result and its benchmark's name.

    Raises:
        ValueError: no such file, or not what a benchmark writes.
    """
    expected = f"expected a JSON file that a benchmark wrote, such as runs/benchmarks/{BENCHMARKS[0]}.json"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; {expected}")
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {expected}") from None
    name = record.get("benchmark") if isinstance(record, dict) else None
    if name not in BENCHMARKS:
        raise ValueError(f"{path}: names the benchmark {name!r}, not one of {', '.join(BENCHMARKS)}; {expected}")
    lacking = [field for field in FIELDS if field not in record]
    if lacking:
        raise ValueError(f"{path}: lacks {', '.join(lacking)}; {expected}")
    try:
        # what the tables cannot show would be found only once it is the record
        render(record)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be shown ({type(error).__name__}: {error}); {expected}") from None
    return text, name


if __name__ == "__main__":
    sys.exit(main())

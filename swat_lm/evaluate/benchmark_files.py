"""Reads the benchmarks' local files: rows of .jsonl with known fields, and WikiText's lines as whole pages."""

import itertools
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from swat_lm.data.source_text import decoded_blocks, read_rows
from swat_lm.data.sources import COMPRESSIONS, DataError, source_file
from swat_lm.evaluate.benchmarks import PAGES, Benchmark, Doc, Form

__all__ = ["find_files", "pages", "read_documents", "read_pages"]


def find_files(folder: Path, benchmarks: Sequence[Benchmark]) -> list[Path]:
    """The first of each benchmark's files that the folder holds; raises DataError that names all that are missing."""
    found = [find_file(folder, benchmark) for benchmark in benchmarks]
    lacking = {benchmark.task: benchmark for benchmark, path in zip(benchmarks, found, strict=True) if path is None}
    if lacking:
        each = "; of task ".join(
            f"{task}: expected " + " or ".join(f"{stem}{kinds_of(benchmark)[0]}" for stem in benchmark.files)
            for task, benchmark in lacking.items()
        )
        raise DataError(
            f"{folder} lacks the file of task {each}, maybe with .xz or .gz added; "
            "choose the tasks that are there with --tasks, or take all from --data hub"
        )
    return [path for path in found if path is not None]


def kinds_of(benchmark: Benchmark) -> tuple[str, ...]:
    """Suffixes of a benchmark's files, the usual one first."""
    return (".txt", ".jsonl") if benchmark.forms is PAGES else (".jsonl",)


def find_file(folder: Path, benchmark: Benchmark) -> Path | None:
    """The first of the benchmark's files that the folder holds."""
    places = [place for stem in benchmark.files for place in (stem, Path(stem).name)]
    names = map("".join, itertools.product(places, kinds_of(benchmark), ("", *COMPRESSIONS)))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_documents(path: Path, benchmark: Benchmark) -> tuple[Form, list[Doc]]:
    """The rows of a .jsonl file as documents for the harness, and the layout they have.

    Raises:
        DataError: fields that are missing or of another type, or no such answer; with file, line and field.
    """
    form, docs = None, []
    for place, row in read_rows(source_file(path)):
        if form is None:
            form = choose_form(row, benchmark, place)
        check_fields(row, form, place)
        try:
            docs.append(form.adapt(row))
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
    assert form is not None
    return form, docs


def choose_form(row: Doc, benchmark: Benchmark, place: str) -> Form:
    """The layout whose fields the row has; raises DataError that says which are missing."""
    for form in benchmark.forms:
        if form.fields.keys() <= row.keys():
            return form
    best = max(benchmark.forms, key=lambda form: len(form.fields.keys() & row.keys()))
    missing = [name for name in best.fields if name not in row]
    raise DataError(
        f"{place}: task {benchmark.task} needs field {', '.join(map(repr, missing))}; the row has "
        f"{', '.join(row) or 'none'} (known layouts: {'; '.join(', '.join(form.fields) for form in benchmark.forms)})"
    )


def check_fields(row: Doc, form: Form, place: str) -> None:
    """Raise DataError for a field that is missing, of another type, or an empty list or text."""
    for name, kind in form.fields.items():
        if name not in row:
            raise DataError(f"{place}: field {name!r} is missing; the rows before have it")
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(alternative.__name__ for alternative in kinds)
            raise DataError(f"{place}: field {name!r} must be {expected}; got {type(value).__name__}")
        if isinstance(value, list) and not (value and all(isinstance(text, str) and text for text in value)):
            raise DataError(f"{place}: field {name!r} must be a list of texts that are not empty")


def read_pages(path: Path) -> list[Doc]:
    """WikiText's lines as the documents that the harness's `wikitext` has, one per article; raises DataError."""
    found = [
        {"page": page} for page in pages("".join(decoded_blocks(source_file(path), lambda count: None)).split("\n"))
    ]
    if not found:
        raise DataError(f"{path}: the file is empty")
    return found


def pages(lines: Sequence[str]) -> Iterator[str]:
    """Articles, cut before each heading of the first level (` = Title = `) as the harness's data set is.

    A line of an article that looks like such a heading cuts there too, as in that data set (two formulas do in the
    test split, which so has 62 documents).
    """
    numbers = itertools.accumulate(map(is_heading, lines))
    for _, numbered in itertools.groupby(zip(numbers, lines, strict=True), key=itemgetter(0)):
        text = "\n".join(line for _, line in numbered)
        if text.strip():
            yield text


def is_heading(line: str) -> bool:
    """Whether a line is a heading of the first level."""
    # "= = Section = =" begins with "==" afterwards
    squeezed = line.replace("= = =", "===").replace("= =", "==").strip()
    return squeezed.startswith("= ") and squeezed.endswith(" =")

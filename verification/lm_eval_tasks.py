"""lm-evaluation-harness's own tasks over local files: its YAML files are included, and only the data is another's.

Nothing of `swat_lm.evaluate` is used here, so that both sides read the files for themselves.
"""

import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from swat_lm.files import write_text

__all__ = ["TASKS", "Task", "local_name", "write_task"]

Row = dict[str, Any]


class Task(NamedTuple):
    """How the stock harness gets a task's documents from a local file."""

    definition: str
    """The harness's YAML file."""
    split: str
    file: str
    """The local file's name without what its compression adds."""
    read: Callable[[Path], Iterator[Row]]
    """Its documents, as the harness's own data set has them."""
    changes: str = ""
    """Lines of YAML that the file needs beside."""


def rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl file."""
    yield from map(json.loads, text_of(path).splitlines())


def text_of(path: Path) -> str:
    """A file's text, plain or packed by xz."""
    content = path.read_bytes()
    return (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")


def arc(path: Path) -> Iterator[Row]:
    """ARC, whose answer the harness finds by its letter."""
    for row in rows(path):
        letters = "ABCDEFGH"[: len(row["choices"])]
        yield {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list(letters)},
            "answerKey": letters[row["gold"]],
        }


def only(*fields: str) -> Callable[[Path], Iterator[Row]]:
    """Rows with these fields, as they are."""
    return lambda path: ({field: row[field] for field in fields} for row in rows(path))


def hellaswag(path: Path) -> Iterator[Row]:
    """HellaSwag that has been through the harness's `process_docs` already."""
    for row in rows(path):
        yield {"query": row["query"], "choices": row["choices"], "label": row["gold"]}


def articles(path: Path) -> Iterator[Row]:
    """WikiText cut before each heading of the first level; a formula `= x =` cuts too, as in the harness's data set.

    The last line's end stays: that data set splits the file at line ends and joins what belongs together.
    """
    lines = text_of(path).splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if re.fullmatch(r" = (?!= ).* (?<!= )= ?\n", line)]
    for begin, end in itertools.pairwise([0, *starts, len(lines)]):
        page = "".join(lines[begin:end])
        page = page if end == len(lines) else page.removesuffix("\n")
        if page.strip():
            yield {"page": page}


TASKS = {
    "piqa": Task(
        "piqa/piqa.yaml", "validation", "commonsense/piqa_validation.jsonl", only("goal", "sol1", "sol2", "label")
    ),
    "arc_easy": Task("arc/arc_easy.yaml", "test", "commonsense/arc_easy_test.jsonl", arc),
    "lambada_openai": Task(
        "lambada/lambada_openai.yaml", "test", "commonsense/lambada_openai_test.jsonl", only("text")
    ),
    "hellaswag": Task(
        "hellaswag/hellaswag.yaml", "validation", "commonsense/hellaswag_validation.jsonl", hellaswag,
        "process_docs: null\n",
    ),
    "wikitext": Task("wikitext/wikitext.yaml", "test", "lm/wikitext-103.test.txt", articles),
}  # fmt: skip


def local_name(name: str) -> str:
    """What a task over local files is called, beside the harness's own."""
    return f"local_{name}"


def write_task(name: str, data: Path, folder: Path) -> None:
    """Write the documents and the task's YAML file, for the harness's `--include_path`.

    Raises:
        FileNotFoundError: the data folder lacks the file.
    """
    import lm_eval.tasks

    task = TASKS[name]
    found = [path for end in ("", ".xz") if (path := data / f"{task.file}{end}").is_file()]
    if not found:
        raise FileNotFoundError(f"{data} lacks {task.file}, plain or with .xz, which task {name} needs")
    documents = folder / f"{name}.jsonl"
    write_text(documents, "".join(json.dumps(row) + "\n" for row in task.read(found[0])))
    splits = {"training": "null", "validation": "null", "test": "null", task.split: task.split}
    lines = [
        f"include: {Path(lm_eval.tasks.__file__).parent / task.definition}",
        f"task: {local_name(name)}",
        "tag: null",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {json.dumps({'data_files': {task.split: str(documents)}})}",
        *(f"{split}_split: {value}" for split, value in splits.items()),
    ]
    write_text(folder / f"{local_name(name)}.yaml", "\n".join(lines) + "\n" + task.changes)

"""lm-evaluation-harness's tasks with their documents, from the hub or from local files, checked beforehand."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from swat_lm.data.sources import DataError, source_file
from swat_lm.evaluate.benchmark_files import find_files, read_documents, read_pages
from swat_lm.evaluate.benchmarks import BENCHMARKS, PAGES, Benchmark, Doc
from swat_lm.paths import local_path
from swat_lm.words import did_you_mean, install_extra

__all__ = ["HUB", "STREAMED", "LoadedTask", "check_harness", "load_tasks", "task_names"]

HUB = "hub"
STREAMED = "_streamed"
"""Ends the names of tasks whose texts are read as one stream; see `LoadedTask.rolling`."""
KNOWN = (*BENCHMARKS, *(name + STREAMED for name, benchmark in BENCHMARKS.items() if benchmark.forms is PAGES))


@dataclass(frozen=True)
class LoadedTask:
    """A task of the harness that is ready to ask a model."""

    name: str
    """The harness's name, or that with `_streamed`."""
    task: Any
    """The harness's object."""
    source: str
    """Where the documents are from."""
    fingerprint: str
    """Changes with the documents."""
    remark: str | None = None
    """What sets the documents apart from the harness's."""
    rolling: str = "windows"
    """How whole texts are scored, "windows" (the harness's way) or "whole"; see `HarnessModel`."""


def check_harness() -> None:
    """Raise ValueError that says what to install where lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"this command needs lm-evaluation-harness, which is not installed: {install_extra('eval')}")


def task_names(wanted: str | None) -> list[str]:
    """Names with commas between as a list; all of Table 1 for None. Raises ValueError for none or a repeated one."""
    if wanted is None:
        return list(BENCHMARKS)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks: no task named; known are {', '.join(KNOWN)}")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise ValueError(f"--tasks: {repeated} is named twice")
    return names


def load_tasks(names: Sequence[str], data: str) -> list[LoadedTask]:
    """The tasks with all their documents, read and checked.

    Args:
        names: keys of BENCHMARKS, also with `_streamed` where whole texts are scored; from the hub any task, group or
            tag of the harness.
        data: `hub`, or a folder of local files.

    Raises:
        DataError: an unknown task, a missing file, rows with other fields, or a data set that the hub does not give.
    """
    check_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if data == HUB else local_path(data)
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"no folder {data}: expected one with the benchmarks' files, or `hub`")
        # every missing file is named before any is read
        find_files(folder, [known_benchmark(name) for name in names])
    tasks: list[LoadedTask] = []
    load = cache(load_from_hub if folder is None else lambda base: [load_local(folder, base)])
    for name in names:
        base = name.removesuffix(STREAMED)
        for task in load(base):
            if name == base:
                tasks.append(task)
            elif task.task.OUTPUT_TYPE == "loglikelihood_rolling":
                tasks.append(replace(task, name=f"{task.name}{STREAMED}", rolling="whole"))
            else:
                raise DataError(f"{name}: only tasks that score whole texts (wikitext) can be streamed")
    return tasks


def known_benchmark(name: str) -> Benchmark:
    """The benchmark of a name; raises DataError with the nearest name for another."""
    base = name.removesuffix(STREAMED)
    if base not in BENCHMARKS:
        raise DataError(
            f"no local form of task {base!r}{did_you_mean(base, BENCHMARKS, ';')} known are {', '.join(KNOWN)}. "
            "The harness's other tasks run "
            "with --data hub"
        )
    return BENCHMARKS[base]


def load_local(folder: Path, name: str) -> LoadedTask:
    """A benchmark from the folder's file, asked as the harness's own task asks."""
    benchmark = known_benchmark(name)
    (path,) = find_files(folder, [benchmark])
    if source_file(path).kind == ".txt":
        docs, changes = read_pages(path), {}
        remark = text_remark(path, docs)
    else:
        form, docs = read_documents(path, benchmark)
        changes, remark = form.changes, None
    digest = hashlib.sha256("\n".join(json.dumps(doc, sort_keys=True) for doc in docs).encode()).hexdigest()
    return LoadedTask(name, local_task(benchmark, docs, changes, path), str(path), f"sha256:{digest}", remark)


def text_remark(path: Path, docs: Sequence[Doc]) -> str:
    """What a WikiText file's words are, beside the harness's raw text."""
    words = [word for doc in docs for word in doc["page"].split()]
    unknown = words.count("<unk>")
    if not unknown:
        return f"{path.name}: {len(docs)} pages of raw text, as the harness has them"
    return (
        f"{path.name}: {len(docs)} pages with {100 * unknown / len(words):.1f} % of the words replaced by <unk>; the "
        "harness (and so the paper) scores the raw text, so this perplexity compares only with others on this file"
    )


def definition(benchmark: Benchmark) -> dict[str, Any]:
    """The harness's settings of a task, its functions among them."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    settings = load_yaml(Path(lm_eval.tasks.__file__).parent / benchmark.definition)
    # a tag would need the index of all tasks, which takes ten seconds to build
    settings.pop("tag", None)
    return settings


def local_task(benchmark: Benchmark, docs: Sequence[Doc], changes: Mapping[str, Any], path: Path) -> Any:
    """The harness's task over the documents."""
    import datasets
    from lm_eval.tasks import TaskManager

    data = datasets.DatasetDict({benchmark.split: datasets.Dataset.from_list(list(docs))})
    settings = definition(benchmark) | {
        "dataset_path": str(path),
        "dataset_name": None,
        "custom_dataset": lambda **_: data,
        "training_split": None,
        "validation_split": benchmark.split if benchmark.split == "validation" else None,
        "test_split": benchmark.split if benchmark.split == "test" else None,
        **changes,
    }
    task: Any = TaskManager(include_defaults=False).load([settings])["tasks"][benchmark.task]
    # it is not asked again, and results would carry it as source code
    task.config.custom_dataset = None
    return task


def load_from_hub(name: str) -> list[LoadedTask]:
    """The harness's own task, group or tag, with its data from the hub or the local cache of it."""
    from lm_eval.tasks import TaskManager

    try:
        if name in BENCHMARKS:
            found = TaskManager(include_defaults=False).load([definition(BENCHMARKS[name])])["tasks"]
        else:
            found = TaskManager().load([name])["tasks"]
    except KeyError as error:
        raise DataError(f"the harness knows no task {name!r}: {error.args[0]}") from error
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"task {name}: no data from the hub: {reason}; or give local files with --data FOLDER"
        ) from error
    tasks = []
    for key, task in found.items():
        data = task.dataset[task.config.test_split or task.config.validation_split]
        tasks.append(LoadedTask(key, task, f"hub:{task.DATASET_PATH}", f"datasets:{data._fingerprint}"))
    return tasks

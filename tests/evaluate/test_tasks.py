"""Benchmarks from local files ask what the harness's own tasks ask; other files are named as such."""

import json
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("lm_eval")

from swat_lm.data.sources import DataError  # noqa: E402
from swat_lm.evaluate import tasks as tasks_module  # noqa: E402
from swat_lm.evaluate.benchmark_files import pages  # noqa: E402
from swat_lm.evaluate.benchmarks import BENCHMARKS  # noqa: E402
from swat_lm.evaluate.table1 import COLUMNS  # noqa: E402
from swat_lm.evaluate.tasks import load_tasks, task_names  # noqa: E402
from tests.evaluate.benchmark_rows import FILES, HARNESS, OTHER_PAGE, PAGE, write_files  # noqa: E402


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """The hub's data sets, made up: what the harness's definitions name is answered with rows in the hub's fields."""
    asked: list[tuple[str, str | None]] = []
    paths = {
        "baber/piqa": "piqa",
        "Rowan/hellaswag": "hellaswag",
        "allenai/winogrande": "winogrande",
        "allenai/ai2_arc": "arc_easy",
        "lighteval/siqa": "social_iqa",
        "aps/super_glue": "boolq",
        "EleutherAI/lambada_openai": "lambada_openai",
        "EleutherAI/wikitext_document_level": "wikitext",
    }

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        rows = datasets.Dataset.from_list(HARNESS[paths[path]])
        return datasets.DatasetDict({"train": rows, "validation": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def requests_of(task: Any) -> list[tuple[str, tuple[Any, ...], int]]:
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(one.request_type, one.args, one.doc_id) for one in task.instances]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_file_asks_what_the_harness_asks(name: str, tmp_path: Path, hub: list):
    (own,) = load_tasks([name], "hub")
    assert hub
    (local,) = load_tasks([name], str(write_files(tmp_path, (name,))))
    assert len(hub) == 1, "a local task must not ask the hub"
    assert local.name == own.name == name
    assert requests_of(local.task) == requests_of(own.task)
    # the answers, and what becomes of log-likelihoods
    assert type(local.task) is type(own.task)
    assert [local.task.doc_to_target(doc) for doc in local.task.eval_docs] == [
        own.task.doc_to_target(doc) for doc in own.task.eval_docs
    ]
    assert local.task.aggregation() == own.task.aggregation()
    assert local.task.VERSION == own.task.VERSION
    for number, (mine, theirs) in enumerate(zip(local.task.eval_docs, own.task.eval_docs, strict=True)):
        count = sum(one.doc_id == number for one in own.task.instances)
        if own.task.OUTPUT_TYPE == "loglikelihood_rolling":
            answers: list[Any] = [-7.0]
        else:
            answers = [(-float(3 + 5 * choice % 4), choice == 0) for choice in range(count)]
        assert local.task.process_results(mine, answers) == own.task.process_results(theirs, answers)


def test_files_as_their_authors_publish_them(tmp_path: Path, hub: list):
    for name in ("hellaswag", "arc_easy"):
        path = tmp_path / Path(FILES[name]).name.removesuffix(".xz")
        path.write_text("\n".join(json.dumps(row) for row in HARNESS[name]))
        (local,), (own,) = load_tasks([name], str(tmp_path)), load_tasks([name], "hub")
        assert requests_of(local.task) == requests_of(own.task)


def test_metrics_of_table_1_exist(tmp_path: Path):
    for loaded in load_tasks(list(BENCHMARKS), str(write_files(tmp_path))):
        metrics = {column.metric for column in COLUMNS if column.task == loaded.name}
        assert metrics
        assert metrics <= loaded.task.aggregation().keys()


def test_wikitext_is_cut_into_pages():
    text = f" \n{PAGE}{OTHER_PAGE}"
    found = list(pages(text.split("\n")))
    assert found == [PAGE.removesuffix("\n"), OTHER_PAGE]
    # as the harness's data set does it: what looks like a heading cuts
    assert len(list(pages(["= A =", "x", "= 1 / s and k =", "y"]))) == 2


def test_wikitext_says_what_its_words_are(tmp_path: Path):
    folder = write_files(tmp_path, ("wikitext",))
    assert "raw text" in str(load_tasks(["wikitext"], str(folder))[0].remark)
    (folder / FILES["wikitext"]).unlink()
    (folder / "lm/wikitext-2.test.txt").write_text(" = A = \n <unk> b c d \n")
    (loaded, streamed) = load_tasks(["wikitext", "wikitext_streamed"], str(folder))
    assert "wikitext-2.test.txt: 1 pages with 14.3 % of the words replaced by <unk>" in str(loaded.remark)
    assert (loaded.rolling, streamed.rolling, streamed.name) == ("windows", "whole", "wikitext_streamed")
    assert loaded.fingerprint == streamed.fingerprint


def test_documents_change_the_fingerprint(tmp_path: Path):
    folder = write_files(tmp_path, ("piqa",))
    before = load_tasks(["piqa"], str(folder))[0].fingerprint
    assert load_tasks(["piqa"], str(folder / "commonsense"))[0].fingerprint == before
    path = folder / FILES["piqa"]
    path.write_text(path.read_text().replace("lid", "cap"))
    assert load_tasks(["piqa"], str(folder))[0].fingerprint != before


@pytest.mark.parametrize(
    ("task", "old", "new", "message"),
    [
        ("piqa", '"sol2"', '"second"', "piqa_validation.jsonl:1: task piqa needs field 'sol2'; the row has goal, sol1"),
        ("piqa", '"label": 1', '"label": 2', "piqa_validation.jsonl:2: field 'label' is 2, none of 0, 1"),
        ("piqa", '"label": 1', '"label": "1"', "piqa_validation.jsonl:2: field 'label' must be int; got str"),
        ("piqa", '"goal": "Dry a cloth", ', "", "piqa_validation.jsonl:2: field 'goal' is missing; the rows before"),
        ("piqa", '{"goal": "Dry', '["goal": "Dry', "piqa_validation.jsonl:2: not a JSON object"),
        ("winogrande", " _ had", " she had", "winogrande_xl_validation.jsonl:2: field 'sentence' has no gap"),
        ("winogrande", '"answer": "2"', '"answer": ""', "field 'answer' is '', none of '1', '2'"),
        ("arc_easy", '"gold": 2', '"gold": 3', "arc_easy_test.jsonl:2: field 'gold' is 3, but there are 3 choices"),
        ("arc_easy", '["ice", "snow", "fire"]', "[]", "field 'choices' must be a list of texts that are not empty"),
        ("social_iqa", '"label": "2"', '"label": "0"', "field 'label' is '0', none of '1', '2', '3'"),
    ],
)
def test_other_fields_are_named(tmp_path: Path, task: str, old: str, new: str, message: str):
    path = write_files(tmp_path, (task,)) / FILES[task]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as caught:
        load_tasks([task], str(tmp_path))
    assert message in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = str(write_files(tmp_path, ("piqa",)))
    with pytest.raises(DataError, match=r"lacks the file of task boolq: expected commonsense/boolq_validation\.jsonl"):
        load_tasks(["piqa", "boolq"], folder)
    with pytest.raises(DataError, match="no local form of task 'arc_esay'; did you mean 'arc_easy'"):
        load_tasks(["arc_esay"], folder)
    with pytest.raises(DataError, match="no folder"):
        load_tasks(["piqa"], str(tmp_path / "none"))
    with pytest.raises(DataError, match="only tasks that score whole texts"):
        load_tasks(["piqa_streamed"], folder)
    (tmp_path / FILES["piqa"]).write_text("")
    with pytest.raises(DataError, match=r"piqa_validation\.jsonl: the file is empty"):
        load_tasks(["piqa"], folder)
    with pytest.raises(ValueError, match="piqa is named twice"):
        task_names("piqa, boolq,piqa")
    assert task_names(None) == list(BENCHMARKS)
    monkeypatch.setattr(tasks_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[eval\]'"):
        load_tasks(["piqa"], folder)


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="task piqa: no data from the hub: Couldn't reach the Hub; or give local files"):
        load_tasks(["piqa"], "hub")

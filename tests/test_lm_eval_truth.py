"""The comparison with the stock lm_eval says what differs, and reads local files as the harness's own data sets are."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from tests.evaluate.benchmark_rows import FILES, HARNESS, write_files
from verification import lm_eval_truth
from verification.lm_eval_tasks import TASKS, write_task
from verification.workplace import CheckFailedError, Workplace


def sample(values: list[float], best: str, length: int = 4) -> dict[str, Any]:
    """A question with a choice per log-likelihood, as both sides write it."""
    return {
        "doc_id": 0,
        "target": "0",
        "arguments": {f"gen_args_{n}": {"arg_0": "Is it?", "arg_1": " " + "y" * length} for n in range(len(values))},
        "filtered_resps": [[str(value), "False"] for value in values],
        "metrics": ["acc", "acc_norm"],
        "acc": float(best == "right"),
        "acc_norm": float(best == "right"),
    }


def test_rounding_is_no_difference_and_ties_are_counted():
    stock = [sample([-3.0, -4.0], "right"), sample([-3.0, -3.0001], "right") | {"doc_id": 1}]
    ours = [sample([-3.0002, -4.0], "right"), sample([-3.0002, -3.0001], "wrong") | {"doc_id": 1}]
    found = lm_eval_truth.compare("piqa", stock, ours)
    assert found[:2] == (2, 4)
    assert found.largest == pytest.approx(2e-4)
    assert found.median == pytest.approx(1e-4)
    assert found.flipped == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "1"}, "piqa, document 0: target is '0' in the harness, '1' in ours"),
        ({"filtered_resps": [["-3.1", "False"], ["-4", "False"]]}, "log-likelihood -3.0 in the harness, -3.1 in ours"),
        ({"filtered_resps": [["-3.0", "True"], ["-4.0", "False"]]}, "and no tie"),
        ({"acc": 0.0}, "and no tie"),
        ({"arguments": {}}, "document 0: arguments is"),
    ],
)  # fmt: skip
def test_what_differs_is_said(change: dict[str, Any], message: str):
    stock = sample([-3.0, -4.0], "right")
    with pytest.raises(CheckFailedError) as caught:
        lm_eval_truth.compare("piqa", [stock], [copy.deepcopy(stock) | change])
    assert message in str(caught.value)
    with pytest.raises(CheckFailedError, match="1 documents in the harness, 0 in ours"):
        lm_eval_truth.compare("piqa", [stock], [])


def test_whole_texts_have_no_choices():
    page = {"doc_id": 0, "target": "x", "arguments": {"gen_args_0": {"arg_0": "x"}}, "metrics": ["word_perplexity"]}
    found = lm_eval_truth.compare(
        "wikitext", [page | {"filtered_resps": ["-2000.0"]}], [page | {"filtered_resps": ["-2000.01"]}]
    )
    assert (found.documents, found.flipped) == (1, 0)
    assert found.largest_share == pytest.approx(5e-6)


@pytest.mark.parametrize("name", TASKS)
def test_documents_are_those_of_the_harness(name: str, tmp_path: Path):
    """The stock harness reads the local file through its own YAML file, and asks as with its own data set."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    write_files(tmp_path, (name,))
    file = TASKS[name].file
    place = tmp_path / FILES[name]
    place.rename(tmp_path / f"{file}{place.suffix if place.suffix == '.xz' else ''}")
    write_task(name, tmp_path, tmp_path / "task")
    settings = load_yaml(tmp_path / f"task/local_{name}.yaml")
    settings.pop("tag")
    settings["dataset_kwargs"]["cache_dir"] = str(tmp_path / "cache")
    task = TaskManager(include_defaults=False).load([settings])["tasks"][f"local_{name}"]
    found = [
        (task.doc_to_text(doc), task.doc_to_target(doc), task.doc_to_choice(doc) if "choice" in task.OUTPUT_TYPE else 0)
        for doc in (task.test_docs() if task.has_test_docs() else task.validation_docs())
    ]
    wanted = [asked_by_harness(name, row) for row in HARNESS[name]]
    assert found == wanted


def asked_by_harness(name: str, row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What the harness asks about a document of its own, from the tests' own words."""
    match name:
        case "piqa":
            return f"Question: {row['goal']}\nAnswer:", row["label"], [row["sol1"], row["sol2"]]
        case "arc_easy":
            right = row["choices"]["label"].index(row["answerKey"])
            return f"Question: {row['question']}\nAnswer:", right, row["choices"]["text"]
        case "lambada_openai":
            before, last = row["text"].rsplit(" ", 1)
            return before, f" {last}", 0
        case "hellaswag":
            from lm_eval.tasks.hellaswag.utils import preprocess

            context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            return preprocess(context), int(row["label"]), [preprocess(one) for one in row["endings"]]
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return "", wikitext_detokenizer(row), 0


def test_bad_options_are_refused(tmp_path: Path):
    parser = argparse.ArgumentParser()
    lm_eval_truth.add_options(parser)
    place = Workplace(tmp_path, print)
    folders = ["--data", str(tmp_path), "--hf", str(tmp_path), "--model", str(tmp_path)]
    for given, message in (
        ([], "--data must name a folder"),
        ([*folders, "--tasks", "picqa"], "--tasks: expected of piqa, arc_easy"),
        ([*folders, "--limit", "0"], "--limit: expected N or TASK=N, got 0"),
        ([*folders, "--tasks", "piqa", "--limit", "arc_easy=3"], "--limit: arc_easy is none of the tasks piqa"),
    ):
        with pytest.raises(CheckFailedError, match=message):
            lm_eval_truth.check(place, parser.parse_args(given))
    assert lm_eval_truth.limits_of(["piqa=3", "10"], ["piqa", "wikitext"]) == {"piqa": 3, "wikitext": 10}


def test_a_finished_side_is_not_run_again(tmp_path: Path):
    command = ["python3", "-c", "print('words'); open('times', 'a').write('x')"]
    for _ in range(2):
        lm_eval_truth.run_once(command, tmp_path)
    assert (tmp_path / "times").read_text() == "x"
    assert (tmp_path / "log.txt").read_text() == "words\n"
    assert json.loads((tmp_path / "done.json").read_text())["command"] == command
    # what another command has left there is none of this one's results
    (tmp_path / "results").mkdir()
    with pytest.raises(CheckFailedError, match="exit code 3\nwords"):
        lm_eval_truth.run_once(["python3", "-c", "print('words'); raise SystemExit(3)"], tmp_path)
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "done.json").exists()

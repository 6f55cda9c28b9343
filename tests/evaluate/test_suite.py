"""Results of tasks are kept whole, not measured twice, refused where they are another's, and shown as Table 1."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from swat_lm.data import load_tokenizer
from swat_lm.evaluate import table1
from swat_lm.evaluate.harness import HarnessModel
from swat_lm.evaluate.suite import Subject, Suite, TaskResult, perplexity_error, weights_fingerprint
from swat_lm.evaluate.tasks import LoadedTask, load_tasks
from tests.evaluate import models
from tests.evaluate.benchmark_rows import FILES, write_files

SUBJECT = Subject("mine", "sha256:weights", "sha256:tokens", max_length=None, limit=None)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedTask]:
    folder = write_files(tmp_path_factory.mktemp("data"))
    return load_tasks([*FILES, "wikitext_streamed"], str(folder))


@pytest.fixture(scope="module")
def model() -> HarnessModel:
    return HarnessModel(models.tiny_swat(vocab_size=259), load_tokenizer("bytes"), max_length=None)


@pytest.fixture(scope="module")
def results(loaded: list[LoadedTask], model: HarnessModel) -> dict[str, TaskResult]:
    suite = Suite(SUBJECT, loaded, None)
    assert [result.task for result in suite.run(model)] == [task.name for task in loaded]
    return suite.results


def chosen(tasks: list[LoadedTask], *names: str) -> list[LoadedTask]:
    return [task for task in tasks if task.name in names]


def test_results_are_kept_and_not_measured_again(
    loaded: list[LoadedTask], model: HarnessModel, results: dict[str, TaskResult], tmp_path: Path
):
    tasks = chosen(loaded, "piqa", "boolq", "wikitext_streamed")
    calls: list[tuple[str, int, int]] = []
    suite = Suite(SUBJECT, tasks, tmp_path)
    running = suite.run(model, lambda *call: calls.append(call))
    first = next(running).task
    assert sorted(one.name for one in (tmp_path / "mine").iterdir()) == [f"{first}.json"]
    # as after an interruption
    running.close()
    again = Suite(SUBJECT, tasks, tmp_path)
    assert first not in [task.name for task in again.missing]
    assert [result.task for result in again.run(model)] == [task.name for task in tasks if task.name != first]
    assert calls[-1][0] == first
    assert calls[-1][1] == calls[-1][2] > 0
    for name, result in Suite(SUBJECT, tasks, tmp_path).results.items():
        assert replace(result, seconds=0) == replace(json_round_trip(results[name]), seconds=0)
    harness = json.loads((tmp_path / "mine/results.json").read_text())
    assert list(harness["results"]) == [task.name for task in tasks]
    assert harness["results"]["piqa"]["acc,none"] == results["piqa"].value("acc")[0]  # type: ignore[index]
    assert harness["n-samples"]["boolq"] == {"original": 2, "effective": 2}
    assert harness["configs"]["piqa"]["doc_to_text"] == "Question: {{goal}}\nAnswer:"
    assert not [name for name in (tmp_path / "mine").iterdir() if name.name.startswith(".")]


def json_round_trip(result: TaskResult) -> TaskResult:
    from dataclasses import asdict

    return TaskResult(**json.loads(json.dumps(asdict(result), default=str)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 1}, "limit is none there, 1 now"),
        ({"checkpoint": "sha256:other"}, "checkpoint is sha256:weights there, sha256:other now"),
        ({"max_length": 64}, "max_length is none there, 64 now"),
    ],
)
def test_another_measurement_is_refused(
    loaded: list[LoadedTask], model: HarnessModel, tmp_path: Path, change: dict[str, Any], message: str
):
    tasks = chosen(loaded, "piqa")
    list(Suite(SUBJECT, tasks, tmp_path).run(model))
    with pytest.raises(ValueError, match=message):
        Suite(replace(SUBJECT, **change), tasks, tmp_path)
    with pytest.raises(ValueError, match="documents is"):
        Suite(SUBJECT, [replace(tasks[0], fingerprint="sha256:others")], tmp_path)
    # another label is another folder
    assert Suite(replace(SUBJECT, label="other", **change), tasks, tmp_path).missing
    (tmp_path / "mine/piqa.json").write_text("{")
    with pytest.raises(ValueError, match=r"piqa.json: not a result of this command"):
        Suite(SUBJECT, tasks, tmp_path)


def test_samples_are_the_harness_own(
    loaded: list[LoadedTask], model: HarnessModel, results: dict[str, TaskResult], tmp_path: Path
):
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    tasks, folder = chosen(loaded, "piqa", "wikitext_streamed"), tmp_path / "mine"
    # a result without samples is not enough, and samples go with the result that they belong to
    list(Suite(SUBJECT, tasks, tmp_path).run(model))
    assert not Suite(SUBJECT, tasks, tmp_path).missing
    suite = Suite(SUBJECT, tasks, tmp_path, log_samples=True)
    assert suite.missing == tasks
    list(suite.run(model))
    assert not Suite(SUBJECT, tasks, tmp_path, log_samples=True).missing
    ours = {task.name: (folder / f"samples_{task.name}.jsonl").read_text().splitlines() for task in tasks}
    # as the harness writes them
    found = lm_eval.evaluate(
        lm=model, task_dict={"tasks": {"piqa": tasks[0].task}}, bootstrap_iters=0, log_samples=True
    )  # type: ignore[call-arg]
    tracker = EvaluationTracker(str(tmp_path / "theirs"))
    tracker.date_id = "today"
    tracker.save_results_samples("piqa", found["samples"]["piqa"])
    (theirs,) = (tmp_path / "theirs").rglob("samples_piqa_*.jsonl")
    assert [json.loads(line) for line in ours["piqa"]] == [json.loads(line) for line in theirs.read_text().splitlines()]
    (page, _) = map(json.loads, ours["wikitext_streamed"])
    assert page["word_perplexity"] == list(results["wikitext_streamed"].documents["word_perplexity"][0])
    assert float(page["filtered_resps"][0]) == page["word_perplexity"][0]
    (folder / "piqa.json").unlink()
    list(Suite(SUBJECT, tasks, tmp_path).run(model))
    assert sorted(path.name for path in folder.glob("samples_*")) == ["samples_wikitext_streamed.jsonl"]
    with pytest.raises(ValueError, match="log_samples: expected a folder"):
        Suite(SUBJECT, tasks, None, log_samples=True)


def test_limit_takes_the_first_documents(loaded: list[LoadedTask], model: HarnessModel, results: dict[str, TaskResult]):
    (result,) = Suite(replace(SUBJECT, limit=1), chosen(loaded, "hellaswag"), None).run(model)
    assert result.documents["acc_norm"] == results["hellaswag"].documents["acc_norm"][:1]
    assert result.value("acc") == (result.documents["acc"][0], None)


def test_nothing_is_printed_where_results_go(
    loaded: list[LoadedTask], model: HarnessModel, capsys: pytest.CaptureFixture[str]
):
    list(Suite(SUBJECT, chosen(loaded, "lambada_openai"), None).run(model))
    assert capsys.readouterr().out == ""


def test_windows_and_streams_differ(results: dict[str, TaskResult], loaded: list[LoadedTask]):
    model = HarnessModel(models.tiny_swat(vocab_size=259), load_tokenizer("bytes"), max_length=16)
    windows, stream = Suite(SUBJECT, chosen(loaded, "wikitext", "wikitext_streamed"), None).run(model)
    assert (windows.rolling, stream.rolling, windows.window_length) == ("windows", "whole", 16)
    assert stream.value("word_perplexity") == results["wikitext_streamed"].value("word_perplexity")
    assert windows.value("word_perplexity") != stream.value("word_perplexity")
    # these texts are shorter than a window of 4,096
    whole, own = results["wikitext"].value("bits_per_byte"), stream.value("bits_per_byte")
    assert whole is not None
    assert own is not None
    assert whole[0] == pytest.approx(own[0], rel=1e-5)


def test_chance(results: dict[str, TaskResult]):
    found = {name: result.chance for name, result in results.items()}
    assert found["piqa"] == found["winogrande"] == found["boolq"] == 0.5
    assert found["hellaswag"] == 0.25
    assert found["social_iqa"] == pytest.approx(1 / 3)
    # one question has three choices
    assert found["arc_easy"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert found["lambada_openai"] is found["wikitext"] is None


def test_error_of_a_perplexity():
    # all documents of one rate: nothing to be uncertain about
    assert perplexity_error([(-6.0, 3), (-12.0, 6), (-2.0, 1)]) == pytest.approx(0, abs=1e-12)
    assert perplexity_error([(-6.0, 3)]) is None
    # equal sizes: the standard error of the mean loss, times the perplexity
    losses = [1.0, 2.0, 4.0]
    mean = sum(losses) / 3
    error = math.sqrt(sum((one - mean) ** 2 for one in losses) / 2 / 3)
    assert perplexity_error([(-10 * one, 10) for one in losses]) == pytest.approx(error * math.exp(mean))


def test_table_1(results: dict[str, TaskResult], tmp_path: Path):
    row, guess = table1.our_row("a <b>", results), table1.chance_row(results)
    assert list(row.cells) == [*(column.heading for column in table1.COLUMNS), "Average"]
    accuracies = [row.cells[heading] for heading in table1.ACCURACIES]
    assert len(accuracies) == 8
    assert row.cells["Average"].value == pytest.approx(sum(cell.value for cell in accuracies) / 8)
    spread = sum(cell.error**2 for cell in accuracies if cell.error is not None)
    assert row.cells["Average"].error == pytest.approx(math.sqrt(spread) / 8)
    assert guess.cells["PIQA"].value == 50
    assert row.cells["Hella n"].value == 100 * results["hellaswag"].value("acc_norm")[0]  # type: ignore[index]
    fewer = {name: result for name, result in results.items() if name != "boolq"}
    assert "Average" not in table1.our_row("fewer", fewer).cells
    remarks = table1.notes({"a <b>": results}, 20)
    assert any("first 20 documents" in remark for remark in remarks)
    assert any("raw text" in remark for remark in remarks)
    assert any("one stream" in remark for remark in remarks)
    written = table1.save_table(tmp_path, [row, guess, *table1.PAPER], remarks)
    text, page, values = (path.read_text() for path in written)
    assert "| SWAT (-) | printed in the paper: 340M, 15B tokens | 33.32 |" in text
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count('<tr class="paper">') == len(table1.PAPER) == 22
    assert json.loads(values)["rows"][0]["cells"]["Average"]["value"] == row.cells["Average"].value


def test_a_checkpoint_is_known_by_its_files(tmp_path: Path):
    model = models.tiny_llama()
    model.save_pretrained(tmp_path)
    before = weights_fingerprint(str(tmp_path))
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(str(tmp_path)) != before
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        weights_fingerprint(str(tmp_path))


def test_tasks_that_generate(model: HarnessModel, tmp_path: Path):
    """Any other task of the harness, here one with two ways to read an answer."""
    import datasets
    from lm_eval.tasks import TaskManager

    rows = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": "4"}])}
    )
    take = {"function": "take_first"}
    digits = {"function": "regex", "regex_pattern": "([0-9])"}
    settings = {
        "task": "sums", "custom_dataset": lambda **_: rows, "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "none", "filter": [take]}, {"name": "digits", "filter": [digits, take]}],
    }  # fmt: skip
    task = TaskManager(include_defaults=False).load([settings])["tasks"]["sums"]
    task.config.custom_dataset = None  # type: ignore[attr-defined]
    (result,) = Suite(SUBJECT, [LoadedTask("sums", task, "here", "sha256:x")], tmp_path).run(model)
    assert result.metrics == ["exact_match", "exact_match,digits"]
    assert set(result.documents) == set(result.metrics)
    for metric in result.metrics:
        value = result.value(metric)
        assert value is not None
        assert value[0] == sum(result.documents[metric]) / 2
    assert [one[:2] for one in table1.other_metrics({"sums": result})] == [("sums", one) for one in result.metrics]

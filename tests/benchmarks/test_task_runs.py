"""Small models on synthetic tasks: equal sizes, records that are kept, and the documents' tables of them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ecp_copy, longvq_tasks, selective_copy, taipan_recall, task_runs
from swat_lm.data.synthetic import synthetic_task
from swat_lm.model.architectures import configure_model, count_model_parameters
from tests.docs_modules import load_module

TABLES = load_module("task_tables")
SCRIPTS = {script.TASKS.name: script.TASKS for script in (ecp_copy, longvq_tasks, selective_copy, taipan_recall)}


def test_the_documents_know_all_of_them():
    assert set(TABLES.TASKS) == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_models_of_a_task_are_equally_large(name: str, tmp_path: Path):
    sizes: dict[tuple[str, int], list[int]] = {}
    for one, case in SCRIPTS[name].cases.items():
        synthetic_task(case.source).check_length(case.length)
        recipe = case.recipe(one, 0, tmp_path, 1)
        depth = recipe.model["num_hidden_layers"] if name == "ecp_copy" else 0
        total = count_model_parameters(configure_model(recipe.model, 259)).total
        # copies at different distances are different tasks of one model
        sizes.setdefault((case.source.partition("distance")[0], depth), []).append(total)
    for found in sizes.values():
        # windows have a projection for keys and another for values, ECP one for both
        assert max(found) <= min(found) * (1.2 if name == "ecp_copy" else 1.03), found


@pytest.mark.parametrize(
    ("name", "model", "also"),
    [
        ("ecp_copy", "disjoint-2-8", []),
        ("selective_copy", "sparsek", []),
        ("longvq_tasks", "listops-quantised", ["codes used, layer 0", "codes used, layer 1"]),
        ("taipan_recall", "taipan", ["gate opens where asked", "elsewhere", "anywhere"]),
    ],
)
def test_one_step(name: str, model: str, also: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    tasks = SCRIPTS[name]
    small = {one: replace(case, rows=4, held_out_batches=2) for one, case in tasks.cases.items()}
    tasks = replace(tasks, cases=small)
    monkeypatch.setattr(task_runs, "RECORDS", tmp_path / "committed")
    asked = ["--out", str(tmp_path / "out"), "--models", model, "--seeds", "3", "--steps", "1"]
    tasks.main([*asked, "--record"])
    (path,) = (tmp_path / "committed" / name).iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"{model}-seed3.json"
    # one step learns nothing
    assert 0 <= record["accuracy"] < 0.6
    assert [one for one in record if one not in TABLES.NOT_MEASURED] == also
    if name == "taipan_recall":
        share = taipan_recall.PAIRS / taipan_recall.LENGTH
        together = share * record["gate opens where asked"] + (1 - share) * record["elsewhere"]
        assert record["anywhere"] == pytest.approx(together)
    # what is there is kept, and shown
    path = tmp_path / "out" / "records" / path.name
    written = path.stat().st_mtime_ns
    tasks.main(asked)
    assert path.stat().st_mtime_ns == written
    assert capsys.readouterr().out.splitlines()[-1].startswith(model)
    with pytest.raises(SystemExit, match=r"seed3\.json is of another run: remove it"):
        tasks.main([*asked[:-1], "2"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--models", "ecp-*,windw"], "--models: expected some of ecp-2-8, .*; got windw"),
        (["--seeds", "0,one"], "--seeds: expected whole numbers by commas; got '0,one'"),
        (["--steps", "0"], "--steps: expected at least 1; got 0"),
    ],
)
def test_what_cannot_be_run_is_said_first(asked: list[str], said: str, capsys):
    with pytest.raises(SystemExit):
        ecp_copy.main(asked)
    assert re.search(said, capsys.readouterr().err)


def test_tables_say_what_records_say(tmp_path: Path):
    folder = tmp_path / "ecp_copy"
    folder.mkdir()
    common = {"recipe": "", "parameters": 1234, "guessing": 0.125, "seconds": 1.0}
    machine = {"processor": "an abacus", "commit": "abc"}
    for model, place, seed, accuracy in (("b", 0, 0, 1.0), ("b", 0, 1, 0.5), ("a", 1, 0, 0.25)):
        record = {"model": model, "place": place, "label": f"model {model}", "seed": seed, "accuracy": accuracy,
                  "machine": machine, **common}  # fmt: skip
        more = {"opened": 0.5} if model == "b" else {"codes": 31.6}
        (folder / f"{model}-seed{seed}.json").write_text(json.dumps({**record, **more}))
    found = TABLES.task_tables(tmp_path)
    lines = found["ecp_copy"].splitlines()
    assert lines[0] == "| model | parameters | seeds | guessing | accuracy | opened | codes |"
    assert lines[2] == "| model b | 1,234 | 0, 1 | 12.5 % | 100.0 %, 50.0 % | 50.0 %, 50.0 % |  |"
    assert lines[3] == "| model a | 1,234 | 0 | 12.5 % | 25.0 % |  | 31.6 |"
    assert lines[-1] == "3 runs, one thread each; an abacus, commit abc."
    assert found["taipan_recall"] == "Not run yet: `python -m benchmarks.taipan_recall --record`."

"""What a run may replace in a folder: what runs wrote there, and nothing of anybody else's."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from swat_lm.train import run
from swat_lm.train.ownership import MARK, check_export
from swat_lm.train.run_folder import hold_folder
from tests.train.runs import metrics, snapshot


def write(path: Path, text: str = "precious\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "name",
    [
        "export/thesis.txt", "thesis.txt", "metrics.jsonl", "recipe.yaml", "tensorboard/events", ".tmp-notes", ".lock",
        "checkpoints/step-00000003/notes.txt", "checkpoints/other.txt", "text/1.txt",
    ],
)  # fmt: skip
def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(tmp_path: Path, name: str):
    write(tmp_path / name, '{"step": 5}\n')
    before = snapshot(tmp_path)
    named = name.partition("/")[0]
    with pytest.raises(ValueError, match=rf"holds {named} and is no run of swat-lm.*choose another `out`"):
        hold_folder(tmp_path)
    assert snapshot(tmp_path) == before


def test_the_command_refuses_it_before_any_work(cli, here: Path):
    (here / "run.yaml").rename(here / "recipe.yaml")
    before = snapshot(here)
    ran = cli("train", "recipe.yaml", "out=.")
    assert ran.code == 2
    assert "error: . holds recipe.yaml, text and is no run of swat-lm" in ran.err
    assert snapshot(here) == before


def test_what_a_killed_start_leaves_and_the_runs_own_cache_are_no_obstacle(tmp_path: Path):
    write(tmp_path / "run" / ".lock", "")
    write(tmp_path / "run" / ".tmp-probe")
    write(tmp_path / "run" / "tokens" / "store" / "index.json")
    with pytest.raises(ValueError, match="holds tokens"):
        hold_folder(tmp_path / "run")
    hold_folder(tmp_path / "run", str(tmp_path / "run" / "tokens")).release()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", MARK, "tokens"]
    # marked from the first second on, so that a kill before the first checkpoint is no obstacle either
    hold_folder(tmp_path / "run").release()


def test_only_a_runs_own_leftovers_go(tmp_path: Path):
    held = hold_folder(tmp_path)
    for name in (".tmp-notes", ".tmp-export/x", "checkpoints/.tmp-step-00000002/x", "checkpoints/.tmp-mine/x"):
        write(tmp_path / name)
    held.release()
    hold_folder(tmp_path).release()
    assert {".tmp-notes", "checkpoints/.tmp-mine/x"} == snapshot(tmp_path).keys() - {".lock", MARK}


def test_a_run_of_before_without_a_mark_goes_on_and_what_stands_beside_it_stays(make_recipe):
    recipe = make_recipe("run", steps=2, export=True)
    run(recipe)
    out = Path(recipe.out)
    (out / MARK).unlink()
    write(out / "notes.txt")
    run(replace(recipe, train=replace(recipe.train, steps=3)))
    assert [one[0] for one in metrics(out)] == [1, 2, 3]
    assert (out / "notes.txt").read_text() == "precious\n"

    # what was put into the export would go with it: that is said before the run, or at its end at the latest
    write(out / "export" / "thesis.txt")
    for train in (replace(recipe.train, steps=4), replace(recipe.train, steps=3)):
        with pytest.raises(ValueError, match=r"export, which the run's export replaces, holds thesis\.txt: move"):
            run(replace(recipe, train=train))
    run(replace(recipe, train=replace(recipe.train, steps=4, export=False)))
    assert (out / "export" / "thesis.txt").exists()

    def add_late(event) -> None:
        if event.kind == "step":
            write(out / "export" / "late.txt")

    (out / "export" / "thesis.txt").unlink()
    with pytest.raises(ValueError, match=r"holds late\.txt"):
        run(replace(recipe, train=replace(recipe.train, steps=5)), add_late)
    (out / "export" / "late.txt").unlink()
    assert run(replace(recipe, train=replace(recipe.train, steps=5))).last_loss is None


def test_only_an_export_of_ours_is_replaced(tmp_path: Path):
    folder = tmp_path / "export"
    check_export(folder)
    folder.mkdir()
    check_export(folder)
    write(folder / "config.json")
    with pytest.raises(ValueError, match=r"a model without the README\.md that a run writes"):
        check_export(folder)
    write(folder / "README.md", "# r\n\nTrained with swat-lm: 3 optimizer steps")
    check_export(folder)
    shutil.rmtree(folder)
    write(folder)
    with pytest.raises(ValueError, match="is a file"):
        check_export(folder)

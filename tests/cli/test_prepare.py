"""`swat-lm prepare` and `tokenizer`, used as a stranger would: what they say of held-out text and of broken places."""

from pathlib import Path

import pytest


def test_a_share_nobody_asked_for_is_not_reported(cli, here: Path):
    assert "held out" not in cli("prepare", "text", "--cache", "tokens").out
    assert "1 document (data.held_out is 0.02)" in cli("prepare", "run.yaml").out.replace("  ", "")


@pytest.mark.parametrize("folder", ["my cache #1", "007", "null", "x~", "yes "])
def test_options_beside_a_recipe_arrive_as_typed(cli, here: Path, folder: str):
    ran = cli("prepare", "run.yaml", "--cache", folder, "--workers", 1)
    assert ran.code == 0, ran.err
    assert [path.parent.parent.name for path in here.glob("*/*/index.json")] == [folder]


def test_a_source_with_a_hash_is_read_and_a_run_lies_where_it_was_sent(cli, here: Path):
    (here / "text #2").mkdir()
    (here / "text #2" / "0.txt").write_text("the other text\n" * 40)
    ran = cli(
        "train", "run.yaml", "data.sources=text #2/", "out=try #2", "name=007", "train.steps=2", "data.held_out=0"
    )
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in here.iterdir()) == ["run.yaml", "text", "text #2", "tokens", "try #2"]
    assert [path.name.partition("-")[0] for path in (here / "tokens").iterdir()] == ["text #2"]
    assert cli("train", here / "try #2" / "recipe.yaml").code == 0


def test_a_store_without_its_index_is_to_be_removed(cli, here: Path):
    assert cli("prepare", "text", "--cache", "tokens").code == 0
    (store,) = (here / "tokens").iterdir()
    (store / "index.json").unlink()
    ran = cli("prepare", "text", "--cache", "tokens")
    assert ran.code == 2
    assert ran.err.endswith("/index.json: damaged: it is missing; remove the folder and prepare again\n")


def test_places_that_cannot_be_written_are_named(cli, here: Path):
    ran = cli("prepare", "text", "--cache", "run.yaml")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "run.yaml is a file: expected a folder for prepared tokens" in ran.err
    ran = cli("tokenizer", "text", "--out", "run.yaml/made")
    assert ran.err == "error: cannot write --out run.yaml/made: Not a directory\n"
    ran = cli("report", "text", "--out", "run.yaml")
    assert ran.err == "error: cannot write --out run.yaml: Not a directory\n"


def test_a_tokenizer_for_which_the_disk_is_full_is_named(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    ran = cli("tokenizer", "text", "--vocab-size", 270, "--out", "made")
    assert ran.err.splitlines()[-1] == "error: No space left on device: made"

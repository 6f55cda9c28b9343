import errno
import json
import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict

from swat_lm.recipe import TrainRecipe
from swat_lm.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_folder,
    find_checkpoints,
    newest_checkpoint,
    read_manifest,
    save_checkpoint,
)
from swat_lm.train.engine import Engine
from swat_lm.train.optimizer import make_optimizer
from swat_lm.train.ownership import remove_leftovers

TRAIN = TrainRecipe(steps=10, warmup_steps=0)


def trained(steps: int):
    """A small model and its AdamW after some steps on fixed data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
    optimizer = make_optimizer(model, TRAIN)
    step_on(model, optimizer, steps)
    return model, optimizer


def step_on(model, optimizer, steps: int):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(out: Path, step: int, keep: int = 3, model=None, optimizer=None) -> Path:
    if model is None:
        model, optimizer = trained(1)
    checkpoint = Checkpoint(checkpoint_folder(out, step), step, 100 * step, 1.5, {"seed": 0}, {"width": 5}, "tokens")
    save_checkpoint(Engine(TRAIN), model, optimizer, checkpoint, keep)
    return checkpoint.folder


def damage(folder: Path, how: str) -> None:
    data = next(folder.glob("*.distcp"))
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-10])
    elif how == "changed":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(bytes(content))
    elif how == "file missing":
        data.unlink()
    elif how == "manifest missing":
        (folder / "checkpoint.json").unlink()
    else:
        (folder / "checkpoint.json").write_text('{"step": 1')


def test_restores_weights_and_optimizer_bit_for_bit(tmp_path):
    model, optimizer = trained(3)
    folder = save(tmp_path, 3, model=model, optimizer=optimizer)
    step_on(model, optimizer, 2)

    restored, restored_optimizer = trained(0)
    Engine(TRAIN).read_state(folder, restored, restored_optimizer)
    step_on(restored, restored_optimizer, 2)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, restored.state_dict()[name]), name


def test_manifest_says_what_was_saved(tmp_path):
    folder = save(tmp_path, 7)
    found = read_manifest(folder)
    assert found == Checkpoint(folder, 7, 700, 1.5, {"seed": 0}, {"width": 5}, "tokens")
    assert newest_checkpoint(tmp_path) == (found, [])


def test_keeps_the_newest(tmp_path):
    for step in (2, 4, 6, 10):
        save(tmp_path, step, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000006", "step-00000010"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("copy", ["step-best", "step-00000010-backup", "step-99999999", "step-1", "best"])
def test_a_copy_is_neither_counted_nor_removed_nor_preferred(tmp_path, copy):
    shutil.copytree(save(tmp_path, 5), tmp_path / "checkpoints" / copy)
    for step in (10, 20):
        save(tmp_path, step, keep=1)
        found, damaged = newest_checkpoint(tmp_path)
        assert found is not None
        assert (found.folder.name, damaged) == (f"step-{step:08d}", [])
    assert names(tmp_path) == sorted(["step-00000020", copy])


@pytest.mark.parametrize("name", ["step-notes", "step-00000001", "step-00000030", "step-٣"])
def test_a_folder_without_a_manifest_is_neither_counted_nor_removed(tmp_path, name):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (10, 20):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == sorted(["step-00000020", name])


def test_a_checkpoint_to_which_something_was_added_is_kept(tmp_path):
    (save(tmp_path, 5) / "notes.txt").write_text("the best")
    for step in (10, 20):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000020"]


def test_what_stands_where_a_checkpoint_goes_gets_another_name(tmp_path):
    shutil.copytree(save(tmp_path, 5), tmp_path / "checkpoints" / "step-00000010")
    (tmp_path / "checkpoints" / "step-00000020").mkdir()
    (tmp_path / "checkpoints" / "step-00000020" / "notes.txt").write_text("notes")
    (tmp_path / "checkpoints" / "step-00000030").write_text("a file")
    for step in (10, 20, 30):
        with pytest.warns(UserWarning, match=f"step-000000{step} was no checkpoint .* it is now .*{step}-other"):
            save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000010-other", "step-00000020-other", "step-00000030", "step-00000030-other"]
    assert (tmp_path / "checkpoints" / "step-00000020-other" / "notes.txt").read_text() == "notes"


def test_the_checkpoint_just_written_stays_where_a_later_one_is_damaged(tmp_path):
    save(tmp_path, 10)
    damage(save(tmp_path, 30), "truncated")
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert read_manifest(tmp_path / "checkpoints" / "step-00000020").step == 20


def test_a_checkpoint_moved_and_linked_back_is_one_and_only_its_link_goes(tmp_path):
    """By its age, by the run getting there again, and as what a killed run left."""
    for step in (10, 20):
        folder = save(tmp_path, step)
        folder.rename(tmp_path / f"moved-{step}")
        folder.symlink_to(tmp_path / f"moved-{step}")
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 20
    save(tmp_path, 20)
    save(tmp_path, 30, keep=1)
    (tmp_path / "checkpoints" / ".tmp-old-step-00000010").symlink_to(tmp_path / "moved-10")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000030"]
    assert read_manifest(tmp_path / "moved-10").step == 10
    assert read_manifest(tmp_path / "moved-20").step == 20


def test_a_link_to_a_disk_that_is_gone_is_spoken_of(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / "step-00000020").symlink_to(tmp_path / "gone")
    found, (said,) = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, "step-00000020" in said) == (10, True)
    save(tmp_path, 20)
    assert newest_checkpoint(tmp_path)[1] == []


@pytest.mark.parametrize("text", ["[]", "null", '{"files": {}, "format": 1, "step": 3, "mine": 1}'])
def test_another_programs_manifest_is_no_checkpoint(tmp_path, text):
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="step-00000003"):
        read_manifest(folder)


def test_no_run_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, [])
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("how", ["truncated", "changed", "file missing", "manifest missing", "manifest torn"])
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, how):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder, how)
    with pytest.raises(CheckpointError, match="step-00000002"):
        read_manifest(folder)
    found, passed_over = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(passed_over) == 1
    assert "step-00000002" in passed_over[0]
    # and it is replaced when the run gets there again
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path)[1] == []


def test_all_damaged_is_an_error(tmp_path):
    damage(save(tmp_path, 1), "truncated")
    damage(save(tmp_path, 2), "changed")
    with pytest.raises(CheckpointError, match=r"step-00000002.*step-00000001.*no checkpoint is left"):
        newest_checkpoint(tmp_path)


def test_other_format_is_named(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_manifest(folder)


def test_failed_write_leaves_older_checkpoints_and_no_rubbish(tmp_path):
    older = save(tmp_path, 1)
    model = torch.nn.Linear(256, 256)
    optimizer = make_optimizer(model, TRAIN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel then refuses to let files grow, as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write checkpoint .*step-00000002.*older ones are intact") as caught:
            save(tmp_path, 2, model=model, optimizer=optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    # the system's reason, not what torch's file writer makes of it
    assert caught.value.errno == errno.EFBIG
    assert "(File too large)" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    assert read_manifest(older).step == 1


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".tmp-step-00000002").mkdir()
    (tmp_path / ".tmp-metrics.jsonl").write_text("x")
    (tmp_path / ".tmp-export").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".tmp")) == []
    assert newest_checkpoint(tmp_path)[0] is not None


def test_reading_into_another_shape_is_an_error_that_names_the_folder(tmp_path):
    folder = save(tmp_path, 1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
    with pytest.raises(ValueError, match="step-00000001"):
        Engine(TRAIN).read_state(folder, model, make_optimizer(model, TRAIN))


def test_recipe_wins_over_the_restored_optimizer(tmp_path):
    model, optimizer = trained(1)
    groups = [group["weight_decay"] for group in optimizer.param_groups]
    assert groups == [0.1, 0.0]
    other = make_optimizer(model, replace(TRAIN, weight_decay=0.5, betas=(0.5, 0.6)))
    assert other.param_groups[0]["weight_decay"] == 0.5
    assert other.param_groups[1]["weight_decay"] == 0.0
    assert other.param_groups[0]["betas"] == (0.5, 0.6)
    assert [parameter.dim() for parameter in other.param_groups[0]["params"]] == [2, 2]


class Getter:
    """Unpickled, it asks a module for what it holds."""

    def __reduce__(self):
        return getattr, (Path, "touch")


def test_index_of_a_foreign_checkpoint_gets_no_attributes(tmp_path):
    model, optimizer = trained(2)
    folder = save(tmp_path, 2, model=model, optimizer=optimizer)
    (folder / ".metadata").write_bytes(pickle.dumps(Getter()))
    with pytest.raises(ValueError, match="cannot read checkpoint"):
        Engine(TRAIN).read_state(folder, model, optimizer)


class Payload:
    """Unpickled as it comes, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_index_of_a_foreign_checkpoint_runs_no_code(tmp_path):
    model, optimizer = trained(2)
    folder = save(tmp_path, 2, model=model, optimizer=optimizer)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match=rf"cannot read checkpoint {folder}: its index names"):
        Engine(TRAIN).read_state(folder, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_values_of_a_foreign_checkpoint_run_no_code(tmp_path):
    model, optimizer = trained(2)
    weights, state = get_state_dict(model, optimizer)
    state["param_groups"][0]["lr"] = Payload(tmp_path / "ran")
    writer = FileSystemWriter(tmp_path / "foreign", single_file_per_rank=True)
    dcp_save({"model": weights, "optimizer": state}, storage_writer=writer, no_dist=True)
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot read checkpoint"):
        Engine(TRAIN).read_state(tmp_path / "foreign", model, optimizer)
    assert not (tmp_path / "ran").exists()

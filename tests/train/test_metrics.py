import json
import resource
import sys
import types

import pytest

from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe
from swat_lm.train.metrics import MetricsFile, check_loggers, open_writers, read_metrics


def recipe(out, *loggers) -> Recipe:
    return Recipe(
        name="a run", out=str(out), model={}, data=DataRecipe(sources=("x",)), train=TrainRecipe(loggers=loggers)
    )


def test_continuing_drops_the_lines_that_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3, 4):
        file.write(step, {"loss": step / 3})
    file.close()
    file = MetricsFile(path, 2)
    file.write(3, {"loss": 9.0})
    file.close()
    found = read_metrics(path)
    assert [one["step"] for one in found] == [1, 2, 3]
    assert [one["loss"] for one in found] == [1 / 3, 2 / 3, 9.0]
    assert not list(tmp_path.glob(".tmp-*"))


def test_lines_reach_the_disk_without_closing(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(1, {"loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    file.close()


def test_full_disk_names_the_file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write to .*metrics\.jsonl: File too large"):
            file.write(1, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    file.close()


def test_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [one["step"] for one in read_metrics(path)] == [1]
    file = MetricsFile(path, 5)
    file.write(2, {"loss": 1.0})
    file.close()
    assert [one["step"] for one in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}'])
def test_foreign_line_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_tensorboard_gets_every_number_and_forgets_the_repeated_steps(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writers = open_writers(recipe(tmp_path, "tensorboard"), resumed)
        for step in steps:
            for writer in writers:
                writer.write(step, {"loss": float(step), "grad_norm": 0.5})
        for writer in writers:
            writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert "a run" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [one["step"] for one in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_called_as_their_interface_says(tmp_path, monkeypatch, name):
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values, step: calls.append(("log", values, step))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    writers = open_writers(recipe(tmp_path, name), 0)
    for writer in writers:
        writer.write(7, {"loss": 1.5})
        writer.close()
    assert calls[0][1]["project"] == "swat-lm"
    assert calls[0][1]["name"] == "a run"
    assert calls[1:] == [("log", {"loss": 1.5}, 7), ("finish",)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_missing_logger_names_the_package_and_leaves_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(ValueError, match=f"pip install {name}"):
        check_loggers([name])
    with pytest.raises(ValueError, match=f"pip install {name}"):
        open_writers(recipe(tmp_path, name), 0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 9}]

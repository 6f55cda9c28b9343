"""Pictures are written whole, and their axes and numbers say what they should."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from swat_lm.evaluate import plots
from swat_lm.evaluate.plots import Series, plot_loss_by_length, plot_state_bytes, plot_training, running_mean
from swat_lm.files import write_text


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn while a test runs."""
    drawn, finish = [], plots.finish

    def keep(figure: Figure, path: Path, title: str | None) -> None:
        drawn.append(figure)
        finish(figure, path, title)

    monkeypatch.setattr(plots, "finish", keep)
    return drawn


def test_loss_by_length(tmp_path: Path, figures: list[Figure]):
    series = [Series("one", [64, 128, 256], [3, 2, 1], [0.1, None, 0.1]), Series("two", [64, 128], [3, 4])]
    plot_loss_by_length(series, tmp_path / "plot.png", training_length=128, window=64, title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "evaluation length (tokens)"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert [one.get_text() for one in axes.texts] == ["training length", "window"]
    assert list(axes.get_xticks()) == [64, 128, 256]


def test_training(tmp_path: Path, figures: list[Figure]):
    steps = list(range(100))
    series = [Series("one", steps, [5 - step / 50 for step in steps])]
    plot_training(series, [Series("one", [50, 99], [4.0, 3.5])], tmp_path / "plot.png")
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == "tokens trained on"
    # three lines: the losses, their mean, the held-out points
    assert len(axes.lines) == 3
    assert axes.get_ylim()[0] < 3.02


def test_state_bytes(tmp_path: Path, figures: list[Figure]):
    plot_state_bytes([Series("one", [64, 128], [1024, 1024])], tmp_path / "plot.png")
    assert figures[0].axes[0].get_yscale() == "log"
    assert plots.short_bytes(3 * 2**20) == "3 MiB"


@pytest.mark.parametrize("series", [[], [Series("one", [], [])], [Series("one", [1, 2], [1])]])
def test_nothing_to_draw(tmp_path: Path, series: list[Series]):
    for plot in (plot_loss_by_length, plot_state_bytes):
        with pytest.raises(ValueError, match=r"nothing to draw|equally long"):
            plot(series, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_running_mean_does_not_lag():
    line = [float(value) for value in range(300)]
    assert running_mean(line) == pytest.approx(line)
    assert running_mean([1.0]) == [1.0]


@pytest.mark.parametrize(("value", "text"), [(64, "64"), (1024, "1k"), (4096, "4k"), (200_000, "200k"), (2**20, "1M")])
def test_short_numbers(value: float, text: str):
    assert plots.short_number(value) == text


def test_a_full_disk_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *_: object) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for write in (
        lambda: write_text(tmp_path / "a.json", "text"),
        lambda: plot_state_bytes([Series("one", [1, 2], [3, 4])], tmp_path / "a.json"),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert caught.value.filename == str(tmp_path / "a.json")
        assert list(tmp_path.iterdir()) == []


def test_states_that_hardly_grow_have_ticks_at_their_values(tmp_path: Path, figures: list[Figure]):
    plot_state_bytes([Series("one", [64, 128], [384 * 1024, 384 * 1024])], tmp_path / "plot.png")
    assert [one.get_text() for one in figures[0].axes[0].get_yticklabels()] == ["384 KiB"]

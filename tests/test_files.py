"""What is written is whole or absent: an error leaves what was there, takes its own away, and names the place."""

import errno
from pathlib import Path

import pytest

from swat_lm.files import BESIDE, beside_of, whole, write_text


def test_a_file_takes_the_place_of_another(tmp_path: Path):
    path = tmp_path / "made" / "deep" / "a.json"
    write_text(path, "é")
    write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert [one.name for one in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_what_goes_wrong_leaves_what_was_there(tmp_path: Path, error: BaseException):
    old = path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with whole(path) as beside:
            beside.write_text("ne")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    # nor do the folders stay that were made on the way
    path = tmp_path / "new" / "deep" / "a.json"
    with pytest.raises(type(error)), whole(path):
        raise error
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    if isinstance(error, OSError):
        # it did not say where
        assert caught.value.filename == str(old)


def test_a_folder_takes_an_empty_place_only(tmp_path: Path):
    path = tmp_path / "made"
    with whole(path) as beside:
        beside.mkdir()
        (beside / "x").write_text("x")
    with pytest.raises(OSError, match=r"not empty: '.*made'"), whole(path) as beside:
        beside.mkdir()
    assert [one.name for one in tmp_path.iterdir()] == ["made"]
    assert (path / "x").read_text() == "x"
    (tmp_path / "empty").mkdir()
    with whole(tmp_path / "empty") as beside:
        beside.mkdir()
        (beside / "y").write_text("y")
    assert (tmp_path / "empty" / "y").exists()


def test_an_error_names_the_place_and_not_the_file_beside(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"Not a directory|File name too long") as caught:
            write_text(path, "a")
        assert BESIDE not in str(caught.value)


def test_the_name_beside_is_the_process_own(tmp_path: Path, monkeypatch):
    first = beside_of(tmp_path / "a")
    monkeypatch.setattr("os.getpid", lambda: 12)
    assert beside_of(tmp_path / "a") not in (first, tmp_path / "a")

"""What is written is whole or absent: an error leaves what was there, takes its own away, and names the place."""

import errno
from pathlib import Path

import pytest

from swat_lm.files import BESIDE, beside_of, clear_leftover, put_in_place, whole, write_text


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


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "x").write_text(text)
    return path


def test_a_folder_takes_the_place_of_a_full_one_where_asked_to(tmp_path: Path):
    path = folder_of(tmp_path / "made", "old")
    with whole(path, over_full=True) as beside:
        folder_of(beside, "new")
    assert (path / "x").read_text() == "new"
    # of a link only the link goes
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    put_in_place(folder_of(tmp_path / "beside", "newer"), path, over_full=True)
    assert [(tmp_path / name / "x").read_text() for name in ("made", "moved")] == ["newer", "new"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["made", "moved"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_folder_is_there_again_whatever_happens_in_between(tmp_path: Path, monkeypatch, error: BaseException):
    path, beside = folder_of(tmp_path / "made", "old"), folder_of(tmp_path / f"{BESIDE}made", "new")

    def fail(*_: object) -> None:
        # the worst moment: nothing bears the name
        assert not path.exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(type(error)):
            put_in_place(beside, path, over_full=True)
    assert path.exists() == isinstance(error, OSError)
    # as after a kill: who comes next removes what was not finished, and puts back what was there
    for left in list(tmp_path.glob(f"{BESIDE}*")):
        clear_leftover(left)
    assert {one.name: (one / "x").read_text() for one in tmp_path.iterdir()} == {"made": "old"}


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    flushed: list[str] = []
    path = tmp_path / "made"

    def flush(one: Path) -> None:
        flushed.append(one.name)
        assert path.exists() == (one == tmp_path)

    monkeypatch.setattr("swat_lm.files.flush", flush)
    beside = folder_of(tmp_path / "beside", "new")
    folder_of(beside / "deep", "deeper")
    put_in_place(beside, path)
    assert sorted(flushed) == sorted(["x", "x", "deep", "beside", tmp_path.name])

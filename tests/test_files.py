"""What is written is whole or absent: an error leaves what was there, takes its own away, and names the place."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swat_lm.files import BESIDE, SET_ASIDE, beside_of, clear_leftover, put_in_place, whole, write_text


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
    path = folder_of(tmp_path / "made", "old")

    def fail(*_: object) -> None:
        # the worst moment: nothing bears the name
        assert not path.exists()
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)), whole(path, over_full=True) as beside:
        folder_of(beside, "new")
    assert contents(tmp_path) == {"made": "old"}


KILLED = """
import os, sys
from pathlib import Path
from swat_lm.files import put_in_place

def half(path):
    (path / "x").unlink()
    os._exit(9)

if sys.argv[2] == "replace":
    Path.replace = lambda *_: os._exit(9)
else:
    import shutil
    shutil.rmtree = half
put_in_place(Path(sys.argv[1], ".tmp-made"), Path(sys.argv[1], "made"), over_full=True)
"""


@pytest.mark.parametrize("moment", ["replace", "rmtree"])
def test_a_kill_loses_no_folder_and_half_of_one_never_gets_its_name_back(tmp_path: Path, moment: str):
    def run() -> None:
        folder_of(tmp_path / ".tmp-made", "new")
        ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], check=False)
        assert ended.returncode == 9

    path = folder_of(tmp_path / "made", "old")
    (path / "y").write_text("more")
    run()
    assert path.exists() == (moment == "rmtree")
    if moment == "rmtree":
        # not even where what had taken its place is gone, and again at the beginning of the next time
        path.rename(tmp_path / "moved")
        folder_of(path, "newer")
        folder_of(tmp_path / f"{SET_ASIDE}made", "older")
        for left in tmp_path.glob(".tmp-old-made"):
            clear_leftover(left)
        run()
        assert not (tmp_path / f"{SET_ASIDE}made").exists()
        (path / "x").unlink()
        path.rmdir()
    # who comes next removes what was not finished, and puts back what was there
    for left in list(tmp_path.glob(f"{BESIDE}*")):
        clear_leftover(left)
    assert contents(tmp_path) == ({"made": "old"} if moment == "replace" else {"moved": "new"})


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_written_to(tmp_path: Path, monkeypatch, call: str, number: int):
    # as of mode -wx, on a network, or a disk that fails when the name is given
    real = getattr(os, call)

    def fail(at: Any, *arguments: int, **others: Any) -> int:
        folder = os.path.isdir(at) if call == "open" else stat.S_ISDIR(os.fstat(at).st_mode)
        # folders are opened to remove them, too
        if folder and not others and (number != errno.EIO or (tmp_path / "made" / "x").exists()):
            raise OSError(number, os.strerror(number))
        return real(at, *arguments, **others)

    path = folder_of(tmp_path / "made", "old")
    with monkeypatch.context() as patch:
        patch.setattr(f"swat_lm.files.os.{call}", fail)
        if number != errno.EIO:
            put_in_place(folder_of(tmp_path / "beside", "new"), path, over_full=True)
        write_text(path / "x", "newer")
    assert contents(tmp_path) == {"made": "newer"}


def contents(folder: Path) -> dict[str, str]:
    """The text `x` in each folder here, by the folder's name."""
    return {one.name: (one / "x").read_text() for one in folder.iterdir()}


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

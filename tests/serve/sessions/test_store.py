"""Stores keep what a call has written, journals end where a crash cut them, and one process has a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from swat_lm.serve.sessions.record import Fed, Record, SessionError, Turn, file_name, parse_journal
from swat_lm.serve.sessions.store import FolderStore, RemoteStore, Store, open_store
from tests.serve.sessions.driver import Server, built, same_state


@pytest.fixture(params=["folder", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "a" / "b") if request.param == "folder" else f"memory://{tmp_path.name}")


def turn(number: int) -> Turn:
    after = Record(session="a", kind="text", held=2 * number, turns=number, created=1.0, used=2.0)
    return Turn(model="m", after=after, tokens=(3, 4), fed=(Fed(kind="piece", size=2, place=0, count=2),))


def test_what_was_written_is_read(store: Store):
    assert store.read("x") is None
    assert store.size("x") is None
    assert store.read_journal("x") == b""
    store.write("x", b"first")
    store.write("x", b"second one")
    store.write("y", b"")
    assert (store.read("x"), store.read("x", 3), store.size("x")) == (b"second one", b"sec", 10)
    assert store.snapshots() == ["x", "y"]
    for number in (9, 10, 11):
        store.append("x", number, turn(number).line())
    assert store.journals() == ["x"]
    assert parse_journal(store.read_journal("x")) == ([turn(9), turn(10), turn(11)], 0)
    for _ in range(2):
        store.remove_journal("x")
        store.remove("x")
    assert (store.snapshots(), store.journals()) == (["y"], [])
    store.close()


def test_a_server_on_a_store_that_cannot_append_loses_nothing(tmp_path: Path):
    model, place = built("recurrence"), f"memory://{tmp_path.name}/sessions"
    server = Server(model, RemoteStore(place))
    server.say("a", "first words")
    server.say("a", "second words", stop=("x",))
    before = server.state("a")
    again = Server(model, RemoteStore(place))
    assert again.recovered == 1
    assert same_state(again.state("a"), before)


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_journal_that_a_crash_has_cut_ends_there(cut: int):
    whole = b"".join(turn(number).line() for number in (1, 2, 3))
    assert parse_journal(whole[:-cut])[0] == [turn(1), turn(2), turn(3)][: 3 if cut == 1 else 2]
    # and the turn that was tried again stands behind the rest
    assert parse_journal(whole[:-cut] + turn(3).line())[0][:3] == [turn(1), turn(2), turn(3)] if cut > 1 else True


def test_a_turn_that_is_missing_between_others_is_said():
    with pytest.raises(SessionError, match="turn 3 after turn 1") as refused:
        parse_journal(turn(1).line() + turn(3).line())
    assert refused.value.kind == "damaged"
    spoilt = turn(2).line().replace(b'"held":4', b'"held":5')
    with pytest.raises(SessionError, match="turn 3 after turn 1"):
        parse_journal(turn(1).line() + spoilt + turn(3).line())
    for line in (b"00000000 {}", b"nonsense", b"\xff\xfe", b"12345678"):
        assert parse_journal(turn(1).line() + line) == ([turn(1)], 1)


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(tmp_path)
    store.append("x", 1, turn(1).line())
    with monkeypatch.context() as patched:
        patched.setattr("swat_lm.serve.sessions.store.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            store.append("x", 2, turn(2).line())
    store.append("x", 2, turn(2).line())
    assert parse_journal(store.read_journal("x")) == ([turn(1), turn(2)], 0)


def test_a_folder_is_one_process_s_and_a_kill_lets_it_go(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from swat_lm.serve.sessions.store import FolderStore\n"
        "store = FolderStore(Path(sys.argv[1])); print('has it', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(BlockingIOError, match="another server has these sessions"):
            FolderStore(tmp_path)
        other.kill()
    FolderStore(tmp_path).close()


def test_addresses_that_nothing_opens(tmp_path: Path):
    with pytest.raises(SessionError, match="nowhere://x"):
        open_store("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        open_store(str(tmp_path / "file"))


def test_names_of_files_say_nothing_of_sessions():
    assert file_name("../../etc/passwd").isalnum()
    assert file_name("a") != file_name("b")

"""Standard streams that are closed, full, read by nobody or of another encoding, and the work that goes on."""

import io
import os
import sys
from pathlib import Path

import pytest
import typer

from swat_lm.cli import streams
from swat_lm.model.state import load_state

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


def unread() -> io.TextIOWrapper:
    """A pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def test_a_text_that_nobody_reads_ends_and_is_saved(cli, here: Path, exported: Path, monkeypatch):
    monkeypatch.setattr("sys.stdout", unread())
    ran = cli("generate", exported, "-p", "abc", "-n", 10**9, "--ignore-end", "--save-state", "s")
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "nobody reads on; state saved: --load-state s goes on after it")
    assert int(load_state(here / "s").position) < 3 + 10
    # so do both at once, and there is nobody to be told
    monkeypatch.setattr("sys.stdout", unread())
    monkeypatch.setattr("sys.stderr", unread())
    assert cli("generate", exported, "-p", "abc", "-n", 10**9, "--ignore-end", "--save-state", "t").code == 0
    assert (here / "t").exists()


def test_a_run_whose_progress_nobody_reads_goes_on(cli, here: Path, monkeypatch):
    monkeypatch.setattr("sys.stdout", unread())
    monkeypatch.setattr("sys.stderr", unread())
    assert cli("train", "run.yaml").code == 0
    assert (here / "runs" / "run" / "export" / "config.json").exists()


@needs_full
def test_a_full_disk_behind_stdout_is_an_error_after_the_work(cli, here: Path, exported: Path, monkeypatch):
    for arguments in (("--help",), ("info",), ("generate", exported, "-p", "abc", "--save-state", "s")):
        monkeypatch.setattr("sys.stdout", open("/dev/full", "w", encoding="utf-8"))  # noqa: SIM115
        ran = cli(*arguments)
        assert (ran.code, ran.err.splitlines()[-1]) == (2, "error: cannot write to stdout: No space left on device")
    assert (here / "s").exists()
    # what goes to stderr is no result
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", open("/dev/full", "w", encoding="utf-8"))  # noqa: SIM115
    assert (cli("info").code, cli("info", "nothing").code) == (0, 2)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_an_encoding_lacks_come_as_escapes(cli, here, exported, encoding: str, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with streams.lasting_streams() as out:
        print("a\u2014b\u00e9", "c\udcff")
        print("d\u2014", file=sys.stderr)
    said = streams.remark(out)
    monkeypatch.undo()
    end = "b\\xe9 c\\udcff\n" if encoding == "ascii" else "b\xe9 c\\udcff\n"
    assert out.buffer.getvalue().decode(encoding) == "a\\u2014" + end
    assert "'\\u2014'" in str(said)


def test_generation_goes_on_in_another_encoding(cli, here: Path, exported: Path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    ran = cli("generate", exported, "-p", "abc", "-n", 60, "--ignore-end", "--seed", 1, "--save-state", "s")
    assert ran.code == 0, ran.err
    assert b"\\ufffd" in written.getvalue()
    assert ran.err.splitlines()[-1].startswith("note: stdout is latin-1, which lacks characters such as '\\u")
    assert int(load_state(here / "s").position) == 3 + 60


def test_a_prompt_in_a_locale_of_ascii(cli, exported: Path, monkeypatch):
    # as Python hands over the bytes of an accent there
    as_ascii = "b\u00e4d".encode().decode("ascii", "surrogateescape")
    ran = cli("generate", exported, "-p", as_ascii, "-n", 1, "--ignore-end")
    assert ran.code == 0
    assert "after 4 tokens read" in ran.err


def test_closed_streams(cli, here: Path, exported: Path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    ran = cli("generate", exported, "-p", "-")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: --prompt -: stdin is closed")
    monkeypatch.setattr("sys.stdout", None)
    assert cli("info").code == 0
    assert cli("generate", exported, "-p", "a", "-n", 3, "--save-state", "s").code == 0
    monkeypatch.setattr("sys.stderr", None)
    assert (cli("info").code, cli("info", "nothing").code, cli("train", "run.yaml").code) == (0, 2, 0)
    assert sys.stdout is None


def test_a_closed_stream_gives_its_number_to_no_file(here: Path):
    number = os.dup(0)
    os.close(number)
    streams.open_if_closed(number)
    try:
        assert os.fstat(number).st_rdev == os.stat(os.devnull).st_rdev
        assert os.get_inheritable(number)
    finally:
        os.close(number)


def test_a_pipe_that_breaks_elsewhere_is_told(cli, here: Path, monkeypatch):
    def break_off() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("swat_lm.model.presets.preset_names", break_off)
    ran = cli("info")
    assert (ran.code, ran.err) == (2, "error: Broken pipe\n")


def test_libraries_that_encode_themselves_write_to_the_same_end(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    # typer writes to the bytes below where a stream is ASCII
    monkeypatch.setattr("sys.stdout", open(writing, "w", encoding="ascii"))  # noqa: SIM115
    with streams.lasting_streams() as out:
        typer.echo("text")
        assert streams.reader_is_gone()
        assert out.is_gone

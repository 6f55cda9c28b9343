import gzip
import json
import logging
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from swat_lm.data.source_text import Piece, read_pieces
from swat_lm.data.sources import DataError, HubSource, SourceFile, hub_source, resolve_sources


def read(*names: object, field: str = "text") -> list[Piece]:
    return [piece for source in resolve_sources(map(str, names)) for piece in read_pieces(source, field, None)]


def texts(*names: object, **options) -> list[str]:
    return [piece.text for piece in read(*names, **options)]


def make(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content)
    return path


def test_folder_is_read_whole_sorted_without_hidden_or_empty_files(tmp_path):
    make(tmp_path / "b.txt", b"zwei\r\n")
    make(tmp_path / "a" / "z.md.gz", "# \u00e9ins".encode())
    make(tmp_path / "c.jsonl.xz", b'{"text": "drei"}\n\n{"text": ""}\n{"text": "vier", "id": 3}\n')
    make(tmp_path / "d.py", "# -*- coding: latin-1 -*-\nx = '\u00e9'\n".encode("latin-1"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["f\u00fcnf", "sechs"]}), tmp_path / "e.parquet")
    make(tmp_path / "f.parquet.gz", (tmp_path / "e.parquet").read_bytes())
    make(tmp_path / "g.txt", b"\xef\xbb\xbfseven")
    for ignored in (".hidden.txt", ".git/x.txt", "picture.png", "empty.txt", "a/__init__.py"):
        make(tmp_path / ignored, b"" if ignored.startswith(("empty", "a/")) else b"ignored")
    expected = ["# \u00e9ins", "zwei\r\n", "drei", "vier", "# -*- coding: latin-1 -*-\nx = '\u00e9'\n"]
    expected += ["f\u00fcnf", "sechs"] * 2 + ["seven"]
    assert texts(tmp_path) == expected
    assert all(piece.opens for piece in read(tmp_path))


def test_links_are_followed_once_and_what_is_left_out_is_named(tmp_path, caplog):
    data, outside = tmp_path / "data", tmp_path / "outside"
    for name in ("a.txt", "b.txt", "own/c.txt", ".hidden/x.txt"):
        make(data / name, name.encode())
    for name in ("1.txt", "deep/2.txt", ".hidden.txt", "deep/3.txt", "4.png"):
        make(outside / name, name.encode())
    links = {
        "data/more": "../outside", "data/twice": "../outside", "data/Own": "own", "data/.dots": "../outside",
        "data/one.txt": "../outside/4.png", "data/same.txt": "b.txt", "data/own/up": "..", "data/own/top": "../..",
        "data/gone": "nowhere", "data/gone.txt": "nowhere.txt", "data/round": "round", "outside/inner": "deep",
        "outside/deep/back": "../../data", "data/more-deep": "../outside/deep",
    }  # fmt: skip
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        found = [str(one.path.relative_to(data)) for one in resolve_sources([str(data)]) if isinstance(one, SourceFile)]
    assert found == ["a.txt", "b.txt", "more/1.txt", "more/deep/2.txt", "more/deep/3.txt", "one.txt", "own/c.txt"]
    assert texts(data) == ["a.txt", "b.txt", "1.txt", "deep/2.txt", "deep/3.txt", "4.png", "own/c.txt"]
    said = {one.partition(" is left out: ")[0]: one.partition(" is left out: ")[2] for one in caplog.messages}
    said = {str(Path(path).relative_to(data)): what.replace(str(tmp_path), "") for path, what in said.items()}
    assert said == {
        "Own": "a link to /data/own, which is read under that name",
        "twice": "a link to /data/more, which is read under that name",
        "more-deep": "a link to /data/more/deep, which is read under that name",
        "more/inner": "a link to /data/more/deep, which is read under that name",
        "more/deep/back": "a link to /data, which is read under that name",
        "same.txt": "a link to /data/b.txt, which is read under that name",
        "own/up": "a link to /data, a folder around it",
        "own/top": "a link to , a folder around it",
        "gone": "a link that leads nowhere (to nowhere)",
        "gone.txt": "a link that leads nowhere (to nowhere.txt)",
        "round": "a link that leads nowhere (to round)",
    }


def test_a_folder_that_is_a_link_or_holds_nothing_but_links_is_read(tmp_path):
    make(tmp_path / "real" / "a.txt", b"one")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "inner").symlink_to("../link")
    assert texts(tmp_path / "link") == texts(tmp_path / "holder") == ["one"]
    # two links, the first of which leads to a part of what the second leads to
    make(tmp_path / "real" / "part" / "b.txt", b"two")
    (tmp_path / "holder" / "first").symlink_to("../real/part")
    assert sorted(texts(tmp_path / "holder")) == ["one", "two"]


def test_identity_changes_with_the_file(tmp_path):
    path = make(tmp_path / "a.txt", b"one")
    before = resolve_sources([str(path)])[0].identity
    assert resolve_sources([str(path)])[0].identity == before
    make(path, b"three")
    assert resolve_sources([str(path)])[0].identity != before


def test_standard_library_is_there_and_decodes():
    sources = resolve_sources(["python:stdlib"])
    names = [str(source.path) for source in sources if isinstance(source, SourceFile)]
    assert len(names) > 300
    assert names == sorted(names)
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert "def " in "".join(piece.text for source in sources[:20] for piece in read_pieces(source, "text", None))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["a.txt", "empty"]),
        ("a.jsonl", b"\n", ["a.jsonl", "empty"]),
        ("a.py", b"", ["a.py", "empty"]),
        ("a.txt.gz", b"", ["a.txt.gz", "empty"]),
        ("a.txt", b"abc\x00def", ["a.txt", "binary", "byte 3"]),
        ("a.txt", b"x" * (1 << 20) + b"\x00", ["binary", f"byte {1 << 20}"]),
        ("a.txt", b"abc\xffdef", ["a.txt", "UTF-8", "0xff", "byte 3"]),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3(", ["UTF-8", "0xc3", f"byte {(1 << 20) - 1}"]),
        ("a.txt", b"abc\xc3", ["ends within a UTF-8 character, at byte 3"]),
        ("a.txt", "text".encode("utf-16"), ["UTF-16", "iconv"]),
        ("a.py", b"x = '\xff'", ["a.py", "UTF-8", "byte 5"]),
        ("a.py", b"# coding: nonsense\n", ["a.py", "unknown encoding"]),
        *[
            ("a.py", f"# coding: {name}\nx = 'plain'\n".encode(), ["a.py: declares the encoding", name, reason])
            for name, reason in (
                ("rot13", "not an encoding of text"),
                ("hex", "not an encoding of text"),
                ("base64", "not an encoding of text"),
                ("zlib", "not an encoding of text"),
                ("punycode", "Invalid extended code point"),
                ("undefined", "undefined encoding"),
                ("cp037", "the declaration itself reads otherwise"),
            )
        ],
        ("a.py", b"# coding: unicode_escape\n'\\x'\n", ["a.py: not UNICODE_ESCAPE text", "byte 26"]),
        ("a.py", b"# coding: raw_unicode_escape\n'\\ud800'\n", ["a.py", "raw_unicode_escape", "half a surrogate pair"]),
        ("a.py", b"# coding: utf-7\n'+2AA-'\n", ["a.py", "utf-7", "half a surrogate pair"]),
        ("a.py", b"# coding: cp1252\n'\x81'\n", ["a.py: not CP1252 text: byte 0x81 at byte 18"]),
        ("a.py", b"\xef\xbb\xbfx = '\xff'", ["a.py: not UTF-8", "byte 0xff at byte 8"]),
        ("a.py", b"\xef\xbb\xbf# coding: latin-1\n", ["a.py", "latin-1", "begins with the byte order mark of UTF-8"]),
        ("a.py", b"# coding: hex\nx = '\x00'\n", ["a.py", "binary", "byte 19"]),
        ("a.jsonl", b'{"text": "a"}\n{"body": 1, "id": 2}\n', ["a.jsonl:2", "'text'", "body, id", "data.text_field"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl:2", "not a JSON object"]),
        ("a.jsonl", b"[1]\n", ["a.jsonl:1", "list"]),
        ("a.jsonl", b'{"text": null}\n', ["a.jsonl:1", "must be text; got null"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1", "must be text; got int"]),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', ["a.jsonl:1", "surrogate", "character 1"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl:1", "UTF-8"]),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", ["a.jsonl:1", "nested too deeply"]),
        ("a.jsonl", b'\n{"text": "a", "x": {"y": ' + b"1" * 5000 + b"}}\n", ["a.jsonl:2", "more than 4,300 digits"]),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', ["a.jsonl:1", "field 'text' is there twice"]),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ["a.jsonl: UTF-16", "iconv"]),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-32-be"), ["a.jsonl:1", "zero byte"]),
        ("a.jsonl", b'{"text": "a"}\n\xef\xbb\xbf{"text": "a"}\n', ["a.jsonl:2", "BOM"]),
        ("a.jsonl", b'{"\\ud800": 1}\n', ["a.jsonl:1", "it has \\ud800"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', ["a.jsonl:2", "Unterminated string"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3', ["a.jsonl:2", "not UTF-8 text (byte 10 of the line)"]),
        ("a.parquet", b"nonsense, and long enough", ["a.parquet", "not a readable parquet"]),
        ("a.doc", b"x", ["a.doc", "unknown kind", ".jsonl"]),
        ("a.gz", b"x", ["a.gz", "unknown kind"]),
    ],
)
def test_bad_content_is_named(tmp_path, name, content, parts):
    path = make(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    for part in parts:
        assert part in str(caught.value)


def test_other_encodings_of_text_are_read(tmp_path):
    for name, content, expected in (
        ("koi8-r", "\u0436".encode("koi8-r"), "\u0436"),
        ("utf-7", b"+BDY-", "\u0436"),
        ("unicode_escape", b"\\u0436", "\u0436"),
        ("utf-8", "\u0436".encode(), "\u0436"),
    ):
        path = make(tmp_path / "a.py", f"#!python\n# vim: set fileencoding={name} :\n".encode() + content)
        assert texts(path)[0].endswith(f":\n{expected}")
    assert texts(make(path, b"\xef\xbb\xbf# coding: utf-8\nx")) == ["# coding: utf-8\nx"]
    assert texts(make(path, b"x = 1\ny = 2\n# coding: hex\n")) == ["x = 1\ny = 2\n# coding: hex\n"]


def test_what_json_allows_is_read(tmp_path):
    rows = [
        b'\xef\xbb\xbf{"text": "a", "x": NaN, "y": -Infinity, "z": "\\ud800"}', b"  ", b'{"text": "\\ud83d\\ude00"}',
        b'{"x": 1, "x": 2, "text": "c", "y": {"text": 1, "text": 2}}', b'{"text": "end"}',
    ]  # fmt: skip
    assert texts(make(tmp_path / "a.jsonl", b"\n".join(rows))) == ["a", "\U0001f600", "c", "end"]


def test_bad_text_in_a_table_is_named_with_its_row(tmp_path):
    whole = pyarrow.array([b"ok"] * 400 + [b"ab\xff"] + [b"ok"] * 99, pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(500, *whole.buffers()[1:])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, row_group_size=150)
    with pytest.raises(DataError, match=r"a\.parquet, row 400: field 'text' is not UTF-8 text \(byte 2 of its text\)"):
        texts(path)
    for values, reason in (([b"a"], "must be text; got bytes"), (["a", None], "row 1: .* must be text; got null")):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(DataError, match=reason):
            texts(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns are called 'text'"):
        texts(path)
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xfft"))
    with pytest.raises(DataError, match=r"a\.parquet: the name of a column is not UTF-8 text"):
        texts(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_damaged_compression_is_named(tmp_path, name, suffix):
    row = json.dumps({"text": "".join(map(chr, range(32, 2000)))}).encode() + b"\n"
    path = make(tmp_path / (name + suffix), row * 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}{suffix}: the {suffix} file is cut off"):
        read(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=rf"{name}{suffix}: damaged, or not a {suffix} file"):
        read(path)


def test_names_that_lead_nowhere(tmp_path):
    make(tmp_path / "corpus" / "novels.txt", b"x")
    with pytest.raises(DataError, match=r"no file or folder .*novel\.txt; the nearest is .*novels\.txt"):
        resolve_sources([str(tmp_path / "corpus" / "novel.txt")])
    with pytest.raises(DataError, match=r"the nearest is .*corpus"):
        resolve_sources([str(tmp_path / "corpsu" / "novels.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file to read; accepted are \.txt \.md \.py \.jsonl \.parquet"):
        resolve_sources([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="only python:stdlib is known"):
        resolve_sources(["python:os"])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: no field 'text'; it has body"):
        read(tmp_path / "t.parquet")


def test_hub_names():
    assert resolve_sources(["some-owner/some.set"]) == [HubSource("some-owner/some.set")]
    assert hub_source("hub:o/n") == HubSource("o/n", None, "train")
    assert hub_source("hub:o/n:validation") == HubSource("o/n", None, "validation")
    assert hub_source("hub:o/n:en") == HubSource("o/n", "en", "train")
    assert hub_source("hub:o/n:en:test[:5%]".replace("[:5%]", "")) == HubSource("o/n", "en", "test")
    for wrong in ("hub:", "hub:a::b", "hub:a:b:c:d"):
        with pytest.raises(DataError, match="write hub:NAME"):
            hub_source(wrong)


def test_hub_data_set_is_loaded_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [f"row {i}" for i in range(600)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": range(600)}), folder / "train.parquet")
    source = f"hub:{folder}"
    assert texts(source) == rows
    identity = resolve_sources([source])[0].identity
    assert identity == resolve_sources([source])[0].identity
    with pytest.raises(DataError, match="no field 'body'; it has text, id"):
        texts(source, field="body")
    with pytest.raises(DataError, match="cannot load this data set"):
        texts(f"{source}:validation")


def test_hub_data_set_offline_says_so(monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub:nobody/nothing:train: cannot load .* is set, so only data sets already"):
        texts("nobody/nothing")

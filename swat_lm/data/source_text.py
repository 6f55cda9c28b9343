"""Reads a source as pieces of text: whole documents, or parts of long text files so that memory stays bounded.

A .txt .md .py file is one document; a .jsonl, .parquet or hub row is one document. Text is kept byte for byte, except
that a UTF-8 byte order mark at a file's start is dropped.
"""

import codecs
import gzip
import io
import json
import lzma
import shutil
import sys
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from swat_lm.data.cutting import LONGEST, Cuts, Cutter
from swat_lm.data.sources import DataError, HubSource, Source, SourceFile
from swat_lm.files import naming

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BLOCK = 1 << 20
KINDS_WITH_ROWS = (".jsonl", ".parquet")
TEXT_KEY = "data.text_field or --text-field"


class Piece(NamedTuple):
    """Some text of one document."""

    text: str
    opens: bool
    """Whether a document begins with this piece."""
    marked: bool = False
    """Whether it is part of an answer, see `swat_lm/data/instructions.py`."""


class SourcePieces:
    """All pieces of all sources in order, counting the bytes read; `read(source, on_bytes=...)` gives those of one."""

    def __init__(self, sources: Sequence[Source], read: Callable[..., Iterator[Piece]]) -> None:
        self.sources, self.read = sources, read
        self.total = sum(source.size for source in sources)
        self.bytes_read = 0
        """Of `total`."""

    def __iter__(self) -> Iterator[Piece]:
        before = 0
        for source in self.sources:
            yield from self.read(source, on_bytes=partial(self._count, before))
            before += source.size
            self.bytes_read = before

    def _count(self, before: int, count: int) -> None:
        self.bytes_read = before + count


def read_pieces(
    source: Source,
    text_field: str,
    cuts: Cuts | None,
    on_bytes: Callable[[int], None] = lambda count: None,
    longest: int = LONGEST,
) -> Iterator[Piece]:
    """The non-empty documents of a source in order, cut into pieces of at most `longest` characters (see `Cutter`).

    Without `cuts` every document is one piece. `on_bytes` is told, now and then, how many of `source.size` bytes have
    been read. Raises DataError for content that is not what the suffix says, naming the file and the line, row or byte.
    """
    if isinstance(source, HubSource) or source.kind in KINDS_WITH_ROWS:
        rows = read_fields(source, {text_field: TEXT_KEY}, on_bytes)
        documents = ([checked_text(row[text_field], place, text_field)] for place, row in rows)
    elif source.kind == ".py":
        documents = [[read_python(source, on_bytes)]]
    else:
        documents = [read_text(source, on_bytes)]
    for texts in documents:
        for number, text in enumerate(cut(texts, Cutter(cuts, str(source), longest))):
            yield Piece(text, not number)


def cut(texts: Iterable[str], cutter: Cutter) -> Iterator[str]:
    """The pieces of one text that comes bit by bit."""
    for text in texts:
        yield from cutter.push(text)
    yield from cutter.finish()


def read_text(source: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """A text file, block by block: memory holds little more than the cutter does."""
    empty = True
    for text in decoded_blocks(source, on_bytes):
        empty = empty and not text
        yield text
    if empty and source.named:
        raise DataError(f"{source.path}: the file is empty")


def decoded_blocks(source: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """UTF-8 text of a file, about BLOCK bytes at a time; DataError with the byte offset for anything else."""
    carried, offset = b"", 0
    with opened(source, on_bytes) as stream:
        while block := stream.read(BLOCK):
            block = carried + block
            check_text(source, block, offset)
            try:
                text, carried = block.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                if error.end < len(block) or error.reason != "unexpected end of data":
                    raise not_text_of("utf-8", source, offset, error) from None
                text, carried = block[: error.start].decode("utf-8"), block[error.start :]
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block) - len(carried)
    if carried:
        raise DataError(f"{source.path}: ends within a UTF-8 character, at byte {offset}; the file seems to be cut off")


def read_python(source: SourceFile, on_bytes: Callable[[int], None]) -> str:
    """A Python source in the encoding it declares (PEP 263)."""
    with opened(source, on_bytes) as stream:
        content = stream.read()
    if not content and source.named:
        raise DataError(f"{source.path}: the file is empty")
    check_text(source, content, 0)
    declared = declared_encoding(content.removeprefix(codecs.BOM_UTF8).decode("latin-1"))
    encoding, reason = "utf-8", None
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    except SyntaxError as error:
        # its way to say that the declared encoding does not exist, or that undeclared UTF-8 is not UTF-8
        is_marked = content.startswith(codecs.BOM_UTF8)
        reason = "it begins with the byte order mark of UTF-8" if is_marked else error.msg
    try:
        text = content.decode(encoding)
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        name = encoding if reason else declared or encoding
        # a byte order mark is not among the bytes that the error counts
        raise not_text_of(name, source, len(content) - len(error.object), error) from None
    except UnicodeEncodeError as error:
        reason = f"half a surrogate pair at character {error.start}"
    except UnicodeError as error:
        # what some encodings raise for bytes that are not theirs
        reason = str(error)
    except LookupError:
        reason = "it is known, but not an encoding of text"
    else:
        if reason is None:
            if declared_encoding(text) == declared:
                return text
            reason = "the declaration itself reads otherwise in it"
    raise DataError(
        f"{source.path}: declares the encoding {(declared or encoding)[:40]}, in which it cannot be read "
        f"({reason[:200]}); convert it to UTF-8 and declare that, or nothing"
    )


def declared_encoding(text: str) -> str | None:
    """The encoding that the first two lines of a Python source declare, if any."""
    found = map(tokenize.cookie_re.match, text.split("\n", 2)[:2])
    return next((match[1] for match in found if match), None)


def read_fields(
    source: Source, fields: Mapping[str, str], on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a source that has them, each with its place and these fields, some at a time in memory.

    `fields`: the wanted ones, each with the key of the recipe that names it; the last must not be twice in a row.
    """
    if isinstance(source, HubSource):
        yield from hub_rows(source, fields, on_bytes)
    elif source.kind == ".parquet":
        yield from parquet_rows(source, fields, on_bytes)
    else:
        expected = f"a JSON object with {'field ' if len(fields) == 1 else ''}{' and '.join(map(repr, fields))}"
        for place, row in read_rows(source, expected, on_bytes, list(fields)[-1]):
            check_fields(fields, row, place)
            yield place, row


def read_rows(
    source: SourceFile,
    expected: str = "a JSON object",
    on_bytes: Callable[[int], None] = lambda count: None,
    once: str | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a .jsonl file with its place, `path:line`.

    `expected` says in errors what a line should be; the field `once` must not be there twice.
    """
    rows = 0
    with opened(source, on_bytes) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                check_mark(source, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            rows += 1
            place = f"{source.path}:{number}"
            row = parsed_line(line, place, once)
            if not isinstance(row, dict):
                raise DataError(f"{place}: expected {expected}; got {type(row).__name__}")
            yield place, row
    if not rows and source.named:
        raise DataError(f"{source.path}: the file is empty")


def parsed_line(line: bytes, place: str, once: str | None) -> Any:
    """The value of one line of JSON; DataError that names the place."""
    twice: dict[str, Any] | None = None

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        row = dict(pairs)
        if len(row) < len(pairs):
            # objects end from the inside out: the last one seen is the row itself
            twice = row if [name for name, _ in pairs].count(once or "") > 1 else None
        return row

    if (zero := line.find(0)) >= 0:
        raise DataError(f"{place}: a zero byte (byte {zero} of the line): not UTF-8 text, or a binary file")
    try:
        # bytes would be taken for UTF-16 or UTF-32 where they look like it
        row = json.loads(line.decode("utf-8"), object_pairs_hook=as_object)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not a JSON object: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply to be read; leave the field that is out of the file") from None
    except ValueError:
        # nothing else is converted while parsing
        digits = sys.get_int_max_str_digits()
        raise DataError(f"{place}: a number of more than {digits:,} digits; write it as text") from None
    if twice is not None and twice is row:
        raise DataError(f"{place}: field {once!r} is there twice")
    return row


def parquet_rows(
    source: SourceFile, fields: Mapping[str, str], on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_fields`."""
    import pyarrow

    with opened(source, on_bytes) as stream, tempfile.TemporaryFile() as plain:
        seekable = stream
        if source.compression:
            shutil.copyfileobj(stream, plain, BLOCK)
            seekable = plain
        try:
            table, row = table_with(source, seekable, fields), 0
            for batch in table.iter_batches(batch_size=256, columns=list(fields)):
                yield from batch_rows(source, batch, fields, row)
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).partition("\n")[0]
            raise DataError(f"{source.path}: not a readable parquet file: {reason}") from error
    if not row and source.named:
        raise DataError(f"{source.path}: the file holds no rows")


def table_with(source: SourceFile, stream: IO[bytes], fields: Mapping[str, str]) -> "ParquetFile":
    """An opened parquet file that has one column of each of these names."""
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(stream)
        names = table.schema_arrow.names
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}: the name of a column is not UTF-8 text: {error.object!r}") from None
    check_fields(fields, names, str(source))
    for field in fields:
        if names.count(field) > 1:
            raise DataError(f"{source.path}: {names.count(field)} columns are called {field!r}")
    return table


def hub_rows(
    source: HubSource, fields: Mapping[str, str], on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a data set, as of a parquet file."""
    dataset, row = source.dataset, 0
    check_fields(fields, dataset.column_names, str(source))
    for batch in dataset.select_columns(list(fields)).with_format("arrow").iter(256):
        yield from batch_rows(source, batch, fields, row)
        row += batch.num_rows
        on_bytes(source.size * row // dataset.num_rows)


def batch_rows(source: Source, batch: Any, fields: Iterable[str], first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a batch of pyarrow, of which the first has this number, with plain values."""
    for row, values in enumerate(zip(*(batch.column(field) for field in fields), strict=True), first):
        place = f"{source}, row {row}"
        yield place, {field: plain(value, place, field) for field, value in zip(fields, values, strict=True)}


def plain(value: Any, place: str, field: str) -> Any:
    """A value of pyarrow as Python's, which may hold bytes where it says text."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: field {field!r} is not UTF-8 text (byte {error.start} of its text)") from None


def checked_text(value: Any, place: str, field: str) -> str:
    """The value as text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {field!r} must be text; got {'null' if value is None else type(value).__name__}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} is not valid Unicode: half a surrogate pair at character {error.start}"
        ) from None
    return value


def check_fields(fields: Mapping[str, str], found: Collection[str], place: str) -> None:
    """Raise DataError for a row or table without one of the fields, whose name a key of the recipe gives."""
    for field, key in fields.items():
        if field in found:
            continue
        # names may hold what no terminal can show
        names = ", ".join(str(name).encode("utf-8", "backslashreplace").decode() for name in found)
        instructions = {"messages": {"messages"}, "prompt_answer": {"prompt", "answer"}}
        form = next((form for form, needed in instructions.items() if needed <= set(found)), None)
        hint = f"; for instruction data set data.format={form}" if form and key == TEXT_KEY else ""
        raise DataError(f"{place}: no field {field!r}; it has {names or 'none'} (set {key}){hint}")


def check_mark(source: SourceFile, beginning: bytes) -> None:
    """Refuse text that begins with UTF-16's byte order mark."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{source.path}: UTF-16 text; convert it to UTF-8 (iconv -f utf-16 -t utf-8)")


def check_text(source: SourceFile, block: bytes, offset: int) -> None:
    """Refuse binary content."""
    if offset == 0:
        check_mark(source, block)
    if (place := block.find(0)) >= 0:
        raise DataError(f"{source.path}: a binary file (zero byte at byte {offset + place}); expected UTF-8 text")


def not_text_of(encoding: str, source: SourceFile, offset: int, error: UnicodeDecodeError) -> DataError:
    """The error for bytes that are not of this encoding."""
    value = error.object[error.start]
    place = offset + error.start
    return DataError(f"{source.path}: not {encoding.upper()[:40]} text: byte 0x{value:02x} at byte {place}")


@contextmanager
def opened(source: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; damage to the compressed stream becomes a DataError."""
    with naming(source.path), io.BufferedReader(Counted(source.path, on_bytes), BLOCK) as packed:
        try:
            unpacked = {".gz": gzip.open, ".xz": lzma.open}.get(source.compression)
            with unpacked(packed) if unpacked else packed as stream:
                yield cast(IO[bytes], stream)
        except EOFError:
            raise DataError(
                f"{source.path}: the {source.compression} file is cut off: it ends before its end mark"
            ) from None
        except (gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{source.path}: damaged, or not a {source.compression} file: {error}") from None


class Counted(io.FileIO):
    """A file that reports how far it has been read."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self.on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int:
        """As the base class; then reports."""
        count = super().readinto(buffer)
        self.on_bytes(self.tell())
        return count

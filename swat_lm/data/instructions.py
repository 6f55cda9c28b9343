"""Instruction data: rows of prompt and answer, or of messages, as documents of which the answers are marked.

A document is laid out as plain text, so that any tokenizer serves and a prompt can be typed. Each part is tokenised on
its own: no token reaches over the place where an answer begins, as none does when a prompt is continued.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from swat_lm.data.cutting import Cuts, Cutter
from swat_lm.data.source_text import KINDS_WITH_ROWS, Piece, checked_text, cut, read_fields
from swat_lm.data.sources import DataError, HubSource, Source
from swat_lm.recipe import DataRecipe

__all__ = ["LAYOUT", "Part", "fields_read", "is_marked", "read_marked_pieces"]

LAYOUT = 1
"""Changes when the same rows are laid out as other text."""
ANSWERING = "assistant"


class Part(NamedTuple):
    """Some text of a document."""

    text: str
    marked: bool
    """Whether it is an answer."""


def is_marked(data: DataRecipe) -> bool:
    """Whether rows of this format say which part of them is an answer."""
    return data.format != "text"


def fields_read(data: DataRecipe) -> dict[str, str]:
    """The fields of a row that a marked document is made of, the answer's last; each with the key that names it.

    Raises DataError for one field that is named twice.
    """
    if data.format == "messages":
        return {data.messages_field: "data.messages_field"}
    if data.prompt_field == data.answer_field:
        raise DataError(f"data.prompt_field and data.answer_field are both {data.answer_field!r}: name two fields")
    return {data.prompt_field: "data.prompt_field", data.answer_field: "data.answer_field"}


def read_marked_pieces(
    source: Source, data: DataRecipe, cuts: Cuts | None, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Piece]:
    """The documents of a source in order as pieces, see `read_pieces`.

    Raises DataError for a source without rows, and for a row that is not of the recipe's `data.format`.
    """
    lay_out = lay_out_messages if data.format == "messages" else lay_out_pair
    if not isinstance(source, HubSource) and source.kind not in KINDS_WITH_ROWS:
        raise DataError(
            f"{source}: a {source.kind} file has no rows, which data.format={data.format} reads; expected .jsonl, "
            ".parquet or a hub data set"
        )
    for place, row in read_fields(source, fields_read(data), on_bytes):
        opens = True
        for part in lay_out(row, place, data):
            for text in cut([part.text], Cutter(cuts, str(source))):
                yield Piece(text, opens, part.marked)
                opens = False


def lay_out_pair(row: Mapping[str, Any], place: str, data: DataRecipe) -> list[Part]:
    """The prompt, a line break, and the answer, which is marked."""
    prompt, answer = (checked_text(row[name], place, name) for name in fields_read(data))
    if not answer:
        raise DataError(f"{place}: field {data.answer_field!r} is empty, so nothing to learn; leave the row out")
    return [Part(f"{prompt}\n", False), Part(answer, True)]


def lay_out_messages(row: Mapping[str, Any], place: str, data: DataRecipe) -> list[Part]:
    """A line `ROLE: CONTENT` for each message; what the assistant says is marked, with the line break that ends it."""
    field = data.messages_field
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: field {field!r} must be a list of messages, each with role and content")
    parts = []
    for number, message in enumerate(messages):
        where = f"{place}: {field}[{number}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            got = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise DataError(f"{where} must have role and content; got {got or 'neither'}")
        role, content = (checked_text(message[name], where, name) for name in ("role", "content"))
        parts += [Part(f"{role}:", False), Part(f" {content}\n", role == ANSWERING)]
    if not any(part.marked for part in parts):
        raise DataError(f"{place}: no message has the role {ANSWERING}, so nothing to learn; leave the row out")
    return parts

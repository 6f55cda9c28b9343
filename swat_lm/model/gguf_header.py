"""What a GGUF file says before its weights: settings and the table of tensors, checked against the file's size.

The form is llama.cpp's, versions 2 and 3. Weights are read through transformers, in gguf.py.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swat_lm.words import counted, install_extra

__all__ = ["GgufHeader", "GgufTensor", "check_settings", "is_gguf", "read_gguf_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# struct's letters of the values of a fixed size, by GGUF's number for their type
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# no file has so much of it, and one that says so is damaged
MOST_DIMENSIONS = 8
# what settings that are read are, where a file has them; whole numbers with the least that they may be
WHOLE_NUMBERS = {
    "general.alignment": 1, "split.count": 0, "block_count": 1, "context_length": 0, "embedding_length": 1,
    "attention.head_count": 1, "attention.key_length": 1, "attention.value_length": 1,
    "attention.sliding_window": 0, "rope.dimension_count": 1, "expert_count": 0,
}  # fmt: skip
FRACTIONS = ("rope.freq_base", "rope.scaling.factor", "attention.layer_norm_rms_epsilon")
LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "tokenizer.ggml.merges")
TEXTS = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", "rope.scaling.type")


class GgufTensor(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    """As torch has it."""
    kind: int
    """ggml's number for how its values are stored: 0 float32, 1 float16, 30 bfloat16, others blocks."""
    start: int
    """Its first byte in the file."""

    @property
    def num_elements(self) -> int:
        """Values, whatever each takes."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """All that stands before the weights."""

    path: Path
    settings: Mapping[str, Any]
    """Numbers and texts by their keys, lists of numbers and of texts."""
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the family."""
        return self.settings["general.architecture"]

    def setting(self, name: str) -> Any:
        """A setting of the architecture, such as `attention.key_length`; None where the file has none."""
        return self.settings.get(f"{self.architecture}.{name}")


class Reading:
    """A place in the bytes of a header, which moves on as values are read."""

    def __init__(self, content: np.ndarray, place: int) -> None:
        self.content, self.place = content, place

    def take(self, count: int) -> bytes:
        """The next bytes; raises EOFError where the file has fewer."""
        if count > len(self.content) - self.place:
            raise EOFError
        self.place += count
        return self.content[self.place - count : self.place].tobytes()

    def numbers(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        """The next numbers of one type."""
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(f"<{letter}")))

    def text(self) -> str:
        """The next text."""
        return self.take(*self.numbers("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """The next value, of the type with this number."""
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind])[0]
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.numbers("I")[0], self.numbers("Q")[0]
        if inner in NUMBERS:
            return list(self.numbers(NUMBERS[inner], count))
        if inner == TEXT:
            return [self.text() for _ in range(count)]
        raise ValueError(f"a list of the unknown type {inner}")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file that holds all tensors it lists.

    Raises:
        ValueError: no GGUF file, one that is cut short or damaged, a part of several, or the package gguf is missing.
        OSError: the file cannot be read.
    """
    if not is_gguf(path):
        raise ValueError(f"source: {path} is not a GGUF file: it does not begin with the letters GGUF")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    reading = Reading(content, len(MAGIC))
    try:
        settings, table = read_parts(reading)
    except EOFError:
        raise ValueError(f"source: {path} is cut short: it ends within its header; fetch it again") from None
    except (ValueError, struct.error) as error:
        raise ValueError(f"source: {path} is damaged or no GGUF file that is known here: {error}") from None
    if not isinstance(settings.get("general.architecture"), str):
        raise ValueError(f"source: {path} names no general.architecture, so nothing is known of its model")
    check_settings(path, {key: settings[key] for key in ("general.alignment", "split.count") if key in settings})
    if settings.get("split.count", 1) > 1:
        raise ValueError(
            f"source: {path} is one of {settings['split.count']} parts of a model, which transformers does not read; "
            "join them with llama.cpp's `llama-gguf-split --merge`"
        )
    alignment = settings.get("general.alignment", 32)
    begin = -(-reading.place // alignment) * alignment
    tensors = {name: GgufTensor(shape, kind, begin + start) for name, (shape, kind, start) in table.items()}
    check_length(path, tensors, len(content))
    return GgufHeader(path, settings, tensors)


def check_settings(path: Path, settings: Mapping[str, Any], architecture: str = "") -> None:
    """Raise ValueError for a setting of another type than its name has, which a byte gone wrong makes of it.

    Settings of a family are judged where its architecture is given: other families may have lists for numbers.
    """
    for key, value in settings.items():
        name = key.removeprefix(f"{architecture}.")
        if name in WHOLE_NUMBERS:
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= WHOLE_NUMBERS[name]
            expected = f"a whole number of at least {WHOLE_NUMBERS[name]}"
        elif key.endswith("_token_id"):
            # how large they may be depends on the vocabulary
            fits, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        elif name in FRACTIONS:
            fits, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        elif key in LISTS:
            fits, expected = isinstance(value, list), "a list"
        elif name in TEXTS:
            fits, expected = isinstance(value, str), "a text"
        else:
            continue
        if not fits:
            shown = f"{value[:3]} ..." if isinstance(value, list) else repr(value)[:60]
            raise ValueError(f"source: {path} is damaged: expected {key} to be {expected}, got {shown}; fetch it again")


def read_parts(reading: Reading) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """Settings, and of each tensor its shape, type and place among the weights."""
    (version,) = reading.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; versions {' and '.join(map(str, VERSIONS))} are read")
    num_tensors, num_settings = reading.numbers("Q", 2)
    settings = {}
    for _ in range(num_settings):
        key = reading.text()
        settings[key] = reading.value(*reading.numbers("I"))
    table = {}
    for _ in range(num_tensors):
        name = reading.text()
        (dimensions,) = reading.numbers("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        # theirs begin with the one that lies closest in memory
        shape = tuple(reversed(reading.numbers("Q", dimensions)))
        table[name] = (shape, reading.numbers("I")[0], reading.numbers("Q")[0])
    return settings, table


def check_length(path: Path, tensors: Mapping[str, GgufTensor], size: int) -> None:
    """Raise ValueError for a file that ends before its last tensor does."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError as error:
        raise ValueError(
            f"source: {path}: reading GGUF files needs the package gguf: {install_extra('gguf')}"
        ) from error
    end = 0
    for name, tensor in tensors.items():
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError):
            raise ValueError(
                f"source: {path}: tensor {name!r} is stored in the form {tensor.kind}, which the installed gguf does "
                "not know; a newer one may"
            ) from None
        end = max(end, tensor.start + tensor.num_elements // block * block_bytes)
    if size < end:
        raise ValueError(
            f"source: {path} is cut short: its tensors end at byte {end:,}, the file has {counted(size, 'byte')}; "
            "fetch it again"
        )

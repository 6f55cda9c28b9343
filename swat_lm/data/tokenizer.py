"""Tokenizers: our byte-level one, and any that Hugging Face loads, with what preparing data needs to know of them.

All are Hugging Face fast tokenizers, so that `save_pretrained` and `AutoTokenizer` work with each.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from swat_lm.data.cutting import BYTE_CUTS, Cuts, find_cuts
from swat_lm.data.sources import DataError
from swat_lm.hub import hub_answers, is_path, nearest_name
from swat_lm.paths import local_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# what common tokenizer.json files without a configuration beside them call their special tokens, in order of preference
KNOWN_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
KNOWN_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
KNOWN_PAD = (PAD, "<|padding|>", "<pad>", "<|endoftext|>")


def load_tokenizer(spec: str) -> "PreTrainedTokenizerFast":
    """The tokenizer a recipe names.

    `spec` is `bytes`; a folder (Hugging Face's, or GPT-2's encoder.json + vocab.bpe, or vocab.json + merges.txt, or a
    SentencePiece tokenizer.model); a tokenizer.json; or a hub name. Raises DataError.
    """
    if spec == BYTES:
        return wrap(byte_backend(), bos_token=BOS, eos_token=EOS, pad_token=PAD)
    path = local_path(spec)
    if path.is_file():
        return load_file(path)
    if path.is_dir():
        return load_folder(path)
    if is_path(spec) or path.suffix == ".json":
        raise DataError(
            f"no tokenizer at {spec}; expected `bytes`, a folder, a tokenizer.json or a hub name{nearest_name(path)}"
        )
    return load_pretrained(spec)


def load_folder(folder: Path) -> "PreTrainedTokenizerFast":
    """A tokenizer folder of any of the known forms."""
    names = {file.name for file in folder.iterdir()}
    if not names & {"tokenizer.json", "tokenizer_config.json"}:
        for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
            # not a link whose end is gone
            if (folder / vocabulary).exists() and (folder / merges).exists():
                return load_gpt2_style(folder / vocabulary, folder / merges)
    if not names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}:
        raise DataError(
            f"{folder}: no tokenizer in this folder; expected tokenizer.json, encoder.json + vocab.bpe, "
            "vocab.json + merges.txt or tokenizer.model"
        )
    needs = [module for module in ("sentencepiece", "google.protobuf") if not is_installed(module)]
    if "tokenizer.model" in names and "tokenizer.json" not in names and needs:
        raise DataError(
            f"{folder}: reading a SentencePiece tokenizer.model needs sentencepiece and protobuf: "
            "pip install sentencepiece protobuf"
        )
    return load_pretrained(str(folder))


def load_file(path: Path) -> "PreTrainedTokenizerFast":
    """A tokenizer.json; its special tokens are recognised by their usual names unless a configuration is beside it."""
    from tokenizers import Tokenizer

    if (path.parent / "tokenizer_config.json").exists() and path.name == "tokenizer.json":
        return load_folder(path.parent)
    with parsing(path, "a tokenizer.json"):
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    return wrap(backend, **known_specials(backend))


@contextmanager
def parsing(path: Path, expected: str) -> Iterator[None]:
    """Turns what Python and the tokenizers library say of files that are something else into DataError."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(f"{path}: not {expected}: not UTF-8 text") from None
    except Exception as error:
        # the Rust library raises plain Exception, and nothing narrower, for a file it cannot parse
        if type(error) is not Exception and not isinstance(error, ValueError | TypeError | IndexError):
            raise
        raise DataError(f"{path}: not {expected}: {str(error).partition(chr(10))[0]}") from None


def load_gpt2_style(vocabulary: Path, merges: Path) -> "PreTrainedTokenizerFast":
    """GPT-2's own files: a vocabulary and a list of merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with parsing(vocabulary.parent, "GPT-2 tokenizer files"):
        entries = json.loads(vocabulary.read_text(encoding="utf-8"))
        # the first line is a version; others may be empty, or have more behind the pair
        lines = [line.split() for line in merges.read_text(encoding="utf-8").split("\n") if not line.startswith("#ver")]
        backend = Tokenizer(models.BPE(vocab=entries, merges=[(pair[0], pair[1]) for pair in lines if pair]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend, **known_specials(backend))


def load_pretrained(name: str) -> "PreTrainedTokenizerFast":
    """A Hugging Face folder or hub name; fast tokenizers only."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        only_local = not Path(name).exists() and not hub_answers()
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=only_local)
    except (OSError, ValueError, ImportError, KeyError) as error:
        offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"cannot load tokenizer {name!r}: {reason}{offline}; "
            "expected `bytes`, a folder, a tokenizer.json or a hub name"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer {name!r} has no fast (tokenizers library) form, which is needed here")
    return tokenizer


def byte_backend() -> "Backend":
    """A tokenizer whose ids 0..255 are the bytes of the UTF-8 text; no merges, no pre-tokenisation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab={character: byte for byte, character in byte_characters().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_characters() -> dict[int, str]:
    """The visible character that stands for each byte in byte-level vocabularies, as GPT-2 chose them.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {byte: chr(byte) for byte in themselves} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def wrap(backend: "Backend", **specials: str) -> "PreTrainedTokenizerFast":
    """A Hugging Face tokenizer around one of the tokenizers library; pads on the left, as generation needs."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left", **specials
    )


def known_specials(backend: "Backend") -> dict[str, str]:
    """The special tokens of a vocabulary that go by a usual name."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = {"bos_token": KNOWN_BOS, "eos_token": KNOWN_EOS, "pad_token": KNOWN_PAD}
    found = {role: next((token for token in known if token in vocabulary), None) for role, known in names.items()}
    return {role: token for role, token in found.items() if token is not None}


def is_byte_level(tokenizer_json: str) -> bool:
    """Whether tokens are strings of the text's bytes, with nothing normalised or put before."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    step = content.get("pre_tokenizer") or {}
    levels = [part for part in (step, *step.get("pretokenizers", ())) if part.get("type") == "ByteLevel"]
    return (
        bool(levels)
        and content.get("normalizer") is None
        and not any(level.get("add_prefix_space") for level in levels)
    )


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id, special tokens included: what the model's embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True)
class TokenizerFacts:
    """What preparing data needs to know of a tokenizer."""

    tokenizer_json: str | None
    """The tokenizers library's form; None for our byte tokenizer, whose ids are the bytes."""
    fingerprint: str
    """Changes with anything that changes the ids of a text, or which tokens begin and end a text."""
    vocab_size: int
    bos: int | None
    eos: int | None
    cuts: Cuts | None
    """Where text may be cut without changing its tokens; None if documents must be seen whole."""
    token_bytes: np.ndarray | None
    """See `token_bytes`."""


def byte_facts() -> TokenizerFacts:
    """Of the byte tokenizer, known without loading it."""
    counts = np.r_[np.ones(256, dtype=np.int64), np.zeros(3, dtype=np.int64)]
    return TokenizerFacts(None, BYTES, 259, bos=256, eos=257, cuts=BYTE_CUTS, token_bytes=counts)


def tokenizer_facts(tokenizer: "PreTrainedTokenizerFast") -> TokenizerFacts:
    """Of any fast tokenizer."""
    # calls on the tokenizer may have set truncation or padding
    content = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    tokenizer_json = json.dumps(content, sort_keys=True)
    bos, eos = cast(int | None, tokenizer.bos_token_id), cast(int | None, tokenizer.eos_token_id)
    fingerprint = hashlib.sha256(f"{bos} {eos} {tokenizer_json}".encode()).hexdigest()
    counts = token_bytes(tokenizer)
    return TokenizerFacts(
        tokenizer_json, fingerprint, vocabulary_size(tokenizer), bos, eos, find_cuts(tokenizer_json), counts
    )


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray | None:
    """UTF-8 bytes that each token id stands for, int64 [vocabulary]; special tokens stand for 0.

    Exact for byte-level tokenizers without normalisation, whose tokens are strings of bytes; None for all others.
    """
    if not is_byte_level(tokenizer.backend_tokenizer.to_str()):
        return None
    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        if number not in added:
            # one visible character for each byte
            counts[number] = len(token)
        elif not added[number].special:
            counts[number] = len(token.encode("utf-8"))
    return counts


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False

"""Tokenizers: our byte-level one, byte-level BPE trained on the user's text, and any that Hugging Face loads.

All are Hugging Face fast tokenizers, so that `save_pretrained` and `AutoTokenizer` work with each.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from swat_lm.data.readers import read_pieces
from swat_lm.data.sources import DataError, resolve_sources
from swat_lm.hub import expanded, hub_answers, is_path, nearest_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# what common tokenizer.json files without a configuration beside them call their special tokens, in order of preference
KNOWN_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
KNOWN_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
KNOWN_PAD = (PAD, "<|padding|>", "<pad>", "<|endoftext|>")

logger = logging.getLogger(__name__)


def load_tokenizer(spec: str) -> "PreTrainedTokenizerFast":
    """The tokenizer a recipe names.

    `spec` is `bytes`; a folder (Hugging Face's, or GPT-2's encoder.json + vocab.bpe, or vocab.json + merges.txt, or a
    SentencePiece tokenizer.model); a tokenizer.json; or a hub name. Raises DataError.
    """
    if spec == BYTES:
        return wrap(byte_backend(), bos_token=BOS, eos_token=EOS, pad_token=PAD)
    path = expanded(spec)
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
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        known = (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
        if not known and (folder / vocabulary).exists() and (folder / merges).exists():
            return load_gpt2_style(folder / vocabulary, folder / merges)
    names = {one.name for one in folder.iterdir()}
    if not names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}:
        raise DataError(
            f"{folder}: no tokenizer in this folder; expected tokenizer.json, encoder.json + vocab.bpe, "
            "vocab.json + merges.txt or tokenizer.model"
        )
    needs = [one for one in ("sentencepiece", "google.protobuf") if not is_installed(one)]
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
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a tokenizer.json: not UTF-8 text") from None
    except Exception as error:
        # the Rust library raises plain Exception, and nothing narrower, for a file it cannot parse
        if type(error) is not Exception:
            raise
        raise DataError(f"{path}: not a tokenizer.json: {error}") from None
    return wrap(backend, **known_specials(backend))


def load_gpt2_style(vocabulary: Path, merges: Path) -> "PreTrainedTokenizerFast":
    """GPT-2's own files: a vocabulary and a list of merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        entries = json.loads(vocabulary.read_text(encoding="utf-8"))
        # the first line is a version; the last may be empty
        lines = [line.split() for line in merges.read_text(encoding="utf-8").split("\n") if not line.startswith("#ver")]
        pairs = [(pair[0], pair[1]) for pair in lines if pair]
    except (ValueError, IndexError) as error:
        raise DataError(f"{vocabulary.parent}: not GPT-2 tokenizer files: {error}") from None
    backend = Tokenizer(models.BPE(vocab=entries, merges=pairs))
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


def train_tokenizer(
    sources: Iterable[str],
    vocab_size: int,
    out: str | Path,
    text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on the sources and save it as the new folder `out`; lossless for any text.

    `vocab_size` counts everything: 256 bytes, three special tokens, the rest merges. `progress(bytes read, bytes in
    all)` is called while the text is read. Raises DataError, and FileExistsError if `out` exists.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len((BOS, EOS, PAD))
    if vocab_size < smallest:
        raise DataError(f"vocab_size must be at least {smallest} (256 bytes and 3 special tokens); got {vocab_size}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; name another folder, or remove it first")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(sources, text_field, progress), trainer)
    if backend.get_vocab_size() < vocab_size:
        logger.warning("the text supports a vocabulary of %d, not %d", backend.get_vocab_size(), vocab_size)
    tokenizer = wrap(backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    out.parent.mkdir(parents=True, exist_ok=True)
    # made as any folder is: the umask says who may read it
    beside = out.with_name(f".{out.name}-{os.getpid()}")
    beside.mkdir()
    try:
        tokenizer.save_pretrained(beside)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return tokenizer


def texts(sources: Iterable[str], text_field: str, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    """Every piece of text of the sources, reporting bytes read."""
    found = resolve_sources(sources)
    total, before = sum(source.size for source in found), 0
    any_text = False
    for source in found:
        read = 0

        def on_bytes(count: int) -> None:
            nonlocal read
            read = count

        for piece in read_pieces(source, text_field, 1 << 16, on_bytes):
            any_text = True
            yield piece.text
            if progress:
                progress(before + read, total)
        before += source.size
    if not any_text:
        raise DataError(f"no text in {', '.join(map(str, sources))}")


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
    found = {role: next((one for one in known if one in vocabulary), None) for role, known in names.items()}
    return {role: token for role, token in found.items() if token is not None}


def is_byte_level(tokenizer_json: str) -> bool:
    """Whether ids depend on the text's bytes only, so that text may be cut between words (no prefix space added)."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    steps = content.get("pre_tokenizer") or {}
    parts = [steps, *steps.get("pretokenizers", ())]
    levels = [one for one in parts if one.get("type") == "ByteLevel"]
    return bool(levels) and content.get("normalizer") is None and not any(one.get("add_prefix_space") for one in levels)


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
    byte_level: bool
    """Whether text may be cut between words without changing its tokens."""
    token_bytes: np.ndarray | None
    """See `token_bytes`."""


def byte_facts() -> TokenizerFacts:
    """Of the byte tokenizer, known without loading it."""
    counts = np.r_[np.ones(256, dtype=np.int64), np.zeros(3, dtype=np.int64)]
    return TokenizerFacts(None, BYTES, 259, bos=256, eos=257, byte_level=True, token_bytes=counts)


def tokenizer_facts(tokenizer: "PreTrainedTokenizerFast") -> TokenizerFacts:
    """Of any fast tokenizer."""
    # calls on the tokenizer may have set truncation or padding
    content = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    tokenizer_json = json.dumps(content, sort_keys=True)
    bos, eos = cast(int | None, tokenizer.bos_token_id), cast(int | None, tokenizer.eos_token_id)
    fingerprint = hashlib.sha256(f"{bos} {eos} {tokenizer_json}".encode()).hexdigest()
    counts = token_bytes(tokenizer)
    return TokenizerFacts(
        tokenizer_json, fingerprint, vocabulary_size(tokenizer), bos, eos, is_byte_level(tokenizer_json), counts
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

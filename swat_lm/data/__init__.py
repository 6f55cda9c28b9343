"""Text -> tokens -> packed batches; a batch is a pure function of (seed, step). Knows no model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swat_lm.data.batches import Batch, BatchSource
    from swat_lm.data.preparation import Progress, default_cache, prepare
    from swat_lm.data.sources import DataError, resolve_sources
    from swat_lm.data.store import Documents, TokenStore
    from swat_lm.data.tokenizer import load_tokenizer, token_bytes, vocabulary_size
    from swat_lm.data.tokenizer_training import train_tokenizer

__all__ = [
    "Batch",
    "BatchSource",
    "DataError",
    "Documents",
    "Progress",
    "TokenStore",
    "default_cache",
    "load_tokenizer",
    "prepare",
    "resolve_sources",
    "token_bytes",
    "train_tokenizer",
    "vocabulary_size",
]

PLACES = {
    "batches": ("Batch", "BatchSource"),
    "preparation": ("Progress", "default_cache", "prepare"),
    "sources": ("DataError", "resolve_sources"),
    "store": ("Documents", "TokenStore"),
    "tokenizer": ("load_tokenizer", "token_bytes", "vocabulary_size"),
    "tokenizer_training": ("train_tokenizer",),
}


def __getattr__(name: str) -> Any:
    # preparing data needs no torch, and batches need no tokenizer: each is imported when first used
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"swat_lm.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Finished parts of a long measurement on disk, so that an interruption loses one batch of documents at most."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from swat_lm.evaluate.figures import read_figures, write_figures
from swat_lm.files import write_text

__all__ = ["PartialResults", "measurement_key"]

# elements of each weight that tell one checkpoint from another
SAMPLED = 256


class PartialResults:
    """Results by name in one JSON file, which belongs to one measurement and is rewritten whole after each addition."""

    def __init__(self, path: Path, key: str) -> None:
        """Raises ValueError if the file holds another measurement's results, or is damaged."""
        self.path, self.key = path, key
        self.known: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            found = read_figures(path.read_text(encoding="utf-8"))
            same, self.known = found["key"] == key, dict(found["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged partial results ({error}): remove the file to start anew") from None
        if not same:
            raise ValueError(
                f"{path}: partial results of another model, text or length; remove the file, or choose another folder"
            )

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep these results; written beside the place and renamed."""
        self.known.update(results)
        write_text(self.path, write_figures({"key": self.key, "results": self.known}, indent=None))

    def remove(self) -> None:
        """The measurement is whole: its own result replaces this file."""
        self.path.unlink(missing_ok=True)


def measurement_key(model: PreTrainedModel, documents: Iterable[Any], settings: Sequence[object]) -> str:
    """A hash of the model, the tokens and what else decides the result.

    Of the weights, each one's first elements are taken, which no two trained models share.
    """
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, weight in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(weight.detach().flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    for document in documents:
        found.update(np.ascontiguousarray(np.asarray(document, dtype=np.int64)).tobytes())
        found.update(b"/")
    found.update(json.dumps([str(setting) for setting in settings]).encode())
    return found.hexdigest()

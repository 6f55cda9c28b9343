"""The record of what text a model was trained on: written into a run's folder, its export, and models made from it."""

import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from swat_lm.data import DataError, TokenStore, default_cache, prepare, resolve_sources
from swat_lm.data.store import INDEX
from swat_lm.data.synthetic import is_synthetic
from swat_lm.data.trained import TrainedText, read_trained_text
from swat_lm.files import write_bytes
from swat_lm.paths import local_path
from swat_lm.recipe import DataRecipe, load_recipe
from swat_lm.train.checkpoint import MANIFEST, find_checkpoints

__all__ = ["RECORD", "find_trained_text", "write_trained_text"]

RECORD = "trained_text.npz"


def write_trained_text(out: Path, store: TokenStore | None, earlier: Path | None) -> None:
    """Write the record of a run that reads the store (None: rows of a task) into its folder, in one piece.

    `earlier` is the folder of the run, this or another, whose checkpoint it goes on from: what that was trained on
    counts too. Nothing is written for a model that has seen no text.
    """
    trained = None if store is None else TrainedText.of_store(store)
    try:
        before = None if earlier is None else find_trained_text(earlier)
    except DataError as error:
        # training goes on, and the record says that it is not whole
        warnings.warn(f"{error}: evaluation will not recognise that text", stacklevel=2)
        before = TrainedText.unknown()
    if before is not None:
        trained = before if trained is None else trained.joined(before)
    if trained is None:
        return
    write_bytes(out / RECORD, trained.to_bytes())


def find_trained_text(folder: Path) -> TrainedText | None:
    """What the model in a folder, a run's or its export, was trained on; None where no run of ours left a trace.

    Of a run that an earlier version trained it is found out from the run's tokens. Raises DataError where they are gone
    and cannot be made again, so that nobody can tell.
    """
    folder = folder.resolve()
    if (folder / RECORD).is_file():
        return read_trained_text(folder / RECORD)
    run = folder if (folder / "recipe.yaml").is_file() else folder.parent
    if run != folder and folder.name != "export":
        return None
    if (run / RECORD).is_file():
        return read_trained_text(run / RECORD)
    if not (run / "recipe.yaml").is_file():
        return None
    data = load_recipe(run / "recipe.yaml").data
    if is_synthetic(data.sources):
        return None
    store = find_store(data, data_key(run))
    if store is None:
        raise DataError(
            f"{run} was trained by an earlier version, which kept no record of its text, and its tokens are gone"
        )
    return TrainedText.of_store(store)


def data_key(run: Path) -> str | None:
    """Identity of the tokens that a run's newest checkpoint was trained on; None if it has none."""
    for checkpoint in reversed(find_checkpoints(run)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["data"])
    return None


def find_store(data: DataRecipe, key: str | None) -> TokenStore | None:
    """The tokens with this identity: among those prepared, or made again from the recipe's sources; None if gone."""
    if key is None:
        return None
    cache = local_path(data.cache) if data.cache else default_cache()
    for place in sorted({cache, default_cache()}):
        for index in sorted(place.glob(f"*/{INDEX}")):
            with suppress(OSError, ValueError, AttributeError):
                if json.loads(index.read_text(encoding="utf-8")).get("key") == key:
                    return TokenStore.open(index.parent, data.held_out, data.split_seed)
    try:
        resolve_sources(data.sources)
        store = prepare(replace(data, cache=None))
    except (ValueError, OSError):
        # sources or a tokenizer that are no longer where the recipe says
        return None
    return store if store.key == key else None

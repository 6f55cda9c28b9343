"""The folder of a run: whether it can be written, what it holds, and whether a recipe may continue it."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from swat_lm.model.configuration import SwatConfig
from swat_lm.model.recipe_fields import DEFAULTS
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe
from swat_lm.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoints,
    find_renamed,
    newest_checkpoint,
    read_manifest,
)
from swat_lm.train.ownership import LOCK, MARK, MARK_TEXT, check_run_folder, remove_leftovers
from swat_lm.validation import defaults_of
from swat_lm.words import counted

__all__ = ["CHANGEABLE", "check_continuation", "check_model", "choose_start", "hold_folder"]

CHANGEABLE = frozenset(
    {
        "name", "out", "data.cache", "data.workers",
        "train.steps", "train.decay_steps", "train.final_learning_rate_ratio",
        "train.micro_batch_size", "train.precision", "train.compile", "train.activation_checkpointing",
        "train.execution", "train.sharding", "train.replicas",
        "train.log_every", "train.evaluate_every", "train.evaluate_batches", "train.save_every", "train.keep",
        "train.export", "train.resume", "train.loggers",
    }
)  # fmt: skip
"""Keys that may differ when a run goes on: its length and the end of its schedule, how it is computed (all of
`train.execution_settings` too), and what it reports. All others decide which run it is; to change one, start another
run (`out=...`), from a checkpoint of this one if wanted (`train.resume=PATH`)."""

# fields of a configuration that say nothing about the architecture: written by saving it, or how it is computed
NOT_ARCHITECTURE = frozenset(
    {"transformers_version", "_name_or_path", "architectures", "dtype", "use_cache", "attention_backend"}
)


class HeldFolder:
    """A folder that no other run may write to until `release()`, or the end of the process, however it ends."""

    def __init__(self, out: Path, made: list[Path], lock: FileLock) -> None:
        """`made` are the folders that were made for it, the innermost first."""
        self.out, self.made, self.lock = out, made, lock

    def release(self) -> None:
        """Let other runs in; where this one wrote nothing, the folders made for it go again."""
        if not {path.name for path in self.out.iterdir()} <= {LOCK, MARK}:
            self.lock.release()
            return
        # before the lock, so that whoever comes after has its own
        (self.out / MARK).unlink(missing_ok=True)
        if os.name == "nt":
            # an open file cannot be removed there
            self.lock.release()
        # elsewhere while held: who comes now makes another one, and keeps the folder by that
        (self.out / LOCK).unlink(missing_ok=True)
        self.lock.release()
        remove_empty(self.made)


def hold_folder(out: Path, cache: str | None = None) -> HeldFolder:
    """Make the folder, write into it, so that a run fails in its first second, and keep other runs out of it.

    `cache`: the recipe's folder for prepared tokens. Raises ValueError for a folder that holds something and is no run,
    OSError for one that cannot be written, also where another process holds it.
    """
    check_run_folder(out, cache)
    probe = out / ".tmp-probe"
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        remove_empty(made)
        raise OSError(error.errno, f"cannot write to the output folder {out}: {error.strerror}") from None
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"another run is writing to {out}: wait for it, stop it, or choose another `out`"
        ) from None
    # whoever goes on with it may then replace what runs write
    if not (out / MARK).exists():
        (out / MARK).write_text(MARK_TEXT, encoding="utf-8")
    remove_leftovers(out)
    return HeldFolder(out, made, lock)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first; those that hold something, or are not there, stay as they are."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def choose_start(out: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to start from (None: start anew) and a sentence for each damaged one that was passed over.

    `auto`: the newest whole one in `out`. `never`: none, and `out` must hold none. A path: that checkpoint, or the
    newest of that run folder; but if `out` already holds a run that began there, the newest in `out`, so that the
    same command goes on after an interruption.
    Raises CheckpointError if the named one or all are damaged, ValueError if `out` holds another run, or checkpoints
    under other names only.
    """
    if resume == "auto":
        newest, damaged = newest_checkpoint(out)
        renamed = find_renamed(out)
        if newest is None and renamed:
            raise ValueError(
                f"{out} holds no checkpoint but {renamed[-1].name}, a name that no run gives, and so would start anew: "
                f"give train.resume={renamed[-1]} to start from it, or choose another `out`"
            )
        return newest, damaged
    own = find_checkpoints(out)
    if own and resume != "never":
        newest, damaged = newest_checkpoint(out)
        if newest is not None and newest.recipe["train"]["resume"] == resume:
            return newest, damaged
    if own:
        raise ValueError(
            f"{out} already holds {own[-1].name}, which train.resume={resume} would overwrite: continue it with "
            "train.resume=auto, or choose another `out`"
        )
    if resume == "never":
        return None, []
    path = Path(resume)
    if find_checkpoints(path):
        return newest_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"train.resume: no checkpoint at {path}; expected a step-... folder or a run's folder")
    return read_manifest(path), []


def check_model(checkpoint: Checkpoint, model: Mapping[str, Any]) -> None:
    """Raise ValueError, naming each differing field, if the checkpoint's architecture is not that of `model`."""
    # what came after the version that wrote it, is as it was before there was a word for it
    later = DEFAULTS if checkpoint.model.get("model_type") == SwatConfig.model_type else {}
    differing = differing_fields({**later, **checkpoint.model}, model)
    if differing:
        own = checkpoint.folder.parent.parent / "recipe.yaml"
        kept = f" (the run's own recipe is {own})" if own.is_file() else ""
        raise ValueError(
            f"checkpoint {checkpoint.folder} has another architecture than the recipe: {', '.join(differing)}; "
            f"change the recipe's model back{kept}, or choose another `out`"
        )


def differing_fields(checkpoint: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Each field in which two configurations, as plain values, are not the same architecture, with both values."""
    ignored = NOT_ARCHITECTURE if scales_rotary(model) else NOT_ARCHITECTURE | {"max_position_embeddings"}
    if not (reads_span(checkpoint) or reads_span(model)):
        # its default is another now
        ignored |= {"slope_span"}
    return [
        f"{name} (checkpoint {checkpoint.get(name)!r}, recipe {model.get(name)!r})"
        for name in sorted((checkpoint.keys() | model.keys()) - ignored)
        if checkpoint.get(name) != model.get(name)
    ]


def reads_span(model: Mapping[str, Any]) -> bool:
    """Whether slopes of any layer are scaled to its window; only then does `slope_span` say anything."""
    layers = model.get("layers")
    own = [entry for entry in layers if isinstance(entry, Mapping)] if isinstance(layers, list) else []
    return any(values.get("slope_schedule") == "window" for values in (model, *own))


def scales_rotary(model: Mapping[str, Any]) -> bool:
    """Whether rotary angles are of a scaled kind; only then the model's training length may enter them."""
    settings = model.get("rope_parameters") or {}
    sets = [settings, *[value for value in settings.values() if isinstance(value, Mapping)]]
    return any(own.get("rope_type", "default") != "default" for own in sets)


def check_continuation(checkpoint: Checkpoint, recipe: Mapping[str, Any], data: str) -> None:
    """Raise ValueError, naming each differing key, if `recipe` may not continue the checkpoint's run.

    Everything but CHANGEABLE must be equal; `model` is left to `check_model`, and `data` is the tokens' identity.
    """
    before, now = with_defaults(flatten(checkpoint.recipe)), flatten(recipe)
    differing = [
        f"{key} (before {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in CHANGEABLE
        and not key.startswith(("model.", "train.execution_settings."))
    ]
    if not differing and checkpoint.data != data:
        differing = ["the text behind data.sources or its tokens (other content than before)"]
    if differing:
        raise ValueError(
            f"{checkpoint.folder} belongs to a run with other settings: {', '.join(differing)}; change them back, or "
            "choose another `out` (and train.resume=PATH to start it from this checkpoint)"
        )


def with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A flat recipe with the defaults of keys that came after the version that wrote it."""
    kinds = {"data": DataRecipe, "train": TrainRecipe}
    known = {at: defaults_of(kind) for at, kind in kinds.items()}
    return flatten(known) | recipe


def describe_new_schedule(checkpoint: Checkpoint, recipe: Recipe) -> str | None:
    """What a continued run should know whose learning rate now follows another curve; None where it does not."""
    before, train = checkpoint.recipe["train"], recipe.train
    names = ("steps", "decay_steps", "final_learning_rate_ratio")
    changed = [f"{name} was {before[name]} and is {getattr(train, name)}" for name in names
               if before[name] != getattr(train, name)]  # fmt: skip
    # before a decay has begun, a stable rate is the same however long the run will be
    follows = {
        "constant": False,
        "cosine": True,
        "wsd": checkpoint.step > min(before["steps"] - before["decay_steps"], train.steps - train.decay_steps),
    }[train.schedule]
    if not changed or not follows:
        return None
    return (
        f"train.{', train.'.join(changed)}: the learning rate of the steps done followed another {train.schedule} "
        f"schedule, so the result is not that of a fresh run of {counted(train.steps, 'step')}"
    )


def flatten(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; tuples as lists, as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{at}{name}.")
        else:
            found[f"{at}{name}"] = list(value) if isinstance(value, tuple) else value
    return found

"""Checkpoint folders: written beside and put in place whole, checked by size and checksum, the newest few kept.

A folder `checkpoints/step-00000100` holds DCP's files and `checkpoint.json`, the manifest. It exists under that name
only once it is whole; whatever a crash leaves is named `.tmp-step-*` and removed by the next run. Folders of other
names, and what others put into these, are nobody's: neither read nor removed.
"""

import errno
import json
import os
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.files import BESIDE, OLD, SET_ASIDE, discard, discard_if_possible, put_in_place
from swat_lm.train.engine import Engine
from swat_lm.words import counted

__all__ = ["Checkpoint", "CheckpointError", "find_checkpoints", "newest_checkpoint", "read_manifest", "save_checkpoint"]

MANIFEST = "checkpoint.json"
FORMAT = 1
NAME = re.compile(r"step-([0-9]+)")
PARTIAL_CHECKPOINT = re.compile(rf"({re.escape(BESIDE)}|{re.escape(OLD)}|{re.escape(SET_ASIDE)}){NAME.pattern}")
OWN_FILE = re.compile(rf"{re.escape(MANIFEST)}|\.metadata|__[0-9]+_[0-9]+\.distcp")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the folder and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's manifest, without the tensors."""

    folder: Path
    step: int
    """Optimizer steps done."""
    tokens: int
    """Target tokens trained on."""
    seconds: float
    """Wall-clock seconds trained, over all parts of the run."""
    recipe: dict[str, Any]
    """The resolved recipe as plain values."""
    model: dict[str, Any]
    """The model's configuration as plain values."""
    data: str
    """Identity of the prepared tokens."""


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return out / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    keep: int,
    objective: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model, optimizer, objective's state and manifest to `checkpoint.folder`; remove all but the newest `keep`.

    All processes call it. Raises OSError; then every older checkpoint is as it was.
    """
    folder = checkpoint.folder
    beside = folder.with_name(f"{BESIDE}{folder.name}")

    def begin() -> None:
        discard_if_possible(beside)
        beside.mkdir(parents=True)

    try:
        engine.on_main(begin)
        engine.write_state(beside, model, optimizer, objective)
        engine.on_main(lambda: publish(beside, checkpoint))
    except OSError as error:
        if engine.is_main:
            discard_if_possible(beside)
        raise OSError(
            errno.EIO if error.errno is None else error.errno,
            f"cannot write checkpoint {folder} ({error.strerror or error}); older ones are intact",
        ) from error
    engine.on_main(lambda: remove_old(folder.parent.parent, checkpoint.step, keep))


def publish(beside: Path, checkpoint: Checkpoint) -> None:
    """Add the manifest and give the finished folder its name."""
    manifest = {
        "format": FORMAT,
        **asdict(checkpoint),
        "files": {path.name: file_identity(path) for path in sorted(beside.iterdir())},
    }
    del manifest["folder"]
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if os.path.lexists(checkpoint.folder) and not is_replaceable(checkpoint.folder, checkpoint.step):
        set_aside(checkpoint.folder)
    put_in_place(beside, checkpoint.folder, over_full=True)


def is_replaceable(folder: Path, step: int) -> bool:
    """Whether a run wrote all that stands here for this step, be it whole or damaged; a link may go as such."""
    return folder.is_symlink() or (folder.is_dir() and has_own_files(folder) and manifest_step(folder) in (None, step))


def has_own_files(folder: Path) -> bool:
    """Whether a folder holds nothing but what checkpoints consist of."""
    return all(OWN_FILE.fullmatch(path.name) for path in folder.iterdir())


def set_aside(path: Path) -> None:
    """Give another name to what somebody else put where a checkpoint goes, and say so."""
    names = (f"{path.name}-other{number or ''}" for number in range(10_000))
    aside = next(place for place in map(path.with_name, names) if not os.path.lexists(place))
    path.rename(aside)
    warnings.warn(f"{path} was no checkpoint of that step written by this run: it is now {aside}", stacklevel=2)


def file_identity(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def find_checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or damaged, by the step that their manifests state, the oldest first.

    Only names of `step-` and digits count; where one cannot be read (also a link whose disk is gone), its name tells.
    """
    found = []
    for folder in (out / "checkpoints").glob("step-*"):
        named = NAME.fullmatch(folder.name)
        if named and (folder.is_dir() or folder.is_symlink()):
            stated = manifest_step(folder)
            step = int(named[1]) if stated is None else stated
            # of two of one step, the one that a run named is preferred
            found.append((step, folder == checkpoint_folder(out, step), folder))
    return [folder for *_, folder in sorted(found)]


def find_renamed(out: Path) -> list[Path]:
    """Checkpoints under names that no run gives, such as `step-best`: they are the user's."""
    folders = sorted((out / "checkpoints").glob("*"))
    return [folder for folder in folders if not NAME.fullmatch(folder.name) and manifest_step(folder) is not None]


def manifest_step(folder: Path) -> int | None:
    """The step that a checkpoint's manifest states; None where there is no manifest to be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, _ = manifest["step"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def remove_old(out: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` up to that of `step`; the others lose their name first: none is ever found half removed.

    Only what a run wrote goes: no folder renamed or without a manifest, and none to which something was added. Those of
    later steps, which were damaged when the run began, are replaced when it gets there.
    """
    steps = [(manifest_step(folder), folder) for folder in find_checkpoints(out)]
    own = [folder for at, folder in steps if at is not None and at <= step and folder == checkpoint_folder(out, at)]
    for folder in own[:-keep]:
        if not has_own_files(folder):
            continue
        unnamed = folder.with_name(f"{OLD}{folder.name}")
        folder.rename(unnamed)
        discard(unnamed)


def read_manifest(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: Mapping[str, Any] = manifest.pop("files")
        form = manifest.pop("format")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error})") from None
    if form != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {form}; this version of swat-lm reads format {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        found = file_identity(path)
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {counted(found['bytes'], 'byte')} instead "
                f"of {expected['bytes']:,}"
            )
        if found != expected:
            raise CheckpointError(f"checkpoint {folder} is damaged: the content of {name} has changed")
    try:
        return Checkpoint(folder=folder, **manifest)
    except TypeError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} has other entries ({error})") from None


def newest_checkpoint(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run, and a sentence for each damaged one that is newer.

    Raises CheckpointError if there are checkpoints and all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(find_checkpoints(out)):
        try:
            return read_manifest(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("; ".join(damaged) + ": no checkpoint is left to continue from")
    return None, []

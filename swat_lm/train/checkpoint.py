"""Checkpoint folders: written beside and renamed, checked by size and checksum, the newest few kept.

A folder `checkpoints/step-00000100` holds DCP's files and `checkpoint.json`, the manifest. It exists under that name
only once it is whole; whatever a crash leaves is named `.tmp-*` and removed by the next run.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swat_lm.train.engine import Engine
from swat_lm.wording import counted

__all__ = ["Checkpoint", "CheckpointError", "find_checkpoints", "newest_checkpoint", "read_manifest", "save_checkpoint"]

MANIFEST = "checkpoint.json"
FORMAT = 1


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
    engine: Engine, model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, keep: int
) -> None:
    """Write model, optimizer and manifest to `checkpoint.folder`, then remove all but the newest `keep`.

    All processes call it. Raises OSError; then every older checkpoint is as it was.
    """
    folder = checkpoint.folder
    beside = folder.with_name(f".tmp-{folder.name}")
    try:
        engine.on_main(lambda: make_empty(beside))
        engine.write_state(beside, model, optimizer)
        engine.on_main(lambda: publish(beside, checkpoint))
    except OSError as error:
        if engine.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        reason = error.strerror or str(error)
        number = errno.EIO if error.errno is None else error.errno
        raise OSError(number, f"cannot write checkpoint {folder} ({reason}); older ones are intact") from error
    engine.on_main(lambda: remove_old(folder.parent, keep))


def make_empty(folder: Path) -> None:
    """An empty folder at this place, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(beside: Path, checkpoint: Checkpoint) -> None:
    """Add the manifest and give the finished folder its name."""
    files = {path.name: file_identity(path) for path in sorted(beside.iterdir())}
    manifest = {"format": FORMAT, **asdict(checkpoint), "files": files}
    del manifest["folder"]
    with (beside / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    synchronise(beside)
    replace_folder(beside, checkpoint.folder)


def replace_folder(beside: Path, folder: Path) -> None:
    """Rename a finished folder into place; one already there goes only after the new one stands."""
    old = folder.with_name(f".tmp-old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    synchronise(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def synchronise(folder: Path) -> None:
    """Make the names in a folder survive a power cut; Windows opens no folders and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_identity(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def find_checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or damaged."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if path.is_dir())


def remove_old(checkpoints: Path, keep: int) -> None:
    """Keep the newest `keep`; the others lose their name first, so that none is ever found half removed."""
    for folder in find_checkpoints(checkpoints.parent)[:-keep]:
        unnamed = folder.with_name(f".tmp-old-{folder.name}")
        folder.rename(unnamed)
        shutil.rmtree(unnamed)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run was writing."""
    for path in [*out.glob(".tmp-*"), *(out / "checkpoints").glob(".tmp-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_manifest(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: Mapping[str, Any] = manifest.pop("files")
        form = manifest.pop("format")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
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
    return Checkpoint(folder=folder, **manifest)


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

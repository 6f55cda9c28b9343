"""Files of weights and states on disk: who may read them, whether they are whole, and what their tokenizer fits.

safetensors writes a file for its owner alone, whatever the umask, and calls one that it may not read absent.
"""

import json
import stat
from pathlib import Path
from typing import Any

from swat_lm.words import counted

__all__ = ["check_present", "check_readable", "check_tokenizer", "check_whole", "give_usual_permissions"]

WEIGHTS = ("*.safetensors", "*.bin")
INDEX, TOKENIZER = "model.safetensors.index.json", "tokenizer.json"
# what transformers looks for in a folder; other names only by an index
FIRST_FILES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# of the number in front of a safetensors file, which says how long its header is
LENGTH_BYTES = 8


def give_usual_permissions(path: Path) -> None:
    """Give a file, or each file of weights in a folder, the permissions of any new file there. Raises OSError."""
    for file in weights_in(path):
        # asked of the system, since reading the umask would change it for a moment, for all threads
        probe = file.with_name(f".{file.name}.new")
        probe.touch()
        try:
            mode = stat.S_IMODE(probe.stat().st_mode)
        finally:
            probe.unlink()
        file.chmod(mode)


def check_readable(path: Path) -> None:
    """Raise PermissionError, naming it, for a file, or a file of weights in a folder, that may not be read."""
    for file in weights_in(path):
        # a link that leads nowhere is for the reader to say
        if file.exists():
            file.open("rb").close()


def weights_in(path: Path) -> list[Path]:
    """The file itself, or the files of weights in a folder."""
    return sorted(file for pattern in WEIGHTS for file in path.glob(pattern)) if path.is_dir() else [path]


def check_present(folder: Path) -> None:
    """Raise ValueError for a folder in which transformers would find no weights."""
    if not any((folder / name).is_file() for name in FIRST_FILES):
        shards = [file.name for file in weights_in(folder)]
        beside = f"; {', '.join(shards[:3])}{' ...' if len(shards) > 3 else ''} without an index" if shards else ""
        raise ValueError(
            f"source: {folder} has no weights: expected model.safetensors, or shards and {INDEX}{beside}; fetch what "
            "is missing"
        )


def check_whole(folder: Path) -> None:
    """Raise ValueError, naming it, for a file of safetensors in a folder that is missing, cut short or damaged.

    Only headers are read. Weights in other files are for the reader to judge.
    """
    names = {file.name for file in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        missing = [name for name in shards_of(folder / INDEX) if name not in names]
        if missing:
            raise ValueError(
                f"source: {folder} lacks {counted(len(missing), 'file')} of weights that {INDEX} names: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; fetch what is missing"
            )
    for name in sorted(names):
        size, wanted = (folder / name).stat().st_size, stated_length(folder / name)
        if wanted is None or size < wanted:
            held = "its header" if wanted is None else f"byte {wanted:,}, where its last tensor ends"
            raise ValueError(
                f"source: the weights in {folder / name} cannot be read: the file is cut short, it has "
                f"{counted(size, 'byte')} and ends before {held}; fetch it again"
            )


def shards_of(index: Path) -> list[str]:
    """The files that an index names; raises ValueError where it does not say which tensor is in which."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(
            f"source: {index} is damaged: expected weight_map to name the file of each tensor, got {str(shards)[:60]}; "
            "fetch it again"
        )
    return sorted(set(shards.values()))


def stated_length(file: Path) -> int | None:
    """Bytes that a safetensors file must have by its header; None where it ends within that.

    Raises ValueError, naming it, for a header that is there and says nothing.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if LENGTH_BYTES + length > file.stat().st_size:
            return None
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, TypeError, KeyError, IndexError):
            raise ValueError(
                f"source: the weights in {file} cannot be read: its header is damaged; fetch it again"
            ) from None
    return LENGTH_BYTES + length + max(ends, default=0)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise ValueError for a tokenizer in a folder that knows more tokens than its model.

    Tokens added to a tokenizer are not counted: models are published with one for images that their text never has.
    """
    if not (folder / TOKENIZER).is_file():
        return
    model = read_object(folder / TOKENIZER).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict | list) and len(vocabulary) > vocab_size:
        raise ValueError(
            f"source: the tokenizer in {folder} has {len(vocabulary):,} tokens, the model {vocab_size:,}: they do not "
            "belong together"
        )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises ValueError naming it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"source: {file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"source: {file} is damaged: expected a JSON object")
    return content

"""What in a folder a training run wrote and may replace; all else in it is somebody's and stays.

A run's folder carries a mark from its first second on. Those of before have none and are known by their checkpoints.
"""

import os
import re
from pathlib import Path

from swat_lm.files import BESIDE, clear_leftover
from swat_lm.model.registration import AUTO_MODULE
from swat_lm.paths import local_path
from swat_lm.train.checkpoint import PARTIAL_CHECKPOINT, find_checkpoints, manifest_step
from swat_lm.train.trained_text import RECORD

__all__ = ["LOCK", "MARK", "MARK_TEXT", "check_export", "check_run_folder", "remove_leftovers"]

LOCK = ".lock"
MARK = ".swat-lm-run"
MARK_TEXT = "A run of `swat-lm train` lies in this folder; when it goes on, it replaces the files that it wrote here.\n"
# what a run that is killed may leave in its folder, and nothing else of that kind
PARTIAL = re.compile(
    rf"{re.escape(BESIDE)}(probe|(old|was)-export|(export|recipe\.yaml|metrics\.jsonl|{re.escape(RECORD)})(\.[0-9]+)?)"
)

CARD = "README.md"
CARD_MARK = "Trained with swat-lm:"
# what `save_pretrained` of models and tokenizers writes, the card, and what the model was trained on
EXPORTED = re.compile(
    rf"config\.json|generation_config\.json|{AUTO_MODULE}\.py"
    r"|model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.jinja|additional_chat_templates|README\.md"
    rf"|{re.escape(RECORD)}"
)


def check_run_folder(out: Path, cache: str | None = None) -> None:
    """Raise ValueError for a folder that holds something and is no run, so that nothing of it is ever replaced.

    `cache`: where the run's prepared tokens go, which may be inside it and be there first.
    """
    if not out.is_dir() or (out / MARK).is_file():
        return
    if any(manifest_step(folder) is not None for folder in find_checkpoints(out)):
        return
    foreign = sorted(path.name for path in out.iterdir() if not is_of_a_start(path) and not holds(path, cache))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"{out} holds {', '.join(foreign[:3])}{more} and is no run of swat-lm, which would replace files there: "
            "choose another `out`, or move away what it holds"
        )


def is_of_a_start(path: Path) -> bool:
    """Whether a run that was killed in its first second may have left this."""
    # the lock would be emptied by being taken; ours has no content
    return PARTIAL.fullmatch(path.name) is not None or (
        path.name == LOCK and path.is_file() and path.stat().st_size == 0
    )


def holds(path: Path, cache: str | None) -> bool:
    """Whether the folder of prepared tokens is this one, or inside it."""
    return cache is not None and local_path(cache).resolve().is_relative_to(path.resolve())


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run was writing, and put back what it had set aside for that."""
    for folder, partial in ((out, PARTIAL), (out / "checkpoints", PARTIAL_CHECKPOINT)):
        for path in list(folder.glob(f"{BESIDE}*")):
            if partial.fullmatch(path.name):
                clear_leftover(path)


def check_export(folder: Path) -> None:
    """Raise ValueError for an `export` that holds what no run wrote, since the next export replaces it whole."""
    if not os.path.lexists(folder) or (folder.is_symlink() and not folder.exists()):
        return
    advice = "move that away, or set train.export=false"
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, where the model would be exported to: {advice}")
    foreign = sorted(path.name for path in folder.iterdir() if not EXPORTED.fullmatch(path.name))
    if not foreign and any(folder.iterdir()):
        try:
            is_ours = CARD_MARK in (folder / CARD).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            is_ours = False
        foreign = [] if is_ours else [f"a model without the {CARD} that a run writes"]
    if foreign:
        raise ValueError(f"{folder}, which the run's export replaces, holds {', '.join(foreign[:3])}: {advice}")

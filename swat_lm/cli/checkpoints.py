"""From what the user names to a model and its tokenizer: an exported folder, a run's folder, or a name on the hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from swat_lm.model.modeling import SwatForCausalLM

__all__ = ["find_export", "load_checkpoint", "load_model", "pick_device"]


def find_export(name: str) -> str:
    """The `save_pretrained` folder behind a name, or a hub name as it is.

    Raises ValueError that says what the folder is instead.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ValueError(f"no checkpoint at {name}: expected a run's folder or its `export` folder")
        return name
    if path.is_file():
        raise ValueError(f"{name} is a file: expected the folder that holds config.json and the weights")
    if (path / "config.json").exists():
        check_architecture(path)
        return str(path)
    if (path / "export" / "config.json").exists():
        return find_export(str(path / "export"))
    if path.name.startswith("step-") and path.parent.name == "checkpoints":
        exported = path.parent.parent / "export"
        hint = f"; the run's model is at {exported}" if exported.exists() else ": continue the run until it exports"
        raise ValueError(f"{name} is a training checkpoint (shards and optimizer), not a model folder{hint}")
    if (path / "checkpoints").is_dir():
        raise ValueError(f"{name} is a run that has no `export` yet: continue it with train.export=true")
    raise ValueError(f"{name} holds no model: expected config.json and weights, or a run's folder with `export`")


def check_architecture(folder: Path) -> None:
    """Raise ValueError unless the folder's config.json describes a SWAT model."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a model configuration: {error}") from None
    if kind in ("llama", "mistral"):
        raise ValueError(f"{folder} holds a {kind} model: convert it first with `swat-lm convert {folder} OUT`")
    if kind != "swat":
        raise ValueError(f"{folder} holds a model of type {kind!r}: expected swat (or llama and mistral, to convert)")


def load_model(name: str, device: str | None = None) -> "SwatForCausalLM":
    """The model in evaluation mode, whole: a weight that is missing or has another shape is an error."""
    from safetensors import SafetensorError

    from swat_lm.model.modeling import SwatForCausalLM

    folder = find_export(name)
    try:
        # with the first option it returns a pair, which its annotation does not say; the second makes it report misfits
        loaded: Any = SwatForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except SafetensorError as error:
        raise ValueError(f"{folder}: the weights are damaged or cut short: {error}") from error
    except OSError as error:
        if Path(folder).exists():
            raise
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"no folder {name}, and the hub gave no model of that name: {reason}") from error
    model, loading = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(one if isinstance(one, str) else str(one[0]) for one in loading.get(problem) or ())
        if found:
            raise ValueError(
                f"{folder}: weights and configuration do not fit: {problem.replace('_', ' ')}: {', '.join(found[:3])}"
                + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            )
    return model.to(pick_device(device)).eval()


def load_checkpoint(
    name: str, tokenizer: str | None = None, device: str | None = None
) -> "tuple[SwatForCausalLM, PreTrainedTokenizerFast]":
    """The model and its tokenizer (or the one named instead), checked to belong together.

    A model may have more ids than its tokenizer (a padded vocabulary), never fewer.
    """
    from swat_lm.data import load_tokenizer, vocabulary_size

    folder = find_export(name)
    model = load_model(name, device)
    tokens = load_tokenizer(tokenizer or folder)
    known = vocabulary_size(tokens)
    if known > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer or folder} has {known} ids, the model {folder} only {model.config.vocab_size}: "
            "they do not belong together; give the model's own with --tokenizer"
        )
    return model, tokens


def pick_device(wanted: str | None) -> str:
    """The device asked for, else a GPU if there is one, else the CPU; raises ValueError for one that is not there."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted}: {' '.join(str(error).split())[:200]}") from None
    return wanted

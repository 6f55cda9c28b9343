"""From a name to a model: any Hugging Face causal language model, ours included, whole or not at all.

A name is an exported folder, a run's folder, or a name on the hub.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swat_lm.hub import hub_answers, is_path, nearest_name, stored_folder
from swat_lm.model.weight_files import check_readable
from swat_lm.paths import check_name, local_path
from swat_lm.words import install_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_model_folder", "load_causal_lm", "model_type", "pick_device"]


def find_model_folder(name: str) -> str:
    """The `save_pretrained` folder behind a name, or a hub name as it is.

    Raises ValueError that says what the folder is instead.
    """
    if not name.strip():
        raise ValueError("the checkpoint's name is empty: expected an exported folder, a run's folder or a hub name")
    path = local_path(name)
    if not path.exists():
        if is_path(name):
            raise ValueError(
                f"no checkpoint at {name}: expected a run's folder or its `export` folder{nearest_name(path)}"
            )
        return name
    check_name(path, "the checkpoint's folder")
    if path.is_file() and path.suffix == ".gguf":
        raise ValueError(f"{name} is a GGUF file: make a folder of it first, `swat-lm convert {name} OUT`")
    if path.is_file():
        raise ValueError(f"{name} is a file: expected the folder that holds config.json and the weights")
    if (path / "config.json").exists():
        return str(path)
    if (path / "export" / "config.json").exists():
        return str(path / "export")
    if path.name.startswith("step-") and path.parent.name == "checkpoints":
        exported = path.parent.parent / "export"
        hint = f"; the run's model is at {exported}" if exported.exists() else ": continue the run until it exports"
        raise ValueError(f"{name} is a training checkpoint (shards and optimizer), not a model folder{hint}")
    if (path / "checkpoints").is_dir():
        raise ValueError(f"{name} is a run that has no `export` yet: continue it with train.export=true")
    raise ValueError(f"{name} holds no model: expected config.json and weights, or a run's folder with `export`")


def model_type(folder: Path) -> str:
    """The architecture that a folder's config.json names; raises ValueError where it names none."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a model configuration: {error}") from None
    if not isinstance(kind, str):
        raise ValueError(f"{path}: not a model configuration: it has no model_type")
    return kind


def load_causal_lm(name: str, device: str | None = None) -> "PreTrainedModel":
    """Any causal language model, in evaluation mode and in the dtype of its weights, on `device`.

    Args:
        name: see `find_model_folder`.
        device: as torch names it; None: a GPU if there is one.

    Raises:
        ValueError: no model there, another kind of model, a device that is not there, damaged weights, or weights that
            are missing or have another shape than the configuration says.
        OSError: weights that may not be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    place, folder = pick_device(device), find_model_folder(name)
    is_local = Path(folder).exists()
    if is_local:
        know_library_of(model_type(Path(folder)), folder)
        check_readable(Path(folder))
    try:
        if not is_local and not hub_answers():
            # the folder itself: by a name, the library would still ask for adapters, again and again
            folder = stored_folder(folder)
        # with the first option it returns a pair, which its annotation does not say; the second makes it report misfits
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: the weights are damaged or cut short: {error}") from error
    except OSError as error:
        if is_local:
            raise
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"no checkpoint at {name}, and the hub gave no model of that name: {reason}") from error
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{folder} holds no causal language model that transformers knows") from error
        raise
    model, loading = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(key if isinstance(key, str) else str(key[0]) for key in loading.get(problem) or ())
        if found:
            raise ValueError(
                f"{folder}: weights and configuration do not fit: {problem.replace('_', ' ')}: {', '.join(found[:3])}"
                + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            )
    return model.to(place).eval()


# architectures that flash-linear-attention registers with the Auto classes when it is imported
FLA_TYPES = ("retnet", "gla", "delta_net")


def know_library_of(kind: str, folder: str) -> None:
    """Import the library that an architecture is from; raises ValueError, naming it, where it is not installed."""
    if kind not in FLA_TYPES:
        return
    try:
        import_module("fla")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{folder} holds a {kind} model of flash-linear-attention: {install_extra('fla')} (for CUDA)"
        ) from error


def pick_device(wanted: str | None) -> str:
    """The device asked for, else a GPU if there is one, else the CPU; raises ValueError for one that is not there."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        raise ValueError(f"device {wanted}: unknown; expected cpu, cuda, or cuda:1 for the second GPU") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted}: no GPU here: leave --device out, or use cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        there = f"; GPUs here: {torch.cuda.device_count()}" if kind == "cuda" else ""
        reason = " ".join(str(error).split("\n")[0].split())[:100]
        raise ValueError(f"device {wanted}: cannot be used{there}: {reason}") from None
    return wanted

"""The state of endless streams on its way to disk and back."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swat_lm.files import whole
from swat_lm.layers.base import StateTensor
from swat_lm.model.fingerprint import fingerprint
from swat_lm.model.slots import Slots
from swat_lm.model.weight_files import check_readable, give_usual_permissions

FORMAT = "swat-lm stream state 2"
FIRST_FORMAT = "swat-lm stream state 1"
"""Before layers could keep anything else than keys and values."""
UNBOUND = "this state does not say which model made it, so one of other weights but the same shape would go on with it"


def made_by(state: Slots) -> str | None:
    """The fingerprint of the model that made a state, as its weights are now; None where that is not known."""
    model = None if state.fits is None else state.fits()
    return state.fingerprint if model is None else fingerprint(model)


def save_state(state: Slots, path: str | Path) -> None:
    """Write a state as one safetensors file, beside and then renamed.

    With it goes the fingerprint of its model, so that no other one goes on with it; a warning says where that model is
    gone already.
    """
    path = Path(path)
    order = torch.arange(state.num_slots, device=state.position.device)
    tensors = {name: tensor.contiguous() for name, tensor in state.snapshot(order).items()}
    metadata = {
        "format": FORMAT,
        "layers": json.dumps([[described(entry) for entry in spec.values()] for spec in state.specs]),
        "dtype": dtype_name(state.dtype),
        "num_columns": str(state.num_columns),
        # how far a chunk looks back, and so how its sums are rounded
        "fullest": str(state.fullest),
        "ragged": json.dumps(state.ragged),
    }
    maker = made_by(state)
    if maker is None:
        warnings.warn(f"{path}: {UNBOUND}: save a state while its model is there", stacklevel=2)
    else:
        metadata["fingerprint"] = maker
    if state.logits is not None:
        # a stream that goes on with a text does not need them
        tensors["logits"] = state.logits.contiguous()
    with whole(path) as beside:
        save_file(tensors, beside, metadata)
        give_usual_permissions(beside)


def load_state(path: str | Path, device: torch.device | str = "cpu") -> Slots:
    """Read a state that `save_state` wrote, now or before version 2; with the model that made it, the stream
    continues bit for bit.

    Any other model refuses it. Files of before do not say which model that was: a warning says so.

    Raises:
        ValueError: not such a file, or a damaged one.
        OSError: the file cannot be read.
    """
    check_readable(Path(path))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a stream state, or damaged: {error}") from error
    if metadata.get("format") not in (FORMAT, FIRST_FORMAT):
        raise ValueError(f"{path}: a safetensors file, but not a stream state of swat-lm")
    logits = tensors.pop("logits", None)
    if metadata["format"] == FIRST_FORMAT:
        specs, dtype = first_specs(metadata, tensors), tensors["layers.0.key"].dtype
    else:
        specs = [tuple(state_tensor(entry) for entry in layer) for layer in json.loads(metadata["layers"])]
        dtype = getattr(torch, metadata["dtype"])
    tensors.setdefault("skipped", torch.zeros_like(tensors["position"]))
    state = Slots(specs, len(tensors["position"]), dtype, device)
    growing = [
        f"layers.{index}.{entry.name}" for index, spec in enumerate(specs) for entry in spec if entry.kind == "growing"
    ]
    state.reserve(max((tensors[name].shape[1] for name in growing), default=0))
    state.restore(torch.arange(state.num_slots, device=state.position.device), tensors)
    state.num_columns, state.ragged = int(metadata["num_columns"]), json.loads(metadata["ragged"])
    state.fullest = int(metadata.get("fullest", state.num_columns))
    state.logits = logits
    state.fingerprint = metadata.get("fingerprint")
    if state.fingerprint is None:
        warnings.warn(f"{path}: {UNBOUND}", stacklevel=2)
    return state


def described(entry: StateTensor) -> dict[str, Any]:
    """A state tensor as JSON."""
    return {**entry._asdict(), "dtype": None if entry.dtype is None else dtype_name(entry.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and so on."""
    return str(dtype).removeprefix("torch.")


def state_tensor(values: dict[str, Any]) -> StateTensor:
    """The inverse of `described`."""
    dtype = values["dtype"]
    return StateTensor(
        **{**values, "shape": tuple(values["shape"]), "dtype": None if dtype is None else getattr(torch, dtype)}
    )


def first_specs(metadata: dict[str, str], tensors: dict[str, Tensor]) -> list[tuple[StateTensor, ...]]:
    """What the layers of a file of the first format keep."""
    specs = []
    for index, window in enumerate(json.loads(metadata["windows"])):
        shape = tuple(tensors[f"layers.{index}.key"].shape[2:])
        kind = "growing" if window is None else "window"
        specs.append((StateTensor("key", shape, kind, window), StateTensor("value", shape, kind, window)))
    return specs

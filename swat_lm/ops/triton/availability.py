"""Whether the Triton kernels can serve a call, without importing triton."""

import importlib.util
import os
from functools import lru_cache
from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# what the third axis of a CUDA grid counts to
LARGEST_BATCH = 65_535
INSTALL = "install it with `pip install triton` (Linux; CUDA builds of PyTorch bring their own)"


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks Triton to run kernels on the CPU, in Python; read before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


class Gpu(NamedTuple):
    """What kernels and their tiles depend on of the GPU that they run on."""

    name: str
    # compute capability, such as (9, 0)
    capability: tuple[int, int]
    num_multiprocessors: int


@lru_cache
def gpu_of(device: torch.device) -> Gpu | None:
    """Return the GPU; None for the CPU, where Triton's interpreter runs the kernels."""
    if device.type != "cuda":
        assert is_interpreted()
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, is_batch_too_large: bool = False) -> str | None:
    """Return why the kernels cannot serve such tensors, naming what to do about it; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed; {INSTALL}"
    if device.type == "cpu":
        if not is_interpreted():
            return "the tensors are on the CPU, where only Triton's interpreter runs the kernels (TRITON_INTERPRET=1)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly; use float32 or float16 there"
    elif device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, the tensors are on {device.type}"
    elif is_interpreted():
        return "TRITON_INTERPRET is set, and Triton's interpreter runs the kernels on CPU tensors only; unset it"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than the Ampere generation (compute capability 8.0), the kernels' oldest"
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, the tensors are {dtype}"
    if head_dim > LARGEST_HEAD:
        return f"the kernels hold heads of up to {LARGEST_HEAD} channels, these have {head_dim}"
    if is_batch_too_large:
        return f"the kernels serve up to {LARGEST_BATCH:,} sequences at once; split the batch"
    return None

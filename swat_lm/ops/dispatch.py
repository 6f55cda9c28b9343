"""Which backend serves a call; a slower path is taken only when asked for, or announced once by name."""

import logging

import torch
from torch import Tensor

from swat_lm.ops.triton.availability import LARGEST_BATCH, LARGEST_HEAD, why_not

logger = logging.getLogger(__name__)
_announced: set[str] = set()


def choose_backend(backend: str, query: Tensor, lacks: str | None = None) -> str:
    """Return "reference", "blocked" or "triton"; `lacks` names what the call needs and the kernels do not have.

    Raises:
        ValueError: "triton" was asked for and cannot serve these tensors; the message says why and what to do.
    """
    if backend in ("reference", "blocked"):
        return backend
    if backend == "auto" and query.device.type == "cpu":
        return "blocked"
    if lacks is not None:
        return _without_kernels(backend, f"{lacks} is served by 'blocked' and 'reference' alone")
    # constants where nothing is wrong: torch.compile may know the sizes as symbols only
    head_dim = query.shape[-1] if query.shape[-1] > LARGEST_HEAD else LARGEST_HEAD
    is_batch_too_large = True if query.shape[0] > LARGEST_BATCH else False  # noqa: SIM210
    return _choose(backend, query.device, query.dtype, head_dim, is_batch_too_large)


# asked once while a call is compiled, not traced: it looks for packages and into the environment
@torch.compiler.assume_constant_result
def _choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, is_batch_too_large: bool) -> str:
    reason = why_not(device, dtype, head_dim, is_batch_too_large)
    return "triton" if reason is None else _without_kernels(backend, reason)


@torch.compiler.assume_constant_result
def _without_kernels(backend: str, reason: str) -> str:
    if backend == "triton":
        raise ValueError(f"backend: 'triton' cannot serve this call: {reason}")
    message = f"window attention runs on the slower 'blocked' PyTorch backend: {reason}"
    if message not in _announced:
        _announced.add(message)
        logger.warning(message)
    return "blocked"

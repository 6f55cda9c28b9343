"""Whether what is asked for fits into memory, asked before any work."""

import os

import torch

GIB = 2**30


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a device may still give out; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(needed: int, device: torch.device, what: str, instead: str) -> None:
    """Refuse work whose numbers the device cannot hold.

    Args:
        needed: bytes.
        what: what needs them, in the plural, as the beginning of a sentence.
        instead: what to do.

    Raises:
        ValueError: it does not fit.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(f"{what} need about {needed / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free; {instead}")

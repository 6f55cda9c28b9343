"""Free memory of a device, and whether what is asked for fits, before any work."""

import os
import re
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, or of this machine for the CPU; None where it cannot be asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    table = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", table.read_text()) if table.exists() else None
    if found:
        return int(found[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_fits(needed: int, device: torch.device, what: str, instead: str) -> None:
    """Refuse work whose numbers the device cannot hold.

    Args:
        needed: bytes.
        what: what needs them, in the plural, as the beginning of a sentence.
        instead: what to do.

    Raises:
        ValueError: it does not fit.
    """
    free = available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{what} need about {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; {instead}"
        )

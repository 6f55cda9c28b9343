"""What every page of this folder shares: one file with its pictures inside, and where it was measured.

Templates are in `pages/`; jinja2 escapes whatever is filled in.
"""

import base64
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from swat_lm.files import write_text
from swat_lm.words import counted

__all__ = ["machine", "with_error", "write_page"]

PACKAGES = ("swat-lm", "torch", "transformers", "tokenizers", "numpy")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template of `pages/` and write the page beside its place and renamed."""
    pages = Environment(
        loader=PackageLoader("swat_lm.papers", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters |= {"commas": "{:,}".format, "counted": counted, "inline": inline, "with_error": with_error}
    write_text(path, pages.get_template(template).render(**values) + "\n")


def inline(path: Path) -> str:
    """A PNG as a data address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def with_error(value: float | None, error: float | None, digits: int = 3, sign: str = "") -> str:
    """3.210 +- 0.012; a dash for nothing."""
    if value is None:
        return "\u2013"
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" \u00b1 {error:.{digits}f}")


def machine(threads: int) -> dict[str, str]:
    """Where and with what this was measured."""
    return {
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def processor_name() -> str:
    """The processor's own name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

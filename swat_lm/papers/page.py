"""What every page of this folder shares: one file with its pictures inside, and where it was measured."""

import base64
import html
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from swat_lm.evaluate.curves import write_whole

__all__ = ["machine", "picture", "table", "with_error", "write_page"]

PACKAGES = ("swat-lm", "torch", "transformers", "tokenizers", "numpy")


def write_page(path: Path, title: str, body: str) -> None:
    """Write a whole page around the body, beside the place and renamed."""
    template = Template((files("swat_lm.papers") / "page.html").read_text(encoding="utf-8"))
    write_whole(path, template.substitute(title=html.escape(title), body=body))


def picture(path: Path) -> str:
    """A PNG as a data address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """A table of plain texts; `kinds[i]` is the class of row i's cells."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(one)}</th>" for one in headings) + "</tr>"]
    for index, row in enumerate(rows):
        kind = f' class="{kinds[index]}"' if index < len(kinds) and kinds[index] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def with_error(value: float | None, error: float | None, digits: int = 3, sign: str = "") -> str:
    """3.210 +- 0.012; a dash for nothing."""
    if value is None:
        return "\u2013"
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" \u00b1 {error:.{digits}f}")


def machine(threads: int) -> dict[str, str]:
    """Where and with what this was measured."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def processor_name() -> str:
    """The processor's own name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

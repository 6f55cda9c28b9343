"""Rows of a benchmark as they are measured, kept in a hidden file, so that an interrupted run goes on after them."""

import json
from collections.abc import Callable
from typing import Any

from benchmarks import measure, record
from swat_lm.files import write_text


class Rows:
    """The rows that are measured so far.

    What an interrupted run has left is taken up where machine, versions, commit and settings are the same; a working
    tree with changes is like no other.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.path = record.OWN / f".{name}.partial"
        # as it reads back from the file
        self.origin = json.loads(json.dumps({**measure.machine(), "date": None, "settings": settings}))
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.exists() and "+" not in self.origin["commit"]:
            kept = json.loads(self.path.read_text())
            if kept["origin"] == self.origin:
                self.rows = kept["rows"]

    def measured(self, label: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this label, measured unless it is there, and kept at once."""
        if label not in self.rows:
            self.rows[label] = run()
            write_text(self.path, json.dumps({"origin": self.origin, "rows": self.rows}, indent=1) + "\n")
        return self.rows[label]

    def forget(self) -> None:
        """Remove the file, once the result is saved."""
        self.path.unlink(missing_ok=True)

"""Tables in Markdown, for what writes parts of documents."""

import re

__all__ = ["rows", "with_error"]


def with_error(value: float | None, error: float | None, sign: str = "") -> str:
    """3.210 ± 0.012, or nothing."""
    if value is None:
        return ""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def rows(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, texts to the left, numbers to the right."""
    numeric = [all(re.match(r"^$|^[-+*]*[0-9]", line[column]) for line in body) for column in range(len(head))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (head, rule, *body))

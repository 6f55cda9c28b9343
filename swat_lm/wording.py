"""Words of messages that many places share: counted nouns, and how to install what is missing. No imports."""

__all__ = ["counted", "install_extra"]


def counted(count: int, noun: str) -> str:
    """`1 document`, `1,200 documents`, `2 queries`."""
    several = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else several}"


def install_extra(extra: str) -> str:
    """The command that installs an extra of this package, which is installed from a clone."""
    return f"pip install -e '.[{extra}]' in the folder of swat-lm's clone"

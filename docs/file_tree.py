"""The tree of the repository's files with the first words of what each says about itself, for generate.py."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# in the order in which the parts build on each other; what is not listed follows by name
READING_ORDER = ("ops", "layers", "model", "data", "train", "evaluate", "serve", "papers", "cli")
FOLDERS = {
    "benchmarks": "speed beside named peers; results/ holds the figures as JSON",
    "verification": "checks too heavy for the suite, and the record of their last run",
    "tests": "mirrors swat_lm/",
    "docs": "the mathematics, the architecture, what was measured and what failed",
}
# folders of data inside the package whose files say what they are
LISTED_DATA = {"recipes": "runs as YAML files, found by name; each is validated by a test"}
WIDTH = 84


def tree(root: Path, folders_only: bool = False) -> str:
    """The repository's files, or only its folders, with the first words of what each says about itself."""
    rows = list(package_rows(root / "swat_lm", root, 0))
    for name, caption in FOLDERS.items():
        rows.append((f"{name}/", caption))
        rows += [(f"  {path.name}", describe(path)) for path in listed_files(root / name)]
    if folders_only:
        rows = [row for row in rows if row[0].endswith("/")]
    column = max(len(name) for name, _ in rows) + 2
    return "".join(f"{name:<{column}}{text}".rstrip() + "\n" for name, text in rows)


def package_rows(folder: Path, root: Path, depth: int) -> Iterator[tuple[str, str]]:
    """A package's line, its own modules, then the packages inside it."""
    yield "  " * depth + f"{folder.name}/", describe(folder / "__init__.py")
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield "  " * (depth + 1) + path.name, describe(path)
    for suffix in (".yaml", ".html"):
        names = sorted(path.stem for path in folder.glob(f"*{suffix}"))
        if names:
            yield "  " * (depth + 1) + f"*{suffix}", ", ".join(names)
    inner = [path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    known = {name: place for place, name in enumerate(READING_ORDER)}
    for path in sorted(inner, key=lambda path: (known.get(path.name, len(known)), path.name)):
        yield from package_rows(path, root, depth + 1)
    data = [path for path in folder.iterdir() if path.is_dir() and path not in inner and data_files(path)]
    for path in sorted(data):
        if path.name in LISTED_DATA:
            yield "  " * (depth + 1) + f"{path.name}/", LISTED_DATA[path.name]
            yield from (("  " * (depth + 2) + one.name, describe(one)) for one in sorted(path.glob("*.yaml")))
            continue
        names = data_files(path)
        listed = ", ".join(names) if len(names) < 9 else f"{names[0]} ... {names[-1]} ({len(names)} files)"
        yield "  " * (depth + 1) + f"{path.name}/", listed


def data_files(folder: Path) -> list[str]:
    """Names of the recipes, presets or pages in a folder."""
    return sorted(path.stem for path in folder.iterdir() if path.suffix in (".yaml", ".html"))


def listed_files(folder: Path) -> list[Path]:
    """Modules and pages of a folder beside the package; of the tests only the folder is named."""
    if folder.name == "tests" or not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix in (".py", ".yaml", ".md") and path.name != "__init__.py"
    )


def describe(path: Path, width: int = WIDTH) -> str:
    """The first words, in a line of so many letters, of a module, of a recipe's first comment or of a page."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        words = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".yaml":
        words = re.sub(r"^# ?", "", text.split("\n\n")[0].partition("\n")[0]) if text.startswith("#") else ""
    else:
        words = next((part for part in text.split("\n\n")[1:] if not part.startswith(("#", "<", "|", "`"))), "")
    return shorten(words.split("\n\n")[0], width)


def shorten(text: str, width: int) -> str:
    """The first sentence without its full stop, cut where a part of it ends if it is too long for a line."""
    text = re.split(r"\.\s+(?=[A-Z])", " ".join(text.split()))[0].removesuffix(".")
    if len(text) <= width:
        return text
    for marks in (r"[;:](?= )", r"(,(?= )| \()"):
        ends = [place.start() for place in re.finditer(marks, text[: width + 1]) if place.start() > 20]
        ends = [end for end in ends if text[:end].count("(") == text[:end].count(")")]
        if ends:
            return text[: ends[-1]]
    return text[:width].rsplit(" ", 1)[0]

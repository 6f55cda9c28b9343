"""How mkdocs reads the repository: the same links work on a git forge and on the site; see mkdocs.yml.

Pages keep their places in the repository. A source file or folder that a page links to becomes a page of its text.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".html": "html"}
# a link outside of fenced code, which the first alternative swallows
LINK = re.compile(r"(?P<fence>^```.*?^```$)|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Headings get the anchors that a git forge gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = lambda text, separator: forge_anchor(text)
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages of the site at their places in the repository, and the sources that they link to."""
    from mkdocs.structure.files import File, Files, InclusionLevel

    pages = page_paths()
    found = [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in pages]
    images = sorted((ROOT / "docs" / "images").iterdir())
    found += [File.generated(config, f"docs/images/{one.name}", abs_src_path=str(one)) for one in images]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in pages}
    for path in sorted(linked_sources(texts)):
        found.append(
            File.generated(config, source_page(path), content=source_text(path), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    # what the theme and plugins bring
    return Files([*found, *(file for file in files if file.src_dir != config.docs_dir)])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to sources lead to their pages."""
    path = page.file.src_uri
    if path not in page_paths():
        return markdown

    def lead(found: re.Match[str]) -> str:
        source = found["target"] and source_of(path, found["target"])
        if not source:
            return found[0]
        return f"]({os.path.relpath(source_page(source), PurePosixPath(path).parent)})"

    return LINK.sub(lead, markdown)


def page_paths() -> list[str]:
    """Of every page its path in the repository."""
    return [*PAGES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def forge_anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading: lower case, marks dropped, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def source_of(page: str, target: str) -> str | None:
    """The file or folder of the repository that a link of a page names, if it is neither a page nor an image.

    None also where nothing is there: the link stays as it is, and mkdocs reports it.
    """
    name = target.partition("#")[0]
    if not name or "://" in name:
        return None
    path = os.path.normpath(PurePosixPath(page).parent / name)
    is_ours = not path.startswith("..") and (ROOT / path).exists()
    return None if not is_ours or path in page_paths() or path.startswith("docs/images/") else path


def linked_sources(texts: dict[str, str]) -> set[str]:
    """All that pages link to beside pages and images; of a folder also the files in it."""
    found = {
        source
        for page, text in texts.items()
        for link in LINK.finditer(text)
        if link["target"] and (source := source_of(page, link["target"]))
    }
    return found | {file for path in found if (ROOT / path).is_dir() for file in files_in(path)}


def files_in(folder: str) -> list[str]:
    """The readable files of a folder of the repository."""
    return sorted(f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if path.suffix in LANGUAGES)


def source_page(path: str) -> str:
    """Where the page of a source lies."""
    return f"source/{path}.md"


def source_text(path: str) -> str:
    """The page of a source: its text, or the list of a folder's files."""
    # a reader searches the documents, not the code
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        base = PurePosixPath(source_page(path)).parent
        return head + "".join(f"- [{file}]({os.path.relpath(source_page(file), base)})\n" for file in files_in(path))
    text = (ROOT / path).read_text(encoding="utf-8")
    # a fence longer than any in the text
    return f"{head}``````` {LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n```````\n"

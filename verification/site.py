"""The documents build as a site, every link and anchor alive; one that is dead stops the build."""

import re
from pathlib import Path

from verification.workplace import CONSTRAINTS, Workplace, require

DEAD = {
    "a page": "docs/nothing.md",
    "an anchor": "docs/data.md#nothing",
    "a source": "swat_lm/nothing.py",
    "an image": "docs/images/nothing.png",
}


def check(place: Workplace) -> dict[str, str]:
    """Build, look at the pages, then build with each kind of dead link; returns the versions."""
    programs, tree = place.environment("builder"), place.copy()
    pins = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("mkdocs")]
    place.run([programs / "python", "-m", "pip", "install", "-q", *pins])
    build = [programs / "mkdocs", "build", "--site-dir", place.folder / "site"]
    place.run(build, tree)
    look(place, place.folder / "site")
    readme = (tree / "README.md").read_text(encoding="utf-8")
    for kind, target in DEAD.items():
        (tree / "README.md").write_text(f"{readme}\n[dead]({target})\n", encoding="utf-8")
        said = place.run(build, tree, expect=1)
        require("Aborted with 1 warning" in said, f"a dead link to {kind} gave {said[-500:]!r}")
    place.done(f"a dead link to {', '.join(DEAD)} is an error")
    return dict(pin.split("==") for pin in pins)


def look(place: Workplace, site: Path) -> None:
    """Every page of docs/ is there, links to sources lead to pages of their text, no reference to another server."""
    pages = sorted(path.name for path in site.joinpath("docs").glob("*.html"))
    require("architecture.html" in pages, f"pages are {pages}")
    links = [
        (page, target.partition("#")[0])
        for page in [site / "index.html", *site.joinpath("docs").glob("*.html")]
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8"))
    ]
    local = [(page, target) for page, target in links if target and not re.match(r"[a-z]+:", target)]
    gone = [f"{page.name}: {target}" for page, target in local if not (page.parent / target).exists()]
    require(not gone, f"links lead nowhere: {gone}")
    sources = {target for _, target in local if "source/" in target}
    require(len(sources) > 50, f"only {len(sources)} links to sources")
    place.done(f"{len(pages)} pages beside README, CONTRIBUTING and CHANGELOG; all {len(local)} links lead somewhere")

"""The import rules of DESIGN.md: the tree is the architecture, and imports only point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "swat_lm"
FILES = sorted(ROOT.rglob("*.py"))
BELOW = {
    "validation": set(),
    "paths": set(),
    "words": set(),
    "files": set(),
    "interruption": set(),
    "named_recipes": set(),
    "recipe": {"named_recipes", "paths", "validation"},
    "hub": {"paths"},
    "ops": set(),
    "layers": {"ops"},
    "model": {"hub", "layers", "ops", "paths", "recipe", "validation"},
    "data": {"hub", "paths", "recipe"},
    "": {"ops", "model", "layers"},  # the package itself; the model lazily
}
BELOW["train"] = BELOW["evaluate"] = BELOW["model"] | {"model", "data"}
BELOW["serve"] = BELOW["model"] | {"model"}
BELOW["papers"] = BELOW["train"] | {"train", "evaluate", "serve", "named_recipes"}
BELOW["cli"] = BELOW["papers"] | {"papers"}
for allowed in BELOW.values():
    # words, how anything is written, and how it is stopped
    allowed |= {"words", "files", "interruption"}


def imported(file: Path) -> set[str]:
    """Names of the swat_lm parts a file imports, anywhere in it."""
    package = ("swat_lm", *file.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], node.module or "") if node.level else ())
            base = (base or node.module or "").strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("swat_lm.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_keeps_the_rules(file: Path):
    relative = file.relative_to(ROOT)
    part = relative.parts[0].removesuffix(".py").replace("__init__", "").replace("__main__", "cli")
    wrong = imported(file) & set(BELOW) - BELOW[part] - {part}
    assert not wrong, f"{relative} imports {sorted(wrong)}; allowed are {sorted(BELOW[part])}"
    assert not set(relative.with_suffix("").parts) & {"utils", "util", "common", "helpers", "misc"}
    limit = 600 if "triton" in relative.parts else 400
    assert len(file.read_text().splitlines()) <= limit, f"{relative} is longer than {limit} lines"


def test_only_a_paper_knows_its_tables():
    # runner, worker and page are handed an object; what they compared by name would be back in a name
    for file in (ROOT / "papers").glob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert not {"table1", "table2", "table3", "figure2", "figure3", "figure5"} & words, file.name
        for paper in ("papers.swat", "papers.taipan", "papers.ecp", "papers.sparsek"):
            assert file.name == "__init__.py" or paper not in file.read_text(), file.name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("recipe", "torch numpy transformers"),
        ("serve.scheduler", "torch numpy transformers pydantic"),
        ("", "transformers datasets"),
    ],
)
def test_import_stays_light(module: str, absent: str):
    # named modules are imported past the package, whose own __init__ may import ops and so torch
    program = f"""if True:
        import sys, types, importlib; package = types.ModuleType('swat_lm'); package.__path__ = [{str(ROOT)!r}]
        if {module!r}: sys.modules['swat_lm'] = package
        importlib.import_module('swat_lm.{module}'.strip('.')); print(set({absent.split()!r}) & set(sys.modules))"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"

"""What a wheel and an sdist hold: read from the lists that build them; `make verify` builds and installs them."""

import subprocess
import tomllib
from pathlib import Path

import swat_lm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = ROOT / "swat_lm"


def test_the_wheel_holds_every_file_of_the_package():
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["swat_lm"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert files == packed
    for pattern in patterns:
        assert list(PACKAGE.glob(pattern)), f"{pattern} names nothing"
    # setuptools' search takes folders with an __init__.py
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_the_sdist_holds_what_its_tests_need():
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    named = {word for line in lines if line.startswith(("include", "graft")) for word in line.split()[1:]}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    top = {name.partition("/")[0] for name in listed if not name.startswith(".")}
    # these setuptools takes by itself; without git, in an unpacked sdist, nothing is listed
    assert top <= named | {"LICENSE", "MANIFEST.in", "pyproject.toml", "swat_lm"}
    for name in named:
        assert (ROOT / name).exists(), f"MANIFEST.in names {name}"


def test_one_version():
    assert PROJECT["project"]["version"] == swat_lm.__version__

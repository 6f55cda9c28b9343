"""docs/serving.md names every address, every option and every error of the server, and no other."""

import inspect
import re
from pathlib import Path

import pytest

from swat_lm.cli.serving import serve
from swat_lm.serve.host import Host
from swat_lm.serve.http.app import create_app
from swat_lm.serve.http.errors import SAID
from swat_lm.serve.http.settings import Settings
from tests.serve.hosting import tiny_engine

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture
def rows() -> str:
    return "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))


def test_the_page_names_every_address(rows: str):
    document = create_app(Host(tiny_engine), Settings("tiny")).openapi()
    there = {f"{method.upper()} {path}" for path, said in document["paths"].items() for method in said}
    assert set(re.findall(r"`((?:GET|POST|PUT|DELETE) /[^`]*)`", rows)) == {*there, "GET /openapi.json"}


def test_the_page_names_every_option(rows: str):
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters if name != "checkpoint"}
    named = set(re.findall(r"`(--[\w-]+)`", rows))
    assert named == options


def test_the_page_names_every_status(rows: str):
    # of the one table whose first column are statuses
    lines = [line for line in rows.splitlines() if re.match(r"\| [45]\d\d\b", line)]
    assert {int(status) for line in lines for status in line.split("|")[1].split(",")} == set(SAID)

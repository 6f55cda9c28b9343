"""One of a thing and several of it, and the command that installs an extra."""

import re
import tomllib
from pathlib import Path

from swat_lm.words import counted, install_extra

ROOT = Path(__file__).parents[1]


def test_one_and_several():
    said = [
        counted(count, noun) for count, noun in ((1, "token"), (0, "token"), (1200, "byte"), (2, "query"), (3, "key"))
    ]
    assert said == ["1 token", "0 tokens", "1,200 bytes", "2 queries", "3 keys"]


def test_what_is_counted_on_the_command_line(cli, here, exported):
    ran = cli("generate", exported, "-p", "a", "-n", 1)
    assert "after 1 token read" in ran.err
    recipe = "model.num_attention_heads=1", "model.sliding_window=1", "model.num_hidden_layers=1"
    ran = cli("info", "run.yaml", *recipe, "--length", 1)
    shown = " ".join(ran.out.split())
    for words in ("1 head of 32", "reach 1 token ", "per token at 1 token ", "per token after 1 token "):
        assert words in shown, words


def test_extras_are_installed_by_a_command_that_works_and_by_one_function():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for path in (ROOT / "swat_lm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        # from an index of packages it cannot be had
        assert "pip install 'swat-lm" not in text, path
        named |= set(re.findall(r"install_extra\('(\w+)'\)", text))
    assert named == {"model", "train", "eval", "gguf", "fla", "serve"}
    assert named <= extras.keys()
    assert install_extra("eval") == "pip install -e '.[eval]' in the folder of swat-lm's clone"

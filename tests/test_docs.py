"""The documents say what is true: links, files, commands, snippets and generated tables against the real thing."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks.measure import RESULTS
from benchmarks.table import fill
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.recipe import load_recipe
from tests.docs_modules import ROOT, load_module
from tests.forked import run

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|[|`(] ?)((?:swat-lm|torchrun) [^`|#\n]+)", re.MULTILINE)


GENERATOR = load_module("generate")
SITE = load_module("site_pages")
RECORDED_DEMO = GENERATOR.DEMO_RESULT.read_text(encoding="utf-8")


# what the pages point to


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert path.is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {path.name} has no heading {anchor}"


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {SITE.forge_anchor(heading) for heading in headings}


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [path for entry in site["nav"] for path in entry.values()]
    assert sorted(named) == sorted(SITE.page_paths())
    assert {str(page.relative_to(ROOT)) for page in PAGES} == {*named, "AGENTS.md"}
    # a warning, as of a dead link, stops the build
    assert site["strict"] is True
    assert {*site["validation"]["links"].values()} == {"warn"}


def test_links_to_sources_lead_to_their_pages():
    assert SITE.source_of("docs/data.md", "../swat_lm/recipe.py") == "swat_lm/recipe.py"
    assert SITE.source_of("README.md", "LICENSE") == "LICENSE"
    # pages and images mkdocs knows; what is not there, or not ours, it reports
    for target in (
        "data.md#packing",
        "../README.md",
        "images/figure2-tiny.png",
        "../gone.py",
        "../../x",
        "#a",
        "http://a",
    ):
        assert SITE.source_of("docs/data.md", target) is None
    page = SimpleNamespace(file=SimpleNamespace(src_uri="docs/data.md"))
    text = "[a](../swat_lm/recipe.py#x) [b](kernels.md)\n```\n[c](../LICENSE)\n```\n[d](../swat_lm/ops/triton)\n"
    assert SITE.on_page_markdown(text, page) == (
        "[a](../source/swat_lm/recipe.py.md) [b](kernels.md)\n```\n[c](../LICENSE)\n```\n"
        "[d](../source/swat_lm/ops/triton.md)\n"
    )
    assert SITE.linked_sources({"docs/data.md": text}) >= {"swat_lm/recipe.py", "swat_lm/ops/triton/forward.py"}
    assert SITE.source_text("LICENSE").endswith("\n```````\n")
    assert "- [swat_lm/ops/triton/forward.py](triton/forward.py.md)\n" in SITE.source_text("swat_lm/ops/triton")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    folders = "swat_lm|tests|docs|benchmarks|recipes|verification"
    for name in re.findall(rf"(?<!runs/)\b((?:{folders})/[\w./*-]*\w\.(?:py|md|yaml|json|png|html))\b", text):
        assert list(ROOT.glob(name)), f"{page.name} names {name}"
    for name in re.findall(r"python -m ((?:benchmarks|swat_lm)[\w.]*)", text):
        assert importlib.util.find_spec(name) is not None, f"{page.name} runs {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z]+)|`make ([a-z]+)`", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert {a or b for a, b in named} <= targets


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 150


# what is generated


def test_generated_blocks_are_current():
    for page, contents in GENERATOR.blocks().items():
        text = page.read_text(encoding="utf-8")
        for name, content in contents.items():
            assert GENERATOR.replace_block(text, name, content) == text, f"{page}: {name} is stale: run `make docs`"


def test_tables_of_figures_are_current():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert fill(page, RESULTS) == page, "docs/performance.md is stale: run `make docs`"


def test_speed_block_tells_what_was_missed(tmp_path: Path):
    assert "No benchmark is recorded" in GENERATOR.speed([])
    goals = [
        {"goal": "A", "wanted": 0.8, "measured": 0.91, "reached": True},
        {"goal": "B", "wanted": 40, "measured": 31.4, "reached": False},
        {"goal": "C", "wanted": 2, "measured": 1234.5, "reached": True},
    ]
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"goals": goals, "machine": {"processor": "P", "threads": 2}}))
    block = GENERATOR.speed([path])
    assert "| one | 2 of 3 | C **1,234** (2); A **0.91** (0.8) | B **31.4** (40) |" in block
    assert "P, 2 threads" in block


def test_every_module_says_what_it_is():
    for line in GENERATOR.tree(ROOT).splitlines():
        name, *text = line.split(maxsplit=1)
        assert text or not name.endswith(".py"), f"{name} has no docstring"


def test_demo_block_shows_a_result_as_it_is():
    result = {
        "training_length": 64,
        "steps": 10,
        "claims": [{"claim": "A", "held": True, "numbers": "1"}, {"claim": "B", "held": False, "numbers": "2"}],
        "models": {
            name: {
                "short": name.upper(),
                "window": window,
                "parameters": 1234,
                "tokens_trained": 5678,
                "curve": [
                    {"length": 64, "mean_loss": 1.25, "state_bytes": 100},
                    {"length": 128, "mean_loss": loss, "state_bytes": size},
                ],
            }
            for name, window, loss, size in (("swat", 16, 1.2, 100), ("paper", 16, 2.4, 100), ("twin", None, 3.5, 2000))
        },
        "machine": {"processor": "P", "cores": "2", "python": "3.11", "torch": "2.13"},
        "seconds": {"swat": 60.0, "twin": 61.0, "last call": 130.4},
    }
    block = GENERATOR.demo(result)
    assert "| evaluated at | SWAT: loss | PAPER: loss | TWIN: loss | SWAT: state | full attention: state |" in block
    assert "| 64 (trained) | 1.250 | 1.250 | 1.250 | 100 | 100 |" in block
    assert "| 128 | 1.200 | 2.400 | 3.500 | 100 | 2,000 |" in block
    assert "- held: A (1)\n- **did not hold**: B (2)" in block
    assert "2 min 10 s" in block


def test_a_finished_demo_is_taken_over(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(GENERATOR, "ROOT", tmp_path)
    monkeypatch.setattr(GENERATOR, "DEMO_RESULT", tmp_path / "docs" / "results" / "demo.json")
    monkeypatch.setattr(GENERATOR, "DEMO_PLOT", tmp_path / "docs" / "images" / "loss_by_length.png")
    finished = tmp_path / "demo"
    finished.mkdir()
    result = json.loads(RECORDED_DEMO)
    # what is not a finished demo changes nothing
    for text, named in ((None, "results.json: No such file"), ("{", "not JSON"), ('{"steps": 3}', "KeyError: 'models'"),
                        (json.dumps(result), "has no loss_by_length.png")):  # fmt: skip
        if text is not None:
            (finished / "results.json").write_text(text)
        with pytest.raises(ValueError, match=named):
            GENERATOR.take_over(finished)
    assert not (tmp_path / "docs").exists()
    (finished / "loss_by_length.png").write_bytes(b"picture")
    GENERATOR.take_over(finished)
    assert json.loads(GENERATOR.DEMO_RESULT.read_text()) == result
    assert GENERATOR.DEMO_PLOT.read_bytes() == b"picture"


def test_an_experiment_is_recorded_where_the_page_has_a_place(tmp_path: Path, monkeypatch):
    known = json.loads((GENERATOR.RESULTS / "figure2-tiny.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(GENERATOR, "RESULTS", tmp_path)
    monkeypatch.setattr(GENERATOR, "DEMO_PLOT", tmp_path / "loss_by_length.png")
    path = tmp_path / "found.txt"
    for result, named in (([], "holds no mapping"), ({"rows": 3}, "TypeError"), ({**known, "scale": "x"}, "markers")):
        path.write_text(json.dumps(result))
        with pytest.raises(ValueError, match=named):
            GENERATOR.record_experiment(path, "abc")
    assert list(tmp_path.glob("*.json")) == []
    path.write_text(json.dumps({**known, "sources": ["/home/of/someone"]}))
    GENERATOR.record_experiment(path, "abc")
    kept = json.loads((tmp_path / "figure2-tiny.json").read_text())
    assert "sources" not in kept
    assert kept["machine"]["commit"] == "abc"


def test_recorded_demo_has_its_picture():
    assert GENERATOR.DEMO_RESULT.exists() == GENERATOR.DEMO_PLOT.exists()
    if GENERATOR.DEMO_RESULT.exists():
        assert json.loads(GENERATOR.DEMO_RESULT.read_text(encoding="utf-8"))["claims"]


# README's commands and snippets


def commands() -> list[str]:
    blocks = [body for language, body in FENCE.findall(README) if language in ("", "bash")]
    tree = "swat_lm/ "
    found = [one.strip() for body in blocks if not body.startswith(tree) for one in COMMAND.findall(body)]
    inline = [one.strip() for one in re.findall(r"`(swat-lm [a-z][^`]*)`", FENCE.sub("", README))]
    return list(dict.fromkeys([*found, *inline]))


def test_readme_shows_every_command():
    from swat_lm.cli.application import application

    names = {command.name for command in application.registered_commands}
    names |= {group.name for group in application.registered_groups}
    assert names - {"demo", "prepare"} <= {words(line)[0] for line in commands()}
    assert "make demo" in README


def words(command: str) -> list[str]:
    """The arguments that reach `swat-lm`; torchrun's own are dropped."""
    parts = shlex.split(command)
    if parts[0] == "torchrun":
        return parts[parts.index("swat_lm.cli") + 1 :]
    return parts[1:]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str):
    import typer

    from swat_lm.cli.application import application

    command, arguments = typer.main.get_command(application), words(line)
    context, name = None, "swat-lm"
    # down through groups, so that the whole line is parsed and nothing is run
    while True:
        context = command.make_context(name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            break
        arguments = [*context._protected_args, *context.args]
        assert arguments, f"{line} names no command"
        name, command, arguments = command.resolve_command(context, arguments)
    if name == "train":
        recipe, overrides = context.params["recipe"], context.params["overrides"] or []
        assert config_from_recipe(load_recipe(recipe, overrides).model, 259).num_hidden_layers > 0


def test_info_prints_what_readme_shows(capfd, monkeypatch):
    from swat_lm.cli.application import run_application

    monkeypatch.setenv("COLUMNS", "120")
    (shown,) = [body for language, body in FENCE.findall(README) if language == "text"]
    assert "swat-lm info swat-340m" in README
    assert run_application(["info", "swat-340m"]) == 0
    printed = capfd.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_python_snippets_run(tmp_path: Path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "models" / "llama")
    pages = [ROOT / "docs" / name for name in ("transformers.md", "checkpoints.md", "serving.md", "sessions.md")]
    beside = "".join(page.read_text(encoding="utf-8") for page in pages)
    snippets = [body for language, body in FENCE.findall(README + beside) if language == "python"]
    assert len(snippets) >= 6
    monkeypatch.chdir(tmp_path)
    run("\n".join(snippets), output=tmp_path / "said.txt")
    assert (tmp_path / "my-model" / "config.json").exists()


def test_install_extras_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        assert set(re.findall(r"install -e '\.\[(\w+)\]'", page.read_text(encoding="utf-8"))) <= extras.keys()


def test_experiments_name_real_recipes():
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    swat, twin = (
        yaml.safe_load((ROOT / "swat_lm" / "papers" / "demo" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("swat", "twin")
    )
    assert swat["model"]["score_bias"] == "-log(window)"
    assert "score_bias: -log(window)" in text
    # the twin differs in attention only, and in the rate that is best for it
    assert set(twin) <= {"inherits", "name", "out", "model", "train"}
    assert set(twin.get("train", {})) <= {"learning_rate"}
    assert set(twin["model"]) <= {"sliding_window", "score_function", "slopes", "score_bias"}

"""The demo end to end with tiny models, its continuation, and verdicts that follow the numbers."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swat_lm.evaluate.curves import summarise
from swat_lm.model.cost import count_parameters
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.papers.demo.pace import steps_within
from swat_lm.papers.demo.report import judge
from swat_lm.papers.demo.run import DemoSettings, evaluation_lengths, load_demo_recipe, open_plan, run_demo
from swat_lm.papers.watching import Watcher
from swat_lm.papers.worker import work
from tests.forked import begin


class Notes(Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps: dict[str, int] = {}
        self.written = ""
        self.sizes: list[tuple[int, int, int]] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def event(self, name: str, event: Any) -> None:
        if event.kind == "step":
            self.steps[name] = event.step

    def text(self, text: str) -> None:
        self.written += text

    def state(self, first: int, last: int, tokens: int) -> None:
        self.sizes.append((first, last, tokens))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.py").write_text(f"def function_{number}(value):\n    return value + {number}\n\n" * 60)
    return (str(folder),)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, sources: tuple[str, ...]) -> tuple[Path, DemoSettings, Notes, dict]:
    """A finished demo."""
    out, settings, notes = tmp_path_factory.mktemp("demo") / "demo", quick(sources), Notes()
    return out, settings, notes, run_demo(out, settings, notes)


def quick(sources: tuple[str, ...]) -> DemoSettings:
    return DemoSettings(quick=True, sources=sources, new_tokens=40, streams=2)


def test_demo_leaves_everything_in_one_folder(done: tuple[Path, DemoSettings, Notes, dict]):
    out, _, notes, results = done
    assert notes.steps == {"swat": 40, "paper": 40, "twin": 40}
    for name in ("swat", "paper", "twin"):
        for part in ("recipe.yaml", "metrics.jsonl", "length.json", "export/model.safetensors", "checkpoints"):
            assert (out / name / part).exists(), part
        config = SwatForCausalLM.from_pretrained(out / name / "export").config
        assert config.window(0) == (None if name == "twin" else 16)
        assert config.slopes == {"swat": "negative", "paper": "balanced", "twin": "none"}[name]
    assert json.loads((out / "results.json").read_text()) == results
    assert not list(out.rglob(".tmp*"))

    curves = {name: model["curve"] for name, model in results["models"].items()}
    assert [point["length"] for point in curves["swat"]] == [16, 32, 64, 128, 256, 512, 1024]
    assert len({point["state_bytes"] for point in curves["swat"]}) == 1
    assert curves["twin"][-1]["state_bytes"] > 20 * curves["twin"][0]["state_bytes"] // 2
    assert len({model["tokens_trained"] for model in results["models"].values()}) == 1
    sizes = {name: model["parameters"] for name, model in results["models"].items()}
    # all but the paper's have gains of queries and keys, a number per channel of a head and layer each
    assert sizes["swat"] == sizes["twin"] == sizes["paper"] + 2 * 2 * 16

    # the state was weighed while it streamed, far beyond the window of 16
    stream = results["models"]["swat"]["stream"]
    assert stream["tokens"] == 40
    assert stream["state_constant"]
    assert notes.sizes == [(stream["state_bytes_first"], stream["state_bytes_last"], len("def main(") + 40)]
    assert notes.written == "def main(" + stream["text"] + "\n"


def test_page_is_whole_and_says_what_the_numbers_say(done: tuple[Path, DemoSettings, Notes, dict]):
    out, _, _, results = done
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.split("</style>")[1].replace("data:", "")
    assert "{{" not in page
    assert page.count('<li class="held">') == sum(claim["held"] for claim in results["claims"])
    assert page.count("<b>did not hold</b>") == sum(not claim["held"] for claim in results["claims"])
    for model in results["models"].values():
        for point in model["curve"]:
            assert f"<td>{point['mean_loss']:.3f}</td>" in page
    assert results["machine"]["torch"] in page


def test_again_does_not_train_again(done: tuple[Path, DemoSettings, Notes, dict]):
    out, settings, _, results = done
    before = (out / "swat" / "export" / "model.safetensors").stat().st_mtime_ns
    notes = Notes()
    again = run_demo(out, replace(settings, minutes=1), notes)
    assert notes.steps == {}
    assert (out / "swat" / "export" / "model.safetensors").stat().st_mtime_ns == before
    assert again["claims"] == results["claims"]
    with pytest.raises(ValueError, match=r"holds a demo with other settings \(prompt was .* and is 'other'\)"):
        run_demo(out, replace(settings, prompt="other"), notes)
    # what another version trained is not shown as this one's
    recipe = out / "paper" / "recipe.yaml"
    kept = recipe.read_text()
    recipe.write_text(kept.replace("slopes: balanced", "slopes: negative"))
    with pytest.raises(ValueError, match=r"recipe\.yaml is not the demo's recipe of today: name another folder"):
        run_demo(out, settings, notes)
    recipe.write_text(kept)


def test_interrupted_demo_saves_and_goes_on(tmp_path: Path, sources: tuple[str, ...]):
    out = tmp_path / "demo"
    settings = replace(quick(sources), minutes=6)
    plan = open_plan(out, settings)
    (out / "plan.json").write_text(json.dumps({**plan, "pace": {"threads": 1, "steps": 100_000}}))
    program = (
        "from pathlib import Path; from swat_lm.papers.demo.run import *; from swat_lm.papers.watching import *\n"
        "import json, sys\n"
        f"settings = DemoSettings(quick=True, sources={sources!r}, new_tokens=40, streams=2)\n"
        "try:\n"
        f"    run_demo(Path({str(out)!r}), settings, Watcher())\n"
        "except InterruptedRunError:\n"
        "    sys.exit(130)\n"
    )
    process = begin(program, output=tmp_path / "said.txt", environment={"OMP_NUM_THREADS": "1"})
    metrics = [out / name / "metrics.jsonl" for name in ("swat", "paper", "twin")]
    try:
        deadline = time.monotonic() + 120
        while not all(path.exists() and path.stat().st_size for path in metrics) and time.monotonic() < deadline:
            assert process.is_alive()
            time.sleep(0.1)
        assert process.pid
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=120)
        assert process.exitcode == 130, (tmp_path / "said.txt").read_text()
    finally:
        process.kill()
    for name in ("swat", "paper", "twin"):
        assert len(list((out / name / "checkpoints").iterdir())) == 1
        assert not (out / name / "length.json").exists()


def curve(losses: dict[int, list[float]]):
    """A curve of two streams."""
    rows = [[losses[length][stream] for length in losses] for stream in (0, 1)]
    return summarise(list(losses), rows, rows, [8] * len(losses), 100, None, same_text=True)


@pytest.mark.parametrize(
    ("swat", "twin", "constant", "held"),
    [
        # SWAT is at 2.0 and 2.1 at the training length
        ([1.9, 2.0], {64: [2.2, 2.29], 1024: [2.9, 3.1]}, True, [True, True, True, True, True]),
        ([2.5, 2.6], {64: [1.9, 2.0], 1024: [1.92, 2.03]}, False, [False, True, False, False, False]),
        # the twin is worse on average, but within the noise
        ([2.0, 2.1], {64: [2.0, 2.6], 1024: [2.0, 3.6]}, True, [False, True, True, False, True]),
    ],
)
def test_verdicts_follow_the_numbers(swat: list[float], twin: dict, constant: bool, held: list[bool]):
    curves = {
        "swat": curve({64: [2.0, 2.1], 1024: swat}), "twin": curve(twin),
        "paper": curve({64: [2.5, 2.61], 1024: [2.5, 2.6]}),
    }  # fmt: skip
    stream = {"state_bytes_first": 8, "state_bytes_last": 8, "state_constant": constant}
    claims = judge(curves, {"swat": stream}, 64)
    assert [claim["held"] for claim in claims] == held
    for words, claim in zip(
        ("ahead of full attention at", "ahead of SWAT with balanced slopes at"), claims, strict=False
    ):
        assert words in claim["claim"]
    # two more with --all
    more = judge({**curves, "alibi": curve(twin), "window": curves["swat"]}, {"swat": stream}, 64)
    assert [claim["held"] for claim in more][2:4] == [held[0], False]
    assert "with ALiBi at the training length (64 tokens)" in more[2]["claim"]


def test_all_adds_two_models_of_the_same_size(tmp_path: Path):
    settings = DemoSettings(all=True)
    assert settings.models == ("swat", "paper", "twin", "window", "alibi")
    recipes = {name: load_demo_recipe(name, tmp_path, settings) for name in settings.models}
    configs = {name: config_from_recipe(recipe.model, 259) for name, recipe in recipes.items()}
    sizes = {name: count_parameters(config).total for name, config in configs.items()}
    assert {size - sizes["paper"] for name, size in sizes.items() if name != "paper"} == {2 * 4 * 32}
    # one budget and one text
    assert len({str(replace(recipe.train, learning_rate=1)) + str(recipe.data) for recipe in recipes.values()}) == 1
    scores = {name: (config.score_function, config.window(0), config.slopes) for name, config in configs.items()}
    assert scores == {
        "swat": ("sigmoid", 64, "negative"), "paper": ("sigmoid", 64, "balanced"), "twin": ("softmax", None, "none"),
        "window": ("softmax", 64, "negative"), "alibi": ("softmax", None, "negative"),
    }  # fmt: skip
    assert configs["alibi"].slope_schedule == "alibi"
    quick = [load_demo_recipe(name, tmp_path, replace(settings, quick=True)) for name in settings.models]
    assert [recipe.model["sliding_window"] for recipe in quick] == [16, 16, None, 16, None]


def test_plan():
    assert evaluation_lengths(256) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert steps_within(6, 1200, 0.05) == 1200
    assert steps_within(6, 1200, 0.5) == 360  # 6 * 60 * 0.68 / (1.35 * 0.5), to a ten below
    assert steps_within(0.01, 1200, 0.5) == 20
    with pytest.raises(ValueError, match="minutes"):
        DemoSettings(minutes=0)


def test_foreign_and_damaged_folders_are_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no demo"):
        open_plan(tmp_path, DemoSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        open_plan(tmp_path, DemoSettings())


def test_a_workers_error_comes_through(tmp_path: Path, sources: tuple[str, ...]):
    out = tmp_path / "demo"
    plan = open_plan(out, quick(sources))
    (out / "plan.json").write_text(json.dumps({**plan, "pace": {"threads": 1, "steps": 3}}))
    # fewer steps than the recipe's warm-up
    with pytest.raises(ValueError, match="warmup_steps"):
        run_demo(out, quick(sources), Watcher())


def test_a_diverged_run_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "unstable.py").write_text(
        "from swat_lm.train.events import DivergedError\n"
        "def do_model(out, name, watcher):\n"
        "    print('what a library prints', flush=True)\n"
        "    raise DivergedError('the loss is nan at step 7')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, (tmp_path / name).open("w"))
    code = work(tmp_path, "name", "unstable")
    monkeypatch.undo()
    assert code == 2
    # the parent reads stdout, so nothing else may be there
    assert json.loads((tmp_path / "stdout").read_text()) == ["fail", "the loss is nan at step 7"]
    assert (tmp_path / "stderr").read_text() == "what a library prints\n"

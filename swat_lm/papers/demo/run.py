"""The demo: small models trained on Python's own sources under one budget, compared far beyond their length.

Each stage leaves a file, so that the same call continues after an interruption. Draws nothing on the terminal: whoever
calls it watches. The page is report.py's.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from swat_lm.data import load_tokenizer, prepare, resolve_sources, vocabulary_size
from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.length import loss_on_same_text, segments
from swat_lm.files import write_text
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.papers.demo.pace import Pace, find_pace, threads
from swat_lm.papers.demo.report import write_report
from swat_lm.papers.watching import InterruptedRunError, Watcher
from swat_lm.papers.worker import run_workers
from swat_lm.recipe import Recipe, dump_recipe, load_recipe
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.stream import Stream
from swat_lm.train import run
from swat_lm.train.setup import resolved
from swat_lm.words import counted

__all__ = ["DemoSettings", "do_model", "run_demo"]

MODELS = ("swat", "paper", "twin")
MORE = ("window", "alibi")
"""With `all`."""
FULL = ("twin", "alibi")
WORKER = "swat_lm.papers.demo.run"
# of evaluation, in training lengths
LENGTHS = (0.25, 0.5, 1, 2, 4, 8, 16)

QUICK = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.sliding_window=16",
    "model.max_position_embeddings=64",
    "data.sequence_length=64",
    "train.steps=40",
    "train.warmup_steps=5",
    "train.evaluate_every=20",
    "train.evaluate_batches=2",
    "train.save_every=20",
)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; kept in `plan.json`, since a folder holds one demo."""

    minutes: float = 6.0
    """Most minutes on this machine; a slow one trains fewer steps."""
    quick: bool = False
    """A tiny model for half a minute: shows that everything works, not what is good for what."""
    sources: tuple[str, ...] = ("python:stdlib",)
    prompt: str = "def main("
    new_tokens: int = 400
    streams: int = 12
    """Held-out pieces of the longest evaluation length."""
    all: bool = False
    """Softmax over the same window, and full attention with slopes, as well."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes: expected more than 0, got {self.minutes}")

    @property
    def models(self) -> tuple[str, ...]:
        """Names of what is trained."""
        return (*MODELS, *(MORE if self.all else ()))


def run_demo(out: Path, settings: DemoSettings, watcher: Watcher) -> dict[str, Any]:
    """Run or continue the demo in the folder `out`; returns what `results.json` holds.

    Raises ValueError if the folder holds something else, InterruptedRunError after a Ctrl-C that saved.
    """
    began = time.monotonic()
    plan = open_plan(out, settings)
    recipes = {name: load_demo_recipe(name, out, settings) for name in settings.models}
    watcher.stage("preparing the text")
    store = prepare(recipes["swat"].data, lambda at: watcher.count("preparing", at.bytes_read, at.bytes_total))
    if plan["pace"] is None:
        watcher.stage("measuring this machine")
        plan["pace"] = asdict(find_pace(list(recipes.values()), store.vocab_size, settings.minutes))
        write_text(out / "plan.json", write_figures(plan) + "\n")
    pace = Pace(**plan["pace"])
    recipes = {name: load_demo_recipe(name, out, settings, (f"train.steps={pace.steps}",)) for name in settings.models}
    seconds = dict(plan["seconds"])
    missing = [name for name in settings.models if not Path(recipes[name].out, "length.json").exists()]
    for name in settings.models:
        path = Path(recipes[name].out, "recipe.yaml")
        # of one that goes on, training finds out by itself
        if name not in missing and path.read_text(encoding="utf-8") != dump_recipe(resolved(recipes[name])):
            raise ValueError(
                f"{path} is not the demo's recipe of today: name another folder for --out, or remove {out}"
            )
    if missing:
        watcher.stage(
            f"training {', '.join(missing)} side by side: {counted(pace.steps, 'step')} each, then evaluating"
        )
        started = time.monotonic()
        try:
            run_workers(out, missing, pace.threads, watcher, WORKER)
        finally:
            seconds["training and evaluation"] = seconds.get("training and evaluation", 0) + time.monotonic() - started
            write_text(out / "plan.json", write_figures({**plan, "seconds": seconds}) + "\n")
    curves = {
        name: LengthCurve.from_json(Path(recipe.out, "length.json").read_text(encoding="utf-8"))
        for name, recipe in recipes.items()
    }
    with threads(pace.threads):
        samples = {
            name: stream_one(recipes[name], settings, watcher if name == "swat" else Watcher())
            for name in reversed(settings.models)
        }
    seconds["last call"] = time.monotonic() - began
    watcher.stage("writing the report")
    held_out = store.split("held_out")
    text = {
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "bytes": store.num_bytes,
        "held_out_documents": len(held_out),
        "held_out_tokens": held_out.num_tokens,
    }
    return write_report(out, recipes, curves, samples, text, seconds, pace.threads)


def open_plan(out: Path, settings: DemoSettings) -> dict[str, Any]:
    """What an earlier call decided, or a new plan; raises ValueError if the folder holds something else."""
    path = out / "plan.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            before, _ = plan["settings"], plan["pace"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged; remove {out} or name another folder") from None
        # a finished or begun demo keeps its steps, so another limit changes nothing
        changed = [
            f"{key} was {before.get(key)!r} and is {wanted.get(key)!r}" for key in {**before, **wanted}
            if key != "minutes" and (key not in before or before[key] != wanted.get(key))
        ]  # fmt: skip
        if changed:
            raise ValueError(
                f"{out} holds a demo with other settings ({', '.join(changed)}): name another folder, or remove it"
            )
        return plan
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no demo: name another folder")
    # a misspelt source must not leave a folder that then holds another demo
    resolve_sources(settings.sources)
    out.mkdir(parents=True, exist_ok=True)
    plan = {"settings": wanted, "pace": None, "seconds": {}}
    write_text(path, write_figures(plan) + "\n")
    return plan


def load_demo_recipe(name: str, out: Path, settings: DemoSettings, more: Sequence[str] = ()) -> Recipe:
    """The recipe of one of the models with everything inside the demo's folder."""
    overrides = (
        [override for override in QUICK if not (name in FULL and "sliding_window" in override)]
        if settings.quick
        else []
    )
    with as_file(files("swat_lm.papers.demo")) as folder:
        recipe = load_recipe(folder / f"{name}.yaml", [*overrides, *more])
    data = replace(recipe.data, sources=settings.sources, cache=str(out / "tokens"))
    return replace(recipe, out=str(out / name), data=data)


def evaluation_lengths(trained: int) -> list[int]:
    """A quarter of the training length, doubling up to the longest."""
    return [round(trained * times) for times in LENGTHS]


def do_model(out: Path, name: str, watcher: Watcher) -> None:
    """Train one model and evaluate it, as the plan in the folder says; what is done already is not done again.

    Raises InterruptedRunError if training was stopped, and saved.
    """
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    settings, pace = (
        DemoSettings(**{**plan["settings"], "sources": tuple(plan["settings"]["sources"])}),
        Pace(**plan["pace"]),
    )
    recipe = load_demo_recipe(name, out, settings, (f"train.steps={pace.steps}",))
    result = run(recipe, lambda event: watcher.event(name, event))
    if result.interrupted:
        raise InterruptedRunError(f"stopped at step {result.last_step} of {recipe.train.steps}")
    lengths = evaluation_lengths(recipe.data.sequence_length)
    streams = segments([*prepare(recipe.data).split("held_out")], lengths[-1], settings.streams)
    curve = loss_on_same_text(
        load_trained(recipe),
        streams,
        lengths,
        on_progress=lambda done, total: watcher.count(f"{name} at all lengths", done, total),
    )
    curve.save(Path(recipe.out, "length.json"))


def load_trained(recipe: Recipe) -> SwatForCausalLM:
    """The exported model of a finished run."""
    return SwatForCausalLM.from_pretrained(str(Path(recipe.out, "export"))).eval()


def stream_one(recipe: Recipe, settings: DemoSettings, watcher: Watcher) -> dict[str, Any]:
    """Generate from the trained model and weigh its state after every token."""
    watcher.stage(f"streaming {counted(settings.new_tokens, 'token')} from {recipe.name}")
    model, tokenizer = load_trained(recipe), load_tokenizer(str(Path(recipe.out, "export")))
    stream, sizes, parts = Stream(model, tokenizer), [], []
    sampling = Sampling(
        temperature=0.7, top_p=0.95, vocab_size=vocabulary_size(tokenizer), seed=recipe.seed,
        max_tokens=settings.new_tokens,
    )  # fmt: skip
    prompt = tokenizer.encode(settings.prompt, add_special_tokens=False)
    stream.read([prompt])
    watcher.text(settings.prompt)
    began = time.monotonic()
    for event in stream.write(sampling):
        parts.append(event.text)
        sizes.append(stream.state.num_bytes)
        watcher.text(parts[-1])
    seconds = time.monotonic() - began
    watcher.text("\n")
    watcher.state(sizes[0], sizes[-1], len(prompt) + len(sizes))
    return {
        "prompt": settings.prompt,
        "text": "".join(parts),
        "tokens": len(sizes),
        "tokens_per_second": len(sizes) / seconds,
        "state_bytes_first": sizes[0],
        "state_bytes_last": sizes[-1],
        "state_constant": len(set(sizes)) == 1,
    }

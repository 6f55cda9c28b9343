"""Writes the generated parts of README and of pages in docs/: results of the demo and of experiments, speed, files.

    python docs/generate.py                  rewrite what stands between the markers
    python docs/generate.py --demo FOLDER    first take over results.json and the plot of a finished demo
    python docs/generate.py --record FOLDER/table3.json --commit HASH
                                             first take over what `swat-lm reproduce` found, trained at that commit,
                                             or table.json of `swat-lm evaluate tasks`

`tests/test_docs.py` compares the documents with what this file would write.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from file_tree import describe, tree
from markdown_rows import rows, with_error
from study_tables import study_tables
from task_tables import task_tables

from swat_lm.cli.information import describe_model, find_config
from swat_lm.evaluate.table1 import GUESSING, MEASURED
from swat_lm.files import write_text
from swat_lm.words import counted

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
EXPERIMENTS = ROOT / "docs" / "experiments.md"
RESULTS = ROOT / "docs" / "results"
DEMO_RESULT = RESULTS / "demo.json"
DEMO_PLOT = ROOT / "docs" / "images" / "loss_by_length.png"
# what `python -m benchmarks.checkpoint --record` found
CHECKPOINT_RESULT = RESULTS / "smollm2.json"
CHECKPOINT_PLOT = DEMO_PLOT.with_name("smollm2.png")
# what `python -m benchmarks.training_memory --record` found
MEMORY_RESULT = ROOT / "benchmarks" / "results" / "training_memory.json"


def main() -> None:
    """Rewrite README and docs/architecture.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="a folder that `swat-lm demo` finished")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", nargs="+", default=[], help="JSON of `swat-lm reproduce`"
    )
    parser.add_argument("--commit", metavar="HASH", help="of the code that trained what --record names")
    arguments = parser.parse_args()
    if arguments.record and not arguments.commit:
        parser.error("--record needs --commit: the code that trained the models")
    try:
        if arguments.demo is not None:
            take_over(arguments.demo)
        for path in arguments.record:
            record_experiment(path, arguments.commit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for page, contents in blocks().items():
        text = page.read_text(encoding="utf-8")
        for name, content in contents.items():
            text = replace_block(text, name, content)
        page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{page}\n")


def blocks() -> dict[Path, dict[str, str]]:
    """Of each page the generated blocks by the names of their markers."""
    result = json.loads(DEMO_RESULT.read_text(encoding="utf-8")) if DEMO_RESULT.exists() else None
    real = json.loads(CHECKPOINT_RESULT.read_text(encoding="utf-8"))
    return {
        README: {
            "demo": demo(result),
            "checkpoint": checkpoint(real, shown=("full", "w256s0", "w1024s4", "third4"), far=True),
            "info": f"```text\n{info('swat-340m')}```",
            "memory": memory(json.loads(MEMORY_RESULT.read_text(encoding="utf-8"))),
            "claims": claims([json.loads(path.read_text(encoding="utf-8")) for path in records()]),
            "speed": speed(sorted((ROOT / "benchmarks" / "results").glob("*.json"))),
            "tree": f"```\n{tree(ROOT, folders_only=True)}```",
        },
        ARCHITECTURE: {"files": f"```\n{tree(ROOT)}```"},
        EXPERIMENTS: {
            "smollm2": checkpoint(real),
            **study_tables(RESULTS / "studies"),
            **task_tables(RESULTS / "tasks"),
            **{path.stem: recorded(json.loads(path.read_text(encoding="utf-8"))) for path in records()},
        },
    }


def replace_block(text: str, name: str, content: str) -> str:
    """Put the content between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; ValueError if they are not there once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have the markers {begin} and {end} once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{content}\n{end}{after}"


def take_over(folder: Path) -> None:
    """Copy a demo's result and plot into docs/. ValueError, and nothing is changed, if that is no finished demo."""
    result = read_json(folder / "results.json", "a folder that `swat-lm demo` finished")
    try:
        demo(result)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not the result of a demo ({type(error).__name__}: {error})") from None
    if not (folder / DEMO_PLOT.name).is_file():
        raise ValueError(f"{folder}: has no {DEMO_PLOT.name}; expected a folder that `swat-lm demo` finished")
    DEMO_RESULT.parent.mkdir(parents=True, exist_ok=True)
    DEMO_PLOT.parent.mkdir(parents=True, exist_ok=True)
    write_text(DEMO_RESULT, json.dumps(result, indent=1) + "\n")
    shutil.copyfile(folder / DEMO_PLOT.name, DEMO_PLOT)


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """A JSON file that holds a mapping; ValueError, which says what was expected, for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected {expected}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected {expected}") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds no mapping; expected {expected}")
    return result


def records() -> list[Path]:
    """What is kept of experiments: `NAME-SCALE.json` of `reproduce`, `tasks.json` of the benchmarks."""
    return sorted(path for path in RESULTS.glob("*.json") if path not in (DEMO_RESULT, CHECKPOINT_RESULT))


def record_experiment(path: Path, commit: str) -> None:
    """Keep what an experiment found, without the places of its texts on one machine.

    ValueError, and nothing is changed, if it is no result, or docs/experiments.md has no place for it.
    """
    expected = "what `swat-lm reproduce` or `swat-lm evaluate tasks` found"
    result, picture = read_json(path, expected), None
    try:
        if "experiment" in result:
            name, picture = f"{result['experiment']}-{result['scale']}", path.with_suffix(".png")
            result = {key: value for key, value in result.items() if key != "sources"}
            result["machine"] |= {"commit": commit}
        else:
            name = "tasks"
            ours = [row for row in result["rows"] if row["group"] in (MEASURED, GUESSING)]
            result = {"commit": commit, **result, "rows": ours}
        block = recorded(result)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}; expected {expected}") from None
    # without its markers the page could not show it, and the documents would be stale from then on
    replace_block(EXPERIMENTS.read_text(encoding="utf-8"), name, block)
    if picture is not None and picture.exists():
        shutil.copyfile(picture, DEMO_PLOT.with_name(f"{name}.png"))
    write_text(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")


def info(preset: str) -> str:
    """What `swat-lm info PRESET` prints."""
    rows = describe_model(*find_config(preset, []))
    column = max(len(name) for name, _ in rows) + 2
    return "".join(f"{name:<{column}}{value}\n" for name, value in rows)


def speed(results: list[Path]) -> str:
    """Of every recorded benchmark with goals, how many are reached, the two farthest beyond, and those that are not."""
    if not results:
        return "No benchmark is recorded yet: see docs/performance.md for how to run them."
    body, machines = [], set()
    for path in results:
        record = json.loads(path.read_text(encoding="utf-8"))
        goals, machine = record["goals"], record["machine"]
        if not goals:
            continue
        reached = [goal for goal in goals if goal["reached"]]
        reached.sort(key=lambda goal: goal["wanted"] / goal["measured"])
        beyond, missed = (
            "; ".join(f"{goal['goal']} **{number(goal['measured'])}** ({number(goal['wanted'])})" for goal in some)
            for some in (reached[:2], [goal for goal in goals if not goal["reached"]])
        )
        about = describe(ROOT / "benchmarks" / f"{path.stem}.py", width=200) or path.stem
        body.append([about, f"{len(reached)} of {len(goals)}", beyond, missed])
        machines.add(f"{machine['processor']}, {machine['threads']} threads")
    table = rows(["measured: **result** (at least)", "goals reached", "farthest beyond", "missed"], body)
    return f"{table}\n\nMeasured on {' and '.join(sorted(machines))}."


def memory(result: dict[str, Any]) -> str:
    """Peaks of a training pass in MiB by the tokens of its row, a column for every way to run layers."""
    names = [key.removesuffix(" MiB") for key in result["rows"][0] if key.endswith(" MiB")]
    body = [
        [f"{row['tokens']:,}", *("" if (size := row[f"{name} MiB"]) is None else number(size) for name in names)]
        for row in result["rows"]
    ]
    shown, commit = result["settings"], result["machine"]["commit"]
    table = rows(["tokens of the row", *(f"{name}, MiB" for name in names)], body)
    model = f"{shown['layers']} layers of width {shown['width']}, a window of {shown['window']}"
    return f"{table}\n\nOf {model}; blocks of {shown['block']:,}, chunks of {shown['chunk']}; commit {commit}."


def number(value: float) -> str:
    """Three significant digits; whole numbers from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# the demo's result


def demo(result: dict[str, Any] | None) -> str:
    """The plot, the table and the verdicts of a recorded demo."""
    if result is None:
        return "No result is recorded here yet: run `make demo`, then `python docs/generate.py --demo demo`."
    models = list(result["models"].values())
    swat, twin = result["models"]["swat"], result["models"]["twin"]
    head = [*(f"{model['short']}: loss" for model in models), "SWAT: state", "full attention: state"]
    lines = [
        f"![Loss against evaluation length]({DEMO_PLOT.relative_to(ROOT).as_posix()})",
        "",
        f"| evaluated at | {' | '.join(head)} |",
        f"| ---: |{' ---: |' * len(head)}",
    ]
    for at, point in enumerate(swat["curve"]):
        mark = " (trained)" if point["length"] == result["training_length"] else ""
        cells = [f"{model['curve'][at]['mean_loss']:.3f}" for model in models]
        cells += [f"{model['curve'][at]['state_bytes']:,}" for model in (swat, twin)]
        lines.append(f"| {point['length']:,}{mark} | {' | '.join(cells)} |")
    machine = result["machine"]
    sizes = " to ".join(f"{size:,}" for size in sorted({model["parameters"] for model in models}))
    lines += [
        "",
        f"Loss in nats per token of the same held-out text, cut into pieces of each length; state in bytes of one "
        f"stream after a piece. Window {swat['window']}, {sizes} parameters, {result['steps']:,} "
        f"steps on {swat['tokens_trained']:,} tokens each. What the demo says about itself:",
        "",
        *(
            f"- {'held' if claim['held'] else '**did not hold**'}: {claim['claim']} ({claim['numbers']})"
            for claim in result["claims"]
        ),
        "",
        f"Measured on {machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"torch {machine['torch']}; the whole demo took {minutes(result['seconds'])}.",
    ]
    return "\n".join(lines)


# a real checkpoint behind windows


def checkpoint(result: dict[str, Any], shown: tuple[str, ...] = (), far: bool = False) -> str:
    """Loss, state and speed of a checkpoint's plans; with `shown` only of these, and with `far` only at few lengths."""
    plans = [plan for plan in result["plans"] if not shown or plan["name"] in shown]
    curves = {plan["name"]: (plan["curve"] or {"points": []})["points"] for plan in plans}
    lengths = sorted({point["length"] for points in curves.values() for point in points})
    lengths = [length for length in lengths if length in (2048, 8192, 32768)] if far else lengths
    head = ["what its layers see", *(f"loss at {length:,}" for length in lengths), "state bytes", "tokens/s"]
    body = []
    for plan in plans:
        points = {point["length"]: point for point in curves[plan["name"]]}
        speed = plan["decoding"]
        cells = [f"{points[length]['tail_loss']:.3f}" if length in points else "" for length in lengths]
        body.append([
            plan["label"], *cells, f"{speed['state_bytes']:,}",
            f"{speed['tokens_per_second']:.1f} ({speed['times_full']:.2f} x)",
        ])  # fmt: skip
    machine, context = result["machine"], result["context"]
    parts = [rows(head, body)]
    if far:
        place = CHECKPOINT_PLOT.relative_to(ROOT).as_posix()
        parts.insert(0, f"![Loss against the length of the context, SmolLM2-135M]({place})")
    if result["stream"] and not far:
        points = result["stream"]["points"]
        head = ["", *(f"{point['length']:,} tokens" for point in points)]
        losses = [f"{point['tail_loss']:.3f}" for point in points]
        parts.append(rows(head, [["loss", *losses], ["state bytes", *(f"{p['state_bytes']:,}" for p in points)]]))
    parts.append(
        f"Loss of tokens N/2+1 .. N in nats; state of one stream in float32, and decoding at batch 1, after "
        f"{context:,} tokens (medians of rounds in turns). {machine['processor']}, "
        f"{counted(machine['threads'], 'thread')}, torch {machine['versions']['torch']}, commit {result['commit']}."
    )
    return "\n\n".join(parts)


# the paper's experiments


def recorded(result: dict[str, Any]) -> str:
    """What one file of `records` says."""
    return experiment(result) if "experiment" in result else benchmarks(result)


def benchmarks(result: dict[str, Any]) -> str:
    """Our rows of the eight benchmarks and the perplexities, a column for each checkpoint."""
    names = [row["name"] for row in result["rows"]]
    columns = list(dict.fromkeys(heading for row in result["rows"] for heading in row["cells"]))
    body = []
    for heading in columns:
        cells = [row["cells"].get(heading) for row in result["rows"]]
        body.append([heading, *("" if cell is None else in_percent(cell["value"], cell["error"]) for cell in cells)])
    # the paper's rows are not shown here
    remarks = "\n".join(f"- {note}" for note in result["notes"] if not note.startswith("Rows of the paper"))
    return f"Commit {result['commit']}.\n\n{rows(['', *names], body)}\n\n{remarks}"


def in_percent(value: float, error: float | None) -> str:
    """45.21 ± 1.31; perplexities of a thousand and more without digits behind the point."""
    digits = 2 if value < 1000 else 0
    return f"{value:,.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")


def experiment(result: dict[str, Any]) -> str:
    """What was compared, the verdict on every claim, and the losses behind them."""
    machine, sizes = result["machine"], result["sizes"]
    tokens = {variant["tokens"] for variant in result["variants"]}
    count = len(result["variants"])
    image = DEMO_PLOT.with_name(f"{result['experiment']}-{result['scale']}.png")
    parts = [
        *([f"![{result['title']}](images/{image.name})"] if image.exists() else []),
        f"{count} variant{'s' if count != 1 else ''} of {parameter_range(result['variants'])} parameters, "
        f"{' or '.join(f'{count:,}' for count in sorted(tokens))} tokens each, seeds "
        f"{' and '.join(map(str, result['seeds']))}; W = {sizes['W']:,}, L = {sizes['L']:,}, XL = {sizes['XL']:,}. "
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}, "
        f"trained at commit {machine['commit']}.",
        rows(
            ["claim", "in the paper", "gap here", "pieces", "outcome"],
            [
                [claim["says"], claim["paper"], with_error(claim["gap"], claim["error"], "+"),
                 f"{claim['num_documents']} x {claim['num_seeds']}", outcome(claim["outcome"])]
                for claim in result["claims"]
            ],
        ),
    ]  # fmt: skip
    for text in TEXTS:
        if any(text in variant["losses"] for variant in result["variants"]):
            lengths = [f"{length:,} tokens" for length in result["lengths"]]
            body = [
                [variant["label"], *(with_error(at["mean"], at["error"]) for at in variant["losses"][text].values())]
                for variant in result["variants"]
            ]
            parts.append(rows([f"loss on {TEXTS[text]}", *lengths], body))
    return "\n\n".join(parts)


def claims(results: list[dict[str, Any]]) -> str:
    """How many of the paper's claims held in what was reproduced."""
    kinds = ("held", "broken", "undecided at this scale")
    body = []
    for result in results:
        if "claims" in result:
            outcomes = [claim["outcome"] for claim in result["claims"]]
            body.append([f"{result['title']} ({result['scale']})", *(str(outcomes.count(kind)) for kind in kinds)])
    return rows(["of the paper's claims", "held", "broken", "undecided"], body)


TEXTS = {"text": "held-out text", "books": "books"}


def parameter_range(variants: list[dict[str, Any]]) -> str:
    """One number, or the least and the greatest."""
    counts = sorted({variant["parameters"] for variant in variants})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def outcome(verdict: str) -> str:
    """What went against the paper stands out."""
    return f"**{verdict}**" if verdict == "broken" else verdict.removesuffix(" at this scale")


def minutes(seconds: dict[str, float]) -> str:
    """The demo's own time; a demo that was interrupted has more than its last call."""
    total = max(seconds["last call"], sum(value for name, value in seconds.items() if name != "last call"))
    return f"{int(total) // 60} min {int(total) % 60} s"


if __name__ == "__main__":
    main()

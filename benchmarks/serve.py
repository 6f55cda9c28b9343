"""Serving beside transformers and llama.cpp: many requests at once, requests that arrive, and one stream that grows.

    python -m benchmarks.serve_models SmolLM2 models/forms/smollm2
    python -m benchmarks.serve_models SmolLM2 models/forms/small --small
    python -m benchmarks.serve models/forms/* --llama-server BINARY [--transformers COMMAND] [--record]

Every server is a process of its own with the same number of threads, the same weights in float32 and the same requests,
asked over loopback by one client; who does not have its turn is stopped. All answers at temperature 0 have to be whole,
and the first of all servers alike. A row is kept when it is measured, and an interrupted run goes on after it.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measure, record
from benchmarks.rows import Rows
from benchmarks.serve_load import (
    Answer,
    Question,
    arriving,
    ask,
    closed,
    figures,
    gaps,
    quantile,
    questions,
    words,
)  # fmt: skip
from benchmarks.serve_models import GGUF, SINKS, WINDOW
from benchmarks.serve_peers import Process, Settings, started, version_of
from swat_lm.interruption import leaving_on_termination

OURS, LLAMA, SERVE, PLAIN = "swat-lm", "llama.cpp", "transformers serve", "transformers generate"
CANDIDATES = (OURS, LLAMA, SERVE, PLAIN)
DEPTHS = (1024, 4096, 16384, 32768, 102400)
# tokens by which answers are compared before anything is timed, and that are drawn at each depth
COMPARED, DRAWN = 8, 49
BETWEEN, COMPUTED = "ms between tokens", "CPU ms a token"
# arrivals come at this share of what the slowest server answers when it is never idle
SHARE = 0.5


def main() -> None:
    """Measure, save and print."""
    options = parse()
    rows = Rows("serve", told(options))
    end = time.monotonic() + 60 * options.minutes
    # no server outlives it, stopped as most are
    with leaving_on_termination(), tempfile.TemporaryDirectory() as logs:
        for folder in options.models:
            settings = Settings(
                options.threads, options.concurrency, WINDOW, options.llama_server, options.transformers, Path(logs)
            )
            deep = replace(settings, slots=1, context=max(options.depths) + WINDOW, is_stream=True)
            for measured, with_ in ((loads, settings), (deepen, deep)):
                if time.monotonic() < end:
                    measured(folder, with_, options, rows, end)
                else:
                    sys.stdout.write(f"{folder.name}: no time for {measured.__name__}\n")
    found = [row for entry in rows.rows.values() for row in entry["rows"]]
    goals = judge(found)
    path = record.save("serve", found, goals, told(options), lines=True)
    rows.forget()
    for line in goals:
        said = "reached " if line["reached"] else "MISSED  "
        sys.stdout.write(f"{said} {line['goal']}: {line['measured']:.3g} (at least {line['wanted']:g})\n")
    sys.stdout.write(record.finish(path, options.record))


def parse() -> argparse.Namespace:
    """Options from the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="FOLDER", help="what benchmarks.serve_models wrote")
    parser.add_argument("--llama-server", type=Path, required=True, help="llama.cpp's program")
    parser.add_argument("--transformers", default="transformers", help="the command of transformers, with [serving]")
    parser.add_argument("--threads", type=int, default=1, help="of every server")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    parser.add_argument("--requests", type=int, default=32, help="of a round")
    parser.add_argument("--rate", type=float, help="arrivals a second; default: half of what the slowest can answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=120, help="no request is sent later, and no stream read longer"
    )
    parser.add_argument("--minutes", type=float, default=60, help="nothing more is begun after so many")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="tokens of the stream, ascending")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    options = parser.parse_args()
    for folder in options.models:
        if not (folder / GGUF).is_file():
            parser.error(f"{folder}: has no {GGUF}; expected a folder that python -m benchmarks.serve_models wrote")
    if not options.llama_server.is_file():
        parser.error(f"--llama-server: there is no file {options.llama_server}; build the target llama-server")
    return options


def told(options: argparse.Namespace) -> dict[str, Any]:
    """What the record says of how it was measured."""
    return {
        "llama.cpp": version_of(options.llama_server), "threads of a server": options.threads,
        "at once": options.concurrency, "requests of a round": options.requests, "rounds": options.rounds,
        "seconds at most": options.seconds, "window": f"{WINDOW} and the first {SINKS}",
    }  # fmt: skip


def loads(folder: Path, settings: Settings, options: argparse.Namespace, rows: Rows, end: float) -> None:
    """Both loads of many requests on one model, all candidates in turns."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Process] = {}

        def all_of_them() -> dict[str, Process]:
            # not before a row is missing
            if not running:
                running.update({name: stack.enter_context(started(name, folder, settings)) for name in CANDIDATES})
                for process in running.values():
                    process.rest()
                check_alike(running)
            return running

        asked = questions(options.requests, seed=1)
        busy = rows.measured(
            f"{folder.name}, closed", lambda: at_once(folder.name, all_of_them(), asked, options, end)
        )  # fmt: skip
        slowest = min(row["tokens/s"] for row in busy["rows"] if row["server"] != PLAIN)
        per_request = statistics.mean(question.num_tokens for question in asked)
        rate = options.rate or float(f"{SHARE * slowest / per_request:.2g}")
        if time.monotonic() < end:
            rows.measured(f"{folder.name}, arriving", lambda: as_they_come(folder.name, all_of_them(), rate, options))


def check_alike(running: dict[str, Process]) -> None:
    """Warm all up. Raises SystemExit where one draws other tokens than ours, or reads another prompt."""
    question, first = Question(words(40, random.Random(0)), COMPARED), {}
    for name, process in running.items():
        first[name] = turn(process, lambda process=process: one(process, [question], 1))[0][0]
    for name, answer in first.items():
        mine = first[OURS]
        if (answer.text, answer.prompt_tokens) != (mine.text, mine.prompt_tokens):
            raise SystemExit(
                f"no figures: {name} reads {answer.prompt_tokens} tokens and answers {answer.text!r}, {OURS} reads "
                f"{mine.prompt_tokens} and answers {mine.text!r}"
            )


def turn(process: Process, work: Callable[[], Any]) -> Any:
    """What is done while only this candidate runs."""
    process.wake()
    try:
        return work()
    finally:
        process.rest()


def one(
    process: Process, asked: Sequence[Question], concurrency: int, seconds: float = 60
) -> tuple[list[Answer], float]:
    """A closed load on a candidate."""
    if process.server is None:
        return process.generate(asked, concurrency)
    return asyncio.run(closed(process.server, asked, concurrency, seconds))


def at_once(
    model: str, running: dict[str, Process], asked: Sequence[Question], options: argparse.Namespace, end: float
) -> dict[str, Any]:
    """So many requests at once, in rounds; after the first, those for which there is time."""
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        if rounds and time.monotonic() > end:
            break
        found = {}
        for name in in_turn(list(running), number):
            process = running[name]
            before = process.cpu_seconds()
            answers, seconds = turn(
                process, lambda process=process: one(process, asked, options.concurrency, options.seconds)
            )
            found[name] = figures(answers, seconds, process.cpu_seconds() - before)
            report(f"{model}, {options.concurrency} at once, round {number + 1}, {name}", found[name])
        rounds.append(found)
    return {"rows": load_rows(model, f"{options.concurrency} at once", rounds)}


def as_they_come(model: str, running: dict[str, Process], rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Requests that arrive by themselves, once for every server."""
    asked, found = questions(options.requests, seed=2, rate=rate), {}
    for name, process in running.items():
        server = process.server
        if server is not None:
            before = process.cpu_seconds()
            answers, seconds = turn(
                process, lambda server=server: asyncio.run(arriving(server, asked, options.seconds))
            )  # fmt: skip
            found[name] = figures(answers, seconds, process.cpu_seconds() - before)
            report(f"{model}, {rate:g} a second, {name}", found[name])
    return {"rows": load_rows(model, f"{rate:g} a second", [found])}


def in_turn(names: list[str], number: int) -> list[str]:
    """The names in the order of a round."""
    # none is left where all were too slow
    shift = number % max(1, len(names))
    return names[shift:] + names[:shift]


def load_rows(model: str, load: str, rounds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """A line for each candidate: medians over rounds, and that of the rounds' ratios of tokens per second."""
    return [
        {
            "model": model, "load": load, "server": name,
            **{key: statistics.median(found[name][key] for found in rounds) for key in rounds[0][name]},
            **{
                f"swat-lm times its {key}": statistics.median(found[OURS][key] / found[name][key] for found in rounds)
                for key in ("tokens/s", "tokens/CPU s")
            },
        }
        for name in rounds[0]
    ]  # fmt: skip


def deepen(folder: Path, settings: Settings, options: argparse.Namespace, rows: Rows, end: float) -> None:
    """One stream that grows: time between tokens behind so many, ours beside llama.cpp's full cache."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Process] = {}

        def both() -> dict[str, Process]:
            for name in (OURS, LLAMA) if not running else ():
                running[name] = stack.enter_context(started(name, folder, settings))
                running[name].rest()
            return running

        rows.measured(f"{folder.name}, stream", lambda: {"rows": stream_rows(folder.name, both(), options, end)})


def stream_rows(
    model: str, running: dict[str, Process], options: argparse.Namespace, end: float
) -> list[dict[str, Any]]:
    """A line for each depth; who does not get there in time, or could not, is left out from there on."""
    spoken: dict[str, list[str]] = {name: [] for name in running}
    alive, found, generator = list(running), [], random.Random(3)
    before, expected = 0, 0.0
    for depth in options.depths:
        if not alive or (found and time.monotonic() > end):
            break
        if expected > options.seconds:
            alive = [name for name in alive if name != LLAMA]
        more = words(depth - len(spoken[OURS]), generator).split()
        between: dict[str, list[float]] = {}
        work: dict[str, list[float]] = {}
        for number in range(options.rounds + 1):
            for name in in_turn(alive, number):
                # first what leads to this depth, then in every round one word more
                spoken[name] += ["and"] if number else more
                said = spoken[name] if name == LLAMA else spoken[name][-1 if number else -len(more) :]
                seconds = options.seconds if number == 0 else 60
                begin, computed = time.monotonic(), running[name].cpu_seconds()
                answer = turn(
                    running[name],
                    lambda name=name, said=said, seconds=seconds: further(running[name], " ".join(said), seconds),
                )
                if number == 0 and name == LLAMA:
                    # attention over all that was read: the time goes with the pairs of tokens
                    later = next((other for other in options.depths if other > depth), depth)
                    expected = (time.monotonic() - begin) * (later**2 - depth**2) / (depth**2 - before**2)
                if answer is None:
                    alive = [other for other in alive if other != name]
                elif number:
                    between.setdefault(name, []).append(quantile(gaps([answer]), 0.5))
                    work.setdefault(name, []).append((running[name].cpu_seconds() - computed) / DRAWN)
        row: dict[str, Any] = {"model": model, "tokens before": depth}
        for what, values in ((BETWEEN, between), (COMPUTED, work)):
            for name in running:
                row[f"{name}: {what}"] = 1e3 * statistics.median(values[name]) if name in values else "too slow"
            pairs = zip(values.get(OURS, []), values.get(LLAMA, []), strict=False)
            ratios = [other / own for own, other in pairs]
            row[f"llama.cpp / swat-lm: {what}"] = statistics.median(ratios) if ratios else None
        report(f"{model}, stream", row)
        found.append(row)
        before = depth
    return found


def further(process: Process, text: str, seconds: float) -> Answer | None:
    """Read on and draw a few tokens; None where that takes longer."""
    server = process.server
    assert server is not None

    async def in_time() -> Answer:
        async with asyncio.timeout(seconds):
            return await ask(server, Question(text, DRAWN))

    try:
        return asyncio.run(in_time())
    except TimeoutError:
        return None


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of each model, those of which there are rows.

    Loads by the clock. Of a stream what a token computes: the goals are about its growth, and on a machine that others
    use too the clock says more of them than of that.
    """
    goals = []
    for row in rows:
        if row.get("server") in (LLAMA, SERVE, PLAIN) and "at once" in row["load"]:
            wanted = 1 if row["server"] == LLAMA else 3
            said = f"{row['model']}, {row['load']}: times the tokens/s of {row['server']}"
            goals.append(measure.goal(said, wanted, row["swat-lm times its tokens/s"]))
    for model in dict.fromkeys(row["model"] for row in rows):
        deep = [row for row in rows if row["model"] == model and "tokens before" in row]
        ours = [row for row in deep if not isinstance(row[f"{OURS}: {COMPUTED}"], str)]
        if len(ours) > 1:
            first, last = ours[0], ours[-1]
            said = f"{model}: {COMPUTED} after {first['tokens before']:,} by those after {last['tokens before']:,}"
            goals.append(measure.goal(said, 0.9, first[f"{OURS}: {COMPUTED}"] / last[f"{OURS}: {COMPUTED}"]))
        beside = [row for row in deep if row[f"llama.cpp / swat-lm: {COMPUTED}"] is not None]
        if beside:
            said = f"{model}: llama.cpp's {COMPUTED} after {beside[-1]['tokens before']:,} by ours"
            goals.append(measure.goal(said, 1, beside[-1][f"llama.cpp / swat-lm: {COMPUTED}"]))
    return goals


def report(what: str, found: dict[str, Any]) -> None:
    """A line on the screen."""
    shown = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )
    sys.stdout.write(f"{what}: {shown}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

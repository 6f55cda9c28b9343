"""Progress shows the numbers of metrics.jsonl, each with the step it belongs to, and finds room on any terminal."""

import io
import json
import re
from pathlib import Path

from rich.console import Console

from swat_lm.cli.progress import RunProgress
from swat_lm.train import Event


def test_losses_shown_are_those_of_the_metrics(cli, here: Path):
    ran = cli("train", "run.yaml", "train.log_every=1")
    metrics = [json.loads(line) for line in (here / "runs/run/metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in metrics}
    shown = re.findall(r"step (\d+)/6  loss ([\d.]+)(?:  held out ([\d.]+)(?: at step (\d+))?)?", ran.err)
    assert shown[-1][0] == "6"
    for step, loss, held_out, at in shown:
        assert loss == f"{by_step[int(step)]['loss']:.3f}"
        if held_out:
            assert held_out == f"{by_step[int(at or step)]['held_out_loss']:.3f}"
    last = by_step[6]
    assert f"step 6: loss {last['loss']:.4f}, held-out loss {last['held_out_loss']:.4f}" in ran.out


def test_an_old_held_out_loss_has_its_step():
    console = Console(file=io.StringIO(), width=120, highlight=False)
    with RunProgress(console) as progress:
        progress.event("one", Event(kind="step", step=40, steps=60, tokens=9, loss=9.0))
        progress.event("one", Event(kind="evaluate", step=40, steps=60, tokens=9, held_out_loss=3.0))
        progress.event("one", Event(kind="step", step=60, steps=60, tokens=9, loss=2.0))
        progress.event("one", Event(kind="evaluate", step=60, steps=60, tokens=9, held_out_loss=2.5))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-2:] == [
        "one: step 60/60  loss 2.000  held out 3.000 at step 40",
        "one: step 60/60  loss 2.000  held out 2.500",
    ]


def test_nothing_is_written_where_nothing_began(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    with RunProgress(console):
        pass
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_narrow_terminal_cuts_no_number_off():
    for width in (40, 60, 80, 120):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
        with RunProgress(console) as progress:
            progress.event("own-text", Event(kind="evaluate", step=40, steps=60, tokens=9, held_out_loss=3.25))
            step = Event(kind="step", step=60, steps=60, tokens=9, loss=2.5, tokens_per_second=12345, seconds_left=3661)
            progress.event("own-text", step)
        words = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
        for number in ("60/60", "2.500", "3.250", "1:01:01 left", "own-text"):
            assert number in words, width

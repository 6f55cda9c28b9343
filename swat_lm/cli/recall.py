"""`swat-lm evaluate recall` and `swat-lm evaluate reach`: what a model still knows of what stood far back."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.checkpoints import load_behind_window
from swat_lm.cli.console import print_table, results, text_table
from swat_lm.cli.evaluation_text import read_documents
from swat_lm.cli.length import check_output, with_error
from swat_lm.cli.options import CHECKPOINT, DEVICE, HELD_OUT, OWN_WINDOW, TEXT_FIELD, TOKENIZER, WINDOW, whole_numbers
from swat_lm.cli.progress import counting
from swat_lm.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from swat_lm.data.synthetic import SyntheticTask
    from swat_lm.evaluate.reach import ReachCurve
    from swat_lm.evaluate.recall import RecallCurve, RecallItem

__all__ = ["reach", "recall"]


def recall(
    checkpoint: CHECKPOINT,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="passkey, kv, mqar, copy, or synthetic:NAME; repeatable. Default: passkey."),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", "-d", help="A .jsonl of key-value retrieval or LongEval lines.")
    ] = None,
    distances: Annotated[
        str | None, typer.Option(help="Distances in tokens, by commas; default: around the window and reach.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Items per distance; of a file, most items in all.")] = 50,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the JSON and the picture.")] = None,
    window: WINDOW = OWN_WINDOW,
    batch_size: Annotated[int, typer.Option(min=1, help="Items read side by side.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass; speed and memory only.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Draws the items.")] = 0,
    tokenizer: TOKENIZER = None,
    device: DEVICE = None,
) -> None:
    """Measure what a model recalls of a text, against the distance to it.

    Tasks in text, for any model: passkey (a number in filler), kv (key-value retrieval), mqar (several keys asked for),
    copy (a list of words). For a model that was trained on a synthetic task, name it as its recipe does. An answer is
    right if the model would write all of its tokens. The picture marks the window's edge and the theoretical reach,
    1 + (W - 1) times the layers. An interrupted measurement with --out goes on where it was.

    \b
    Examples:
      swat-lm evaluate recall runs/mine --task passkey --task kv --distances 64,256,1024,4096
      swat-lm evaluate recall runs/recall-mqar --task 'synthetic:mqar?pairs=8' --out mqar
      swat-lm evaluate recall llama-folder --data kv_retrieval_75_keys.jsonl.xz --samples 100
    """
    names = list(dict.fromkeys(task or ([] if data else ["passkey"])))
    asked = None if distances is None else sorted(set(whole_numbers(distances, "--distances", 1, "64,256")))
    check_output(out, "recall.json")
    from swat_lm.data.synthetic import PREFIX, synthetic_task
    from swat_lm.evaluate.partial import PartialResults, measurement_key
    from swat_lm.evaluate.probes import check_name, guessed_share, read_items
    from swat_lm.evaluate.recall import measure_recall

    # a task that does not exist is told before a model is loaded
    trained_on = {name: synthetic_task(name) for name in names if name.startswith(PREFIX)}
    for name in [name for name in names if name not in trained_on]:
        check_name(name)
    model, tokens = load_behind_window(checkpoint, window, tokenizer, device)
    where = asked or default_distances(model)
    # all items first, so that what cannot be made is said before anything is measured
    sets = [
        (name, make_items(name, trained_on.get(name), tokens, where, samples, seed, asked is not None))
        for name in names
    ]
    sets += [
        (path.name.partition(".")[0], read_items(path, partial(tokens.encode, add_special_tokens=False), samples))
        for path in data or []
    ]
    curves: list[RecallCurve] = []
    kept: list[PartialResults] = []
    for number, (name, items) in enumerate(sets):
        if out is not None:
            settings = [name, [(item.answers, item.group) for item in items]]
            key = measurement_key(model, [item.tokens for item in items], settings)
            kept.append(PartialResults(out / f"partial-{number}.json", key))
        with counting(f"recalling, {name}", "tokens") as counter:
            curve = measure_recall(
                model, items, name, chunk=chunk, batch_size=batch_size, partial=kept[-1] if kept else None,
                on_progress=counter, chance=guessed_share(trained_on.get(name), items) if name in names else None,
            )  # fmt: skip
        curves.append(curve)
        guess = "" if curve.chance is None else f", guessing {100 * curve.chance:.2g} %"
        results().print(
            f"{name}: window {curve.window or 'none'}, reach {curve.reach or 'everything'}{guess}", markup=False
        )
        print_table(recall_table(curve))
    if out is not None:
        from swat_lm.evaluate.figures import write_figures
        from swat_lm.evaluate.recall_plots import plot_recall

        # before anything is drawn
        write_text(out / "recall.json", write_figures([asdict(curve) for curve in curves]) + "\n")
        for results_of_task in kept:
            results_of_task.remove()
        plot_recall(curves, out / "recall.png", title=Path(checkpoint).name)
        results().print(f"{out / 'recall.json'}, {out / 'recall.png'}", markup=False)


def reach(
    checkpoint: CHECKPOINT,
    data: Annotated[list[str], typer.Option("--data", "-d", help="Text to measure on; may be given several times.")],
    length: Annotated[
        int | None, typer.Option(min=3, help="Tokens before the prediction; default: twice the reach.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Streams, spread over the text.")] = 32,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the JSON and the picture.")] = None,
    window: WINDOW = OWN_WINDOW,
    held_out: HELD_OUT = None,
    text_field: TEXT_FIELD = "text",
    tokenizer: TOKENIZER = None,
    device: DEVICE = None,
) -> None:
    """Measure how far back a model's predictions depend on the text, by gradients.

    The influence of a token is the norm of the gradient of the last token's loss with respect to its embedding. Given
    are the distances within which half, 90 % and 99 % of all influence lie.

    \b
    Example:
      swat-lm evaluate reach runs/mine --data books/ --out reach
    """
    check_output(out, "reach.json")
    model, _ = load_behind_window(checkpoint, window, tokenizer, device)
    from swat_lm.evaluate.length import segments
    from swat_lm.evaluate.reach import effective_reach
    from swat_lm.evaluate.windows import theoretical_reach

    documents = read_documents(checkpoint, data, tokenizer, text_field, held_out, model)
    size = length or min(2 * (theoretical_reach(model) or 1024), 8192)
    with counting("measuring", "streams") as counter:
        curve = effective_reach(model, segments(documents, size + 1, most), on_progress=counter)
    if out is not None:
        # before anything is drawn
        curve.save(out / "reach.json")
    print_table(reach_table(curve))
    if out is not None:
        from swat_lm.evaluate.recall_plots import plot_reach

        plot_reach(curve, out / "reach.png", title=Path(checkpoint).name)
        results().print(f"{out / 'reach.json'}, {out / 'reach.png'}", markup=False)


def default_distances(model: "PreTrainedModel") -> list[int]:
    """From a quarter of the window to twice the reach, and both sides of either edge; without a window 64 to 2,048."""
    from swat_lm.evaluate.windows import model_window, theoretical_reach

    window, reach_here = model_window(model), theoretical_reach(model)
    if window is None or reach_here is None:
        return [1 << power for power in range(6, 12)]
    # W - 1 and reach - 1 are the last distances on this side of either edge
    between = [window << power for power in range(1, 64) if window << power < reach_here]
    edges = {window // 4, window // 2, window - 1, window, *between, reach_here - 1, reach_here, 2 * reach_here}
    return sorted(edge for edge in edges if edge > 0)


def make_items(
    name: str,
    task: "SyntheticTask | None",
    tokens: "PreTrainedTokenizerFast",
    distances: list[int],
    samples: int,
    seed: int,
    asked: bool,
) -> "list[RecallItem]":
    """Items of one task, a synthetic one or one in text; of default distances, those too short for it are left out."""
    from swat_lm.evaluate.probes import synthetic_items, text_items

    items: list[RecallItem] = []
    make = partial(text_items, name, partial(tokens.encode, add_special_tokens=False))
    if task is not None:
        # the task has odd distances only
        distances = (
            [distance - 1 + distance % 2 for distance in distances] if task.name == "kv" and not asked else distances
        )
        make = partial(synthetic_items, task)
    for distance in distances:
        try:
            items += make([distance], samples, seed)
        except ValueError:
            if asked or distance == distances[-1]:
                raise
    return items


def recall_table(curve: "RecallCurve") -> Table:
    """The curve as a table of text."""
    rows = [
        [
            f"{point.distance:,}",
            f"{100 * point.accuracy:.1f} %",
            f"{100 * point.low:.1f} .. {100 * point.high:.1f} %",
            with_error(point.loss, point.loss_error),
            f"{point.num_items}",
        ]
        for point in curve.points
    ]
    return text_table(("distance", "recalled", "95 % interval", "loss of answers", "items"), rows)


def reach_table(curve: "ReachCurve") -> Table:
    """The distances within which shares of the influence lie, beside what the windows allow."""
    rows = [
        [f"{100 * float(share):g} %", with_error(value, curve.within_error[share], ",.1f")]
        for share, value in curve.within.items()
    ]
    rows.append(["theoretical reach", "everything" if curve.reach is None else f"{curve.reach - 1:,}"])
    return text_table(("influence", "within so many tokens"), rows, left=("influence",))

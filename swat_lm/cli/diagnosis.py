"""`swat-lm evaluate diagnose`: what the attention of a trained model does."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.checkpoints import load_behind_window
from swat_lm.cli.console import messages, print_table, results, text_table
from swat_lm.cli.evaluation_text import read_documents
from swat_lm.cli.length import check_output
from swat_lm.cli.options import CHECKPOINT, DEVICE, HELD_OUT, OWN_WINDOW, TEXT_FIELD, TOKENIZER, WINDOW
from swat_lm.cli.progress import counting

if TYPE_CHECKING:
    from swat_lm.evaluate.diagnose import Diagnosis

__all__ = ["diagnose"]


def diagnose(
    checkpoint: CHECKPOINT,
    data: Annotated[list[str], typer.Option("--data", "-d", help="Text to read; may be given several times.")],
    length: Annotated[int, typer.Option(min=2, help="Tokens of each stream.")] = 512,
    most: Annotated[int, typer.Option(min=1, help="Streams, spread over the text.")] = 16,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the JSON and the pictures.")] = None,
    window: WINDOW = OWN_WINDOW,
    held_out: HELD_OUT = None,
    text_field: TEXT_FIELD = "text",
    tokenizer: TOKENIZER = None,
    device: DEVICE = None,
) -> None:
    """Look into the attention of any causal language model.

    Per layer and head: the weight of the first token (a sink takes much more than its even share), the sum of a query's
    weights, and for sigmoid the share of weights that are saturated near 0 or 1. Per layer and position: the norm of
    the attention's output and the variance of the hidden state (Figure 3 of the paper). Of a layer whose gate chooses
    queries (taipan): the share of tokens that it chooses, its budget, and the share that attention gets of them.

    \b
    Example:
      swat-lm evaluate diagnose runs/mine --data books/ --length 1024 --out looked
    """
    check_output(out, "diagnosis.json")
    model, _ = load_behind_window(checkpoint, window, tokenizer, device)
    from swat_lm.evaluate import diagnose as diagnosing
    from swat_lm.evaluate.length import segments

    documents = read_documents(checkpoint, data, tokenizer, text_field, held_out, model)
    with counting("reading", "streams") as counter:
        found = diagnosing.diagnose(model, segments(documents, length, most), on_progress=counter)
    if not found.has_weights:
        messages().print(f"note: {type(model).__name__} shows no attention weights; norms and variance only")
    if out is not None:
        # before anything is drawn
        found.save(out / "diagnosis.json")
    print_table(diagnosis_table(found))
    if out is not None:
        from swat_lm.evaluate.diagnosis_plots import plot_diagnosis

        pictures = plot_diagnosis(found, out, title=Path(checkpoint).name)
        results().print(", ".join(map(str, [out / "diagnosis.json", *pictures])), markup=False)


def diagnosis_table(found: "Diagnosis") -> Table:
    """One row per layer: means over heads, the greatest first-token weight, and norms at both ends of the streams."""
    headings = ["layer", "weights", "first", "most", "even", "sum", "near 0", "near 1", "norm", "norm at end"]
    rows, tenth = [], max(1, found.length // 10)
    for index, (weights, norms) in enumerate(zip(found.weights, found.output_norm, strict=True)):
        figures = ["none", *["-"] * 6] if weights is None else [
            weights.score_function, f"{fmean(weights.first_token_mass):.3f}", f"{max(weights.first_token_mass):.3f}",
            f"{weights.first_token_uniform:.3f}", f"{fmean(weights.row_sum):.3g}",
            f"{100 * fmean(weights.near_zero):.1f} %", f"{100 * fmean(weights.near_one):.1f} %",
        ]  # fmt: skip
        rows.append([str(index), *figures, f"{norms[0]:.3g}", f"{fmean(norms[-tenth:]):.3g}"])
    if any(found.gates):
        headings += ["chosen", "budget", "share"]
        for row, gate in zip(rows, found.gates, strict=True):
            row += ["-"] * 3 if gate is None else [
                f"{100 * gate.selected:.1f} %", f"{100 * gate.capacity:.0f} %", f"{gate.share:.2f}"
            ]  # fmt: skip
    return text_table(headings, rows, left=("weights",), gap=2)

"""The page and the JSON of a reproduced table or figure: ours beside the paper's numbers, and a verdict per claim."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swat_lm.evaluate.curves import write_whole
from swat_lm.evaluate.figures import write_figures
from swat_lm.papers.claims import DOUBTFUL, PRINTED, Verdict, error_of_mean
from swat_lm.papers.findings import Findings
from swat_lm.papers.page import machine, picture, table, with_error, write_page
from swat_lm.papers.reproduction_pictures import draw
from swat_lm.papers.scales import Scale
from swat_lm.papers.variants import Experiment, Variant, budget_of, variants_of
from swat_lm.wording import counted

__all__ = ["write_results"]

# of a gap without any effect but that of seeds to exceed twice its error, from so many seeds (Student's t), in per cent
BY_CHANCE = {2: 30, 3: 18, 4: 14, 5: 12}
TEXTS = {"text": "held-out text (the paper: OpenWebText)", "books": "books (the paper: PG-19)"}


def write_results(
    experiment: Experiment,
    scale: Scale,
    chosen: Mapping[str, Variant],
    seeds: Sequence[int],
    out: Path,
    sources: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `NAME.json`, its pictures and, last, `NAME.html` into the folder; returns what the JSON holds."""
    findings = Findings(experiment, scale, chosen, seeds, out)
    verdicts = findings.verdicts()
    left_out = [one.label for name, one in variants_of(experiment, scale).items() if name not in chosen]
    results = {
        "experiment": experiment.name,
        "title": experiment.title,
        "scale": scale.name,
        "about": scale.about,
        "seeds": list(seeds),
        "sizes": dict(scale.sizes),
        "lengths": list(scale.lengths),
        "variants": [describe(findings, one, scale) for one in chosen.values()],
        "not_run_on_this_machine": left_out,
        "diverged": findings.diverged(),
        "claims": [asdict(one) for one in verdicts],
        "printed_in_the_paper": PRINTED.get(experiment.name, {}),
        "doubtful_in_the_paper": list(DOUBTFUL.get(experiment.name, ())),
        "sources": json.loads(json.dumps(sources)),
        "machine": machine(torch.get_num_threads()),
    }
    # what was measured is kept before anything is drawn
    write_whole(out / f"{experiment.name}.json", write_figures(results) + "\n")
    pictures = draw(findings, out)
    write_page(out / f"{experiment.name}.html", experiment.title, body(findings, results, verdicts, pictures))
    return results


def describe(findings: Findings, one: Variant, scale: Scale) -> dict[str, Any]:
    """The figures of one variant, over seeds."""
    finals = [findings.final_loss(one, seed) for seed in findings.finished(one)]
    return {
        "name": one.name,
        "label": findings.label(one),
        "parameters": findings.parameters(one),
        "training_length": scale.sizes[one.length],
        "tokens": budget_of(one, scale).tokens,
        "training_loss": math.fsum(finals) / len(finals) if finals else None,
        "training_loss_error": error_of_mean(finals),
        "losses": {
            text: {
                str(length): dict(zip(("mean", "error"), findings.mean_loss(one, text, length), strict=True))
                for length in scale.lengths
            }
            for text in findings.texts
        }
        if findings.experiment.name in ("table2", "table3")
        else {},
    }


def body(findings: Findings, results: dict[str, Any], verdicts: Sequence[Verdict], pictures: dict[str, Path]) -> str:
    """Everything between head and foot."""
    scale, seeds = findings.scale, ", ".join(map(str, findings.seeds))
    parts = [
        f"<h1>{html.escape(results['title'])}</h1>",
        f"<p>Scale <b>{scale.name}</b>: {html.escape(scale.about)}. Seeds: {seeds}. SWAT, arXiv 2502.18845. Windows "
        f"and lengths are written in the paper's terms: W = {scale.sizes['W']:,} here (128 there), "
        f"L = {scale.sizes['L']:,} (1,024), XL = {scale.sizes['XL']:,} (4,096).</p>",
        claims_part(verdicts),
        diverged_part(results["diverged"]),
        *(
            f'<h2>{html.escape(name)}</h2>\n<img src="{picture(path)}" alt="{html.escape(name)}">'
            for name, path in pictures.items()
        ),
    ]
    if findings.experiment.name in ("table2", "table3"):
        parts += [losses_part(findings, text) for text in findings.texts]
    if findings.experiment.name == "table1":
        parts.append(tasks_part(findings))
    parts.append(variants_part(results))
    doubts = results["doubtful_in_the_paper"]
    if doubts:
        parts.append(
            "<h2>Doubtful in the paper</h2><ul>" + "".join(f"<li>{html.escape(x)}</li>" for x in doubts) + "</ul>"
        )
    if results["not_run_on_this_machine"]:
        left_out = html.escape(", ".join(results["not_run_on_this_machine"]))
        parts.append(f"<p>Not run, because this machine lacks what they need (CUDA, packages): {left_out}.</p>")
    parts.append("<h2>Machine and versions</h2>" + table((), [list(one) for one in results["machine"].items()]))
    parts.append(f'<p class="small">Text: {html.escape(json.dumps(results["sources"]))}</p>')
    return "\n".join(parts)


def claims_part(verdicts: Sequence[Verdict]) -> str:
    """Every claim with its verdict and the gap that decides it."""
    kinds = {"held": "held", "broken": "failed"}
    lines = []
    for one in verdicts:
        numbers = "" if one.gap is None else (
            f" Gap {with_error(one.gap, one.error, sign='+')} ({counted(one.num_documents, 'document')}, "
            f"{counted(one.num_seeds, 'seed')})."
        )  # fmt: skip
        lines.append(
            f'<li class="{kinds.get(one.outcome, "open")}"><b>{one.outcome}</b>: {html.escape(one.says)}.{numbers} '
            f'<span class="small">The paper: {html.escape(one.paper)}. {html.escape(one.remark)}</span></li>'
        )
    return (
        '<h2>The paper\'s claims</h2><ul class="claims">' + "\n".join(lines) + "</ul>"
        '<p class="small">A gap is what the claim says is positive (losses in nats per token), &plusmn; one standard '
        f"error, paired over documents and seeds. Held or broken only beyond twice the error. {caution(verdicts)}</p>"
    )


def caution(verdicts: Sequence[Verdict]) -> str:
    """How far the error can be trusted with so few seeds."""
    seeds = max((one.num_seeds for one in verdicts), default=0)
    if seeds == 1:
        return "With one seed the error is over documents alone: it says nothing of what another seed would give."
    if seeds in BY_CHANCE:
        return (
            f"An error from {counted(seeds, 'seed')} is itself uncertain: where seeds differ more than documents do, "
            f"about {BY_CHANCE[seeds]} in 100 claims without anything to them would be decided."
        )
    return ""


def diverged_part(lines: Sequence[str]) -> str:
    """The runs that came to no end; empty if there are none."""
    if not lines:
        return ""
    each = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>Diverged</h2><p>These runs have no losses, and no claim is judged by them.</p><ul>{each}</ul>"


def losses_part(findings: Findings, text: str) -> str:
    """Losses of every variant at every length, and the paper's beside them."""
    scale, printed = findings.scale, PRINTED[findings.experiment.name]
    rows, kinds = [], []
    for one in findings.chosen.values():
        values = [with_error(*findings.mean_loss(one, text, length)) for length in scale.lengths]
        rows.append([findings.label(one), f"{findings.parameters(one):,}", *values])
        kinds.append("")
        theirs = printed.get(one.name, {}).get(text)
        if theirs:
            cells = {scale.sizes["W"]: theirs.get("W"), scale.lengths[-1]: theirs.get("last")}
            shown = ["" if cells.get(x) is None else f"{cells[x]:.2f}" for x in scale.lengths]
            rows.append(["as printed in the paper", "247M", *shown])
            kinds.append("paper")
    headings = ("variant", "parameters", *(f"{length:,} tokens" for length in scale.lengths))
    return (
        f"<h2>Loss on {html.escape(TEXTS[text])}</h2>"
        + table(headings, rows, kinds)
        + '<p class="small">Nats per token over whole pieces, &plusmn; its standard error over pieces and seeds. '
        "The paper's rows are on other text and another vocabulary: compare orders and gaps, not values.</p>"
    )


def tasks_part(findings: Findings) -> str:
    """Table 1 with the paper's rows."""
    from swat_lm.evaluate.table1 import PAPER, headings, notes, our_row, shown

    found = {
        f"{findings.label(one)}, seed {seed}": findings.tasks(one, seed)
        for one in findings.chosen.values()
        for seed in findings.seeds
    }
    rows = [*(our_row(label, results) for label, results in found.items()), *PAPER]
    columns = headings(rows)
    cells = [[row.name, row.group, *(shown(row.cells.get(one), "\u00b1") for one in columns)] for row in rows]
    kinds = ["paper" if row.group.startswith("printed") else "" for row in rows]
    remarks = "".join(f"<li>{html.escape(one)}</li>" for one in notes(found, findings.scale.task_limit))
    return f'<h2>Benchmarks</h2>{table(("model", "source", *columns), cells, kinds)}<ul class="small">{remarks}</ul>'


def variants_part(results: dict[str, Any]) -> str:
    """Size and training of every variant."""
    rows = [
        [one["label"], f"{one['parameters']:,}", f"{one['training_length']:,}", f"{one['tokens']:,}",
         with_error(one["training_loss"], one["training_loss_error"])]
        for one in results["variants"]
    ]  # fmt: skip
    headings = ("variant", "parameters", "training length", "tokens trained on", "training loss at the end")
    return "<h2>Training</h2>" + table(headings, rows)

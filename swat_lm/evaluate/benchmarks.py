"""The benchmarks of SWAT's Table 1: lm-evaluation-harness's names, and local files' fields as the harness reads them.

Prompts, choices and metrics are the harness's own; nothing of them is here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BENCHMARKS", "PAGES", "Benchmark", "Doc", "Form"]

Doc = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """Fields of a local file's rows, with their types, and how a row becomes the document that the harness reads."""

    fields: Mapping[str, type | tuple[type, ...]]
    adapt: Callable[[Doc], Doc] = dict
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the harness's task that such rows need otherwise."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: the harness's definition, and the local files that may hold its documents."""

    task: str
    """The harness's name."""
    definition: str
    """Its YAML file among the harness's tasks."""
    split: str
    files: tuple[str, ...]
    """Paths below the data folder without suffix, best first; a folder that holds the file itself also serves."""
    forms: tuple[Form, ...]
    """Known layouts; a file's first row decides."""


def arc_document(row: Doc) -> Doc:
    """ARC's answer key from the number of the right choice."""
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[checked_index("gold", row["gold"], labels)],
    }


def arc_original(row: Doc) -> Doc:
    """ARC as its authors publish it."""
    choices = row["choices"]
    if not {"text", "label"} <= set(choices):
        raise ValueError(f"field 'choices' must hold text and label; it has {', '.join(choices) or 'nothing'}")
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"field 'answerKey' is {row['answerKey']!r}, none of {choices['label']}")
    return {"question": row["question"], "choices": choices, "answerKey": row["answerKey"]}


def hellaswag_document(row: Doc) -> Doc:
    """HellaSwag with the harness's cleaning already done."""
    gold = checked_index("gold", row["gold"], row["choices"])
    return {"query": row["query"], "choices": row["choices"], "label": str(gold)}


def hellaswag_original(row: Doc) -> Doc:
    """HellaSwag as its authors publish it; the harness cleans it."""
    row = {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label")}
    return row | {"label": str(checked_index("label", int(row["label"]), row["endings"]))}


def with_label(field: str, names: Sequence[Any], keep: Sequence[str]) -> Callable[[Doc], Doc]:
    """Keep some fields; the one with the answer must be one of the names."""

    def adapt(row: Doc) -> Doc:
        if row[field] not in names:
            raise ValueError(f"field {field!r} is {row[field]!r}, none of {', '.join(map(repr, names))}")
        return {name: row[name] for name in (*keep, field)}

    return adapt


def winogrande_document(row: Doc) -> Doc:
    """WinoGrande's sentences have a gap."""
    if "_" not in row["sentence"]:
        raise ValueError("field 'sentence' has no gap (_)")
    return with_label("answer", ("1", "2"), ("sentence", "option1", "option2"))(row)


def lambada_document(row: Doc) -> Doc:
    """LAMBADA's last word is what is asked for."""
    if " " not in row["text"].strip(" "):
        raise ValueError("field 'text' holds a single word: nothing stands before the one to predict")
    return {"text": row["text"]}


def checked_index(field: str, number: int, choices: Sequence[Any]) -> int:
    """The number of a choice; raises ValueError for one that is not there."""
    if not 0 <= number < len(choices):
        raise ValueError(f"field {field!r} is {number}, but there are {len(choices)} choices, numbered from 0")
    return number


ARC_FORMS = (
    Form({"question": str, "choices": list, "gold": int}, arc_document),
    Form({"question": str, "choices": dict, "answerKey": str}, arc_original),
)
PAGES = (Form({"page": str}, lambda row: {"page": row["page"]}),)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.task: benchmark
    for benchmark in (
        Benchmark("wikitext", "wikitext/wikitext.yaml", "test",
                  ("lm/wikitext-2-raw.test", "lm/wikitext-103-raw.test", "lm/wikitext-103.test",
                  "lm/wikitext-2.test"), PAGES),
        Benchmark("lambada_openai", "lambada/lambada_openai.yaml", "test", ("commonsense/lambada_openai_test",),
                  (Form({"text": str}, lambada_document),)),
        Benchmark("piqa", "piqa/piqa.yaml", "validation", ("commonsense/piqa_validation",),
                  (Form({"goal": str, "sol1": str, "sol2": str, "label": int},
                        with_label("label", (0, 1), ("goal", "sol1", "sol2"))),)),
        Benchmark("hellaswag", "hellaswag/hellaswag.yaml", "validation", ("commonsense/hellaswag_validation",),
                  (Form({"query": str, "choices": list, "gold": int}, hellaswag_document, {"process_docs": None}),
                   Form({"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (int, str)},
                        hellaswag_original))),
        Benchmark("winogrande", "winogrande/default.yaml", "validation", ("commonsense/winogrande_xl_validation",),
                  (Form({"sentence": str, "option1": str, "option2": str, "answer": str}, winogrande_document),)),
        Benchmark("arc_easy", "arc/arc_easy.yaml", "test", ("commonsense/arc_easy_test",), ARC_FORMS),
        Benchmark("arc_challenge", "arc/arc_challenge.yaml", "test", ("commonsense/arc_challenge_test",), ARC_FORMS),
        Benchmark("social_iqa", "siqa/siqa.yaml", "validation", ("commonsense/social_i_qa_validation",),
                  (Form({"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str, "label": str},
                        with_label("label", ("1", "2", "3"), ("context", "question", "answerA", "answerB", "answerC"))),
                  )),
        Benchmark("boolq", "super_glue/boolq/default.yaml", "validation", ("commonsense/boolq_validation",),
                  (Form({"passage": str, "question": str, "label": int},
                        with_label("label", (0, 1), ("passage", "question"))),)),
    )
}  # fmt: skip

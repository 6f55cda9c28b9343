"""Tiny made-up documents of every benchmark: as the harness's data sets have them, and as local files do."""

import json
import lzma
from pathlib import Path
from typing import Any

PAGE = (
    " = Tin whistle = \n \n A tin whistle is a flute , with 6 holes . It costs 1 @,@ 000 marks . \n \n"
    ' = = Use = = \n \n " Use " it at 10 @-@ 20 degrees ; it is loud ! \n \n'
)
OTHER_PAGE = " = Brass = \n \n Brass is heavy 's metal ( mostly ) . \n "

HARNESS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "turn the jar into a lid", "label": 0},
        {"goal": "Dry a cloth", "sol1": "wet it", "sol2": "hang it up", "label": 1},
    ],
    "hellaswag": [
        {"ind": 4, "activity_label": "Baking", "ctx_a": "A man takes bread.", "ctx_b": "he", "ctx": "", "label": "1",
         "endings": ["eats a house.", "cuts it.  Then [substeps] butters it.", "flies.", "sings [x] a loaf."]},
        {"ind": 5, "activity_label": "Home [title] Garden", "ctx_a": "How to dig [title] Take a spade.", "ctx_b": "",
         "ctx": "", "label": "0", "endings": ["Push it down.", "Eat it.", "Sell it.", "Paint it."]},
    ],
    "winogrande": [
        {"sentence": "The cup did not fit in the bag because _ was too big.", "option1": "the cup",
         "option2": "the bag", "answer": "1"},
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
    "arc_easy": [
        {"id": "a", "question": "What is wet?", "answerKey": "B",
         "choices": {"text": ["sand", "water", "dust", "salt"], "label": ["A", "B", "C", "D"]}},
        {"id": "b", "question": "What is hot?", "answerKey": "3",
         "choices": {"text": ["ice", "snow", "fire"], "label": ["1", "2", "3"]}},
    ],
    "social_iqa": [
        {"context": "Tom fell.", "question": "How does Tom feel?", "answerA": "sore", "answerB": "rich",
         "answerC": "tall", "label": "1"},
        {"context": "Kim sang.", "question": "Why?", "answerA": "for sleep", "answerB": "for joy",
         "answerC": "for rain", "label": "2"},
    ],
    "boolq": [
        {"passage": "Salt -- Salt is a mineral.", "question": "is salt a mineral", "idx": 0, "label": 1},
        {"passage": "Rain -- Rain is water.", "question": "is rain dry", "idx": 1, "label": 0},
    ],
    "lambada_openai": [{"text": "He took the key and opened the door"}, {"text": "She lit\n\nthe old lamp, a lamp"}],
    "wikitext": [{"page": PAGE.removesuffix("\n")}, {"page": OTHER_PAGE}],
}  # fmt: skip
HARNESS["arc_challenge"] = HARNESS["arc_easy"]

FILES = {
    "piqa": "commonsense/piqa_validation.jsonl",
    "hellaswag": "commonsense/hellaswag_validation.jsonl.xz",
    "winogrande": "commonsense/winogrande_xl_validation.jsonl",
    "arc_easy": "commonsense/arc_easy_test.jsonl",
    "arc_challenge": "commonsense/arc_challenge_test.jsonl",
    "social_iqa": "commonsense/social_i_qa_validation.jsonl",
    "boolq": "commonsense/boolq_validation.jsonl.xz",
    "lambada_openai": "commonsense/lambada_openai_test.jsonl.xz",
    "wikitext": "lm/wikitext-2-raw.test.txt.xz",
}


def local_row(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A document of the harness as a local file's row."""
    if task.startswith("arc"):
        labels = row["choices"]["label"]
        return {"id": row["id"], "question": row["question"], "choices": row["choices"]["text"],
                "gold": labels.index(row["answerKey"])}  # fmt: skip
    if task == "hellaswag":
        from lm_eval.tasks.hellaswag.utils import preprocess

        query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return {"query": query, "choices": [preprocess(one) for one in row["endings"]], "gold": int(row["label"])}
    if task == "lambada_openai":
        context, target = row["text"].rsplit(" ", 1)
        return row | {"context": context, "target": target}
    return row


def write_files(folder: Path, tasks: tuple[str, ...] = tuple(FILES)) -> Path:
    """Write the tasks' local files below the folder."""
    for task in tasks:
        path = folder / FILES[task]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(json.dumps(local_row(task, row)) for row in HARNESS[task]) + "\n"
        if task == "wikitext":
            text = " \n" + PAGE + OTHER_PAGE
        path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return folder

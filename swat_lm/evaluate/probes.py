"""Recall items for models that were never trained on them: texts with something to recall, made or read from files.

Made ones are put together from tokens, so that distances are exact. Files are in the layouts of Lost in the Middle's
key-value retrieval (arXiv 2307.03172) and LongEval's lines (LongChat); .jsonl, also .gz and .xz.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swat_lm.data.source_text import read_rows
from swat_lm.data.sources import source_file
from swat_lm.data.synthetic import Answer, SyntheticTask
from swat_lm.evaluate.recall import RecallItem
from swat_lm.words import counted

__all__ = ["TEXT_TASKS", "check_name", "guessed_share", "read_items", "synthetic_items", "text_items"]

Encode = Callable[[str], list[int]]

TEXT_TASKS = ("passkey", "kv", "mqar", "copy")
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "A river runs through the valley. The road is long and the day is warm. Birds sing in the old trees. "
)
WORDS = (  # noqa: SIM905
    "apple river stone garden winter candle bridge forest mirror silver thunder window marble pepper lantern harbor "
    "meadow copper ribbon violet anchor basket desert engine feather glacier hammer island jacket kettle ladder magnet "
    "needle orchard pencil quarry rocket saddle temple umbrella valley wagon yellow zipper basin cellar dragon elbow"
).split()
LEAD = 32
"""Tokens of filler before the first thing to recall."""
PAIRS = 4
"""Pairs of `mqar`."""


def guessed_share(task: SyntheticTask | None, items: Sequence[RecallItem]) -> float:
    """Share of answers that guessing gets right: among all values of a task, or all numbers of five digits in texts.

    Who knows which values stand in a row of `mqar` and not which belongs to the key gets one in `pairs`.
    """
    if task is None:
        return 1 / 90_000
    shares = [task.values ** -(answer.end - answer.start) for item in items for answer in item.answers]
    return math.fsum(shares) / len(shares)


def synthetic_items(task: SyntheticTask, distances: Sequence[int], count: int, seed: int = 0) -> list[RecallItem]:
    """Items of a synthetic task, `count` for each distance; raises DataError for a distance that it cannot have."""
    return [
        RecallItem(*task.row_at(np.random.default_rng((seed, 2, distance, number)), distance), distance)
        for distance in distances for number in range(count)
    ]  # fmt: skip


def text_items(name: str, encode: Encode, distances: Sequence[int], count: int, seed: int = 0) -> list[RecallItem]:
    """Texts with one of `TEXT_TASKS`, `count` for each distance.

    - `passkey`: a number to remember, filler, and the question for it.
    - `kv`: a list of words with numbers, and one word again; the list is the filler.
    - `mqar`: four words with numbers, filler, and all four words again.
    - `copy`: a list of words, filler, and the list again from its second word on.

    Args:
        encode: text to tokens, without special ones.
        distances: in tokens, from the place that predicts an answer's first token to the token it must recall; of
            `mqar` and `copy` the first answer has it.

    Raises:
        ValueError: an unknown name, or a distance too short for the text between.
    """
    check_name(name)
    maker = {"passkey": passkey, "kv": key_value, "mqar": queries, "copy": copied}[name]
    items = []
    for distance in distances:
        for number in range(count):
            tokens, answers = maker(encode, np.random.default_rng((seed, distance, number)), distance)
            items.append(RecallItem(np.array(tokens, dtype=np.int64), tuple(answers), distance))
    return items


def check_name(name: str) -> None:
    """Raise ValueError unless it is one of `TEXT_TASKS`."""
    if name not in TEXT_TASKS:
        raise ValueError(f"task: expected one of {', '.join(TEXT_TASKS)} or synthetic:NAME, got {name!r}")


def passkey(encode: Encode, random: np.random.Generator, distance: int) -> tuple[list[int], list[Answer]]:
    """A number, filler, and the question."""
    question, code = encode(" The pass key is"), encode(f" {random.integers(10_000, 100_000)}")
    stored = [*filler(encode, LEAD), *question]
    after = encode(". Remember it.")
    needed = len(code) + len(after) + len(question)
    gap = filler(encode, gap_of(distance, needed - 1, "passkey"))
    tokens = [*stored, *code, *after, *gap, *question]
    return [*tokens, *code], [Answer(len(tokens), len(tokens) + len(code), len(tokens) - 1 - len(stored))]


def key_value(encode: Encode, random: np.random.Generator, distance: int) -> tuple[list[int], list[Answer]]:
    """A list of pairs, and the key of one of them again."""
    word, *others = (str(one) for one in random.permutation(WORDS))
    question, value = encode(f"\n{word}:"), encode(f" {random.integers(10_000, 100_000)}")
    needed = len(value) + len(question)
    gap: list[int] = []
    wanted = gap_of(distance, needed - 1, "kv")
    while len(gap) < wanted:
        gap += encode(f"\n{others[random.integers(len(others))]}: {random.integers(10_000, 100_000)}")
    # the end of what stands between is whole, its beginning cut
    gap = gap[len(gap) - wanted :]
    stored = [*filler(encode, LEAD), *question]
    tokens = [*stored, *value, *gap, *question]
    return [*tokens, *value], [Answer(len(tokens), len(tokens) + len(value), len(tokens) - 1 - len(stored))]


def queries(encode: Encode, random: np.random.Generator, distance: int) -> tuple[list[int], list[Answer]]:
    """Some pairs, filler, and all the keys again in another order."""
    words = [str(word) for word in random.permutation(WORDS)[:PAIRS]]
    pairs = [(encode(f"\n{word}:"), encode(f" {random.integers(10_000, 100_000)}")) for word in words]
    tokens, stored = filler(encode, LEAD), []
    for key, value in pairs:
        stored.append(len(tokens) + len(key))
        tokens += [*key, *value]
    order = random.permutation(PAIRS).tolist()
    first = order[0]
    needed = len(tokens) + len(pairs[first][0]) - 1 - stored[first]
    tokens += filler(encode, gap_of(distance, needed, "mqar"))
    answers = []
    for which in order:
        key, value = pairs[which]
        tokens += key
        answers.append(Answer(len(tokens), len(tokens) + len(value), len(tokens) - 1 - stored[which]))
        tokens += value
    return tokens, answers


def copied(encode: Encode, random: np.random.Generator, distance: int) -> tuple[list[int], list[Answer]]:
    """A list of words, filler, and the list again; its first word says which list is meant."""
    words = [str(word) for word in random.permutation(WORDS)[:6]]
    first, rest = encode(f"\n{words[0]}"), encode("".join(f" {word}" for word in words[1:]))
    stored = [*filler(encode, LEAD), *first]
    needed = len(rest) + len(first) - 1
    tokens = [*stored, *rest, *filler(encode, gap_of(distance, needed, "copy")), *first]
    return [*tokens, *rest], [Answer(len(tokens), len(tokens) + len(rest), len(tokens) - 1 - len(stored))]


def filler(encode: Encode, count: int) -> list[int]:
    """So many tokens of text that means nothing."""
    once = encode(FILLER)
    return (once * (count // len(once) + 1))[:count]


def gap_of(distance: int, needed: int, name: str) -> int:
    """Tokens of filler that make up a distance of which the text itself takes `needed`."""
    if distance < needed:
        raise ValueError(
            f"{name}: with this tokenizer the distance is {counted(needed, 'token')} or more; got {distance}"
        )
    return distance - needed


def read_items(path: Path, encode: Encode, most: int | None = None) -> list[RecallItem]:
    """Items of a file of key-value retrieval or LongEval lines, grouped by distances that double.

    Args:
        path: .jsonl, also .gz or .xz; the fields tell which of the two it is.
        encode: text to tokens, without special ones.
        most: that many items, spread evenly over the file.

    Raises:
        ValueError: another layout, or a record whose answer is not in its text; the message names the line.
    """
    if not path.is_file():
        raise ValueError(f"no file at {path}: expected a .jsonl of key-value retrieval or LongEval lines")
    records = list(read_rows(source_file(path)))
    if most is not None and most < len(records):
        records = [records[i * len(records) // most] for i in range(most)]
    return [item_of(place, record, encode) for place, record in records]


def item_of(at: str, record: dict[str, Any], encode: Encode) -> RecallItem:
    """One record as text before the answer, the answer, and where it stands in the text."""
    try:
        if "ordered_kv_records" in record:
            pairs = "".join(f'\n"{key}": "{value}",' for key, value in record["ordered_kv_records"])
            before, answer = f'JSON data:{pairs}\n\nKey: "{record["key"]}"\nCorresponding value: "', record["value"]
            place = before.index(f'\n"{record["key"]}": "') + len(record["key"]) + 6
        elif "expected_number" in record:
            before, answer = record["prompt"].rstrip() + "\nThe <REGISTER_CONTENT> is <", str(record["expected_number"])
            place = before.index(record["correct_line"].strip()) + record["correct_line"].index("<") + 1
        else:
            raise ValueError(f"its fields are {', '.join(map(str, record))}")
        if not before.startswith(answer, place):
            raise ValueError("the answer does not stand where the record says")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{at}: expected key-value retrieval (ordered_kv_records, key, value) or LongEval lines (prompt, "
            f"expected_number, correct_line): {error}"
        ) from None
    tokens, wanted = encode(before), encode(answer)
    distance = len(tokens) - 1 - len(encode(before[:place]))
    group = math.floor(math.log2(max(distance, 1)))
    both = np.array([*tokens, *wanted], dtype=np.int64)
    return RecallItem(both, (Answer(len(tokens), len(both), distance),), group)

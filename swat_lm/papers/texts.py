"""The texts of an experiment: where they are, the share that is read, tokenizer and tokens, the same for all runs.

Everything lies in the experiment's folder, shared by the experiments of one scale.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from swat_lm.data import TokenStore, prepare, resolve_sources
from swat_lm.data.source_text import read_pieces
from swat_lm.data.tokenizer_training import train_tokenizer
from swat_lm.evaluate.length import segments
from swat_lm.files import write_text
from swat_lm.papers.experiment import Experiment
from swat_lm.papers.measuring import read_json
from swat_lm.papers.scales import Scale
from swat_lm.papers.watching import Watcher
from swat_lm.recipe import Recipe

__all__ = [
    "Sources",
    "check_sources",
    "evaluation_streams",
    "prepare_texts",
    "read_by_runs",
    "sources_from_folder",
]

FOLDERS = {"text": "corpus", "books": "books"}


@dataclass(frozen=True)
class Sources:
    """Where the texts are; kept in `plan.json`, since a folder holds one scale on one text."""

    text: tuple[str, ...]
    """To train on, with a share held out for evaluation."""
    books: tuple[str, ...]
    """Long documents, only for evaluation."""
    tasks: str
    """Folder of the benchmarks' files, or `hub`."""
    tokenizer: str | None = None
    """None: the paper's where the scale names it, or trained on the text."""

    @classmethod
    def planned(cls, plan: Mapping[str, Any]) -> "Sources":
        """What the plan of a folder says of the texts."""
        held = plan["sources"]
        return cls(tuple(held["text"]), tuple(held["books"]), held["tasks"], held["tokenizer"])

    def plain(self) -> dict[str, Any]:
        """As JSON holds them."""
        return json.loads(json.dumps(asdict(self)))


def sources_from_folder(folder: Path, experiment: Experiment) -> Sources:
    """The parts of a data folder that an experiment needs: corpus/, books/ and the benchmarks' files.

    Raises ValueError naming what is missing.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--data: no folder {folder}; expected one with corpus/ and books/ (and the benchmarks' files)"
        )
    needed = [name for text, name in FOLDERS.items() if text in ("text", *experiment.texts)]
    missing = [f"{name}/" for name in needed if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"--data {folder} lacks {' and '.join(missing)}: expected text files or .jsonl there; or name the texts "
            "themselves with --text and --books"
        )
    books = (str(folder / "books"),) if (folder / "books").is_dir() else ()
    return Sources((str(folder / "corpus"),), books, str(folder))


def check_sources(experiment: Experiment, sources: Sources) -> None:
    """Raise ValueError for a text or benchmark that is not there."""
    resolve_sources(sources.text)
    if "books" in experiment.texts:
        if not sources.books:
            raise ValueError(
                f"{experiment.name} is also measured on books: name them with --books, or use --data FOLDER"
            )
        resolve_sources(sources.books)
    if experiment.reads_benchmarks:
        from swat_lm.evaluate.tasks import load_tasks, task_names

        load_tasks(task_names(None), sources.tasks)


def prepare_texts(
    out: Path, sources: Sources, recipe: Recipe, experiment: Experiment, scale: Scale, watcher: Watcher
) -> None:
    """Everything that runs share: the share of the text, the tokenizer, the tokens; each only if it is not there.

    `recipe` is any of the runs: all read the same tokens.
    """
    asked = {"text_bytes": scale.text_bytes, "vocab_size": experiment.budget(scale).vocab_size}
    check_same_request(out, experiment.budget_name, asked)
    if scale.text_bytes is not None and not (out / "text.jsonl").exists():
        sample_text(sources.text, scale.text_bytes, out / "text.jsonl", watcher)
    trained, most = out / "tokenizer", experiment.budget(scale).vocab_size
    if recipe.data.tokenizer == str(trained) and not trained.exists():
        assert most is not None
        train_tokenizer(
            recipe.data.sources, most, trained,
            progress=lambda done, total: watcher.count("training the tokenizer", done, total),
        )  # fmt: skip
    store = prepare(recipe.data, lambda at: watcher.count("the text", at.bytes_read, at.bytes_total))
    if most is not None and store.vocab_size > most:
        raise ValueError(
            f"the tokenizer has {store.vocab_size:,} ids, the scale {scale.name} counts on at most {most:,}: name a "
            "smaller one"
        )
    keys = {"text": store.key}
    for text in experiment.texts:
        # too little text is found here and not after training
        keys[text] = text_store(recipe, sources, text, watcher).key
        found = len(evaluation_streams(recipe, sources, scale, watcher, text))
        if found < scale.pieces:
            tokens = f"{scale.lengths[-1]:,} tokens"
            watcher.stage(
                f"the {text} to evaluate on fills {found} pieces of {tokens}, not {scale.pieces}: fewer count"
            )
    check_same_texts(out, experiment.budget_name, keys)


def check_same_request(out: Path, kind: str, wanted: dict[str, int | None]) -> None:
    """Remember how much text the runs of a kind read, and their tokenizer's size; raises ValueError for others."""
    path = out / "texts.json"
    known = read_json(path) if path.exists() else {}
    asked = known.get("asked", {})
    before = asked.get(kind, wanted)
    changed = [
        f"{name} was {before.get(name)} and is {value}" for name, value in wanted.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{out} holds another text or tokenizer ({', '.join(changed)}): name another folder for --out")
    if kind not in asked:
        write_text(path, json.dumps({**known, "asked": {**asked, kind: wanted}}, indent=1) + "\n")


def check_same_texts(out: Path, kind: str, keys: dict[str, str]) -> None:
    """Remember which texts the runs of a kind have; raises ValueError for others than before, since runs are compared.

    `keys` are those of the token stores: the names in `plan.json` stay the same when the files behind them change.
    """
    path = out / "texts.json"
    known = read_json(path) if path.exists() else {}
    before = known.get(kind, {})
    changed = [name for name, key in keys.items() if before.get(name, key) != key]
    if changed:
        raise ValueError(
            f"the files of the {' and the '.join(changed)} are not those that the runs in {out} were trained or "
            "measured on: bring the old ones back, or name another folder for --out"
        )
    if {**before, **keys} != before:
        write_text(path, json.dumps({**known, kind: {**before, **keys}}, indent=1) + "\n")


def sample_text(sources: Sequence[str], wanted: int, path: Path, watcher: Watcher) -> None:
    """About so many bytes of the documents, every k-th one of each source, as one .jsonl."""
    found = resolve_sources(sources)
    total = sum(source.size for source in found)
    documents: list[str] = []
    read = 0
    for source in found:
        documents += [piece.text for piece in read_pieces(source, "text", None)]
        read += source.size
        watcher.count("reading the text", read, total)
    held = sum(len(document.encode()) for document in documents)
    step = max(1, held // wanted)
    write_text(path, "".join(json.dumps({"text": document}) + "\n" for document in documents[::step]))


def read_by_runs(out: Path, sources: Sources, experiment: Experiment, scale: Scale) -> tuple[tuple[str, ...], str]:
    """What is trained on, and the tokenizer: the one named, the scale's, or the one trained here."""
    text = sources.text if scale.text_bytes is None else (str(out / "text.jsonl"),)
    return text, sources.tokenizer or experiment.budget(scale).tokenizer or str(out / "tokenizer")


def text_store(recipe: Recipe, sources: Sources, text: str, watcher: Watcher) -> TokenStore:
    """The tokens of the text trained on and held out from, or of the books."""
    data = replace(recipe.data, sources=sources.books, held_out=0.0) if text == "books" else recipe.data
    return prepare(data, lambda at: watcher.count(text, at.bytes_read, at.bytes_total))


def evaluation_streams(recipe: Recipe, sources: Sources, scale: Scale, watcher: Watcher, text: str) -> list[Any]:
    """Pieces of the greatest length of the held-out text or of the books; raises ValueError if there is none."""
    split = text_store(recipe, sources, text, watcher).split("train" if text == "books" else "held_out")
    return segments([*split], scale.lengths[-1], scale.pieces)

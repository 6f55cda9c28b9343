"""A run as strict dataclasses: YAML file <- `key=value` overrides; the resolved recipe is part of every result.

`model:` stays a plain mapping, checked by `swat_lm.model.configuration`. No torch here, so that anything may import it.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field

from swat_lm.named_recipes import SUFFIXES, find_recipe, nearest_recipe, recipe_names
from swat_lm.paths import check_name, local_path
from swat_lm.validation import (
    OVERRIDE,
    Flag,
    Origin,
    RecipeError,
    Several,
    build,
    describe,
    hint_at,
    number,
    settings,
)
from swat_lm.words import nearest, shown

__all__ = [
    "DataRecipe", "Recipe", "RecipeError", "TrainRecipe",
    "describe", "dump_recipe", "load_recipe", "read_value",
]  # fmt: skip

Rate = Annotated[float, number(at_least=0, below=1)]


@settings
class DataRecipe:
    """Text, tokenizer and how rows are packed. Paths are relative to the working directory."""

    sources: Several[str]
    """Files or folders of .txt .md .py .jsonl .parquet (also .gz .xz), `hub:NAME[:CONFIG][:SPLIT]`, `python:stdlib`,
    or one recall task: `synthetic:mqar?pairs=8` (also kv, passkey, copy, flag, selective)."""
    text_field: str = "text"
    """The field of a .jsonl, .parquet or hub row that holds the document's text."""
    format: Literal["text", "prompt_answer", "messages"] = "text"
    """What rows hold: text; or prompt and answer; or messages with role and content. Answers are then marked."""
    prompt_field: str = "prompt"
    """The field of a `prompt_answer` row that holds the prompt; a line break is put behind it."""
    answer_field: str = "answer"
    """The field of a `prompt_answer` row that holds the answer."""
    messages_field: str = "messages"
    """The field of a `messages` row that holds the list; each becomes a line `ROLE: CONTENT`."""
    tokenizer: str = "bytes"
    """`bytes`, a tokenizer folder, a tokenizer.json, or a hub name."""
    add_bos: Flag = False
    """Put the tokenizer's beginning-of-text token before each document."""
    add_eos: Flag = True
    """Put the tokenizer's end-of-text token after each document; the only separator when documents are concatenated."""
    sequence_length: int = number(1024, at_least=2)
    """Tokens in a row."""
    documents: Literal["separate", "concatenate"] = "separate"
    """Whether documents packed in one row see each other (`concatenate`, as the paper does) or not (`separate`)."""
    shuffle: Flag = True
    """Visit the rows of each epoch in an order drawn from the seed; off: in the order of the text."""
    held_out: float = number(0.02, at_least=0, below=1)
    """Share of documents kept out of training, at least one when above 0; the choice depends on `split_seed` only."""
    split_seed: int = number(0, at_least=0, below=2**63)
    """Draws the held-out documents; apart from the run's seed so that runs with other seeds stay comparable."""
    cache: str | None = None
    """Folder for prepared tokens; null: `swat-lm/tokens` under $XDG_CACHE_HOME or ~/.cache."""
    workers: int | None = number(None, at_least=1)
    """Processes that tokenise; null: one per processor core. The tokens do not depend on it."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("data.sources is empty: name at least one file, folder or data set")
        if any(not source.strip() for source in self.sources):
            raise RecipeError("data.sources holds an empty name")


@settings
class TrainRecipe:
    """Optimisation, precision, distribution, logging and checkpoints. The optimizer is AdamW."""

    objective: str = "next_token"
    """What a step minimises: `next_token`, or `masked_next_token`, only what is marked (see `data.format`)."""
    objective_settings: dict[str, Any] = Field(default_factory=dict)
    """Of all objectives: `auxiliary_weights`, by name what an auxiliary loss of the layers is multiplied by."""
    steps: int = number(1000, at_least=1)
    """Optimizer steps of the whole run."""
    batch_size: int = number(32, at_least=1)
    """Rows per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = number(None, at_least=1)
    """Rows per forward pass of one process; null: the process's whole share of the batch."""
    learning_rate: float = number(1e-3, above=0)
    """Highest learning rate, reached after the warm-up."""
    final_learning_rate_ratio: float = number(0.1, at_least=0)
    """Learning rate of the last step over the highest; `constant` does not use it."""
    warmup_steps: int = number(100, at_least=0)
    """Steps of linear rise from 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to the last step; stable, then linear decay in the last `decay_steps`; or constant."""
    decay_steps: int = number(0, at_least=0)
    """Steps of the final decay; needed by `wsd`, must be 0 otherwise."""
    weight_decay: float = number(0.1, at_least=0)
    """Decoupled weight decay of the weight matrices; norms, biases and other vectors have none."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: float = number(1e-8, above=0)
    """AdamW's epsilon."""
    grad_clip: float | None = number(1.0, above=0)
    """Largest norm of the whole gradient; null: not clipped."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward and backward pass; auto: bf16 where the hardware computes in it, else fp32. Weights stay fp32."""
    compile: Flag = False
    """Compile the model with torch.compile (on a CPU this needs a C++ compiler)."""
    activation_checkpointing: Flag = False
    """The old spelling of `execution: checkpoint`."""
    execution: Literal["plain", "checkpoint", "blockwise", "chunks"] = "plain"
    """How layers are run: plain; checkpoint (each is recomputed), blockwise (block by block), or reverse chunks."""
    execution_settings: dict[str, Any] = Field(default_factory=dict)
    """Of `blockwise`: `block_size`, `key_block_size`; of `chunks`: `chunk_size`, `carries` (memory, disk), `folder`."""
    sharding: Literal["auto", "none", "full", "hybrid"] = "auto"
    """Over processes: none (replicated), full (FSDP2), hybrid (FSDP2 in `replicas` groups); auto: full if several."""
    replicas: int = number(1, at_least=1)
    """Number of whole copies of the model under `hybrid`."""
    log_every: int = number(10, at_least=1)
    """Steps between lines of metrics.jsonl and of the loggers."""
    evaluate_every: int = number(200, at_least=0)
    """Steps between evaluations on the held-out documents; 0: never."""
    evaluate_batches: int = number(16, at_least=1)
    """Most batches of one evaluation."""
    save_every: int = number(500, at_least=0)
    """Steps between checkpoints; 0: only the last step and an interruption save."""
    keep: int = number(3, at_least=1)
    """Checkpoints kept; older ones that the run wrote are removed."""
    export: Flag = True
    """Write a `save_pretrained` folder with the tokenizer at the end."""
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint in `out`, if any; `never`: start anew; else a checkpoint's path."""
    loggers: Several[Literal["tensorboard", "wandb", "trackio"]] = ()
    """Also log there; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise RecipeError(
                f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batch_size "
                f"({self.micro_batch_size})"
            )
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise RecipeError(
                f"train.decay_steps ({self.decay_steps}) does not fit train.schedule ({self.schedule}): "
                f"wsd needs it above 0 (for example {max(1, self.steps // 5)}), the others need 0"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise RecipeError(
                f"train.warmup_steps ({self.warmup_steps}) and train.decay_steps ({self.decay_steps}) together exceed "
                f"train.steps ({self.steps}): set for example train.warmup_steps={self.steps // 10}"
                + (f" train.decay_steps={max(1, self.steps // 5)}" if self.decay_steps else "")
            )
        if self.activation_checkpointing and self.execution not in ("plain", "checkpoint"):
            raise RecipeError(f"train.activation_checkpointing means train.execution=checkpoint; got {self.execution}")
        if self.replicas > 1 and self.sharding != "hybrid":
            raise RecipeError(f"train.replicas ({self.replicas}) needs train.sharding=hybrid; got {self.sharding}")
        object.__setattr__(self, "resume", without_tilde(self.resume, "train.resume"))
        if not self.resume:
            raise RecipeError("train.resume is empty: use auto, never or a checkpoint's path")


@settings
class Recipe:
    """One run, whole."""

    name: str
    """Name of the run; the recipe's file name if not given."""
    seed: int = number(0, at_least=0, below=2**63)
    """Draws the first weights, the order of rows and everything else random in the run."""
    out: str
    """Folder of the run's results, new, empty or a run's; `runs/NAME` if not given."""
    model: dict[str, Any]
    """Fields of SwatConfig, and `preset: NAME` to start from a preset; `swat-lm info` lists them.
    `full_layers: every:3` (`last`, `odd`, [0, 7], ...) says which keep full attention beside the window of the others.
    `init: PATH` begins with the weights of a run, a checkpoint or an exported model, and needs no other field."""
    data: DataRecipe
    """What to read, with which tokenizer, and how rows are packed; at least `sources`."""
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    """Optimisation, precision, distribution, logging and checkpoints."""

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.out.strip():
            raise RecipeError("name and out must not be empty")
        object.__setattr__(self, "out", without_tilde(self.out, "out"))
        check_name(self.name, "name")
        check_name(self.out, "out")


def without_tilde(name: str, key: str) -> str:
    """A path with its home folder written out; raises RecipeError where there is none."""
    try:
        return str(local_path(name)) if name.startswith("~") else name
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a YAML file or the name of one of ours, and apply overrides such as `train.steps=100`.

    The value of a text (a name, a path) is taken as it stands, whatever YAML makes of it, `null` being none where a
    text may be none, and `[A, B]` several where there may be several. Other values are YAML without comments.
    `inherits: OTHER.yaml` (relative to the file) or `inherits: NAME` (one of ours) starts from another recipe; mappings
    are merged, lists replaced, and its name stays its own.
    Raises RecipeError, which names the file and line, or the override, at fault.
    """
    path = find_recipe(local_path(path))
    places: dict[str, str] = {}
    values = read_file(path, places, ())
    for override in overrides:
        apply_override(values, override, places)
    values.setdefault("name", path.stem)
    values.setdefault("out", f"runs/{values['name']}")
    return build(Recipe, values, place=Origin(str(path), places, [entry.key for entry in describe(Recipe)]))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal recipe."""
    return yaml.dump(asdict(recipe), Dumper=Dumper, sort_keys=False, width=120)


# as whole scalars: with a colon, digits after a zero, dates
UNMEANT = re.compile(r".*[0-9]:[0-9].*|[-+]?0[0-9_]+|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*", re.DOTALL)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader that reads `1e-3` as a number (YAML 1.2) instead of text."""


class ValueLoader(Loader):
    """Reads a value on the command line: no dates, numbers to the base 60 (`8:4`) or 8 (`010`), which nobody means."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a scalar; text where YAML 1.1 alone sees something else in it."""
        tag = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and implicit[0] and UNMEANT.fullmatch(value):
            return "tag:yaml.org,2002:str"
        return tag


class TextLoader(yaml.BaseLoader):
    """Reads lists and texts only: nothing is a number."""


class Dumper(yaml.SafeDumper):
    """Quotes the texts that this `Loader` would read as numbers."""


for reader_or_writer in (Loader, Dumper):
    reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_file(path: Path, places: dict[str, str], children: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values over those it inherits; `places` learns where each key was written."""
    if path.resolve() in children:
        raise RecipeError(f"{path}: inherits from itself")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}{nearest_file(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; a recipe is a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    found: dict[str, str] = {}
    values = parse(text, str(path), found)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold a mapping with the keys model and data; got {shown(values)}")
    parent = values.pop("inherits", None)
    if parent is None:
        places.update(found)
        return values
    if not isinstance(parent, str):
        raise RecipeError(f"{found['inherits']}: inherits must be a file name; got {shown(parent)}")
    inherited = read_file(find_recipe(local_path(parent), path.parent), places, (*children, path.resolve()))
    # two heirs of one recipe would otherwise be one run in one folder
    inherited.pop("name", None)
    places.update(found)
    return merge(inherited, values)


def parse(text: str, origin: str, places: dict[str, str], kind: type[Any] = Loader) -> Any:
    """YAML to plain values; records `origin:line` of each key and refuses a key written twice."""
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        record_places(node, "", origin, places)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{origin}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {error}") from None


def record_places(node: yaml.Node, at: str, origin: str, places: dict[str, str]) -> None:
    """Walk the mappings below `node`; see `parse`."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{at}.{key_node.value}" if at else str(key_node.value)
        here = f"{origin}:{key_node.start_mark.line + 1}"
        if places.get(key, "").startswith(f"{origin}:"):
            raise RecipeError(f"{here}: key {key} is written twice, first at {places[key]}")
        places[key] = here
        record_places(value_node, key, origin, places)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over`, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def apply_override(values: dict[str, Any], override: str, places: dict[str, str]) -> None:
    """Set one `dotted.key=value` in the plain values."""
    key, equals, text = override.partition("=")
    origin = f"{OVERRIDE} {override!r}"
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(f"{origin}: write key=value, for example train.steps=100")
    key = key.strip()
    value = read_typed(text, hint_at(Recipe, key.split(".")), origin)
    *parents, last = key.split(".")
    target = values
    for depth, parent in enumerate(parents):
        dotted = ".".join(parents[: depth + 1])
        if parent not in target:
            target[parent] = {}
            places[dotted] = origin
        target = target[parent]
        if not isinstance(target, dict):
            raise RecipeError(f"{origin}: {dotted} is not a mapping in this recipe")
    target[last] = value
    places[key] = origin


def read_typed(text: str, hint: Any, origin: str) -> Any:
    """What a text on the command line stands for where a recipe has this annotation (None: any plain value)."""
    choices = get_args(hint)
    if hint is str or choices == (str, NoneType):
        if not text.strip():
            raise RecipeError(f"{origin}: a text is expected, and none came")
        return None if text == "null" and hint is not str else text
    if get_origin(hint) is tuple and choices[-1] is Ellipsis:
        is_list = text.strip().startswith("[") and text.strip().endswith("]")
        return read_value(text, origin, TextLoader) if is_list else text
    return read_value(text, origin)


def read_value(text: str, origin: str, kind: type[Any] = ValueLoader) -> Any:
    """A value on the command line as YAML; raises RecipeError, also for a comment, which would drop what was typed."""
    value = parse(text, origin, {}, kind)
    if "#" in text:
        spans = [range(token.start_mark.index, token.end_mark.index) for token in yaml.scan(text)]
        if any(sign == "#" and not any(at in span for span in spans) for at, sign in enumerate(text)):
            raise RecipeError(f"{origin}: what follows # would be a comment, and dropped; put the text in quotes")
    return value


def nearest_file(path: Path) -> str:
    """A hint naming what was meant: a recipe of that name, the nearest in the same folder, or of ours."""
    if path.suffix in SUFFIXES and path.stem in recipe_names():
        return f"; {path.stem} comes with swat-lm: give its name alone, without folder and suffix"
    folder, is_file = path.parent, path.suffix in SUFFIXES
    for own in () if is_file else (folder / f"{path.name}.yaml", Path("recipes") / f"{path.name}.yaml"):
        if own.is_file():
            return f"; did you mean {own}?"
    ours = nearest_recipe(path.stem if is_file else path.name)
    if ours and not is_file:
        return f"; did you mean {ours}?"
    files = {file.stem: file for file in folder.iterdir() if file.suffix in SUFFIXES} if folder.is_dir() else {}
    if near := nearest(path.stem, files):
        return f"; the nearest is {files[near[0]]}"
    if ours:
        return f"; of those that come with swat-lm, which go by their names alone, did you mean {ours}?"
    return "; `swat-lm recipes` lists those that come with swat-lm"

"""The finished model as a folder that `AutoModelForCausalLM.from_pretrained` reads."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from swat_lm.files import whole
from swat_lm.model.architectures import exported_class
from swat_lm.model.weight_files import give_usual_permissions
from swat_lm.recipe import Recipe, dump_recipe
from swat_lm.train.engine import Engine
from swat_lm.train.ownership import CARD, CARD_MARK, check_export
from swat_lm.train.trained_text import RECORD

__all__ = ["export_model"]

CARD_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [swat-lm]
---
# {name}

{mark} {step} optimizer steps, {tokens:,} target tokens{held_out}.

```python
import swat_lm  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

The recipe, resolved:

```yaml
{recipe}```
"""


def export_model(
    engine: Engine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    step: int,
    tokens: int,
    held_out_loss: float | None,
) -> Path:
    """Write `OUT/export` (weights in fp32, configuration, tokenizer, model card) in one piece; all processes call it.

    Raises OSError, and ValueError where something else lies there; then what was there before is as it was.
    """
    folder = Path(recipe.out, "export")
    weights = engine.whole_weights(model)

    def write() -> None:
        # looked at before the run began, but that may be long ago
        check_export(folder)
        held_out = "" if held_out_loss is None else f", held-out loss {held_out_loss:.4f} nats per token"
        card = CARD_TEXT.format(
            name=recipe.name, mark=CARD_MARK, step=step, tokens=tokens, held_out=held_out, recipe=dump_recipe(recipe)
        )
        try:
            with whole(folder, over_full=True) as beside:
                with progress_bars_off():
                    plain_copy(model, weights).save_pretrained(beside)
                give_usual_permissions(beside)
                tokenizer.save_pretrained(beside)
                if (folder.parent / RECORD).is_file():
                    shutil.copyfile(folder.parent / RECORD, beside / RECORD)
                (beside / CARD).write_text(card, encoding="utf-8")
        except OSError as error:
            raise OSError(error.errno, f"cannot write {folder} ({error.strerror or error})") from error

    engine.on_main(write)
    return folder


@contextmanager
def progress_bars_off() -> Iterator[None]:
    """Keep transformers from drawing over the caller's own progress."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def plain_copy(model: nn.Module, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model without shards, compilation or checkpointing, around these very tensors."""
    # fully_shard and our loss stand before the class that others know
    with torch.device("meta"):
        copy = exported_class(type(model))(model.config)  # type: ignore[arg-type]
    copy.load_state_dict(weights, assign=True)  # type: ignore[attr-defined]
    copy.tie_weights()  # type: ignore[attr-defined]
    return copy  # type: ignore[return-value]

"""Plans of layers over which the tests of other libraries run, and the tokenizer and rows that they need."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swat_lm import SwatForCausalLM

from .models import tiny_model, tokens

PLANS = {"attention": {}, "mixed": {"layers": ["mamba2", "attention"]}, "mamba2": {"layers": ["mamba2"]}}
PAD, END = 90, 91


def planned(plan: str, **changes) -> SwatForCausalLM:
    special = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
    return tiny_model(**{**special, **PLANS[plan], **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    letters = {"Ġ" if index == 0 else chr(32 + index): index for index in range(90)}
    inner = Tokenizer(models.BPE(letters | {"<pad>": PAD, "<end>": END, "<unk>": 92}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def exported(folder, plan: str, **changes) -> str:
    """A folder as `save_pretrained` writes it, with a tokenizer."""
    planned(plan, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def rows(count: int = 8, length: int = 12) -> list[dict[str, list[int]]]:
    """Of a data set that somebody has made ready, labels included."""
    found = [tokens(1, length, seed=index)[0].tolist() for index in range(count)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in found]

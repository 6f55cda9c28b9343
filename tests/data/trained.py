"""Small trained tokenizers of every form that splits text in its own way."""

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from swat_lm.data.tokenizer import EOS

TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL,
    "o200k": f"{CASED % ('*', '+')}|{CASED % ('+', '*')}" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + TAIL,
    "lines and words": r"\n\S+|\s+(?!\S)|\S+|\s",
    "no last space": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    "small letters": CASED % ("*", "+") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL,
}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    """A pattern before bytes, as most tokenizers have it."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), PLAIN_BYTES])


STEPS = {
    "ByteLevel": BYTES,
    **{name: split(pattern) for name, pattern in PATTERNS.items()},
    "kept matches": split(PATTERNS["cl100k"], "removed", invert=True),
    "digits first": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "punctuation first": pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("contiguous"), BYTES, pre_tokenizers.Split(Regex("[0-9][0-9]"), "isolated")]
    ),
    "line breaks first": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            BYTES,
        ]
    ),
    "white space": pre_tokenizers.WhitespaceSplit(),
    "Bert": pre_tokenizers.BertPreTokenizer(),
    "no regex": PLAIN_BYTES,
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "Metaspace": pre_tokenizers.Metaspace(),
    "line breaks, then Metaspace": pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    ),
    "merged matches": split(PATTERNS["cl100k"], "merged_with_next"),
    "none": None,
}
NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "Strip": normalizers.Strip(),
    "Prepend": normalizers.Prepend("_"),
    "Replace": normalizers.Replace("\n", "_"),
    "Lowercase": normalizers.Lowercase(),
}


def trained(form: str, text: str, normalizer: str | None = None, added: AddedToken | None = None) -> Tokenizer:
    """Byte pairs trained on one text, split by one of STEPS."""
    backend = Tokenizer(models.BPE())
    if STEPS[form] is not None:
        backend.pre_tokenizer = STEPS[form]
    if normalizer is not None:
        backend.normalizer = NORMALIZERS[normalizer]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = trainers.BpeTrainer(vocab_size=600, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text], settings)
    if added is not None:
        backend.add_tokens([added])
    return backend

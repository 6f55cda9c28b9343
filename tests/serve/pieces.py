"""A tokenizer in the form of SentencePiece's, small enough to be written out."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Llama's form: pieces that begin with their space, bytes where there is no piece."""
    words = ["<unk>", "</s>", "a", "b", "ab", "ba", "\u2581", "\u2581a", "\u2581ab", "\u2581\u2581", "\u00e9"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)

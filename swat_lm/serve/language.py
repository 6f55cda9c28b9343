"""A tokenizer as a server uses it: prompts, chats, what single tokens say, constraints. For several threads at once.

Knows nothing of requests. What a reply says is text.py's matter.
"""

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from swat_lm.serve.constraints import ConstraintCompiler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ChatError", "Cut", "Encoded", "Language"]

Cut = Callable[[str], Iterable[str]]
# characters that are encoded at once, and those that take longer than handing them over
LONG_TEXT, SHORT_TEXT = 1 << 16, 1 << 11


class ChatError(ValueError):
    """Messages that cannot be put into the tokenizer's chat template."""


class Encoded(NamedTuple):
    """A text as tokens."""

    tokens: list[int]
    added: int
    """Of these so many in front stand for nothing in the text: a token that begins one."""


class Language:
    """A tokenizer beside the model that it is of."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        vocabulary: int,
        end_tokens: Collection[int] = (),
        cut: Cut | None = None,
    ) -> None:
        """`vocabulary` is the model's, in which `end_tokens` end a text.

        `cut` parts a long text into pieces whose tokens together are those of the text, so that none takes long or much
        memory; None: it is encoded as a whole.
        """
        self.tokenizer, self.vocabulary, self._cut = tokenizer, vocabulary, cut
        self.end_tokens = frozenset(end_tokens)
        self.size = min(vocabulary, max(tokenizer.get_vocab().values()) + 1)
        """Ids that may be drawn: the model's may be more, those of a padded vocabulary."""
        # a file may say that texts are to be cut or filled up; the library undoes that with the first one it encodes,
        # which threads must not do beside each other
        tokenizer.encode("a")
        self._backend = tokenizer.backend_tokenizer
        self._lock = threading.Lock()
        self._compiler: ConstraintCompiler | None = None
        # at most one for each id of the model
        self._pieces: dict[int, str] = {}

    def prompt(self, text: str) -> Encoded:
        """A text that a reply goes on, with what begins a text, but without what would close it."""
        first, *others = self._pieces_of(text)
        encoding = self._encode(first, special=True)
        tokens, added = list(encoding.ids), encoding.special_tokens_mask
        end = len(tokens)
        while end and added[end - 1] and not all(added[:end]):
            end -= 1
        front = next((place for place, mark in enumerate(added[:end]) if not mark), end)
        del tokens[end:]
        for piece in others:
            tokens += self._encode(piece).ids
        return Encoded(tokens, front)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without what the tokenizer puts around one."""
        tokens: list[int] = []
        for piece in self._pieces_of(text):
            tokens += self._encode(piece).ids
        return tokens

    def _pieces_of(self, text: str) -> list[str]:
        return [text] if len(text) < LONG_TEXT or self._cut is None else list(self._cut(text)) or [text]

    def _encode(self, text: str, special: bool = False) -> Any:
        if len(text) < SHORT_TEXT:
            return self._backend.encode(text, add_special_tokens=special)
        # the library's `encode` lets no other thread run until it is done
        return self._backend.encode_batch_fast([text], add_special_tokens=special)[0]

    def decode(self, tokens: Sequence[int]) -> str:
        """What tokens say together, special ones included. Ids that the tokenizer has not say nothing."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that one token stands for; None where the tokenizer does not say."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return None
        if token not in self._special and self._letters is not None:
            try:
                return bytes(self._letters[letter] for letter in piece)
            except KeyError:
                return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        text = self.decode([token])
        return None if "\ufffd" in text else text.encode()

    def piece(self, token: int) -> str:
        """What one token says, as OpenAI writes it: bytes that are no character by themselves as `bytes:\\xe2\\x80`."""
        if (known := self._pieces.get(token)) is not None:
            return known
        text = self.decode([token])
        if "\ufffd" in text and (raw := self.bytes_of(token)) is not None:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        self._pieces[token] = text
        return text

    @property
    def can_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def chat(self, messages: Iterable[Mapping[str, Any]]) -> str:
        """Messages as the chat template writes them, up to where the next answer begins. Raises ChatError."""
        from jinja2 import TemplateError

        if not self.can_chat:
            raise ChatError("the model's tokenizer has no chat template; use /v1/completions, which needs none")
        chat = [dict(message) for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from None

    def compiler(self) -> ConstraintCompiler:
        """What compiles constraints; made on first use, which takes about a second. Raises ConstraintError."""
        with self._lock:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(self.tokenizer, self.end_tokens)
            return self._compiler

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """The bytes behind the letters of a byte-level vocabulary; None for one of another kind."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        decoder = json.loads(self._backend.to_str())["decoder"]
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        if not any(step["type"] == "ByteLevel" for step in steps):
            return None
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

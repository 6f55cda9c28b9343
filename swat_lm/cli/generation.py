"""`swat-lm generate`: continue a text, streamed to stdout, in memory that does not grow with it."""

import codecs
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Self, TypeVar

import typer

from swat_lm.cli.checkpoints import load_checkpoint
from swat_lm.cli.console import messages
from swat_lm.cli.failures import INTERRUPTED
from swat_lm.cli.options import DEVICE, TOKENIZER
from swat_lm.cli.outputs import check_new_file
from swat_lm.cli.streams import reader_is_gone
from swat_lm.interruption import Interruption
from swat_lm.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from swat_lm.model.modeling import SwatForCausalLM
    from swat_lm.model.slots import Slots
    from swat_lm.serve.sampling import Sampling
    from swat_lm.serve.stream import Stream

__all__ = ["generate"]

PIECE_BYTES = 1 << 16
# characters that may take longer to tokenise than anybody waits after Ctrl-C
LONG_TEXT = 1 << 16
Result = TypeVar("Result")


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, an exported folder, or a hub name.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; `-` reads it from stdin.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message to a chat model, put into its chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=0, help="Most tokens to generate.")
    ] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; 1: the model's own odds.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among this many most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Choose among the most likely tokens that sum to this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes the draws repeatable.")] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after a token that ends a text.")] = False,
    load_from: Annotated[Path | None, typer.Option("--load-state", help="Go on with a stream saved before.")] = None,
    save_to: Annotated[Path | None, typer.Option("--save-state", help="Save the stream's state at the end.")] = None,
    tokenizer: TOKENIZER = None,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens per forward pass; speed and memory only.")] = 512,
    device: DEVICE = None,
) -> None:
    """Continue a text and stream it to stdout.

    The prompt is read in pieces and forgotten; all that is kept of it is the model's state, whose size goes to stderr.
    For a window model it is constant, so the prompt may be a pipe that never ends. With --save-state, Ctrl-C saves the
    state first, and so does a reader of the text that goes away; with --load-state, a prompt is optional. It ends where
    the model's own generate() does: at any end token of generation_config.json, else of config.json, else the
    tokenizer's.

    \b
    Examples:
      swat-lm generate demo/swat --prompt 'def main(' --seed 1
      swat-lm generate models/smollm2 --chat --prompt 'What is a prime number?'
      tail -f app.log | head -c 100M | swat-lm generate runs/mine --prompt - --temperature 0
    """
    from swat_lm.data import vocabulary_size
    from swat_lm.model.fingerprint import fingerprint
    from swat_lm.serve.sampling import Sampling
    from swat_lm.serve.stream import Stream

    sampling = Sampling(temperature, top_k, top_p, seed=seed, max_tokens=max_new_tokens, ignore_end=ignore_end)
    prompt = whole_text(prompt, "--prompt")
    if save_to is not None:
        check_new_file(save_to, "--save-state")
    if chat and (prompt in ("", "-") or load_from is not None):
        raise ValueError(
            "--chat takes one message, by --prompt TEXT: neither stdin nor a saved state; for a conversation there is "
            "`swat-lm chat`"
        )
    model, tokens = load_checkpoint(checkpoint, tokenizer, device)
    if chat:
        prompt = in_template(tokens, prompt, checkpoint, tokenizer)
    state = model.init_state() if load_from is None else read_state(model, load_from)
    if save_to is not None:
        # goes with the state, and is formed faster while the weights lie in rows
        fingerprint(model)
    if model.device.type == "cpu":
        model.arrange_for_decoding()
    sampling = replace(sampling, vocab_size=vocabulary_size(tokens))
    stream = Stream(model, tokens, state, chunk, end_tokens(model, tokens))
    with SavingInterruption(active=save_to is not None) as interruption:
        pieces = in_chunks(prompt_pieces(tokens, prompt, load_from is None, interruption, chat), chunk, interruption)
        read_prompt(stream, pieces, model.config.vocab_size, load_from, interruption)
        before, read = state.num_bytes, int(state.position)
        write_text(stream, sampling, interruption)
        if save_to is not None:
            save(stream, save_to)
    report_state(state, read, before)
    if save_to is not None and reader_is_gone() and not interruption.requested:
        messages().print(f"nobody reads on; state saved: --load-state {save_to} goes on after it", markup=False)
    if interruption.requested:
        messages().print(f"state saved: --load-state {save_to} goes on after it", markup=False)
        raise typer.Exit(INTERRUPTED)


def read_state(model: "SwatForCausalLM", path: Path) -> "Slots":
    """The state of one stream that this very model made; raises ValueError naming the file."""
    from swat_lm.model.state import load_state

    state = load_state(path, model.device)
    if state.batch_size != 1:
        raise ValueError(f"{path}: holds {state.batch_size} streams, expected one")
    try:
        model.check_state(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state


def read_prompt(
    stream: "Stream",
    pieces: Iterator[list[int]],
    vocabulary: int,
    load_from: Path | None,
    interruption: "SavingInterruption",
) -> None:
    """Read the prompt; where there is none, the stream has the logits that came with its state.

    Raises ValueError that says what to give where there is neither.
    """
    stream.read(pieces)
    if stream.logits is None and interruption.requested:
        # nothing was read, so nothing is lost
        raise KeyboardInterrupt
    if stream.logits is None:
        raise ValueError(
            "nothing to continue: give --prompt" + ("" if load_from is None else ", the text that follows the state")
        )
    if stream.logits.shape != (1, vocabulary):
        raise ValueError(
            f"{load_from}: the state belongs to another model (of {counted(stream.logits.shape[1], 'token')}, "
            f"this one knows {vocabulary:,})"
        )


def write_text(stream: "Stream", sampling: "Sampling", interruption: "SavingInterruption") -> None:
    """Draw tokens and write their text as it comes.

    No text where an interruption was requested before. Ends early where nobody reads the text any more.
    """
    for event in () if interruption.requested else stream.write(sampling):
        write(event.text)
        if interruption.requested or reader_is_gone():
            break
    write(stream.stop() + "\n")


def save(stream: "Stream", path: Path) -> None:
    """Save the state so that the stream goes on after its last token, as if it had never been stopped."""
    from swat_lm.model.state import save_state

    stream.close()
    save_state(stream.state, path)


class SavingInterruption(Interruption):
    """While entered and active, a first signal sets `requested`, so that the state can be saved; then Ctrl-C kills.

    Where something is waited for (`waiting`), the wait ends at once.
    """

    def __init__(self, active: bool = True) -> None:
        super().__init__()
        self._active = active
        self._waiting = False

    def __enter__(self) -> Self:
        return super().__enter__() if self._active else self

    def waiting(self, call: Callable[[], Result]) -> Result | None:
        """What a call gives that an interruption may end; None once one is requested."""
        if not self._active:
            return call()
        try:
            self._waiting = True
            return None if self.requested else call()
        except KeyboardInterrupt:
            return None
        finally:
            self._waiting = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        # the next Ctrl-C kills, whatever came first
        super()._request(signal.SIGINT, frame)
        if self._waiting:
            raise KeyboardInterrupt


def report_state(state: "Slots", read: int, before: int) -> None:
    """The size of the state after the prompt, `before`, and now."""
    # not judged by the two sizes: what grows does so in blocks
    kind = "grows with every token: the model has full-attention layers" if state.grows else "constant"
    messages().print(
        f"state: {counted(before, 'byte')} after {counted(read, 'token')} read, "
        f"{counted(state.num_bytes, 'byte')} after {int(state.position):,} ({kind})",
        markup=False,
    )


def write(text: str) -> None:
    """Text to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def whole_text(text: str, option: str) -> str:
    """An argument as the UTF-8 text that its bytes are; in a locale of ASCII alone Python keeps them as surrogates.

    Raises ValueError for bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{option} is not UTF-8 text (byte {error.start})") from None
    return text


def in_chunks(pieces: Iterable[list[int]], size: int, interruption: SavingInterruption) -> Iterator[list[int]]:
    """The pieces in parts of `size` tokens, until an interruption is requested."""
    for piece in pieces:
        for start in range(0, len(piece), size):
            if interruption.requested and start:
                return
            yield piece[start : start + size]


def prompt_pieces(
    tokens: "PreTrainedTokenizerFast", prompt: str, fresh: bool, interruption: SavingInterruption, whole: bool = False
) -> Iterator[list[int]]:
    """Token ids of the prompt, piece by piece; an empty prompt of a fresh stream is the start of a new text.

    One that is `whole` holds its special tokens already. The pieces are cut where the tokenizer leaves the tokens as
    they are, so they do not depend on how the text comes.
    """
    from swat_lm.data.cutting import Cutter, find_cuts
    from swat_lm.data.source_text import cut

    if prompt == "-" and sys.stdin is None:
        raise ValueError("--prompt -: stdin is closed; pipe a text into it, or give one by --prompt TEXT")
    cuts = find_cuts(tokens.backend_tokenizer.to_str())
    if prompt == "-" and cuts is None:
        messages().print("note: this tokenizer must see a text whole: the prompt is read to its end first")
    piped = arriving(lambda: interruption.waiting(partial(sys.stdin.buffer.read1, PIECE_BYTES)))  # type: ignore
    end, first, any_text = end_token(tokens), fresh and not whole, False
    for text in cut(piped if prompt == "-" else [prompt], Cutter(cuts, "the prompt", eager=True)):
        call = partial(tokens.encode, text, add_special_tokens=first)
        # what was read before an interruption still counts, and a short text is quicker than a thread
        ids = call() if interruption.requested or len(text) < LONG_TEXT else interruption.waiting(partial(heard, call))
        if ids is None:
            return
        if first and closes(tokens, end):
            # this text goes on
            ids = ids[:-1]
        any_text, first = any_text or bool(ids), False
        yield ids
    if fresh and not any_text and end is not None and not interruption.requested:
        # between documents stands the end token, so it also begins one
        yield [end]


def in_template(tokens: "PreTrainedTokenizerFast", message: str, checkpoint: str, given: str | None) -> str:
    """A user's message as a chat model's template writes it, up to where the answer begins.

    Raises ValueError where the tokenizer, the checkpoint's or the one given, has no template.
    """
    if not tokens.chat_template:
        whose = f"of {checkpoint}" if given is None else given
        advice = "give one that has by --tokenizer" if given is None else "give another one by --tokenizer"
        raise ValueError(f"--chat: the tokenizer {whose} has no chat template: leave --chat out, or {advice}")
    chat = [{"role": "user", "content": message}]
    return str(tokens.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def heard(call: Callable[[], Result]) -> Result:
    """A long call of a library that would not hear Ctrl-C: it runs in a thread, and this one waits and does."""
    # its threads end with the process, and leaving it does not wait for them
    with ThreadPool(1) as pool:
        return pool.apply_async(call).get()


def closes(tokens: "PreTrainedTokenizerFast", end: int | None) -> bool:
    """Whether a tokenizer puts the end token behind what it encodes."""
    plain, whole = (tokens.encode("a", add_special_tokens=added) for added in (False, True))
    return whole[-1:] == [end] != plain[-1:]


def end_token(tokens: "PreTrainedTokenizerFast") -> int | None:
    """The id of the end-of-text token, if there is one."""
    return None if tokens.eos_token is None else tokens.get_vocab().get(str(tokens.eos_token))


def end_tokens(model: "SwatForCausalLM", tokens: "PreTrainedTokenizerFast") -> frozenset[int]:
    """The ids that end a text: of the model's generation settings, else of its configuration, else of the tokenizer.

    The first two may name several.
    """
    for named in (getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id, end_token(tokens)):
        if named is not None:
            return frozenset(named if isinstance(named, list | tuple) else [named])
    return frozenset()


def arriving(read: Callable[[], bytes | None]) -> Iterator[str]:
    """UTF-8 text from a pipe as it comes, b"" at its end.

    Where `read` gives None, the text ends there, maybe within a character. Raises ValueError for what is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    while True:
        new = read()
        if new is None:
            return
        # of a character that has begun the decoder holds the first bytes
        begun = len(decoder.getstate()[0])
        try:
            text = decoder.decode(new, final=not new)
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 text (byte {at - begun + error.start})") from None
        yield text
        at += len(new)
        if not new:
            return

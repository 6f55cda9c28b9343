"""`swat-lm generate`: continue a text, streamed to stdout, in memory that does not grow with it."""

import codecs
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Self

import typer

from swat_lm.cli.checkpoints import load_checkpoint
from swat_lm.cli.console import messages
from swat_lm.cli.failures import INTERRUPTED
from swat_lm.cli.outputs import check_new_file
from swat_lm.cli.streams import reader_is_gone
from swat_lm.wording import counted

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedTokenizerFast

    from swat_lm.model.modeling import SwatForCausalLM
    from swat_lm.model.state import StreamState
    from swat_lm.serve.sampling import Sampling

__all__ = ["generate"]

# Ctrl-C, a wish to end, and the end of a terminal, which Windows does not have
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PIECE_BYTES = 1 << 16
# more than a command line can carry in one argument (128 KiB on Linux), so that a pipe equals --prompt there
LONGEST_PIECE = 1 << 18


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, an exported folder, or a hub name.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; `-` reads it from stdin.")] = "",
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
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the checkpoint's own.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens per forward pass; speed and memory only.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
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
      tail -f app.log | head -c 100M | swat-lm generate runs/mine --prompt - --temperature 0
    """
    import torch

    from swat_lm.data import vocabulary_size
    from swat_lm.model.state import load_state
    from swat_lm.serve.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    prompt = whole_text(prompt, "--prompt")
    if save_to is not None:
        check_new_file(save_to, "--save-state")
    model, tokens = load_checkpoint(checkpoint, tokenizer, device)
    if model.device.type == "cpu":
        model.arrange_for_decoding()
    sampling = Sampling(temperature, top_k, top_p, vocab_size=vocabulary_size(tokens))
    state = model.init_state() if load_from is None else load_state(load_from, model.device)
    generator = torch.Generator(model.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    with SavingInterruption(active=save_to is not None) as interruption:
        pieces = in_chunks(prompt_pieces(tokens, prompt, load_from is None, interruption), chunk, interruption)
        logits = first_logits(model, pieces, state, load_from, interruption)
        before, read = state.num_bytes, int(state.position)
        stop = frozenset[int]() if ignore_end else end_tokens(model, tokens)
        last = write_text(model, tokens, logits, state, sampling, max_new_tokens, generator, stop, interruption)
        if save_to is not None:
            save(model, state, logits, last, save_to)
    report_state(state, read, before)
    if save_to is not None and reader_is_gone() and not interruption.requested:
        messages().print(f"nobody reads on; state saved: --load-state {save_to} goes on after it", markup=False)
    if interruption.requested:
        messages().print(f"state saved: --load-state {save_to} goes on after it", markup=False)
        raise typer.Exit(INTERRUPTED)


def first_logits(
    model: "SwatForCausalLM",
    pieces: Iterator[list[int]],
    state: "StreamState",
    load_from: Path | None,
    interruption: "SavingInterruption",
) -> "Tensor":
    """The logits after the prompt, or, where there is none, those that came with the state.

    Raises ValueError that says what to give where there is neither.
    """
    from swat_lm.serve.stream import read_prompt

    if state.batch_size != 1:
        raise ValueError(f"{load_from}: holds {counted(state.batch_size, 'stream')}, expected one")
    logits = read_prompt(model, pieces, state)
    if logits is not None:
        return logits
    if state.logits is not None:
        if state.logits.shape != (1, model.config.vocab_size):
            raise ValueError(
                f"{load_from}: the state belongs to another model (of {counted(state.logits.shape[1], 'token')}, "
                f"this one knows {model.config.vocab_size:,})"
            )
        return state.logits
    if interruption.requested:
        # nothing was read, so nothing is lost
        raise KeyboardInterrupt
    raise ValueError(
        "nothing to continue: give --prompt" + ("" if load_from is None else ", the text that follows the state")
    )


def write_text(
    model: "SwatForCausalLM",
    tokens: "PreTrainedTokenizerFast",
    logits: "Tensor",
    state: "StreamState",
    sampling: "Sampling",
    count: int,
    generator: "Generator",
    stop: Collection[int],
    interruption: "SavingInterruption",
) -> int | None:
    """Draw tokens and write their text as it comes; returns the last one, which the state has not read yet.

    None, and no text, where an interruption was requested before. Ends early where nobody reads the text any more.
    """
    from swat_lm.serve.stream import TextAssembler, generate_tokens

    assembler, last = TextAssembler(tokens), None
    count = 0 if interruption.requested else count
    for last in generate_tokens(model, logits, state, sampling, count, generator, stop):
        write(assembler.push(last))
        if interruption.requested or reader_is_gone():
            break
    write(assembler.finish() + "\n")
    return last


def save(model: "SwatForCausalLM", state: "StreamState", logits: "Tensor", last: int | None, path: Path) -> None:
    """Save the state so that the stream goes on after its last token, as if it had never been stopped."""
    from swat_lm.model.state import save_state
    from swat_lm.serve.stream import next_logits

    state.logits = logits if last is None else next_logits(model, last, state)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(state, path)


class SavingInterruption:
    """While entered and active, a first Ctrl-C sets `requested`, so that the state can be saved; a second one kills.

    SIGTERM and, unless it is ignored, SIGHUP, which comes where a terminal is closed, do the same. Where a pipe is
    waited for (`reading`), the wait ends at once.
    """

    def __init__(self, active: bool = True) -> None:
        self.requested = False
        self._active = active and threading.current_thread() is threading.main_thread()
        self._reading = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._active:
            for number in SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def read(self, source: BinaryIO) -> bytes | None:
        """What has come of a pipe, b"" at its end; None once an interruption is requested."""
        if not self._active:
            return read_some(source)
        try:
            self._reading = True
            return None if self.requested else read_some(source)
        except KeyboardInterrupt:
            return None
        finally:
            self._reading = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._reading:
            raise KeyboardInterrupt


def report_state(state: "StreamState", read: int, before: int) -> None:
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
    tokens: "PreTrainedTokenizerFast", prompt: str, fresh: bool, interruption: SavingInterruption
) -> Iterator[list[int]]:
    """Token ids of the prompt, piece by piece; an empty prompt of a fresh stream is the start of a new text."""
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt -: stdin is closed; pipe a text into it, or give one by --prompt TEXT")
        texts = text_pieces(sys.stdin.buffer, whole=not pieces_are_exact(tokens), read=interruption.read)
    else:
        texts = iter([prompt] if prompt else [])
    end, first, any_text = end_token(tokens), fresh, False
    for text in texts:
        ids = tokens.encode(text, add_special_tokens=first)
        if first and len(ids) > 1 and ids[-1] == end:
            # some tokenizers close what they encode; this text goes on
            ids = ids[:-1]
        any_text, first = any_text or bool(ids), False
        yield ids
    if fresh and not any_text and end is not None and not interruption.requested:
        # between documents stands the end token, so it also begins one
        yield [end]


def end_token(tokens: "PreTrainedTokenizerFast") -> int | None:
    """The id of the end-of-text token, if there is one."""
    return None if tokens.eos_token is None else tokens.get_vocab().get(str(tokens.eos_token))


def end_tokens(model: "SwatForCausalLM", tokens: "PreTrainedTokenizerFast") -> frozenset[int]:
    """The ids that end a text: of the model's generation settings, else its configuration, else the tokenizer.

    The first two may name several.
    """
    for named in (getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id, end_token(tokens)):
        if named is not None:
            return frozenset(named if isinstance(named, list | tuple) else [named])
    return frozenset()


def pieces_are_exact(tokens: "PreTrainedTokenizerFast") -> bool:
    """Whether text may be cut at `SAFE_CUT`: byte-level tokenizers add nothing at the start of a piece."""
    from swat_lm.data.tokenizer import is_byte_level

    return is_byte_level(tokens.backend_tokenizer.to_str())


def read_some(source: BinaryIO) -> bytes | None:
    """What has come of a pipe; b"" at its end."""
    return source.read1(PIECE_BYTES)  # type: ignore[attr-defined]


def text_pieces(
    source: BinaryIO,
    whole: bool,
    longest: int = LONGEST_PIECE,
    read: Callable[[BinaryIO], bytes | None] = read_some,
) -> Iterator[str]:
    """UTF-8 text from a pipe as it comes, cut where a line break stands between two visible characters.

    Byte-level tokens end there, so that neither the cuts nor the way the text arrives change them; without such a place
    in `longest` characters it is cut anyway, always at the same one. `whole` reads to the end first, for tokenizers
    that must see all. Where `read` gives None, the text ends there, maybe within a character. Raises ValueError for
    what is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, looked_at, at = "", 0, 0
    while True:
        new = read(source)
        if new is None:
            break
        try:
            held += decoder.decode(new, final=not new)
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 text (byte {at + error.start})") from None
        at += len(new)
        if not new:
            break
        if whole:
            continue
        start = 0
        while cut := piece_end(held, start, looked_at, longest):
            yield held[start:cut]
            start = looked_at = cut
        held = held[start:]
        looked_at = len(held)
    if held:
        yield held


def piece_end(text: str, start: int, looked_at: int, longest: int) -> int:
    """Where the piece that begins at `start` ends, 0 if that is still open; there is no cut before `looked_at`."""
    from swat_lm.data.readers import SAFE_CUT

    # the character after a cut must be there, hence one more; both before it belong to this piece
    end = min(len(text), start + longest + 1)
    cuts = [found.start() for found in SAFE_CUT.finditer(text, max(start + 2, looked_at), end)]
    if cuts:
        return cuts[-1]
    return start + longest if end == start + longest + 1 else 0

"""`swat-lm generate`: continue a text, streamed to stdout, in memory that does not grow with it."""

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from swat_lm.cli.checkpoints import load_checkpoint
from swat_lm.cli.console import messages
from swat_lm.cli.outputs import check_new_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from swat_lm.model.state import StreamState

__all__ = ["generate"]

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
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after an end-of-text token.")] = False,
    load_from: Annotated[Path | None, typer.Option("--load-state", help="Go on with a stream saved before.")] = None,
    save_to: Annotated[Path | None, typer.Option("--save-state", help="Save the stream's state at the end.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the checkpoint's own.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens per forward pass; speed and memory only.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
) -> None:
    """Continue a text and stream it to stdout.

    The prompt is read in pieces and forgotten; all that is kept of it is the model's state, whose size goes to stderr.
    For a window model it is constant, so the prompt may be a pipe that never ends.

    \b
    Examples:
      swat-lm generate demo/swat --prompt 'def main(' --seed 1
      tail -f app.log | head -c 100M | swat-lm generate runs/mine --prompt - --temperature 0
    """
    import torch

    from swat_lm.data import vocabulary_size
    from swat_lm.model.state import load_state, save_state
    from swat_lm.serve.sampling import Sampling
    from swat_lm.serve.stream import TextAssembler, generate_tokens, read_prompt

    sampling = Sampling(temperature, top_k, top_p)
    if save_to is not None:
        check_new_file(save_to, "--save-state")
    model, tokens = load_checkpoint(checkpoint, tokenizer, device)
    if model.device.type == "cpu":
        model.arrange_for_decoding()
    sampling = Sampling(temperature, top_k, top_p, vocab_size=vocabulary_size(tokens))
    fresh = load_from is None
    state = model.init_state() if load_from is None else load_state(load_from, model.device)
    if state.batch_size != 1:
        raise ValueError(f"{load_from}: holds {state.batch_size} streams, expected one")
    pieces = prompt_pieces(tokens, prompt, fresh)
    logits = read_prompt(model, pieces, state, chunk)
    if logits is None:
        raise ValueError("nothing to continue: give --prompt" + ("" if fresh else ", the text that follows the state"))
    before, read = state.num_bytes, int(state.position)
    generator = torch.Generator(model.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    end = end_token(tokens)
    stop = () if ignore_end or end is None else (end,)
    assembler, last = TextAssembler(tokens), None
    for last in generate_tokens(model, logits, state, sampling, max_new_tokens, generator, stop):
        write(assembler.push(last))
    write(assembler.finish() + "\n")
    if save_to is not None:
        if last is not None:
            # the state has not read the last token yet, and whoever goes on begins after it
            read_prompt(model, [[last]], state)
        save_to.parent.mkdir(parents=True, exist_ok=True)
        save_state(state, save_to)
    report_state(state, read, before)


def report_state(state: "StreamState", read: int, before: int) -> None:
    """The size of the state after the prompt, `before`, and now."""
    # not judged by the two sizes: what grows does so in blocks
    kind = "grows with every token: the model has full-attention layers" if state.grows else "constant"
    messages().print(
        f"state: {before:,} bytes after {read:,} tokens read, {state.num_bytes:,} bytes after {int(state.position):,} "
        f"({kind})",
        markup=False,
    )


def write(text: str) -> None:
    """Text to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prompt_pieces(tokens: "PreTrainedTokenizerFast", prompt: str, fresh: bool) -> Iterator[list[int]]:
    """Token ids of the prompt, piece by piece; an empty prompt of a fresh stream is the start of a new text."""
    if prompt == "-":
        texts = text_pieces(sys.stdin.buffer, whole=not pieces_are_exact(tokens))
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
    if fresh and not any_text and end is not None:
        # between documents stands the end token, so it also begins one
        yield [end]


def end_token(tokens: "PreTrainedTokenizerFast") -> int | None:
    """The id of the end-of-text token, if there is one."""
    return None if tokens.eos_token is None else tokens.get_vocab().get(str(tokens.eos_token))


def pieces_are_exact(tokens: "PreTrainedTokenizerFast") -> bool:
    """Whether text may be cut at `SAFE_CUT`: byte-level tokenizers add nothing at the start of a piece."""
    from swat_lm.data.tokenizer import is_byte_level

    return is_byte_level(tokens.backend_tokenizer.to_str())


def text_pieces(source: BinaryIO, whole: bool, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """UTF-8 text from a pipe as it comes, cut where a line break stands between two visible characters.

    Byte-level tokens end there, so that neither the cuts nor the way the text arrives change them; without such a place
    in `longest` characters it is cut anyway, always at the same one. `whole` reads to the end first, for tokenizers
    that must see all. Raises ValueError for what is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, looked_at, at = "", 0, 0
    while True:
        read = source.read1(PIECE_BYTES)  # type: ignore[attr-defined]
        try:
            held += decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 text (byte {at + error.start})") from None
        at += len(read)
        if not read:
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

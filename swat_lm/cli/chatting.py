"""`swat-lm chat`: a conversation in the terminal, whose state has one size however long it becomes."""

import contextlib
import itertools
import queue
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from swat_lm.cli.console import messages
from swat_lm.cli.failures import USER_ERROR, describe_os_error
from swat_lm.cli.generation import whole_text, write
from swat_lm.cli.hosting import running, serving_beside
from swat_lm.cli.options import DEVICE, TOKENIZER
from swat_lm.cli.outputs import check_new_file
from swat_lm.cli.serving import check_extra, cutter, hosted, limits_of, model_name, opener
from swat_lm.cli.streams import reader_is_gone
from swat_lm.interruption import leaving_on_termination
from swat_lm.words import counted, nearest

if TYPE_CHECKING:
    from swat_lm.serve.engine import Event
    from swat_lm.serve.language import Language
    from swat_lm.serve.sampling import Sampling
    from swat_lm.serve.sessions.hosted import HostedSessions
    from swat_lm.serve.sessions.keeper import Description

__all__ = ["chat"]

HELP = """\
  /fork NAME     a copy of the conversation, to go on with later: /go NAME
  /go NAME       go on with another conversation, or begin it
  /sessions      all conversations that are kept
  /save FILE     the conversation as one file
  /load FILE     a conversation from a file, under the file's name
  /help, /quit   Ctrl-C stops a reply, Ctrl-D leaves
  A line that ends in \\ goes on in the next; //x says /x."""


def chat(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, an exported folder, or a hub name.")],
    session: Annotated[str, typer.Option(help="Name of the conversation; one that is kept goes on.")] = "chat",
    sessions: Annotated[
        str | None,
        typer.Option(help="Keep conversations there, a folder or what fsspec opens; default: until the end."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first in a new conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; 1: the model's own odds.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Choose among this many most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Choose among the most likely tokens that sum to this probability.")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes the draws repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of a reply.")] = 512,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a slot holds; needed where a layer keeps all it has seen.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Also answer HTTP there, on this machine alone; 0: any free.")
    ] = None,
    tokenizer: TOKENIZER = None,
    device: DEVICE = None,
) -> None:
    """Talk with a model in the terminal.

    Of the conversation only the model's state is kept, not the text: of the same size after ten turns and after ten
    thousand where all layers are windows or recurrences. Replies come as they are drawn; Ctrl-C stops one, and the
    conversation goes on from what was shown. With --sessions it can be left and taken up again, and with --port the
    same model and conversations answer HTTP as under `swat-lm serve`. A model without a chat template goes on with the
    lines as plain text. Where stdin is no terminal, each of its lines is a message.

    \b
    Examples:
      swat-lm chat models/smollm2
      swat-lm chat models/smollm2 --sessions talks --session monday --system 'Answer in one sentence.'
      printf 'What is a prime number?\\nAnd an even one?\\n' | swat-lm chat models/smollm2 --temperature 0
    """
    check_extra()
    from swat_lm.serve.language import Language
    from swat_lm.serve.sampling import Sampling
    from swat_lm.serve.sessions.book import Policy
    from swat_lm.serve.sessions.record import check_name

    sampling = Sampling(temperature, top_k, top_p, seed=seed, max_tokens=max_new_tokens)
    check_name(session)
    system = None if system is None else whole_text(system, "--system")
    limits = limits_of(checkpoint, 2, None, context)
    with leaving_on_termination(), contextlib.ExitStack() as stack:
        place = sessions or stack.enter_context(tempfile.TemporaryDirectory(prefix="swat-lm-chat-"))
        host, kept = hosted(opener(checkpoint, tokenizer, device, limits), place, Policy())
        assert kept is not None
        stack.enter_context(running(host))
        if port is not None:
            stack.enter_context(serving_beside(host, kept, port, model_name(checkpoint)))
        engine = host.engine
        language = Language(
            engine.tokenizer, engine.model.config.vocab_size, engine.end_tokens, cutter(engine.tokenizer)
        )
        talk = Talk(kept, language, sampling, system)
        if system is not None and not language.can_chat:
            raise ValueError("--system: the model's tokenizer has no chat template, so nothing can be said to it first")
        talk.go(session)
        if sys.stdin is None:
            raise ValueError("stdin is closed: type messages, or pipe them in")
        went_well = hold(talk, keeps=sessions is not None)
    if not went_well:
        # of a script, which reads no messages
        raise typer.Exit(USER_ERROR)


def hold(talk: "Talk", keeps: bool) -> bool:
    """Read lines and answer them until they end; False where one that was piped in could not be done."""
    is_terminal, went_well = sys.stdin.isatty(), True
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 lets lines be edited

        messages().print("/help shows what else can be done; Ctrl-D leaves", style="dim", markup=False)
    for line in lines(is_terminal):
        if reader_is_gone():
            break
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not command(talk, line):
                    break
            elif line.strip():
                talk.say(line.removeprefix("/") if line.startswith("//") else line)
        except (ValueError, OSError) as error:
            # what is wrong with one line ends no conversation
            said = describe_os_error(error) if isinstance(error, OSError) else error
            messages().print(f"error: {said}", markup=False)
            went_well = is_terminal
        except KeyboardInterrupt:
            # a moment after a reply's end it is meant for the reply, and must not end the conversation
            if not is_terminal:
                raise
            write("\n")
    if is_terminal and keeps and talk.has_turns():
        messages().print(f"kept: --session {shlex.quote(talk.name)} goes on with it", markup=False)
    return went_well


def lines(is_terminal: bool) -> Iterator[str]:
    """What is typed or piped, line by line; one that ends in a backslash with the next."""
    begun: list[str] = []
    while True:
        try:
            line = input(("> " if not begun else ". ") if is_terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            # as shells do: a line is thrown away
            write("\n")
            begun = []
            continue
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 text (byte {error.start})") from None
        begun.append(whole_text(line.removesuffix("\\"), "a line"))
        if not line.endswith("\\"):
            yield "\n".join(begun)
            begun = []
    if begun:
        yield "\n".join(begun)


def command(talk: "Talk", line: str) -> bool:
    """Do what a line with a slash says; False to leave. Raises ValueError for what cannot be done."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    known: dict[str, Callable[[str], Any]] = {
        "fork": talk.fork, "go": talk.go, "save": talk.save, "load": talk.load,
    }  # fmt: skip
    if name in ("quit", "exit"):
        return False
    if name == "help":
        messages().print(HELP, markup=False)
    elif name == "sessions":
        talk.show_all()
    elif name not in known:
        near = nearest(name, [*known, "sessions", "help", "quit"])
        advice = f"did you mean /{near[0]}?" if near else "/help shows what there is"
        raise ValueError(f"/{name}: no such command; {advice}")
    elif not rest:
        raise ValueError(f"/{name}: expected a name behind it; /help shows what there is")
    else:
        known[name](rest)
    return True


def of_turn(sampling: "Sampling", turn: int) -> "Sampling":
    """The same with a seed of its own for each turn, which would otherwise draw the same numbers; the first has its."""
    from dataclasses import replace

    if sampling.seed is None:
        return sampling
    # a large odd step, so that the turns of seeds side by side are none of each other's
    return replace(sampling, seed=(sampling.seed + turn * 0x9E3779B97F4A7C15) % 2**63)


class Shown(NamedTuple):
    """What was shown of a reply."""

    count: int
    """Its tokens."""
    seconds: float
    """From the first to the last."""


class Talk:
    """One conversation of many, in a terminal."""

    def __init__(
        self, sessions: "HostedSessions", language: "Language", sampling: "Sampling", system: str | None
    ) -> None:
        from dataclasses import replace

        self._sessions, self._language, self._system = sessions, language, system
        self._sampling = replace(sampling, vocab_size=language.size)
        self._keys = itertools.count()
        self.name = ""

    def go(self, name: str) -> None:
        """Go on with a conversation, or begin one. Raises SessionError."""
        from swat_lm.serve.sessions.record import SessionError, check_name

        check_name(name)
        try:
            found = self._sessions.describe(name).result()
        except SessionError as error:
            if error.kind != "unknown":
                raise
            messages().print(f"{name}: a new conversation", style="dim", markup=False)
        else:
            record = found.record
            messages().print(
                f"{name}: goes on after {counted(record.turns, 'turn')}, {counted(record.num_tokens, 'token')}",
                style="dim", markup=False,
            )  # fmt: skip
        self.name = name

    def say(self, text: str) -> None:
        """One turn: the reply is written as it comes. Raises ValueError where there is none."""
        events: queue.Queue[Event] = queue.Queue()
        key = f"chat-{next(self._keys)}"
        kind = "chat" if self._language.can_chat else "text"
        shown: list[Event] = []
        try:
            self._sessions.turn(
                self.name, kind, key, lambda record: self._asked(record, key, text), events.put
            ).result()
            reply = self._show(events, shown)
        except (KeyboardInterrupt, SystemExit) as stopped:
            last = shown[-1].shown if shown else (0, "")
            self._sessions.cancel(key, last, "".join(event.text for event in shown)).result()
            # what is looked at next comes after what is written; until then the conversation is busy
            with contextlib.suppress(ValueError):
                self._sessions.describe(self.name).result()
            if isinstance(stopped, SystemExit):
                raise
            messages().print("\nstopped" + ("" if last != (0, "") else "; the message was taken back"), markup=False)
            if self.has_turns():
                self._show_state(Shown(0, 0.0))
            return
        self._show_state(reply)

    def _asked(self, record: Any, key: str, text: str) -> Any:
        """What is new of the session in this turn."""
        from swat_lm.serve.generation import Generation
        from swat_lm.serve.sessions.conversation import Message, begin_chat, continue_chat
        from swat_lm.serve.sessions.outcome import Asked

        sampling = of_turn(self._sampling, record.turns)
        if not self._language.can_chat:
            tokens = self._language.encode(text) if record.turns else self._language.prompt(text).tokens
            return Asked(Generation(key, tokens, sampling))
        said = [Message("user", text)]
        if record.turns:
            conversation = continue_chat(self._language.chat, record, said)
        else:
            first = [] if self._system is None else [Message("system", self._system)]
            conversation = begin_chat(self._language.chat, [*first, *said])
        return Asked(Generation(key, self._language.encode(conversation.text), sampling), conversation)

    def _show(self, events: "queue.Queue[Event]", shown: "list[Event]") -> Shown:
        """Write a reply as it comes; `shown` has its events."""
        times: list[float] = []
        while True:
            event = events.get()
            if event.ended == "error":
                write("\n" if shown else "")
                raise ValueError(f"the reply failed, and the turn was taken back: {event.error}")
            write(event.text)
            shown.append(event)
            if event.choice is not None:
                times = [times[0] if times else time.monotonic(), time.monotonic()]
            if event.ended is not None:
                write("\n")
                count = sum(one.choice is not None for one in shown)
                return Shown(count, times[1] - times[0] if times else 0.0)

    def _show_state(self, reply: Shown) -> None:
        found = self._sessions.describe(self.name).result()
        speed = f" · {(reply.count - 1) / reply.seconds:.1f} tokens/s" if reply.count > 1 and reply.seconds > 0 else ""
        messages().print(f"[{self._state(found)}{speed}]", style="dim", markup=False)

    def _state(self, found: "Description") -> str:
        kept = "the most that it may have" if self._sessions.book.engine.slots.grows else "constant"
        size = "of another model"
        if found.state_bytes is not None:
            size = f"state {counted(found.state_bytes, 'byte')}, {kept}"
        return f"{found.record.session} · {size} · {counted(found.record.num_tokens, 'token')}"

    def has_turns(self) -> bool:
        """Whether there is anything of the conversation."""
        from swat_lm.serve.sessions.record import SessionError

        try:
            return self._sessions.describe(self.name).result().record.turns > 0
        except SessionError:
            return False

    def fork(self, name: str) -> None:
        """Copy the conversation. Raises SessionError."""
        self._sessions.fork(self.name, name).result()
        messages().print(f"{name}: a copy of {self.name}; /go {name} goes on with it", markup=False)

    def save(self, name: str) -> None:
        """Write the conversation as one file. Raises SessionError, OSError."""
        from swat_lm.files import write_bytes

        path = Path(name).expanduser()
        check_new_file(path, "/save")
        content = self._sessions.export(self.name).result()
        write_bytes(path, content)
        messages().print(f"{path}: {counted(len(content), 'byte')}", markup=False)

    def load(self, name: str) -> None:
        """Take a conversation from a file and go on with it. Raises SessionError, OSError."""
        path = Path(name).expanduser()
        size, most = path.stat().st_size, self._sessions.most_bytes()
        if size > most:
            raise ValueError(
                f"{path}: has {counted(size, 'byte')}, more than a conversation of this model can ({most:,})"
            )
        self._sessions.bring_in(path.stem, path.read_bytes()).result()
        self.go(path.stem)

    def show_all(self) -> None:
        """Every conversation that is kept."""
        found = self._sessions.all().result()
        if not found:
            messages().print("none yet")
        for one in found:
            mark = "*" if one.record.session == self.name else " "
            messages().print(f"{mark} {self._state(one)} · {counted(one.record.turns, 'turn')}", markup=False)

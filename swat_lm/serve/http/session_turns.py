"""What a request that names a session asks of it: `session_id`, in completions and in chats."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from swat_lm.serve.generation import Generation
from swat_lm.serve.http.asking import Counts, Options, Prompt, Served, room
from swat_lm.serve.http.bodies import shortly
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.streams import SessionTurn
from swat_lm.serve.sessions.conversation import Message, begin_chat, continue_chat
from swat_lm.serve.sessions.hosted import HostedSessions
from swat_lm.serve.sessions.outcome import Asked
from swat_lm.serve.sessions.record import Record, SessionError

__all__ = ["chat_turn", "check_text_turn", "sessions_of", "text_turn"]


def sessions_of(sessions: HostedSessions | None, asked: bool = True) -> HostedSessions:
    """The server's sessions, for a request that names one (`asked`), or by their address. Raises ApiError for none."""
    if sessions is None:
        name = "session_id: " if asked else ""
        advice = ", or leave it out" if asked else ""
        message = f"{name}this server keeps no sessions; start it with --sessions FOLDER{advice}"
        raise ApiError(400, message, "session_id" if asked else None, "no_sessions")
    return sessions


def session_of(served: Served, asked: Options) -> str:
    """The session that a request names. Raises ApiError for what no session can be asked."""
    sessions_of(served.sessions)
    name = asked.session_id
    if not isinstance(name, str):
        raise ApiError(400, f"session_id: expected a text, got {shortly(name)}", "session_id")
    if asked.n is not None and asked.n != 1:
        message = f"n: expected 1 in a session, got {shortly(asked.n)}; fork the session for other replies"
        raise ApiError(400, message, "n")
    return name


def check_turns(asked: Options, record: Record) -> None:
    """Raise SessionError where the session has other turns than who asks knows of."""
    known = asked.session_turns
    if known is None:
        return
    if isinstance(known, bool) or not isinstance(known, int):
        raise ApiError(400, f"session_turns: expected a whole number from 0, got {shortly(known)}", "session_turns")
    if known != record.turns:
        raise SessionError(
            "history",
            f"session_turns: expected {record.turns}, the turns of session {record.session!r}; got {known}; a request "
            "that was sent again may have been answered already",
        )


def check_text_turn(served: Served, asked: Any) -> None:
    """Raise ApiError where a completion in a session asks for what none can give."""
    if asked.session_id is None:
        return
    session_of(served, asked)
    if asked.echo:
        raise ApiError(400, "echo: expected false in a session, which does not keep its text", "echo")


def chat_turn(
    served: Served,
    asked: Options,
    generation: Generation,
    messages: Sequence[Mapping[str, Any]],
    most: int | None,
    counts: Counts,
) -> SessionTurn:
    """Messages that go on with a session: only what is new, or the whole conversation as the session has it.

    Args:
        generation: how the reply is drawn, without tokens.
        most: tokens of the reply; None: as many as there is room for.
        counts: filled when the prompt is known.

    Raises ApiError, also for a message that has a name.
    """
    session = session_of(served, asked)
    for place, one in enumerate(messages):
        if one.get("name") is not None:
            message = "expected none in a session, which keeps only roles and texts; put the name into the content"
            raise ApiError(400, f"messages[{place}].name: {message}, got {shortly(one['name'])}",
                           f"messages[{place}].name")  # fmt: skip
    said = [Message(one["role"], one["content"]) for one in messages]

    def prepare(record: Record) -> Asked:
        check_turns(asked, record)
        write = served.language.chat
        conversation = continue_chat(write, record, said) if record.turns else begin_chat(write, said)
        made = with_tokens(served, generation, record, served.language.encode(conversation.text), most, counts)
        return Asked(made, conversation)

    return SessionTurn(session, "chat", generation, prepare, bool(asked.stream))


def text_turn(
    served: Served, asked: Options, prompts: Sequence[Prompt], generation: Generation, counts: Counts
) -> SessionTurn:
    """A text, or tokens, that a session goes on with. Raises ApiError for several."""
    session = session_of(served, asked)
    if len(prompts) != 1:
        raise ApiError(400, f"prompt: expected one in a session, got {len(prompts)}", "prompt")
    (prompt,) = prompts

    def prepare(record: Record) -> Asked:
        check_turns(asked, record)
        tokens = prompt.tokens
        if prompt.text is not None and record.turns:
            # only a conversation's first text begins one
            tokens = served.language.encode(prompt.text)
        return Asked(with_tokens(served, generation, record, tokens, generation.sampling.max_tokens, counts))

    return SessionTurn(session, "text", generation, prepare, bool(asked.stream))


def with_tokens(
    served: Served, generation: Generation, record: Record, tokens: list[int], most: int | None, counts: Counts
) -> Generation:
    """A request for a session with its new tokens, and as long a reply as there is room for."""
    # those that are pending are read in this turn
    counts.cached = record.held
    counts.prompt = record.num_tokens + len(tokens)
    sampling = generation.sampling
    if most is None:
        sampling = replace(sampling, max_tokens=room(served, counts.prompt))
    return replace(generation, tokens=tokens, sampling=sampling)

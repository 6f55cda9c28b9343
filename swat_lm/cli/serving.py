"""`swat-lm serve`: OpenAI's API over one model, on this machine."""

import asyncio
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swat_lm.cli.checkpoints import find_export, load_checkpoint
from swat_lm.cli.console import messages
from swat_lm.cli.generation import end_tokens
from swat_lm.cli.options import DEVICE, TOKENIZER
from swat_lm.words import counted, install_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from swat_lm.model.configuration import SwatConfig
    from swat_lm.serve.engine import Engine
    from swat_lm.serve.host import Host
    from swat_lm.serve.language import Cut
    from swat_lm.serve.requests import Limits
    from swat_lm.serve.sessions.book import Policy
    from swat_lm.serve.sessions.hosted import HostedSessions

__all__ = ["serve"]

NEEDS = ("fastapi", "llguidance", "prometheus_client", "uvicorn")
KEY_VARIABLE = "SWAT_LM_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
SLOTS, PIECE, WAITING, PANELS = 8, 256, 256, "1GiB"


def serve(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, an exported folder, or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one, which is printed.")] = 8000,
    slots: Annotated[
        int | None, typer.Option(min=1, help=f"Replies that are written at once; default {SLOTS}.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Instead of --slots: as many as fit, such as 2GiB, beside the weights.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a slot holds; needed where a layer keeps all it has seen.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompts are read in pieces of so many tokens.")] = PIECE,
    token_budget: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a step; default a piece and one token a slot.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in line; more are refused.")] = WAITING,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 4096,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Who asks needs one of its keys, one a line; or set {KEY_VARIABLE}.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Pages of this origin may ask from a browser; repeatable, * for all.")
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "16MiB",
    rate_limit: Annotated[
        float | None, typer.Option(help="Requests a minute for each key, or for each address without keys.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="At the end: how long replies that are begun may take.")
    ] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked into the log.")] = False,
    sessions: Annotated[
        str | None, typer.Option(help="Keep conversations there, a folder or what fsspec opens; see session_id.")
    ] = None,
    session_expiry: Annotated[
        float | None, typer.Option(min=1, help="Seconds after which a session that nobody uses is removed.")
    ] = None,
    session_idle: Annotated[
        float, typer.Option(min=0, help="Seconds after which the state of a session is written to its file.")
    ] = 30.0,
    session_every: Annotated[
        int, typer.Option(min=1, help="It is written at least after so many tokens; a crash costs reading them again.")
    ] = 1024,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="On a GPU: decode by recorded graphs, where no layer keeps all.")
    ] = False,
    panel_memory: Annotated[
        str, typer.Option(help="On a CPU: most a second copy of the weights may take, for faster batches; 0: none.")
    ] = PANELS,
    tokenizer: TOKENIZER = None,
    device: DEVICE = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does.

    Requests share the model step by step; each has a slot for what the model keeps of it, of a size that does not grow
    with the text where all layers are windows or recurrences. Ctrl-C and SIGTERM let replies that are begun end first;
    a second one stops at once. The log comes as JSON lines on stderr.

    \b
    Examples:
      swat-lm serve demo/swat
      swat-lm serve models/smollm2 --port 0 --memory 2GiB --api-key-file keys.txt
      curl localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "swat", "prompt": "def main(", "max_tokens": 20}'
    """
    check_extra()
    from swat_lm.serve.http.app import create_app
    from swat_lm.serve.http.server import Server, listen, log_lines
    from swat_lm.serve.http.settings import Settings
    from swat_lm.serve.sessions.book import Policy

    if rate_limit is not None and not 0 < rate_limit < float("inf"):
        raise ValueError(f"--rate-limit: expected a number above 0, got {rate_limit:g}; leave it out for no limit")
    if session_expiry is not None and sessions is None:
        raise ValueError("--session-expiry: expected only with --sessions, which says where sessions are kept")
    limits = limits_of(
        checkpoint, slots, memory, context, prefill_chunk, token_budget, max_waiting, sessions is not None
    )
    settings = Settings(
        model_name(checkpoint), max_new_tokens, size_of(max_body, "--max-body"), max_waiting,
        keys_of(api_key_file), rate_limit, tuple(cors_origin or ()), log_prompts,
    )  # fmt: skip
    panel_bytes = 0 if panel_memory.strip() == "0" else size_of(panel_memory, "--panel-memory")
    # before the model, which takes long to load
    socket = listen(host, port)
    place = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}"
    if host not in LOOPBACK and not settings.api_keys:
        messages().print(
            f"warning: whoever reaches {host} may ask, since no API key is set: see --api-key-file", markup=False
        )
    policy = Policy(session_every, session_idle, session_expiry)
    engine_host, kept = hosted(
        opener(checkpoint, tokenizer, device, limits, cuda_graphs, panel_bytes), sessions, policy
    )
    server = Server(create_app(engine_host, settings, kept, cutter), engine_host, drain_seconds)
    messages().print(f"listening on {place}, model {settings.model!r}; loading", markup=False)
    log_lines()
    engine_host.start()
    try:
        asyncio.run(server.serve([socket]))
    finally:
        socket.close()
    if engine_host.failure is not None:
        raise engine_host.failure
    messages().print("stopped")


def check_extra() -> None:
    """Raise ValueError unless all is installed that a server needs."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {missing[0]}, which is not installed: {install_extra('serve')}")


def cutter(tokens: "PreTrainedTokenizerFast") -> "Cut":
    """What cuts long texts where the tokenizer leaves their tokens as they are."""
    from swat_lm.data.cutting import Cutter, find_cuts
    from swat_lm.data.source_text import cut

    cuts = find_cuts(tokens.backend_tokenizer.to_str())
    return lambda text: cut([text], Cutter(cuts, "a request's text"))


def opener(
    checkpoint: str,
    tokenizer: str | None,
    device: str | None,
    limits: "Limits",
    graphs: bool = False,
    panel_bytes: int = 0,
) -> "Callable[[HostedSessions | None], Engine]":
    """What loads the model, in the thread in which it will run; sessions take part from then on."""

    def open_engine(sessions: "HostedSessions | None") -> "Engine":
        from swat_lm.model.fingerprint import fingerprint
        from swat_lm.serve.engine import Engine

        model, tokens = load_checkpoint(checkpoint, tokenizer, device)
        if sessions is not None:
            # goes with every session, and is formed faster while the weights lie in rows
            fingerprint(model)
        copied = 0
        if model.device.type == "cpu":
            # one row at a time has no use for panels
            copied = model.arrange_for_decoding(panel_bytes if limits.num_slots > 1 else 0)
        restorable = sessions is not None
        engine = Engine(model, limits, tokens, end_tokens(model, tokens), restorable=restorable, graphs=graphs)
        if sessions is not None:
            sessions.attach(engine, lambda said: messages().print(said, markup=False))
        each = engine.slots.num_bytes // engine.slots.batch_size
        messages().print(
            f"ready: {counted(limits.num_slots, 'slot')} of {counted(each, 'byte')}"
            + (f", for {counted(limits.capacity, 'token')} each" if limits.capacity is not None else "")
            + (f"; weights a second time for batches, {counted(copied, 'byte')}" if copied else ""),
            markup=False,
        )
        return engine

    return open_engine


def hosted(
    open_engine: "Callable[[HostedSessions | None], Engine]", place: str | None, policy: "Policy"
) -> "tuple[Host, HostedSessions | None]":
    """A host that will open an engine, and its sessions where they have a place. Raises OSError, SessionError."""
    from swat_lm.serve.host import Host
    from swat_lm.serve.sessions.hosted import HostedSessions
    from swat_lm.serve.sessions.store import open_store

    host = Host(lambda: open_engine(kept))
    kept = None if place is None else HostedSessions(host, open_store(place), policy)
    return host, kept


def limits_of(
    checkpoint: str, slots: int | None, memory: str | None, context: int | None, prefill_chunk: int = PIECE,
    token_budget: int | None = None, max_waiting: int = WAITING, with_sessions: bool = False,
) -> "Limits":  # fmt: skip
    """What the engine shares out, checked against the model's configuration before its weights are read."""
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.serve.pool import slots_in
    from swat_lm.serve.requests import Limits

    config = SwatConfig.from_pretrained(find_export(checkpoint))
    check_context(config, context)
    if slots is not None and memory is not None:
        raise ValueError("--slots and --memory: give one of them; the other follows from it")
    count = slots or SLOTS
    if memory is not None:
        try:
            count = slots_in(config, size_of(memory, "--memory"), context, restorable=with_sessions)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
    budget = prefill_chunk + count if token_budget is None else token_budget
    if budget <= prefill_chunk:
        raise ValueError(
            f"--token-budget: expected above --prefill-chunk ({prefill_chunk}), got {budget}; a step has room for a "
            "piece of a prompt and a decoded token"
        )
    return Limits(count, budget, prefill_chunk, max_waiting, context)


def check_context(config: "SwatConfig", context: int | None) -> None:
    """Raise ValueError unless --context is given exactly where a slot grows with the text."""
    from swat_lm.model.cost import layers_without_weights

    grows = any(entry.kind == "growing" for layer in layers_without_weights(config) for entry in layer.state_spec())
    if grows and context is None:
        raise ValueError(
            "--context: a layer of this model keeps all it has seen, so say how many tokens a slot is to hold, such as "
            f"--context {config.max_position_embeddings or 2048}; or give it windows: swat-lm convert --window"
        )
    if not grows and context is not None:
        raise ValueError("--context: every slot of this model holds a text of any length; leave it out")


def size_of(text: str, option: str) -> int:
    """`2GiB`, `500MB` or `1048576` as bytes; raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or (size := int(float(found[1]) * UNITS[found[2].upper()])) < 1:
        raise ValueError(f"{option}: expected bytes, such as 512MiB, 2GiB or 1000000; got {text!r}")
    return size


def model_name(checkpoint: str) -> str:
    """What the model is called in requests: the folder's name, or the run's where that is `export`."""
    path = Path(checkpoint).expanduser()
    path = path.resolve() if path.exists() else path
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def keys_of(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file, one a line, and that of the environment; raises ValueError for what is none."""
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if path is not None and not keys:
        raise ValueError(f"--api-key-file: {path} holds no key; write one on each line")
    named = [(f"key {number} of {path}", key) for number, key in enumerate(keys, 1)]
    named += [(KEY_VARIABLE, key)] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    for name, key in named:
        if not re.fullmatch(r"[!-~]{8,}", key):
            # never the key itself
            raise ValueError(f"{name}: expected at least 8 visible ASCII characters without spaces")
    return tuple(key for _, key in named)

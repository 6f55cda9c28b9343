"""Sessions driven by hand, in one thread: what the store's thread and the engine's would do is done in turns."""

from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from itertools import count
from pathlib import Path
from typing import Any

import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.data import load_tokenizer
from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.requests import Limits
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.sessions.book import Book, Front, Policy
from swat_lm.serve.sessions.conversation import Message, begin_chat, continue_chat
from swat_lm.serve.sessions.keeper import Keeper
from swat_lm.serve.sessions.outcome import Asked
from swat_lm.serve.sessions.record import Record
from swat_lm.serve.sessions.store import FolderStore, Store
from swat_lm.serve.sessions.turns import Turns
from tests.serve.test_engine import PLANS

TOKENIZER = load_tokenizer("bytes")
ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
TOKENIZER.chat_template = ROLES + "{% if add_generation_prompt %}<assistant>{% endif %}"


def written(messages: Any) -> str:
    return str(TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def built(plan: str, seed: int = 0) -> SwatForCausalLM:
    torch.manual_seed(seed)
    return SwatForCausalLM(SwatConfig(
        vocab_size=272, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layers=PLANS[plan], initializer_range=0.3, eos_token_id=257,
    )).eval()  # fmt: skip


class Inline(Executor):
    """Does what it is asked at once."""

    def submit(self, job: Callable[..., Any], /, *arguments: Any, **more: Any) -> "Future[Any]":  # type: ignore[override]
        future: Future[Any] = Future()
        try:
            future.set_result(job(*arguments, **more))
        except Exception as error:
            future.set_exception(error)
        return future


class Server:
    """An engine with sessions, and nothing around it."""

    def __init__(
        self, model: SwatForCausalLM, store: Store | Path, slots: int = 2, capacity: int | None = None,
        chunk: int = 7, **policy: Any,
    ) -> None:  # fmt: skip
        self.store = FolderStore(store) if isinstance(store, Path) else store
        self.now = 1000.0
        self.engine = Engine(
            model, Limits(slots, slots + chunk, chunk, capacity=capacity), TOKENIZER, [257], restorable=True
        )
        self.listening: dict[Hashable, Callable[[Event], None]] = {}
        self.posted: deque[Callable[[], None]] = deque()
        front = Front(self.posted.append, self.submit, self.stop, self.refuse)
        self.book = Book(self.engine, self.store, front, Policy(**policy), Inline(), lambda: self.now)
        self.recovered = self.book.recover(lambda said: None)
        self.turns, self.keeper, self.keys = Turns(self.book, Inline()), Keeper(self.book), count()
        self.events: dict[Hashable, list[Event]] = {}

    def submit(self, generation: Generation, deliver: Callable[[Event], None]) -> None:
        self.engine.submit(generation)
        self.listening[generation.key] = deliver

    def stop(self, key: Hashable) -> Event:
        del self.listening[key]
        return self.engine.stop(key)

    def refuse(self, key: Hashable, error: Exception) -> None:
        self.engine.abort(key)
        self.listening.pop(key)(Event(key, ended="error", error=str(error), cause=error))

    def loop(self, most: int = 3000, until: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing is left to do."""
        for _ in range(most):
            while self.posted:
                self.posted.popleft()()
            if until() or (self.engine.is_idle and not self.posted):
                return
            self.book.before_step()
            for event in self.engine.step():
                deliver = self.listening[event.key]
                if event.ended:
                    del self.listening[event.key]
                deliver(event)
        raise AssertionError("requests are left")

    def begin(self, name: str, said: str | list[Message], **sampling: Any) -> tuple[int, "Future[None]"]:
        """A turn in line: its key, and the future that says so."""
        key = next(self.keys)
        options = Sampling(**{"temperature": 0, "max_tokens": 6, "ignore_end": True, "vocab_size": 127, **sampling})
        self.events[key] = []

        def prepare(record: Record) -> Asked:
            if isinstance(said, str):
                text, conversation = said, None
            else:
                conversation = continue_chat(written, record, said) if record.turns else begin_chat(written, said)
                text = conversation.text
            tokens = TOKENIZER.encode(text, add_special_tokens=False)
            return Asked(Generation(key, tokens, options), conversation)

        kind: Any = "text" if isinstance(said, str) else "chat"
        return key, self.turns.turn(name, kind, key, prepare, self.events[key].append)

    def say(self, name: str, said: str | list[Message], **sampling: Any) -> str:
        """A whole turn: the reply's text."""
        key, future = self.begin(name, said, **sampling)
        self.loop()
        future.result(0)
        end = self.events[key][-1]
        assert end.ended not in (None, "error"), end
        return "".join(event.text for event in self.events[key])

    def record(self, name: str) -> Record:
        return self.done(self.keeper.describe(name)).record

    def done(self, future: "Future[Any]") -> Any:
        self.loop()
        return future.result(0)

    def state(self, name: str) -> tuple[Record, dict[str, torch.Tensor]]:
        """What a session is, wherever it is."""
        record, tensors = self.book.shelf.checked(self.done(self.keeper.export(name)))
        # when it was last used is no part of what was said
        return record.model_copy(update={"used": 0.0, "created": 0.0, "session": ""}), tensors

    def die(self) -> None:
        """As kill -9 does: nothing is written, the lock goes."""
        self.store.close()


def same_state(first: tuple[Record, dict], second: tuple[Record, dict]) -> bool:
    """To the bit."""
    return first[0] == second[0] and first[1].keys() == second[1].keys() and all(
        torch.equal(first[1][name], second[1][name]) for name in first[1])  # fmt: skip


def capacity(plan: str) -> int | None:
    """Of a server of such a plan: full attention needs one."""
    return 200 if plan == "full" else None


def check_holds(server: Server, name: str, text: str) -> None:
    """Its state is that of the model which has read just this text, and nothing else."""
    record, tensors = server.state(name)
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert record.num_tokens == len(tokens)
    assert list(record.pending) == tokens[record.held :]
    model, most, slot = server.engine.model, server.engine.scheduler.limits.capacity, torch.zeros(1, dtype=torch.int64)
    held, alone = model.init_state(1, capacity=most), model.init_state(1, capacity=most)
    held.restore(slot, tensors)
    if record.held:
        model.extend(torch.tensor([tokens[: record.held]]), alone)
    more = torch.tensor([[*tokens[record.held :], *b"and what follows"]])
    torch.testing.assert_close(model.extend(more, held), model.extend(more, alone), rtol=1e-3, atol=1e-4)


def flipped(content: bytes) -> bytes:
    """With one bit of the state changed."""
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]

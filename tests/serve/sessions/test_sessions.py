"""Sessions hold what their clients saw, go on from slot, file and journal to the bit, and lose nothing acknowledged."""

import errno
from pathlib import Path

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.serve.requests import RequestError
from swat_lm.serve.sessions.conversation import Message
from swat_lm.serve.sessions.record import SessionError
from tests.serve.sessions.driver import PLANS, TOKENIZER, Server, built, same_state


def capacity(plan: str) -> int | None:
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


@pytest.mark.parametrize("plan", PLANS)
def test_a_session_goes_on_from_its_slot_and_from_its_file(plan: str, tmp_path: Path):
    server = Server(built(plan), tmp_path, slots=1, capacity=capacity(plan))
    text = ""
    for said in ("first words", " and more", "!"):
        text += said + server.say("a", said)
        check_holds(server, "a", text)
        # another session takes the only slot, so this one goes to its file
        server.say("b", "x")
        described = server.done(server.keeper.describe("a"))
        assert not described.in_slot
        assert described.file_bytes > 0
        check_holds(server, "a", text)
    assert server.record("a").turns == 3
    assert server.engine.scheduler.kept.keys() == {0}


def test_the_state_is_what_the_client_saw(tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    whole = server.say("whole", "some words", max_tokens=12)
    # a stop string that ends within the reply, after its first character
    stop = whole[3:6]
    assert stop not in whole[:3]
    text = server.say("cut", "some words", max_tokens=12, stop=(stop,))
    assert whole.startswith(text)
    check_holds(server, "cut", "some words" + text)
    after = "some words" + text + "."
    check_holds_next = server.say("cut", ".")
    check_holds(server, "cut", after + check_holds_next)
    # only read
    assert server.say("read", "some words", max_tokens=0) == ""
    check_holds(server, "read", "some words")
    assert server.say("read", "?") == server.say("alone", "some words?")


def test_turns_that_are_cut_are_read_once(tmp_path: Path):
    model = built("recurrence")
    server, text = Server(model, tmp_path / "a"), ""
    for turn in range(4):
        whole = server.say(f"probe {turn}", text + "go on", max_tokens=9)
        # of more than one token: what the slot has read of it is taken back
        stop = whole[3:6]
        text += "go on" + server.say("a", "go on", max_tokens=9, stop=(stop,))
        record = server.record("a")
        assert (record.held, record.pending) == (len(text), ())
        check_holds(server, "a", text)
    before = server.state("a")
    server.die()
    assert same_state(Server(model, tmp_path / "a").state("a"), before)


def test_a_last_text_that_fails_takes_the_turn_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("full"), tmp_path, capacity=20)
    text = "begin" + server.say("a", "begin", max_tokens=2)
    # until its slot is full: the scheduler ends it, and then its text fails
    key, _ = server.begin("a", "on", max_tokens=None)
    server.loop(until=lambda: bool(server.events[key]))

    def no_text(reason: str) -> None:
        raise TypeError("no text")

    monkeypatch.setattr(server.engine._requests[key].replies[0].text, "finish", no_text)
    server.loop()
    assert server.events[key][-1].error == "TypeError: no text"
    assert server.record("a").turns == 1
    assert server.say("a", "on", max_tokens=2) == server.say("b", text + "on", max_tokens=2)


def test_a_slot_that_cannot_be_prepared_gives_nobody_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path, slots=1)
    text = "begin" + server.say("a", "begin")
    server.say("b", "somebody else's words")

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        # of one that comes from its file, of a new one, and of one that is in its slot
        patched.setattr(server.engine.slots, "restore", fails)
        patched.setattr(server.engine.slots, "reset", fails)
        patched.setattr(server.engine.slots, "copy", fails)
        for name in ("a", "new", "a"):
            key, _ = server.begin(name, "?")
            server.loop()
            assert server.events[key][-1].error == "out of memory"
    check_holds(server, "a", text)
    server.say("a", "!")
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.slots, "copy", fails)
        key, _ = server.begin("a", "?")
        server.loop()
        assert server.events[key][-1].error == "out of memory"
    assert server.record("a").turns == 2
    assert server.say("a", "?")


def test_a_state_that_cannot_be_copied_now_is_saved_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path, slots=1)
    server.say("a", "x")
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.slots, "snapshot", lambda slot: (_ for _ in ()).throw(RuntimeError("no memory")))
        key, _ = server.begin("b", "x")
        server.loop()
        assert "no slot is free" in server.events[key][-1].error
    server.now += 11
    assert server.say("b", "x")
    assert server.say("a", "y")


def test_a_step_that_fails_as_a_whole_takes_the_turn_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(built("windows"), tmp_path)
    text = "begin" + server.say("a", "begin")
    key, _ = server.begin("a", "on")
    server.loop(until=lambda: len(server.events[key]) == 2)
    with monkeypatch.context() as patched:
        patched.setattr(server.engine, "_report", lambda events: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.engine.step()
    (end,) = server.engine.casualties
    server.listening.pop(key)(end)
    check_holds(server, "a", text)
    assert server.say("a", "on")


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_cancelled_turn_is_as_delivered(lag: int, tmp_path: Path):
    server = Server(built("recurrence"), tmp_path)
    first = server.say("a", "begin")
    key, _ = server.begin("a", " go on", max_tokens=50)
    server.loop(until=lambda: len(server.events[key]) == 8)
    got = server.events[key][: 8 - lag]
    text = "".join(event.text for event in got)
    assert server.turns.cancel(key, got[-1].shown, text)
    assert not server.turns.cancel(key)
    server.loop()
    check_holds(server, "a", "begin" + first + " go on" + text)
    assert server.say("a", "?") == server.say("b", "begin" + first + " go on" + text + "?")


def test_a_turn_of_which_nothing_was_delivered_did_not_happen(tmp_path: Path):
    server = Server(built("recurrence"), tmp_path, slots=1)
    first = server.say("a", "begin")
    # in line, while it is read, and before anything was delivered
    for events in (0, 0, 3):
        key, _ = server.begin("a", "y" * 30, max_tokens=9)
        steps = iter(range(2 if events == 0 else 99))
        server.loop(until=lambda steps=steps, key=key, events=events: next(steps, None) is None
                    or bool(events and len(server.events[key]) >= events))  # fmt: skip
        assert server.turns.cancel(key)
        server.loop()
        check_holds(server, "a", "begin" + first)
        assert server.record("a").turns == 1
    key, _ = server.begin("new", "never", max_tokens=9)
    server.loop(until=lambda: bool(server.events[key]))
    server.turns.cancel(key)
    server.loop()
    with pytest.raises(SessionError, match="there is none"):
        server.record("new")
    # its slot is free: somebody else gets it
    assert server.say("other", "x")


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_acknowledged_is_lost_to_a_kill(plan: str, tmp_path: Path):
    model = built(plan)
    server = Server(model, tmp_path / "store", slots=3, capacity=capacity(plan))
    server.say("saved", "x" * 20)
    server.say("other", "yy")
    # of several sizes of batches, and from different rows
    keys = [server.begin(name, f"{name} says things", max_tokens=count)[0]
            for name, count in (("one", 5), ("two", 9), ("saved", 12))]  # fmt: skip
    server.loop()
    assert all(server.events[key][-1].ended for key in keys)
    server.say("one", "more", stop=("\x00",), max_tokens=20)
    names = ("saved", "other", "one", "two")
    before = {name: server.state(name) for name in names}
    key, _ = server.begin("two", "this turn is not acknowledged", max_tokens=30)
    server.loop(until=lambda: len(server.events[key]) > 3)
    server.die()
    again = Server(model, tmp_path / "store", slots=3, capacity=capacity(plan))
    assert again.recovered >= 2
    for name in names:
        assert same_state(again.state(name), before[name]), name
    assert not again.store.journals()
    assert again.say("two", "?")


def test_every_so_many_tokens_and_when_idle_a_session_is_written(tmp_path: Path):
    server = Server(built("windows"), tmp_path, every=40, idle=30)
    server.say("a", "x" * 20)
    assert server.store.snapshots() == []
    server.say("a", "x" * 20)
    assert len(server.store.snapshots()) == 1
    assert server.store.journals() == []
    server.say("a", "x")
    assert len(server.store.journals()) == 1
    server.now += 31
    server.book.tick()
    server.loop()
    assert server.store.journals() == []
    assert server.done(server.keeper.describe("a")).in_slot


def test_sessions_expire(tmp_path: Path):
    server = Server(built("windows"), tmp_path, slots=1, expiry=100)
    server.say("on disk", "x")
    server.say("in slot", "x")
    server.now += 90
    server.say("in slot", "x")
    server.now += 20
    server.book.tick()
    server.loop()
    assert [found.record.session for found in server.done(server.keeper.all())] == ["in slot"]
    server.now += 101
    server.book.tick()
    server.loop()
    assert server.done(server.keeper.all()) == []
    assert server.engine.scheduler.free_slots == 1


def test_a_fork_goes_on_by_itself(tmp_path: Path):
    server = Server(built("recurrence"), tmp_path)
    text = "begin" + server.say("a", "begin")
    server.done(server.keeper.fork("a", "b"))
    assert same_state(server.state("a"), server.state("b"))
    one, other = server.say("a", " left"), server.say("b", " right")
    check_holds(server, "a", text + " left" + one)
    check_holds(server, "b", text + " right" + other)
    for wrong, kind in (
        (("a", "b"), "exists"),
        (("none", "c"), "unknown"),
        (("a", ""), "name"),
        (("a", "a"), "exists"),
    ):
        with pytest.raises(SessionError) as refused:
            server.done(server.keeper.fork(*wrong))
        assert refused.value.kind == kind


def test_a_session_moves_to_another_server_as_one_file(tmp_path: Path):
    model = built("windows")
    server, other = Server(model, tmp_path / "a"), Server(model, tmp_path / "b")
    server.say("a", "x" * 50)
    content = server.done(server.keeper.export("a"))
    other.done(other.keeper.bring_in("moved", content))
    assert other.say("moved", "?") == server.say("a", "?")
    assert len(content) < server.keeper.most_bytes()
    size = server.done(server.keeper.describe("a")).state_bytes
    server.say("a", "x" * 700)
    long = server.done(server.keeper.export("a"))
    assert abs(len(long) - len(content)) < 200
    assert server.done(server.keeper.describe("a")).state_bytes == size
    for wrong, kind in (
        (content[:-1], "damaged"), (b"", "damaged"), (b"no such file" * 100, "damaged"), (flipped(content), "damaged"),
        (b"\xff" * 8 + content[8:], "damaged"),
    ):  # fmt: skip
        with pytest.raises(SessionError) as refused:
            other.done(other.keeper.bring_in("new", wrong))
        assert refused.value.kind == kind
    strange = Server(built("windows", seed=1), tmp_path / "c")
    with pytest.raises(SessionError, match="by another model"):
        strange.done(strange.keeper.bring_in("a", content))
    assert strange.done(strange.keeper.all()) == []


def flipped(content: bytes) -> bytes:
    """With one bit of the state changed."""
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def test_a_session_has_one_request_at_a_time(tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    _, first = server.begin("a", "x")
    _, second = server.begin("a", "y")
    with pytest.raises(SessionError, match="wait for it") as refused:
        second.result(0)
    assert refused.value.kind == "busy"
    for call in (server.keeper.export("a"), server.keeper.fork("a", "b"), server.book.delete("a")):
        with pytest.raises(SessionError, match=r"wait for it|there is none"):
            server.done(call)
    first.result(0)


def test_deleted_is_gone(tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    for name, file in (("slot", 0), ("file", 1)):
        server.say(name, "x")
        if file:
            server.say("b", "x")
            server.say("c", "x")
        server.done(server.book.delete(name))
        for call in (server.keeper.describe(name), server.keeper.export(name), server.book.delete(name)):
            with pytest.raises(SessionError, match="there is none"):
                server.done(call)
        assert server.say(name, "x") == server.say(f"{name} again", "x")


def test_a_full_disk_fails_the_turn_and_keeps_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    server = Server(built("windows"), tmp_path, slots=1)
    text = "begin" + server.say("a", "begin")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(server.store, "append", full)
        patched.setattr(server.store, "write", full)
        for name in ("a", "a"):
            key, _ = server.begin(name, "more")
            server.loop()
            assert (server.events[key][-1].ended, server.events[key][-1].cause.kind) == ("error", "storage")
            assert "No space left" in server.events[key][-1].error
        # who lacks the slot that cannot be written is told so
        key, _ = server.begin("b", "more")
        server.loop()
        assert "no slot is free" in server.events[key][-1].error
        assert server.events[key][-1].cause.kind == "storage"
    assert len([one for one in caplog.records if "said once" in one.message]) == 1
    check_holds(server, "a", text)
    assert server.record("a").turns == 1
    server.now += 11
    check_holds(server, "a", text + "on" + server.say("a", "on"))
    assert server.say("b", "more")


def test_errors_take_the_turn_back(tmp_path: Path):
    server = Server(built("full"), tmp_path, capacity=60)
    text = "begin" + server.say("a", "begin")
    with pytest.raises(RequestError, match="a slot here holds 60"):
        server.say("a", "x" * 60)
    with pytest.raises(RequestError, match="samples"):
        server.say("a", "x", n=2)
    check_holds(server, "a", text)
    key, future = server.begin("a", "x")
    weight = server.engine.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    server.loop()
    future.result(0)
    assert server.events[key][-1].ended == "error"
    with torch.no_grad():
        weight.copy_(kept)
    check_holds(server, "a", text)
    assert server.say("a", "x")


@pytest.mark.parametrize("wrong", ["", "x" * 257, "a\nb", "\ud800", 3])
def test_names_that_no_session_can_have(wrong: str, tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    for call in (server.begin(wrong, "x")[1], server.keeper.describe(wrong), server.book.delete(wrong)):
        with pytest.raises(SessionError, match="session_id: expected") as refused:
            server.done(call)
        assert refused.value.kind == "name"


def test_a_damaged_file_is_named_and_left(tmp_path: Path):
    model = built("windows")
    server = Server(model, tmp_path, slots=1)
    server.say("a", "x")
    server.say("b", "x")
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(SessionError, match="damaged") as refused:
        server.say("a", "x")
    assert refused.value.kind == "damaged"
    assert path.exists()
    assert server.say("b", "x")
    server.done(server.book.delete("a"))
    assert server.say("a", "x")


def chat(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[index % 2], content) for index, content in enumerate(contents)]


def test_a_history_whose_beginning_the_session_holds_is_recognised(tmp_path: Path):
    server = Server(built("recurrence"), tmp_path)
    first = server.say("a", chat("hello"))
    # only what is new, and everything
    second = server.say("a", chat("and now"))
    third = server.say("a", chat("hello", first, "and now", second, "why"))
    whole = f"<user>hello|<assistant>{first}|<user>and now|<assistant>{second}|<user>why|<assistant>{third}"
    check_holds(server, "a", whole)
    assert server.record("a").messages == 6
    assert server.say("b", chat("hello", first, "and now", second, "why")) == third
    for wrong, message in (
        (chat("hello", "otherwise", "and now"), "not the one of this session"),
        (chat("hello", first, "and now", second, "why", third), "holds all 6 already"),
        ([], "none is new"),
    ):
        with pytest.raises(SessionError, match=message) as refused:
            server.say("a", wrong)
        assert refused.value.kind == "history"
    with pytest.raises(SessionError, match="go on with chat completions"):
        server.say("a", "text")
    check_holds(server, "a", whole)


def test_a_system_message_that_is_sent_again_is_not_read_again(tmp_path: Path):
    server = Server(built("recurrence"), tmp_path)
    system = [Message("system", "be short")]
    first = server.say("a", [*system, *chat("hello")])
    second = server.say("a", [*system, *chat("again")])
    check_holds(server, "a", f"<system>be short|<user>hello|<assistant>{first}|<user>again|<assistant>{second}")


def test_a_conversation_of_a_million_tokens_takes_the_memory_of_a_hundred(tmp_path: Path):
    torch.manual_seed(0)
    model = SwatForCausalLM(SwatConfig(
        vocab_size=272, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        sliding_window=4, eos_token_id=257,
    )).eval()  # fmt: skip
    server = Server(model, tmp_path, chunk=16384)
    server.say("a", "x" * 100)
    size, kept = len(server.done(server.keeper.export("a"))), server.engine.slots.num_bytes
    for _ in range(4):
        server.say("a", "y" * 250_000)
    assert server.record("a").num_tokens > 1_000_000
    assert abs(len(server.done(server.keeper.export("a"))) - size) < 100
    assert server.engine.slots.num_bytes == kept
    # and what is kept is what matters: a text that ends alike is gone on with alike
    assert server.say("a", "and now?") == server.say("b", "y" * 100 + "and now?")

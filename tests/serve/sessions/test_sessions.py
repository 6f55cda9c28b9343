"""Sessions hold what their clients saw, go on from slot, file and journal to the bit, fork, move, expire and end."""

from pathlib import Path

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.serve.sessions.conversation import Message
from swat_lm.serve.sessions.record import SessionError
from tests.serve.sessions.driver import PLANS, Server, built, capacity, check_holds, flipped, same_state


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


@pytest.mark.parametrize("wrong", ["", "x" * 257, "a\nb", "\ud800", 3])
def test_names_that_no_session_can_have(wrong: str, tmp_path: Path):
    server = Server(built("windows"), tmp_path)
    for call in (server.begin(wrong, "x")[1], server.keeper.describe(wrong), server.book.delete(wrong)):
        with pytest.raises(SessionError, match="session_id: expected") as refused:
            server.done(call)
        assert refused.value.kind == "name"


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

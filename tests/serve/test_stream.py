"""Streams: any way of feeding a prompt gives the same tokens, the state is constant, characters stay whole."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.data import load_tokenizer, train_tokenizer
from swat_lm.data.tokenizer import byte_characters
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.stream import TextAssembler, generate_tokens, read_prompt

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> SwatForCausalLM:
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    return SwatForCausalLM(config).eval()


def continued(model: SwatForCausalLM, pieces: list[list[int]], count: int, chunk: int = 512) -> list[int]:
    state = model.init_state()
    logits = read_prompt(model, pieces, state, chunk)
    assert logits is not None
    return list(generate_tokens(model, logits, state, GREEDY, count))


def test_pieces_and_chunks_change_nothing(model: SwatForCausalLM):
    prompt = torch.randint(0, 259, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 60:].tolist()
    assert continued(model, [prompt], 20) == expected
    assert continued(model, [prompt[:1], [], prompt[1:31], prompt[31:]], 20) == expected
    assert continued(model, [prompt], 20, chunk=7) == expected


def test_state_stays_constant_over_many_windows(model: SwatForCausalLM):
    state = model.init_state()
    logits = read_prompt(model, [[1, 2, 3]], state)
    assert logits is not None
    sizes = {state.num_bytes for _ in generate_tokens(model, logits, state, GREEDY, 100)}
    assert sizes == {model.init_state().num_bytes}
    # the last token has been given out, not read
    assert int(state.position) == 3 + 99


def test_ends(model: SwatForCausalLM):
    state = model.init_state()
    logits = read_prompt(model, [[1]], state)
    assert logits is not None
    assert list(generate_tokens(model, logits, state, GREEDY, 0)) == []
    first = int(logits.argmax())
    assert list(generate_tokens(model, logits, state, GREEDY, None, stop=[first])) == [first]
    assert read_prompt(model, [[], []], state) is None


@pytest.mark.parametrize("text", ["plain", "na\u00efve \u20ac 5", "\U0001f600\U0001f600!", "\u4f60\u597d"])
def test_text_is_assembled_whole(text: str):
    tokenizer = load_tokenizer("bytes")
    assembler = TextAssembler(tokenizer)
    parts = [assembler.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(parts) + assembler.finish() == text
    assert all("\ufffd" not in part for part in parts)


def streamed(assembler: TextAssembler, tokens: list[int]) -> str:
    return "".join([assembler.push(token) for token in tokens]) + assembler.finish()


@pytest.mark.parametrize("tokenizer", ["bytes", "pairs"])
def test_text_is_that_of_all_tokens_at_once(tokenizer: str, tmp_path: Path):
    """Also where bytes are invalid: of random bytes, with pieces of characters among them."""
    if tokenizer == "pairs":
        (tmp_path / "text.txt").write_text(
            "na\u00efve \u20ac 5 \U0001f600 \U0001f601 \u4f60\u597d \u00e9\n" * 9, "utf-8"
        )
        train_tokenizer([str(tmp_path / "text.txt")], 266, tmp_path / "made")
    loaded = load_tokenizer("bytes" if tokenizer == "bytes" else str(tmp_path / "made"))
    draw = random.Random(3)
    pieces = [[0x80], [0xF0, 0x9F], [0xF0, 0x9F, 0x98], [0xE2, 0x82], [0xC3], [0xFF], [0xED, 0xA0], [0xF4, 0x90]]
    pieces += [list(text.encode()) for text in ("\U0001f600", "\u20ac", "\u00e9", "a", " ", "\ufffd")]
    cases = [[0x80, *"\U0001f600".encode()], [0xFF, 0xFF, *"\U0001f600\u00e9".encode()], [0xE2, *b"x"]]
    cases += [[byte for _ in range(12) for byte in draw.choice(pieces)] for _ in range(150)]
    vocabulary = len(loaded) - 3
    cases += [[draw.randrange(vocabulary) for _ in range(30)] for _ in range(150)]
    for case in cases:
        if tokenizer == "pairs" and case[0] < 256:
            by_byte = {character: number for number, character in byte_characters().items()}
            ids = {by_byte[text]: number for text, number in loaded.get_vocab().items() if text in by_byte}
            case = [ids[one] if one < 256 else one for one in case]
        assert streamed(TextAssembler(loaded), case) == loaded.decode(case, skip_special_tokens=True)


def test_an_invalid_byte_does_not_hold_the_text_after_it():
    assembler = TextAssembler(load_tokenizer("bytes"))
    assert assembler.push(0x80) == ""
    assert assembler.push(ord("a")) == "\ufffda"
    assert assembler.push(0xE2) == ""
    assert assembler.push(ord("b")) == "\ufffdb"


def test_characters_of_byte_fallback_tokens_stay_whole():
    vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    text = "\U0001f600\U0001f601\u00e9a\U0001f600"
    tokens = [1 if one == ord("a") else one + 2 for one in text.encode()]
    assert streamed(TextAssembler(tokenizer), tokens) == text


def test_broken_bytes_do_not_hold_the_stream_up():
    assembler = TextAssembler(load_tokenizer("bytes"))
    parts = [assembler.push(token) for token in [0xFF] * 50 + list(b"ok")]
    assert "".join(parts) == "\ufffd" * 50 + "ok"
    assert len(assembler._context) + len(assembler._held) <= 2 * TextAssembler.MANY_HELD
    # tokens without text neither
    for _ in range(100):
        assembler.push(258)
    assert assembler.push(0xF0) == ""
    for _ in range(100):
        assembler.push(258)
    assert len(assembler._context) + len(assembler._held) <= 2 * TextAssembler.MOST_HELD


def test_special_tokens_are_left_out():
    tokenizer = load_tokenizer("bytes")
    assembler = TextAssembler(tokenizer)
    assert assembler.push(65) + assembler.push(258) + assembler.push(66) == "AB"

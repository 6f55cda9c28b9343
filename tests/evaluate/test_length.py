"""Loss by length: each token once, chunk-independent, equal to one whole pass, and what the errors mean."""

import math

import numpy as np
import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.evaluate.curves import LengthCurve, difference
from swat_lm.evaluate.length import loss_by_length, loss_on_same_text, position_losses, segments
from swat_lm.evaluate.streaming_model import streaming_model
from swat_lm.evaluate.windows import with_window


def tiny(window: int | None = 7, **changes) -> SwatForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "initializer_range": 0.2, "sliding_window": window,
    }  # fmt: skip
    if window is None:
        values |= {"score_function": "softmax", "slopes": "none"}
    return SwatForCausalLM(SwatConfig(**{**values, **changes})).eval()


def texts(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 61, length, dtype=np.uint16) for length in lengths]


def whole_pass(model: SwatForCausalLM, document: np.ndarray) -> torch.Tensor:
    """Losses of tokens 2 .. N by the ordinary forward pass."""
    tokens = torch.from_numpy(document.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")


@pytest.mark.parametrize("window", [1, 7, None])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_position_losses_do_not_depend_on_the_chunk(window: int | None, chunk: int):
    model, (document,) = tiny(window), texts(40)
    tokens = torch.from_numpy(document.astype(np.int64))[None]
    pieces = list(position_losses(streaming_model(model), tokens, chunk))
    assert torch.cat([piece.losses for piece in pieces], 1).shape == (1, 39)
    assert pieces[0].start == 1
    torch.testing.assert_close(
        torch.cat([piece.losses for piece in pieces], 1)[0], whole_pass(model, document), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("window", [7, None])
def test_loss_by_length_is_the_mean_of_the_whole_pass(window: int | None):
    model, documents = tiny(window), texts(64, 50, 33, 9)
    curve = loss_by_length(model, documents, [32, 8, 64, 3], chunk=11, batch_size=3)
    assert curve.lengths == (3, 8, 32, 64)
    assert [point.num_documents for point in curve.points] == [4, 4, 3, 1]
    # each token after the first exactly once, up to the greatest length
    assert curve.num_tokens == 63 + 49 + 32 + 8
    for point in curve.points:
        losses = [whole_pass(model, d).double() for d in documents if len(d) >= point.length]
        heads = torch.stack([one[: point.length - 1].mean() for one in losses])
        tails = torch.stack([one[point.length // 2 - 1 : point.length - 1].mean() for one in losses])
        assert point.mean_loss == pytest.approx(heads.mean().item(), abs=1e-5)
        assert point.tail_loss == pytest.approx(tails.mean().item(), abs=1e-5)
        if len(losses) > 1:
            expected = heads.std().item() / math.sqrt(len(losses))
            assert point.mean_loss_error == pytest.approx(expected, abs=1e-6)
        else:
            assert point.mean_loss_error is None
    assert curve.document_mean_loss[3][2] is None


@pytest.mark.parametrize("window", [7, None])
def test_same_text_is_the_mean_over_all_pieces(window: int | None):
    model, documents = tiny(window), texts(70, 130, 20)
    curve = loss_on_same_text(model, documents, [16, 32, 64], chunk=24, batch_size=2)
    assert curve.same_text
    for at, size in enumerate(curve.lengths):
        for index, used in ((0, 64), (1, 128)):
            pieces = [documents[index][start : start + size] for start in range(0, used, size)]
            losses = torch.stack([whole_pass(model, piece) for piece in pieces])
            assert curve.document_mean_loss[index][at] == pytest.approx(losses.mean().item(), abs=1e-5)
            tail = losses[:, size // 2 - 1 :].mean().item()
            assert curve.document_tail_loss[index][at] == pytest.approx(tail, abs=1e-5)
        assert curve.document_mean_loss[2][at] is None
    assert curve.num_tokens == sum(used // size * (size - 1) for used in (64, 128) for size in (16, 32, 64))
    other = loss_on_same_text(model, documents, [16, 32, 64], chunk=512, batch_size=7)
    assert other.at(64).mean_loss == pytest.approx(curve.at(64).mean_loss, abs=1e-6)


def test_state_is_constant_for_a_window_and_grows_without():
    documents = texts(400)
    window = loss_by_length(tiny(7), documents, [8, 100, 400], chunk=16)
    full = loss_by_length(tiny(None), documents, [8, 100, 400], chunk=16)
    assert len({point.state_bytes for point in window.points}) == 1
    # keys and values of two layers, two heads of 16, 7 places, fp32; and the position
    assert window.points[0].state_bytes == 2 * 2 * 7 * 32 * 4 + 8
    sizes = [point.state_bytes for point in full.points]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] >= 2 * 2 * 400 * 32 * 4


def test_another_window_shares_the_weights():
    model, documents = tiny(7, score_bias="-log(window)"), texts(64)
    narrow = with_window(model, 3)
    assert narrow.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert narrow.config.attention_settings(0).bias() == pytest.approx(-math.log(7))
    curve = loss_by_length(model, documents, [64], window=3)
    assert curve.window == 3
    assert curve.at(64).mean_loss == pytest.approx(whole_pass(narrow, documents[0]).mean().item(), abs=1e-5)
    assert curve.at(64).mean_loss != pytest.approx(loss_by_length(model, documents, [64]).at(64).mean_loss, abs=1e-4)
    assert model.config.window(0) == 7


def test_training_mode_and_gradients_are_left_alone():
    model = tiny()
    model.train()
    loss_by_length(model, texts(20), [8])
    assert model.training
    assert all(one.grad is None for one in model.parameters())


def test_json_round_trip(tmp_path):
    curve = loss_by_length(tiny(), texts(64, 20), [8, 64])
    curve.save(tmp_path / "length.json")
    assert LengthCurve.from_json((tmp_path / "length.json").read_text()) == curve
    with pytest.raises(ValueError, match="length 9 was not measured; measured: 8, 64"):
        curve.at(9)


def test_difference_pairs_documents():
    mean, error = difference([2.0, 5.0, None, 1.0], [1.0, 4.5, 3.0, None])
    assert mean == pytest.approx(0.75)
    assert error == pytest.approx(0.25)
    assert difference([1.0], [0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no document has both"):
        difference([None], [1.0])


def test_segments_cut_the_joined_documents():
    documents = [np.arange(5), np.arange(5, 12), np.arange(12, 26)]
    assert [piece.tolist() for piece in segments(documents, 10)] == [list(range(10)), list(range(10, 20))]
    assert len(segments(documents, 2, most=4)) == 4
    with pytest.raises(ValueError, match="26 tokens together, less than one piece of 30"):
        segments(documents, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [1, 8]}, "each at least 2"),
        ({"lengths": []}, "each at least 2"),
        ({"lengths": [8, 65]}, "no document has 65 tokens; the longest of 1 has 64"),
        ({"lengths": [8], "chunk": 0}, "chunk: expected at least 1"),
        ({"lengths": [8], "batch_size": 0}, "batch_size: expected at least 1"),
        ({"lengths": [8], "window": 0}, "window: expected at least 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        loss_by_length(tiny(), texts(64), arguments.pop("lengths"), **arguments)


def test_same_text_needs_divisors():
    with pytest.raises(ValueError, match="divisors of the greatest, 64"):
        loss_on_same_text(tiny(), texts(64), [24, 64])

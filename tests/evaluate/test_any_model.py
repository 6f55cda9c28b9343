"""Loss by length of any causal model: chunk-free results, windows of pretrained models, limits, and partial results."""

import json
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from swat_lm import SwatConfig
from swat_lm.evaluate import limits
from swat_lm.evaluate.curves import WindowMatrix
from swat_lm.evaluate.heatmaps import plot_heat_map
from swat_lm.evaluate.length import loss_by_length, loss_on_same_text
from swat_lm.evaluate.limits import check_length, extrapolates_beyond, position_limit, stream_bytes
from swat_lm.evaluate.partial import PartialResults, measurement_key
from swat_lm.evaluate.streaming_model import streaming_model
from swat_lm.evaluate.windows import layer_windows, model_window, theoretical_reach, with_window

from .models import VOCABULARY, built, tiny_gpt2, tiny_llama, tiny_mamba2, tiny_mistral, tiny_qwen3_next, tiny_swat


def texts(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, VOCABULARY, length, dtype=np.uint16) for length in lengths]


def whole_pass(model, document: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(document.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral, tiny_mamba2])
def test_any_causal_model_is_measured(build):
    model, documents = build(), texts(64, 50)
    curve = loss_by_length(model, documents, [16, 64], chunk=11, batch_size=2)
    for index, document in enumerate(documents):
        losses = whole_pass(model, document)
        assert curve.document_mean_loss[index][0] == pytest.approx(losses[:15].mean().item(), abs=1e-4)
    assert curve.document_mean_loss[0][1] == pytest.approx(whole_pass(model, documents[0]).mean().item(), abs=1e-4)
    assert curve.window == (7 if build is tiny_mistral else None)
    pieces = loss_on_same_text(model, documents[:1], [32, 64], chunk=24)
    expected = torch.stack([whole_pass(model, documents[0][start : start + 32]) for start in (0, 32)]).mean()
    assert pieces.at(32).mean_loss == pytest.approx(expected.item(), abs=1e-4)


def test_pretrained_models_run_with_a_window():
    llama, documents = tiny_llama(), texts(64)
    windowed = with_window(llama, 7)
    assert windowed.model.embed_tokens.weight.data_ptr() == llama.model.embed_tokens.weight.data_ptr()
    twin = built("Mistral", **{**llama.config.to_dict(), "sliding_window": 7, "model_type": "mistral"})
    twin.load_state_dict(llama.state_dict())
    torch.testing.assert_close(whole_pass(windowed, documents[0]), whole_pass(twin, documents[0]), atol=1e-4, rtol=1e-4)
    curve = loss_by_length(llama, documents, [64], window=7)
    assert curve.window == 7
    assert curve.at(64).mean_loss == pytest.approx(whole_pass(twin, documents[0]).mean().item(), abs=1e-4)
    # without a window it is the model itself, and ours becomes one with full attention
    torch.testing.assert_close(
        whole_pass(with_window(llama, None), documents[0]), whole_pass(llama, documents[0]), atol=1e-4, rtol=1e-4
    )
    full = with_window(tiny_swat(7), None)
    assert full.config.window(0) is None
    assert loss_by_length(tiny_swat(7), documents, [64]).at(64).mean_loss != pytest.approx(
        loss_by_length(full, documents, [64]).at(64).mean_loss, abs=1e-6
    )
    with pytest.raises(ValueError, match="a gpt2 model cannot be run with another window"):
        with_window(tiny_gpt2(), 7)
    nested = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
    hybrid = tiny_swat(7, layer_types=["sliding_attention", "full_attention"], rope_parameters=nested)
    # each layer goes on rotating as it did
    assert with_window(hybrid, 3).config.rotary(1) == hybrid.config.rotary(1) != hybrid.config.rotary(0)


def test_windows_and_reach():
    assert layer_windows(tiny_swat([3, 5]).config) == [3, 5]
    assert (model_window(tiny_swat([3, 5])), theoretical_reach(tiny_swat([3, 5]))) == (5, 7)
    assert (model_window(tiny_mistral()), theoretical_reach(tiny_mistral())) == (7, 13)
    for kind in ("spade", "sparsek"):
        # their window is not all that they see
        small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "sliding_window": 5}
        assert layer_windows(SwatConfig(**small, layers=[kind, "attention"])) == [None, 5]
    for model in (tiny_llama(), tiny_gpt2(), tiny_mamba2(), tiny_qwen3_next()):
        assert theoretical_reach(model) is None


def test_positions_that_end():
    assert position_limit(tiny_gpt2()) == 128
    assert position_limit(tiny_llama()) is None
    assert position_limit(tiny_swat()) is None
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert position_limit(tiny_llama(rope_parameters=rope, max_position_embeddings=256)) == 256
    assert extrapolates_beyond(tiny_llama(max_position_embeddings=256)) == 256
    assert extrapolates_beyond(tiny_gpt2()) is None
    assert extrapolates_beyond(tiny_swat()) is None
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no position beyond token 128: it cannot read 200"):
        loss_by_length(tiny_gpt2(), texts(200), [200])


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral, tiny_mamba2, tiny_swat, tiny_gpt2])
def test_memory_is_known_before_it_is_used(build, monkeypatch):
    streaming, tokens = streaming_model(build()), torch.zeros(1, 100, dtype=torch.int64)
    state = streaming.start(1)
    streaming.extend(tokens, state)
    assert stream_bytes(streaming, 100) == pytest.approx(streaming.state_bytes(state), rel=0.2, abs=16)
    each = stream_bytes(streaming, 100)
    monkeypatch.setattr(limits, "available_bytes", lambda _: 3 * each)
    check_length(streaming, 100, 3)
    with pytest.raises(ValueError, match="read at most 3 side by side"):
        check_length(streaming, 100, 4)
    monkeypatch.setattr(limits, "available_bytes", lambda _: each - 1)
    with pytest.raises(ValueError, match="ask for less, or for a --window"):
        check_length(streaming, 100, 1)


def test_free_memory_is_found(monkeypatch, tmp_path):
    free = limits.available_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    assert limits.available_bytes(torch.device("meta")) is None
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        # as of a system without that table
        monkeypatch.setattr("swat_lm.ops.memory.Path", lambda _: tmp_path / "none")
        assert limits.available_bytes(torch.device("cpu")) > 2**20


def test_interrupted_measurements_go_on(tmp_path):
    model, documents, sizes = tiny_swat(), texts(64, 50, 33, 64), [8, 64]
    whole = loss_by_length(model, documents, sizes, batch_size=2)
    key = measurement_key(model, documents, sizes)

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.65 * total:
            raise StopError

    path = tmp_path / "new" / "partial.json"
    with pytest.raises(StopError):
        loss_by_length(model, documents, sizes, batch_size=2, partial=PartialResults(path, key), on_progress=stop)
    kept = PartialResults(path, key)
    assert sorted(kept.known) == ["0", "3", "state bytes"]
    calls = []
    again = loss_by_length(
        model, documents, sizes, batch_size=2, partial=kept, on_progress=lambda done, total: calls.append(done)
    )
    assert again == whole
    assert calls[0] > 126
    assert calls[-1] == whole.num_tokens
    kept.remove()
    assert not path.exists()


def test_partial_results_belong_to_one_measurement(tmp_path):
    model, documents = tiny_swat(), texts(20)
    key = measurement_key(model, documents, [8])
    assert key == measurement_key(tiny_swat(), texts(20), [8])
    others = {
        measurement_key(with_window(model, 3), documents, [8]),
        measurement_key(model, texts(21), [8]),
        measurement_key(model, documents, [9]),
    }
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    others.add(measurement_key(model, documents, [8]))
    assert len({key, *others}) == 5
    path = tmp_path / "partial.json"
    PartialResults(path, key).add({"0": [1.0]})
    with pytest.raises(ValueError, match="partial results of another model, text or length"):
        PartialResults(path, others.pop())
    path.write_text(path.read_text()[:9])
    with pytest.raises(ValueError, match="damaged partial results"):
        PartialResults(path, key)


def test_window_matrix(tmp_path):
    model, documents = tiny_llama(), texts(64)
    curves = tuple(loss_by_length(model, documents, [8, 64], window=window) for window in (3, None))
    matrix = WindowMatrix(("3", "none"), curves)
    matrix.save(tmp_path / "windows.json")
    assert list(json.loads((tmp_path / "windows.json").read_text())) == ["3", "none"]
    assert WindowMatrix.from_json((tmp_path / "windows.json").read_text()) == matrix
    assert matrix.losses() == [[point.mean_loss for point in curve.points] for curve in curves]
    assert matrix.lengths == (8, 64)
    plot_heat_map(matrix.losses(), tmp_path / "a.png", rows=matrix.names, columns=["8", "64"],
                  ylabel="y", xlabel="x", scale="nats")  # fmt: skip
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected 1 rows of 2 values"):
        plot_heat_map([[1.0]], tmp_path / "b.png", rows=["a"], columns=["b", "c"], ylabel="", xlabel="", scale="")

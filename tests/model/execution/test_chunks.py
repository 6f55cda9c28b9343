"""Reverse chunks give the gradients of one pass: of every weight and of the inputs, for every plan that they take."""

import errno
import gc
from pathlib import Path

import pytest
import torch

from swat_lm import SwatForCausalLM
from swat_lm.layers import LAYERS
from tests.layers.in_training import LENGTH, packed_rows, targets_of
from tests.layers.subject import Subject, close, gradients, name_of, tokens
from tests.train.speaking import SpeakingLayer

EXACT = 1e-12
SUBJECTS = [
    Subject("sigmoid window", ["attention"], {"score_bias": -1.0}),
    Subject("softmax with sink and norms", [
        {"kind": "attention", "sliding_window": 5, "score_function": "softmax", "slopes": "none", "learned_sink": True},
        {"kind": "attention", "sliding_window": 1, "score_function": "softmax", "slopes": "negative", "qk_norm": True,
         "learned_sink": True,
         "output_norm": True},
    ]),
    Subject("first tokens", [
        {"kind": "attention", "sliding_window": 5, "sinks": 3, "score_function": "softmax", "slopes": "none"},
        {"kind": "attention", "sliding_window": 4, "sinks": 2},
    ]),
    Subject("mamba2", ["mamba2"]),
    Subject("mixture, tied", ["mamba2", "attention", {"kind": "attention", "sliding_window": 2}],
            {"tie_word_embeddings": True, "logits_scaling": 2.0, "final_logit_softcapping": 1.5}),
]  # fmt: skip


def chunked(model: SwatForCausalLM, size: int = 7, **settings) -> SwatForCausalLM:
    model.set_execution("chunks", chunk_size=size, **settings)
    return model


def learnt(model: SwatForCausalLM, ids, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(ids, **more).loss
    return loss.detach(), gradients(model, loss)


def same(found, expected) -> None:
    close(found[0], expected[0], "loss", EXACT)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(found[1][name], gradient, f"gradient of {name}", EXACT)
        assert gradient.any(), name


@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_gradients_are_those_of_one_pass(subject: Subject, tmp_path):
    model, ids = subject.model().train(), tokens(3, LENGTH)
    # documents over borders of chunks, padding anywhere, and padding that a mask says
    documents = packed_rows()
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, -8:], mask[2, 3:6] = 0, 0, 0
    inputs = [{"labels": ids}, {"shift_labels": targets_of(ids, documents), "document_ids": documents}]
    inputs += [{"shift_labels": targets_of(ids).masked_fill(mask == 0, -100), "attention_mask": mask}]
    expected = [learnt(model, ids, **one) for one in inputs]
    # ragged last chunks, one chunk that is longer than the row, and a row that chunks fill
    for size in (7, 11, LENGTH, 50):
        for one, right in zip(inputs, expected, strict=True):
            same(learnt(chunked(model, size), ids, **one), right)
    same(learnt(chunked(model, 7, carries="disk", folder=str(tmp_path)), ids, **inputs[1]), expected[1])
    assert not list(tmp_path.iterdir())


def test_embedded_inputs_positions_and_divisors():
    model, ids = SUBJECTS[4].model().train(), tokens(2, LENGTH)
    positions = torch.cat((torch.arange(9), torch.arange(LENGTH - 9)))[None]
    found = []
    for execution in (model, chunked(model)):
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        loss = execution(inputs_embeds=embedded, position_ids=positions, labels=ids, num_items_in_batch=5.0).loss
        # of the loss, scaled, through the ordinary interface of autograd
        wanted = [embedded, model.model.layers[0].mixer.A_log]
        found.append([loss.detach(), *torch.autograd.grad(loss * 3, wanted)])
        model.set_execution()
    for actual, expected in zip(found[1], found[0], strict=True):
        close(actual, expected, tolerance=EXACT)


def test_auxiliary_losses_statistics_and_metrics(monkeypatch):
    monkeypatch.setitem(LAYERS, "speaking", SpeakingLayer)
    model, ids = Subject("speaking", ["speaking", "attention"]).model().train(), tokens(2, LENGTH)
    # more of some chunks than of others
    mask, found = torch.ones_like(ids), []
    mask[0, -20:], mask[1, :3] = 0, 0
    for _ in range(2):
        outputs = model(ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask)
        said = outputs.auxiliary[0]
        total, divisor = said.losses["balance"]
        found.append((total.detach(), divisor, said.statistics["seen"], said.metrics["score"]))
        found.append(tuple(gradients(model, outputs.loss + 2 * total / divisor).values()))
        chunked(model)
    for actual, expected in zip(found[2] + found[3], found[0] + found[1], strict=True):
        # the layer speaks in float32
        close(actual.double(), expected.double(), tolerance=1e-6)


def test_dropout_is_drawn_again_as_it_was():
    model, ids = SUBJECTS[0].model().train(), tokens(1, LENGTH)
    model.model.layers[0].self_attn.o_proj = torch.nn.Sequential(
        model.model.layers[0].self_attn.o_proj, torch.nn.Dropout(0.5)
    )
    chunked(model)
    torch.manual_seed(3)
    loss = model(ids, labels=ids).loss
    after = torch.rand(3)
    direction = {name: torch.randn_like(each) for name, each in model.named_parameters()}
    slope = sum((gradient * direction[name]).sum() for name, gradient in gradients(model, loss).items())
    # the slope along one direction, by differences under the same draws
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, each in model.named_parameters():
                each.add_(direction[name], alpha=sign * 1e-6)
            torch.manual_seed(3)
            moved.append(model(ids, labels=ids).loss)
            assert torch.equal(torch.rand(3), after)
            for name, each in model.named_parameters():
                each.sub_(direction[name], alpha=sign * 1e-6)
    assert float((moved[0] - moved[1]) / 2e-6) == pytest.approx(float(slope), rel=1e-6)


def test_bfloat16_autocast_is_that_of_one_pass():
    model, ids = SUBJECTS[4].model(torch.float32).train(), tokens(2, LENGTH)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
            # weights that were cast for a pass without gradients must not serve one with them
            again = model(ids, labels=ids).loss
        found.append((loss.detach(), gradients(model, loss + again)))
        chunked(model)
    assert float(found[1][0]) == pytest.approx(float(found[0][0]), rel=1e-2)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_what_it_cannot_do_is_refused_by_name(tmp_path):
    full = Subject("full", ["attention", {"kind": "attention", "sliding_window": None}]).model()
    with pytest.raises(ValueError, match=r"layer 1 \(attention\) keeps the key of all tokens.*blockwise or checkpoint"):
        chunked(full)
    model, ids = SUBJECTS[0].model().train(), tokens(1, LENGTH)
    with pytest.raises(ValueError, match=r"chunk_size: 6 is below the window of layer 0 \(attention\), 7.*at least 7"):
        chunked(model, 6)
    with pytest.raises(ValueError, match=r"unknown execution 'chunk'; did you mean 'chunks'\?"):
        model.set_execution("chunk")
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1; got 0"):
        chunked(model, 0)
    with pytest.raises(ValueError, match="folder: carries in memory need none"):
        chunked(model, 7, folder=str(tmp_path))
    assert model.execution.name == "plain"
    budget = Subject("budget", ["mamba2", {"kind": "taipan", "sliding_window": 7}]).model()
    with pytest.raises(ValueError, match=r"layer 1 \(taipan\) has a loss of each row.*set budget_weight: 0, or take"):
        chunked(budget)
    chunked(model)
    with pytest.raises(ValueError, match="pass labels and leave return_logits out"):
        model(ids)
    with pytest.raises(ValueError, match="pass labels and leave return_logits out"):
        model(ids, labels=ids, return_logits=True)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its carries are gone"):
        loss.backward()
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # without gradients, and where logits are read, everything is as before
    assert model.eval()(ids, labels=ids).logits.shape == (1, LENGTH, 40)
    with torch.no_grad():
        close(model(ids, labels=ids, return_logits=False).loss, model(ids, labels=ids).loss, tolerance=EXACT)


def test_a_full_disk_is_named_and_nothing_stays(tmp_path, monkeypatch):
    model, ids = SUBJECTS[0].model().train(), tokens(1, LENGTH)
    chunked(model, 7, carries="disk", folder=str(tmp_path / "none"))
    with pytest.raises(OSError, match=rf"cannot keep carries in {tmp_path / 'none'}: No such file.*carries: memory"):
        model(ids, labels=ids)
    chunked(model, 7, carries="disk", folder=str(tmp_path))
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, limit[1]))
    try:
        with pytest.raises(OSError, match=rf"carries fill {tmp_path}: .* after 7000 bytes of carry 2 of 3") as caught:
            model(ids, labels=ids)
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"carries need \d+ bytes in .*, where 1000 are free"):
        model(ids, labels=ids)
    gc.collect()
    assert not list(Path(tmp_path).iterdir())

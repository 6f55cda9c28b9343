"""Perceivers as layers: what each equals under a mask, who is handed on, what is learnt from, and what is refused."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.perceiver_settings import PerceiverSettings
from swat_lm.model import cost
from swat_lm.model.packing import may_pack

VOCABULARY, LATENTS, LENGTH = 40, 6, 20
HISTORY = LENGTH - LATENTS


def perceiver(history: str = "drop", **settings):
    return {"kind": "perceiver", "latents": LATENTS, "history": history, **settings}


AR = [perceiver()] * 3
V1 = [perceiver("whole", rotary_layers="all")] * 2 + [perceiver(rotary_layers="all")]
V2 = [perceiver("segments", segment=4)] * 2 + [perceiver()]
V3 = [perceiver("compress", length=LENGTH), perceiver("whole"), perceiver()]
PLANS = {"AR": AR, "V1": V1, "V2": V2, "V3": V3}


def model(layers, seed: int = 0, **changes) -> SwatForCausalLM:
    torch.manual_seed(seed)
    config = SwatConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), layers=list(layers),
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **changes,
    )  # fmt: skip
    return SwatForCausalLM(config).double().eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def seen_by(history: str, starts: torch.Tensor | int = 0) -> torch.Tensor:
    """Which tokens `[T, T]` each sees in one layer, if all were of its document; those begin at `starts`."""
    place = torch.arange(LENGTH)
    seen = place <= place[:, None]
    if history == "segments":
        segment = (place - starts) // 4
        seen = torch.where((place < HISTORY)[:, None], segment[:, None] == segment, seen)
    elif history in ("whole", "compress"):
        seen = seen | ((place < HISTORY) & (place < HISTORY)[:, None])
    return seen & ~((place[:, None] < HISTORY) & (place >= HISTORY))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("history", ["drop", "whole", "segments", "compress"])
@pytest.mark.parametrize("documents", [None, [3, 8, 4, 5]])
def test_each_is_attention_under_a_mask(history, score_function, documents):
    """Rows of one document and of four, of which the third goes over from the history to the latents."""
    if history == "compress" and documents is not None:
        return
    more = {"segments": {"segment": 4}, "compress": {"length": LENGTH, "compressed": 3}}.get(history, {})
    one = model([perceiver(history, score_function=score_function, use_rotary=False, **more)])
    layer, ids, seen = one.model.layers[0], tokens(2, LENGTH), seen_by(history)
    given = None
    if documents is not None:
        given = torch.repeat_interleave(torch.arange(4), torch.tensor(documents)).expand(2, -1)
        seen = seen_by(history, torch.searchsorted(given[0].contiguous(), given[0].contiguous()))
        seen = seen & (given[0] == given[0][:, None])
    hidden, mixer = one.model.embed_tokens(ids), layer.self_attn
    normed = layer.input_layernorm(hidden)
    query = mixer.q_proj(normed).unflatten(-1, (-1, 8))
    key = mixer.kv_norm(mixer.kv_proj(normed).unflatten(-1, (-1, 8))).repeat_interleave(2, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(8)
    weights = (
        scores.sigmoid() * seen if score_function == "sigmoid" else scores.masked_fill(~seen, -torch.inf).softmax(-1)
    )
    joined = hidden + mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, key).flatten(2))
    if history == "drop":
        joined = joined[:, HISTORY:]
    if history == "compress":
        short = torch.einsum("ph,bhm->bpm", layer.compress.weight, joined[:, :HISTORY]) + layer.compress.bias[:, None]
        joined = torch.cat((short, joined[:, HISTORY:]), dim=1)
    expected = one.model.norm(joined + layer.mlp(layer.post_attention_layernorm(joined)))
    found = one.model(ids, document_ids=given, use_cache=False).last_hidden_state
    assert found.shape[1] == cost.layers_without_weights(one.config)[0].num_handed_on(LENGTH)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_latents_see_all_before_them_and_nothing_to_come(name):
    """Also after a step of training; and what is learnt is latents' alone."""
    one, ids = model(PLANS[name]).train(), tokens(2, LENGTH)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.02)
    plain = one(ids, labels=ids).loss
    plain.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in one.parameters())
    plain_gradients = [parameter.grad.clone() for parameter in one.parameters()]
    one.zero_grad()
    one.activation_checkpointing_enable()
    one(ids, labels=ids).loss.backward()
    for parameter, expected in zip(one.parameters(), plain_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)
    optimizer.step()
    one.eval()
    logits = one(ids).logits
    assert logits.shape == (2, LATENTS, VOCABULARY)
    targets = ids[:, -LATENTS + 1 :]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(one(ids, labels=ids).loss.double(), expected, rtol=0, atol=1e-6)
    for latent in (0, 3, LATENTS - 1):
        embedded = one.model.embed_tokens(ids).detach().requires_grad_()
        one(inputs_embeds=embedded).logits[0, latent].pow(2).sum().backward()
        seen = embedded.grad[0].abs().sum(-1) > 0
        assert seen.tolist() == [True] * (HISTORY + latent + 1) + [False] * (LATENTS - latent - 1)
        assert not embedded.grad[1].any()


def test_one_segment_is_the_whole_history():
    ids = tokens(2, LENGTH)
    one, other = model([perceiver("whole"), perceiver()]), model([perceiver("segments", segment=HISTORY), perceiver()])
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=0, atol=1e-12)
    latents_alone = model([perceiver("segments", segment=2)] * 2)(ids[:, :LATENTS]).logits
    torch.testing.assert_close(latents_alone, model(AR[:2])(ids[:, :LATENTS]).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["AR", "V1", "V2"])
def test_padding_and_holes_are_seen_by_nobody(name):
    """On the left a row is as if it were alone; on the right and in holes other tokens change nothing."""
    one, ids = model(PLANS[name]), tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 3:9] = mask[1, 15] = 0
    mask[2, -3:] = 0
    with torch.no_grad():
        found = one(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[:1], one(ids[:1, 5:]).logits, rtol=0, atol=1e-12)
        other = one(torch.where(mask == 1, ids, (ids + 1) % VOCABULARY), attention_mask=mask).logits
    real = mask[:, -LATENTS:] == 1
    assert found.isfinite().all()
    torch.testing.assert_close(other[real], found[real], rtol=0, atol=1e-12)


def test_generation_reads_whole_rows():
    one, ids = model(AR), tokens(2, 9)
    expected = ids
    for _ in range(4):
        expected = torch.cat((expected, one(expected).logits[:, -1:].argmax(-1)), dim=1)
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(one.generate(ids, use_cache=False, **more), expected)
    with pytest.raises(ValueError, match=r"layer 0 \(perceiver\): its latents are the last tokens of a whole row"):
        one.generate(ids, **more)


@pytest.mark.parametrize("name", PLANS)
def test_no_past_is_kept(name, tmp_path):
    one, ids = model(PLANS[name]), tokens(2, LENGTH)
    refused = r"layer 0 \(perceiver\): its latents are the last tokens of a whole row"
    for call in (
        lambda: one.init_state(2),
        lambda: one.init_carry("exact"),
        lambda: one(ids, use_cache=True),
        lambda: one(ids, past_key_values=DynamicCache()),
        lambda: one.set_execution("chunks"),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.raises(ValueError, match=r"layer 0 \(perceiver\) is no layer of the kind attention: take checkpoint"):
        one.set_execution("blockwise")
    assert not may_pack(one)
    assert cost.state_bytes(one.config) == 0
    one.save_pretrained(tmp_path)
    again = SwatForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.plan() == one.config.plan()
    torch.testing.assert_close(again(ids).logits, one(ids).logits, rtol=0, atol=1e-12)


def test_costs_are_those_that_are_counted():
    for layers in (AR, [perceiver(tied=False)]):
        one = model(layers)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(tokens(2, LENGTH))
        assert counter.get_total_flops() == 2 * cost.forward_flops(one.config, LENGTH)
        # all layers, and logits, behind the first are of latents alone
        assert sum(layer.flops_per_token for layer in cost.plan_costs(one.config, LENGTH)) * LENGTH == (
            cost.forward_flops(one.config, LENGTH) - 2 * VOCABULARY * 32 * LATENTS
        )
    for name, layers in PLANS.items():
        one = model(layers)
        assert cost.count_parameters(one.config).total == sum(x.numel() for x in one.parameters()), name
    # history to itself, latents to the history and to each other
    pairs = {"whole": HISTORY**2, "segments": 3 * 16 + 2**2, "drop": 0}
    heads = 4 * 4 * 8
    for history, own in pairs.items():
        config = model([perceiver(history, **({"segment": 4} if history == "segments" else {}))]).config
        layer = cost.layers_without_weights(config)[0]
        rows = LATENTS if history == "drop" else LENGTH
        products = 2 * (rows * (2 * 32 * 32 + 3 * 32 * 48) + LENGTH * 32 * 16)
        seen = own + LATENTS * HISTORY + LATENTS * (LATENTS + 1) // 2
        assert layer.flops(LENGTH) == products + heads * seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": 0}, "latents: expected at least 1 token, got 0"),
        ({"history": "keep"}, "history: expected 'drop' or 'whole' or 'segments' or 'compress', got 'keep'"),
        ({"segment": 4}, "segment: only history='segments' has any, and it is 'drop'"),
        ({"history": "segments"}, "segment: history='segments' needs the tokens of one, at least 1, got None"),
        ({"history": "segments", "segment": 0}, "segment: history='segments' needs"),
        ({"length": 9}, "length: only history='compress' has one"),
        ({"compressed": 9}, "compressed: only history='compress' has one"),
        ({"history": "compress"}, "length: history='compress' learns a map along time"),
        ({"history": "compress", "length": 1024}, "latents: 1024 of rows of 1024 tokens leave no history"),
        ({"history": "compress", "length": 1034, "compressed": 10}, "compressed: expected at least 1 and fewer than"),
        ({"score_bias": "-log(window)"}, "score_bias: some tokens see all before them"),
        ({"score_bias": math.nan}, "score_bias: expected a finite number"),
        ({"head_dim": 7}, "head_dim: rotary needs an even head size"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        PerceiverSettings(**changes)


def test_rows_that_are_refused():
    ids = tokens(2, LENGTH)
    with pytest.raises(ValueError, match=r"layer 0 \(perceiver\): latents: 6 are longer than the sequence of 5 tokens"):
        model(AR)(ids[:, :5])
    with pytest.raises(ValueError, match="length: it has learned to compress rows of 20 tokens, got 19"):
        model(V3)(ids[:, 1:])
    with pytest.raises(ValueError, match="it can keep neither documents nor padding apart"):
        model(V3)(ids, document_ids=torch.arange(LENGTH).expand(2, -1) // 7)
    with pytest.raises(ValueError, match="it has no window, so none can be drawn"):
        model(AR)(ids, windows=(3, None, None))
    with pytest.raises(ValueError, match=r"labels: the layers hand on the last 6 tokens alone.*last_tokens"):
        model(AR)(ids, labels=ids, num_items_in_batch=7)

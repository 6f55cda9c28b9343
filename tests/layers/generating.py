"""Checks of `generate()` and its cache, which is Hugging Face's view on slots."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from swat_lm import SwatForCausalLM
from swat_lm.model.cache import SlotCache
from tests.layers.at_once import masks
from tests.layers.subject import Check, Subject, close, keeps_summaries, one_pass, tokens

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}


def greedy(model: SwatForCausalLM, ids: Tensor, mask: Tensor | None, count: int = 10) -> Tensor:
    """What greedy decoding without any cache gives, prompt included."""
    for _ in range(count):
        best = one_pass(model, ids, mask)[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, best), dim=1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(best)), dim=1)
    return ids


def every_way_to_generate_gives_the_same(subject: Subject, folder: Path) -> None:
    """Greedy, in chunks, with left padding and holes, beams, samples, and on from a cache."""
    model, ids = subject.model(), tokens(3, 12)
    padded = masks(3, 12, left=True)
    for mask in (None, padded, masks(3, 12, left=True, holes=True, seed=3)):
        expected = greedy(model, ids, mask)
        for extra in ({}, {"prefill_chunk_size": 5}):
            found = model.generate(ids, attention_mask=mask, **GREEDY, **extra)
            assert torch.equal(found, expected), f"mask {mask}, {extra}"
    for extra in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        ways = []
        for use_cache in (False, True):
            torch.manual_seed(3)
            ways.append(model.generate(ids, attention_mask=padded, use_cache=use_cache, **{**GREEDY, **extra}))
        assert torch.equal(*ways), str(extra)
    cache = SlotCache(model.config)
    told = model.generate(ids[:1], past_key_values=cache, **GREEDY)
    told = torch.cat((told, ids[1:2, :4]), dim=1)
    assert torch.equal(model.generate(told, past_key_values=cache, **GREEDY), greedy(model, told, None))


def a_cache_is_no_cache_at_every_step(subject: Subject, folder: Path) -> None:
    """Chunks and single tokens, padded and with holes; rows chosen, repeated and forgotten in between."""
    model, ids = subject.model(), tokens(3, 20)
    for mask in (None, masks(3, 20, left=True, seed=2), masks(3, 20, left=True, holes=True, seed=4)):
        whole = one_pass(model, ids, mask)
        for cuts in ([12, 1, 1, 6], [3, 1, 8, 1, 1, 6]):
            cache, parts, seen = SlotCache(model.config), [], 0
            for part in ids.split(cuts, dim=1):
                seen += part.shape[1]
                shown = None if mask is None else mask[:, :seen]
                with torch.no_grad():
                    parts.append(model(part, attention_mask=shown, past_key_values=cache, use_cache=True).logits)
                assert cache.get_seq_length() == seen
            real = slice(None) if mask is None else mask == 1
            close(torch.cat(parts, dim=1)[real], whole[real], f"cached, {cuts}")
    with torch.no_grad():
        cache = SlotCache(model.config)
        model(ids, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        rows, new = ids[[0, 2, 2, 0]], tokens(4, 1)
        stepped = model(new, past_key_values=cache, use_cache=True).logits[:, -1]
        close(stepped, one_pass(model, torch.cat((rows, new), dim=1))[:, -1], "rows chosen")
        cache.reset()
        assert cache.get_seq_length() == 0
        close(model(rows, past_key_values=cache, use_cache=True).logits, one_pass(model, rows), "after a reset")


def whoever_looks_in_sees_the_layout_of_transformers(subject: Subject, folder: Path) -> None:
    """Keys and values `[B, K, T, D]`, oldest first, where a layer keeps them; else nothing."""
    model, ids = subject.model(), tokens(2, 11)
    cache = SlotCache(model.config)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache, use_cache=True)
        model(ids[:, 10:], past_key_values=cache, use_cache=True)
    assert len(cache) == len(model.model.layers)
    specs = [{one.name: one for one in layer.state_spec()} for layer in model.model.stack]
    for layer, entry in zip(model.model.stack, model.config.plan(), strict=True):
        summaries = [one.name for one in layer.state_spec() if one.kind == "summary"]
        assert bool(entry.kind.keeps_beside_keys(entry.settings)) == bool(summaries)
    for layer, spec in zip(cache.layers, specs, strict=True):
        if not {"key", "value"} <= spec.keys():
            assert layer.keys is None
            assert layer.values is None
            assert layer.is_croppable == all(one.kind != "summary" for one in spec.values())
            continue
        heads, size = spec["key"].shape
        held = 11 if spec["key"].items is None else min(11, spec["key"].items)
        assert tuple(layer.keys.shape) == tuple(layer.values.shape) == (2, heads, held, size)
    windows = [spec["key"].items if "key" in spec else None for spec in specs]
    assert cache.max_cache_len == (-1 if None in windows else max(windows))
    if keeps_summaries(model) or any(spec.keys() != {"key", "value"} for spec in specs):
        with pytest.raises(ValueError, match=r"past_key_values: .*a layer here keeps \w+"):
            model(ids, past_key_values=DynamicCache(), use_cache=True)
        return
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=stock, use_cache=True)
    for layer, other in zip(cache.layers, stock.layers, strict=True):
        # a stock window keeps one less, what the next token sees, and everything where that is nothing
        count = min(layer.keys.shape[2], other.keys.shape[2])
        if count:
            close(layer.keys[:, :, -count:], other.keys[:, :, -count:], "keys")
            close(layer.values[:, :, -count:], other.values[:, :, -count:], "values")


def tokens_are_taken_back_or_it_is_said_why_not(subject: Subject, folder: Path) -> None:
    """`crop`, and assisted generation, which needs it."""
    model, ids = subject.model(), tokens(2, 40)
    cache = SlotCache(model.config)
    assistant = subject.model(seed=1)
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache, use_cache=True)
        if keeps_summaries(model):
            with pytest.raises(ValueError, match=r"layer \d+ keeps .*of its past.*without drafts"):
                cache.activate_past_recording()
            with pytest.raises(ValueError, match=r"layer \d+ keeps .*of its past.*without drafts"):
                cache.crop(-1)
            for extra in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
                with pytest.raises(ValueError, match="of its past, which cannot be taken back"):
                    model.generate(ids[:1, :12], **GREEDY, **extra)
            # nothing was spoiled by asking
            close(model(ids[:, 11:13], past_key_values=cache, use_cache=True).logits, one_pass(model, ids)[:, 11:13])
            return
        whole, seen = one_pass(model, ids), 11
        cache.activate_past_recording()
        for read, back in ((9, 6), (1, 0), (1, 1), (13, 2), (2, 2)):
            model(ids[:, seen : seen + read], past_key_values=cache, use_cache=True)
            cache.crop(-back)
            seen += read - back
            assert cache.get_seq_length() == seen
        for part in (ids[:, seen : seen + 1], ids[:, seen + 1 : seen + 3]):
            close(model(part, past_key_values=cache, use_cache=True).logits, whole[:, seen : seen + part.shape[1]])
            seen += part.shape[1]
    expected = greedy(model, ids[:1, :12], None)
    for extra in ({"assistant_model": assistant}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids[:1, :12], **GREEDY, **extra), expected), str(list(extra))


CHECKS: tuple[Check, ...] = (
    every_way_to_generate_gives_the_same,
    a_cache_is_no_cache_at_every_step,
    whoever_looks_in_sees_the_layout_of_transformers,
    tokens_are_taken_back_or_it_is_said_why_not,
)

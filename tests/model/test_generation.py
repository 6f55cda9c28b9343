"""generate() in all its ways gives the tokens of the plain model; caches equal no cache at every step."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer
from transformers.cache_utils import DynamicSlidingWindowLayer

from swat_lm.model.cache import SlotCache

from .models import VOCABULARY, close, tiny_model, tokens

CACHES = {
    "stock": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=400),
    "slots": SlotCache,
}
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def decided(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Where the two best logits differ by more than 1e-3, so that rounding cannot change the token."""
    with torch.no_grad():
        best = model(ids, attention_mask=mask).logits.topk(2).values
    return (best[..., 0] - best[..., 1]) > 1e-3


def same_tokens(model, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    sure = decided(model, expected)
    assert sure.float().mean() >= 0.95
    assert torch.equal(actual[:, 1:][sure[:, :-1]], expected[:, 1:][sure[:, :-1]])


@pytest.mark.parametrize("cache", ["stock", "static", "slots"])
@pytest.mark.parametrize(("window", "length"), [(1, 14), (2, 19), (7, 44), (64, 329), ([3, None], 24)])
def test_cached_is_uncached_at_every_step(cache, window, length):
    for chunk in (1, 5) if length < 100 else (1,):
        check_steps(CACHES[cache], window, length, chunk)


def check_steps(make_cache, window, length: int, chunk: int) -> None:
    model = tiny_model(sliding_window=window, hidden_size=16, intermediate_size=16)
    ids = tokens(2, length)
    with torch.no_grad():
        whole = model(ids).logits
        past = make_cache(model.config)
        # a prompt of another size than the chunks, then chunks or single tokens to the end
        parts = [ids[:, :3], *ids[:, 3:].split(chunk, dim=1)]
        cached = [model(part, past_key_values=past, use_cache=True).logits for part in parts]
    close(torch.cat(cached, dim=1), whole)


@pytest.mark.parametrize("kind", [7, [3, None], None])
def test_ways_to_generate(kind):
    model, ids = tiny_model(sliding_window=kind), tokens(2, 20)
    plain = model.generate(ids, use_cache=False, **GREEDY)
    same_tokens(model, model.generate(ids, **GREEDY), plain)
    for extra in (
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 16},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ):
        rows = ids[:1] if "prompt_lookup_num_tokens" in extra else ids
        same_tokens(model, model.generate(rows, **GREEDY, **extra), plain[: len(rows)])


def test_beams_and_samples_do_not_depend_on_the_cache():
    model, ids = tiny_model(), tokens(2, 12)
    beams = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    expected = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), expected)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **beams), expected)
    samples = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 16}
    torch.manual_seed(3)
    expected = model.generate(ids, use_cache=False, **samples)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **samples), expected)


@pytest.mark.parametrize(
    "extra", [{}, {"cache_implementation": "dynamic"}, {"prefill_chunk_size": 4}, {"num_beams": 2}]
)
@pytest.mark.parametrize("kind", [7, [3, None]])
def test_left_padded_batch_is_each_alone(kind, extra):
    model = tiny_model(sliding_window=kind)
    rows = [tokens(1, length, seed=length) for length in (3, 14, 9)]
    ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 14 - row.shape[1] :], mask[index, 14 - row.shape[1] :] = row[0], 1
    batch = model.generate(ids, attention_mask=mask, **GREEDY, **extra)
    for index, row in enumerate(rows):
        alone = model.generate(row, **GREEDY, **extra)
        same_tokens(model, batch[index : index + 1, 14 - row.shape[1] :], alone)


def test_assisted_generation():
    model, assistant, ids = tiny_model(), tiny_model(seed=1), tokens(1, 12)
    expected = model.generate(ids, **GREEDY)
    same_tokens(model, model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    # an assistant that is always right is past its window again and again
    same_tokens(model, model.generate(ids, assistant_model=model, **GREEDY), expected)


def test_streamer_gets_every_token():
    class Letters:
        def decode(self, ids, **kwargs):
            return " ".join(str(int(token)) for token in ids)

    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    pieces: list[str] = []
    model, ids = tiny_model(), tokens(1, 5)
    out = model.generate(ids, streamer=Collect(Letters(), skip_prompt=True), **GREEDY)
    assert "".join(pieces).split() == [str(int(token)) for token in out[0, 5:]]


def test_generate_keeps_a_cache_of_constant_size():
    model, ids = tiny_model(), tokens(2, 30)
    cache = model.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values
    assert isinstance(cache, SlotCache)
    # in transformers' layout: [B, K, T, D]
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 2, 7, 8)] * 2
    assert cache.max_cache_len == 7
    assert cache.get_seq_length() == 30 + 24 - 1
    mixed = tiny_model(sliding_window=[3, None])
    cache = mixed.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 53]


def test_rings_are_no_longer_than_the_generation():
    model = tiny_model(sliding_window=64)
    cache = model.generate(tokens(1, 5), return_dict_in_generate=True, **GREEDY).past_key_values
    # the last token is never fed
    assert cache.layers[0].keys.shape[2] == 5 + 24 - 1
    assert cache.slots.num_bytes == 2 * 2 * 28 * 2 * 8 * 4 + 8


def test_conversation_goes_on_beyond_the_length_a_cache_was_made_for():
    model, ids = tiny_model(sliding_window=64), tokens(1, 80)
    first = model.generate(ids[:, :5], return_dict_in_generate=True, **GREEDY)
    cache, told = first.past_key_values, first.sequences
    for turn in (slice(5, 12), slice(12, 80)):
        told = torch.cat((told, ids[:, turn]), dim=1)
        continued = model.generate(told, past_key_values=cache, **GREEDY)
        same_tokens(model, continued, model.generate(told, use_cache=False, **GREEDY))
        told = continued
    assert cache.layers[0].keys.shape[2] == 64


def test_conversation_goes_on_from_a_cache():
    model, ids = tiny_model(), tokens(1, 40)
    cache = SlotCache(model.config)
    first = model.generate(ids[:, :12], past_key_values=cache, **GREEDY)
    more = torch.cat((first, ids[:, 12:20]), dim=1)
    continued = model.generate(more, past_key_values=cache, **GREEDY)
    same_tokens(model, continued, model.generate(more, use_cache=False, **GREEDY))


def test_ring_layer_serves_hugging_faces_interface():
    model = tiny_model(sliding_window=5)
    ours, stock = SlotCache(model.config).layers[0], DynamicSlidingWindowLayer(5)
    generator = torch.Generator().manual_seed(0)
    for length in (3, 1, 1, 8, 1, 2):
        states = [torch.randn(2, 2, length, 8, generator=generator) for _ in range(2)]
        assert ours.get_mask_sizes(length) == stock.get_mask_sizes(length)
        for mine, theirs in zip(ours.update(*states), stock.update(*states), strict=True):
            assert torch.equal(mine, theirs)
        assert ours.get_seq_length() == stock.get_seq_length()


def test_ring_cache_follows_rows():
    model, ids = tiny_model(), tokens(3, 12)
    with torch.no_grad():
        cache = SlotCache(model.config)
        model(ids, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        rows = ids[[0, 2, 2, 0]]
        new = tokens(4, 1)
        stepped = model(new, past_key_values=cache, use_cache=True).logits[:, -1]
        close(stepped, model(torch.cat((rows, new), dim=1)).logits[:, -1])
        cache.reset()
        assert cache.get_seq_length() == 0
        close(model(rows, past_key_values=cache, use_cache=True).logits, model(rows).logits)


def test_tokens_are_taken_back():
    """As often as asked, over chunks longer than the window, and where nothing was recorded it is said."""
    for kind in (5, [3, None]):
        model, ids = tiny_model(sliding_window=kind), tokens(2, 40)
        with torch.no_grad():
            whole = model(ids).logits
            cache = SlotCache(model.config)
            model(ids[:, :11], past_key_values=cache, use_cache=True)
            cache.activate_past_recording()
            seen = 11
            for read, back in ((9, 6), (1, 0), (1, 1), (13, 2), (2, 2)):
                model(ids[:, seen : seen + read], past_key_values=cache, use_cache=True)
                cache.crop(-back)
                seen += read - back
                assert cache.get_seq_length() == seen
            for part in (ids[:, seen : seen + 1], ids[:, seen + 1 : seen + 3]):
                close(model(part, past_key_values=cache, use_cache=True).logits, whole[:, seen : seen + part.shape[1]])
                seen += part.shape[1]
            with pytest.raises(ValueError, match="only the last 3 tokens can be taken back, got 30"):
                cache.crop(-30)


def test_logits_to_keep():
    model, ids = tiny_model(), tokens(2, 9)
    whole = model(ids).logits
    assert whole.shape == (2, 9, VOCABULARY)
    close(model(ids, logits_to_keep=2).logits, whole[:, -2:])

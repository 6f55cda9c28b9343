"""The chunked loss against `F.cross_entropy` on whole logits, in value and gradients, and its memory."""

import pytest
import torch
import torch.nn.functional as F

from swat_lm.model.loss import chunked_cross_entropy, chunked_cross_entropy_through, token_losses
from swat_lm.model.targets import next_tokens

from .models import VOCABULARY, close, tiny_model, tokens


def inputs(num_tokens: int = 37, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 53, (num_tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 7, 37, 100, None])
@pytest.mark.parametrize(("num_items", "softcap"), [(None, None), (11, None), (torch.tensor(11), None), (None, 3.0)])
def test_value_and_gradients(chunk, num_items, softcap):
    hidden, weight, labels = inputs()
    logits = lambda h: h @ weight.T if softcap is None else softcap * (h @ weight.T / softcap).tanh()  # noqa: E731
    losses = F.cross_entropy(logits(hidden), labels, reduction="sum")
    expected = losses / ((labels != -100).sum() if num_items is None else num_items)
    gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, labels, num_items, chunk, softcap)
    close(loss, expected, 1e-12)
    for actual, wanted in zip(torch.autograd.grad(3 * loss, (hidden, weight)), gradients, strict=True):
        close(actual, wanted, 1e-12)
    through = chunked_cross_entropy_through(logits, hidden, labels, 53, num_items, chunk)
    close(through.double(), expected, 1e-6)
    for actual, wanted in zip(torch.autograd.grad(3 * through, (hidden, weight)), gradients, strict=True):
        close(actual, wanted, 1e-6)


def test_gradcheck():
    hidden, weight, labels = inputs(9)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, chunk=4), (hidden, weight))


def test_backward_twice_gives_the_same():
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for one, two in zip(first, second, strict=True):
        close(two, 2 * one, 1e-12)


def test_nothing_to_learn_gives_zero_gradients():
    hidden, weight, _ = inputs(5)
    labels = torch.full((5,), -100)
    loss = chunked_cross_entropy(hidden, weight, labels, num_items=3)
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_bfloat16_and_autocast_stay_near_float32():
    hidden, weight, labels = inputs(64, torch.float32)
    expected = chunked_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    close(loss, expected, 1e-2)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    for actual, wanted in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert (actual - wanted).norm() < 0.02 * wanted.norm()
    low = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    close(low, expected, 1e-2)


def test_whole_logits_never_exist():
    hidden, weight = torch.randn(512, 8).requires_grad_(), torch.randn(4096, 8).requires_grad_()
    labels = torch.randint(0, 4096, (512,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        chunked_cross_entropy(hidden, weight, labels, chunk=32).backward()
    assert largest == max(32 * 4096, weight.numel())


def test_token_losses():
    hidden, weight, labels = inputs()
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    close(token_losses(hidden, weight, labels, chunk=5), expected, 1e-12)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(4).long(), "hidden: expected"),
        (torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(3).long(), "labels: expected one per token"),
    ],
)
def test_shapes_are_checked(hidden, weight, labels, message):
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(hidden, weight, labels)


def test_model_loss_is_hugging_faces():
    model, ids = tiny_model(), tokens(2, 20)
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model(ids).logits
    expected = model.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
    outputs = model(ids, labels=labels)
    # whoever evaluates looks at them; training needs none
    close(outputs.logits, logits)
    assert outputs.past_key_values is None
    assert model(ids, labels=labels, return_logits=False).logits is None
    assert model.train()(ids, labels=labels).logits is None
    model.eval()
    close(outputs.loss, expected)
    items = model.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, num_items_in_batch=100)
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss, items)
    close(model(ids, labels=labels, return_logits=True).logits, logits)
    close(model(ids, shift_labels=next_tokens(labels)).loss, expected)


def test_tied_embeddings_get_both_gradients():
    model, ids = tiny_model(tie_word_embeddings=True), tokens(2, 20)
    expected = torch.autograd.grad(
        model.loss_function(logits=model(ids).logits, labels=ids, vocab_size=VOCABULARY), model.lm_head.weight
    )[0]
    close(torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0], expected)


def test_targets_stop_at_documents():
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert next_tokens(labels).tolist() == [[2, 3, 4, 5, -100]]
    assert next_tokens(labels, torch.tensor([[0, 0, 1, 1, 1]])).tolist() == [[2, -100, 4, 5, -100]]


@pytest.mark.parametrize("wrong", [-1, 53])
def test_labels_that_are_no_tokens_are_refused(wrong):
    hidden, weight, labels = inputs()
    labels[3] = wrong
    with pytest.raises(ValueError, match=f"labels: expected 0 to 52, or -100 .*; got {wrong}"):
        chunked_cross_entropy(hidden, weight, labels)


class Halved(torch.Tensor):
    """A weight as libraries of quantisation keep it: it knows one way of being multiplied with, its module's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            hidden, weight, *bias = args
            return F.linear(hidden, weight.as_subclass(torch.Tensor) * 2, *bias)
        if function in (torch.mm, torch.addmm, torch.Tensor.t, torch.Tensor.__matmul__):
            raise NotImplementedError(f"{function} of a quantised weight")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("learning", [False, True])
def test_through_a_quantised_head(learning):
    model, ids = tiny_model(), tokens(2, 20)
    plain = model(ids).logits
    half = (model.lm_head.weight.detach() / 2).as_subclass(Halved)
    model.lm_head.weight = torch.nn.Parameter(half, requires_grad=False)
    assert type(model.lm_head.weight) is Halved
    close(model(ids).logits, plain)
    loss = model.train(learning)(ids, labels=ids).loss
    close(loss, F.cross_entropy(plain[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    loss.backward()
    assert model.model.norm.weight.grad is not None
    # and it streams
    close(model.eval().prefill(ids, model.init_state(2))[0], plain[:, -1])

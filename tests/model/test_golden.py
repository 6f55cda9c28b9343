"""What checkpoints and stream states of before compute, they compute now: files written by commit 5b2a3aa."""

import pytest
import torch
from safetensors.torch import load_file

from swat_lm import SwatForCausalLM
from swat_lm.model.state import load_state

from .golden.make import DECODED, FOLDER, PLANS, PROMPT, expected, tokens
from .models import close


@pytest.fixture(params=PLANS)
def plan(request):
    model = SwatForCausalLM.from_pretrained(FOLDER / request.param).eval()
    return model, load_file(FOLDER / request.param / "expected.safetensors"), FOLDER / request.param


def test_checkpoints_compute_what_they_did(plan):
    model, golden, _ = plan
    numbers = expected(model)
    assert numbers.keys() == golden.keys()
    for name, value in golden.items():
        close(numbers[name], value, 1e-5)


def test_states_of_the_first_format_go_on_where_they_were(plan):
    model, golden, folder = plan
    state = load_state(folder / "state.safetensors")
    assert state.position.tolist() == [PROMPT, PROMPT]
    ids = tokens(2, PROMPT + DECODED)
    logits = [model.decode_step(one, state) for one in ids[:, PROMPT:].split(1, dim=1)]
    close(torch.stack(logits, dim=1), golden["logits"][:, PROMPT:])

"""What each of both processes of `test_tensor_parallel.py` does."""

import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed import barrier, destroy_process_group, get_rank, init_process_group
from transformers.distributed.configuration_utils import DistributedConfig

from swat_lm import SwatForCausalLM

from .models import close, tiny_model, tokens

PLANS = {
    "sigmoid": {"slopes": "3:1"},
    "softmax": {"score_function": "softmax", "learned_sink": True, "qk_norm": True, "output_norm": True},
    "learned": {"learned_slopes": True, "learned_score_bias": True, "slope_schedule": "window", "output_gate": True,
                "layer_scale": 0.3},
    "scaled": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_bias": True,
               "output_bias": False},
    "norms behind": {"norm_placement": "both", "qk_norm_over": "layer", "norm": "layer", "feed_forward": "plain",
                     "mlp_bias": True, "attention_bias": True, "attn_logit_softcapping": 0.5,
                     "final_logit_softcapping": 1.5},
    "mixed": {"layers": ["mamba2", "attention"]},
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip


def try_one(folder: Path, changes: dict) -> None:
    """The whole model's logits, tokens, loss and gradients from two processes that share its heads."""
    if get_rank() == 0:
        tiny_model(**changes).save_pretrained(folder)
    barrier()
    whole = SwatForCausalLM.from_pretrained(folder).eval()
    shared = SwatForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    attention = shared.model.stack[-1].self_attn
    assert attention.q_proj.weight.to_local().shape == (16, 32)
    assert attention.state_spec()[0].shape == (1, 8)
    ids = tokens(2, 20)
    with torch.no_grad():
        close(shared(ids).logits, whole(ids).logits)
        close(shared.prefill(ids, shared.init_state(2))[0], whole(ids).logits[:, -1])
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(shared.generate(ids, **greedy), whole.generate(ids, **greedy))
    losses = [model.train()(ids, labels=ids).loss for model in (shared, whole)]
    close(*losses)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
        gradient = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        assert torch.allclose(gradient, theirs.grad, atol=1e-4), name
    shared.save_pretrained(folder / "again")
    barrier()
    again = SwatForCausalLM.from_pretrained(folder / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.state_dict().items())


def refuse(folder: Path) -> None:
    """One head of keys for two processes."""
    if get_rank() == 0:
        tiny_model(num_key_value_heads=1).save_pretrained(folder)
    barrier()
    with pytest.raises(ValueError, match="num_key_value_heads: 1 heads cannot be shared by 2 processes"):
        SwatForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    together = folder / "together"
    if get_rank() == 0:
        tiny_model(qk_norm=True, qk_norm_over="layer").save_pretrained(together)
    barrier()
    with pytest.raises(ValueError, match="qk_norm_over: 'layer' norms all heads together"):
        SwatForCausalLM.from_pretrained(together, distributed_config=DistributedConfig(tp_size=2))


def main() -> None:
    """All of it in the folder that is the only argument; what failed is written down."""
    folder = Path(sys.argv[1])
    init_process_group("gloo")
    said = {}
    for name, changes in PLANS.items():
        try:
            try_one(folder / name, changes)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    try:
        refuse(folder / "refused")
        said["refused"] = ""
    except Exception:
        said["refused"] = traceback.format_exc()
    (folder / f"rank{get_rank()}.json").write_text(json.dumps(said))
    destroy_process_group()

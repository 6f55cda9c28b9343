"""Mamba-2's mixer beside those of the hybrids of transformers that have it: the same function of the same weights."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import BambaConfig, Zamba2Config
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from swat_lm.layers.chunk import Chunk
from swat_lm.layers.mamba2 import Mamba2Mixer, Mamba2Settings

WIDTH, HEADS, HEAD_DIM, STATE, GROUPS = 32, 8, 8, 12, 2


def bamba() -> nn.Module:
    config = BambaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=HEADS,
        mamba_d_head=HEAD_DIM, mamba_d_state=STATE, mamba_n_groups=GROUPS, mamba_expand=2, mamba_chunk_size=16,
        attn_layer_indices=[], rms_norm_eps=1e-5,
    )  # fmt: skip
    return BambaMixer(config, 0)


def zamba2() -> nn.Module:
    config = Zamba2Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, n_mamba_heads=HEADS,
        mamba_d_state=STATE, mamba_ngroups=GROUPS, mamba_expand=2, chunk_size=16, layers_block_type=["mamba"],
    )  # fmt: skip
    return Zamba2MambaMixer(config, 0)


@pytest.mark.parametrize(("peer", "limit"), [(bamba, None), (zamba2, (0.001, math.inf))], ids=["bamba", "zamba2"])
def test_a_mixer_of_the_same_weights_is_the_same_function(peer, limit):
    """Outputs and every gradient, by the parameters' own names; left padding too. Jamba's mixer is Mamba-1's."""
    torch.manual_seed(0)
    theirs = peer()
    for parameter in theirs.parameters():
        # what starts at zero or one would prove nothing
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.3)
    settings = Mamba2Settings(
        state_size=STATE, ssm_head_dim=HEAD_DIM, num_groups=GROUPS, time_step_limit=limit, chunk_size=8
    )
    ours = Mamba2Mixer(settings, WIDTH, 1e-5)
    ours.load_state_dict(theirs.state_dict())
    hidden, mask = torch.randn(2, 37, WIDTH), torch.ones(2, 37, dtype=torch.int64)
    mask[1, :6] = 0
    first = torch.tensor([[0], [6]], dtype=torch.int32).expand(2, 37).contiguous()
    padded = Chunk((mask.cumsum(1) - 1).clamp(min=0), first)
    for given, chunk, real in (
        ({}, Chunk(torch.arange(37)[None]), mask >= 0),
        ({"attention_mask": mask}, padded, mask == 1),
    ):
        found: list[list[Tensor]] = []
        for mixer, output in ((theirs, theirs(hidden, **given)), (ours, ours(hidden, chunk, None))):
            names, leaves = zip(*mixer.named_parameters(), strict=True)
            gradients = torch.autograd.grad(output[real].sin().sum(), leaves)
            found.append([output[real], *(gradient for _, gradient in sorted(zip(names, gradients, strict=True)))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, atol=2e-4, rtol=2e-4)

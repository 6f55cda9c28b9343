"""Mamba-2's mixer beside those of transformers' hybrids, for what they share: for `benchmarks/hybrids_cpu.py`.

Bamba's and Zamba2's mixers are Mamba-2's, so ours takes their weights over and both learn the same. Jamba's is that of
Mamba-1: with it only the width, the convolution and the task are shared. The losses are those of two mixers, each
behind a norm and added to the stream, on rows that repeat themselves every four tokens, which their convolutions reach.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BambaConfig, JambaConfig, Zamba2Config
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from benchmarks import measure
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.mamba2 import Mamba2Mixer, Mamba2Settings
from swat_lm.layers.norm import RMSNorm

HEAD, STATE, CHUNK, EPSILON = 64, 128, 64, 1e-5
VOCABULARY, ROWS, ROW, PERIOD, LEARNING_RATE = 16, 4, 64, 4, 1e-3
# of Jamba's mixer, whose path by tokens takes a time that goes as the square of the row
SHORT = 256


def bamba(width: int) -> nn.Module:
    """Its mixer."""
    config = BambaConfig(
        hidden_size=width, num_hidden_layers=1, mamba_n_heads=2 * width // HEAD, mamba_d_head=HEAD,
        mamba_d_state=STATE, mamba_n_groups=1, mamba_chunk_size=CHUNK, attn_layer_indices=[], rms_norm_eps=EPSILON,
    )  # fmt: skip
    return BambaMixer(config, 0)


def zamba2(width: int) -> nn.Module:
    """Its mixer."""
    config = Zamba2Config(
        hidden_size=width, num_hidden_layers=1, n_mamba_heads=2 * width // HEAD,
        mamba_d_state=STATE, mamba_ngroups=1, chunk_size=CHUNK, layers_block_type=["mamba"],
    )  # fmt: skip
    return Zamba2MambaMixer(config, 0)


def jamba(width: int) -> nn.Module:
    """Its mixer, of Mamba-1, with its own 16 numbers per channel."""
    return JambaMambaMixer(JambaConfig(hidden_size=width, num_hidden_layers=1), 0)


PEERS: dict[str, Callable[[int], nn.Module]] = {"bamba": bamba, "zamba2": zamba2, "jamba": jamba}


def like(peer: nn.Module, width: int) -> Mamba2Mixer:
    """Ours; with the peer's weights where it is Mamba-2's."""
    limit = getattr(peer, "time_step_limit", None)
    ours = Mamba2Mixer(Mamba2Settings(state_size=STATE, ssm_head_dim=HEAD, time_step_limit=limit), width, EPSILON)
    if hasattr(peer, "dt_bias"):
        ours.load_state_dict(peer.state_dict())
    return ours


def mixed(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """What a mixer makes of whole rows."""
    if isinstance(mixer, Mamba2Mixer):
        return mixer(hidden, Chunk(torch.arange(hidden.shape[1])[None]), None)
    return mixer(hidden)


class Stack(nn.Module):
    """Two mixers as a language model; equal seeds give equal embeddings."""

    def __init__(self, mixers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(RMSNorm(width, EPSILON) for _ in range(len(mixers) + 1))

    def loss(self, ids: Tensor) -> Tensor:
        """In nats, of the tokens after the first period."""
        hidden = self.embedding(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            hidden = hidden + mixed(mixer, norm(hidden))
        logits = self.head(self.norms[-1](hidden[:, PERIOD - 1 : -1]))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, PERIOD:].flatten())


def trained(stack: Stack, steps: int) -> float:
    """The mean loss of the last quarter of the steps, each on new rows."""
    optimizer, generator = torch.optim.AdamW(stack.parameters(), lr=LEARNING_RATE), torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        period = torch.randint(VOCABULARY, (ROWS, PERIOD), generator=generator)
        loss = stack.loss(period.repeat(1, ROW // PERIOD))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 4) :]
    return sum(last) / len(last)


def compare_peer(name: str, width: int, length: int, rounds: int, steps: int) -> dict[str, Any]:
    """A row: forward and backward of one mixer, and losses of two, ours and the peer's."""
    torch.manual_seed(0)
    pairs = [(peer, like(peer, width)) for peer in (PEERS[name](width) for _ in range(2))]
    peer, ours = pairs[0]
    is_mamba2 = hasattr(peer, "dt_bias")
    length = length if is_mamba2 else min(length, SHORT)
    hidden = torch.randn(1, length, width)

    def step(mixer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            mixed(mixer, hidden).sum().backward()
            mixer.zero_grad(set_to_none=True)

        return run

    timings = measure.take_turns({"ours": step(ours), "theirs": step(peer)}, rounds, clock=measure.processor_clock)
    row: dict[str, Any] = {
        "peer": name, "length": length, "ours s": timings["ours"].median, "theirs s": timings["theirs"].median,
        "times theirs": timings["ours"].times_faster_than(timings["theirs"]),
    }  # fmt: skip
    with torch.no_grad():
        apart = (mixed(ours, hidden) - mixed(peer, hidden)).abs().max().item() if is_mamba2 else "another mixer"
        row["largest difference"] = apart
    for whose, mixers in (("ours", [own for _, own in pairs]), ("theirs", [one for one, _ in pairs])):
        row[f"loss, {whose}"] = trained(Stack(mixers, width), steps)
    return row
